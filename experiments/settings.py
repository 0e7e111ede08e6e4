"""The groups of settings that a `Run` holds, and what their values may be.

A field's plain name is unique over all groups: it is the flag (`--crop-height`), the key in `run.json` and the name of
an override. Groups only say what belongs together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Schedule = Literal["cosine", "cosine-step", "constant", "poly", "step30", "halve", "decay"]
Augment = Literal["none", "crop", "crop-flip", "resized-crop-flip", "scale-crop-flip"]


@dataclass(frozen=True, kw_only=True)
class SubsetSettings:
    """Which of the data set's images are used."""

    classes: int | None = None
    """Use only the first so many classes."""
    train_images: int | None = None
    """Use only so many training images: the first of each class, class-balanced, the same for every seed."""
    test_images: int | None = None
    """Use only so many test images, chosen likewise."""


@dataclass(frozen=True, kw_only=True)
class OptimizationSettings:
    """How the loss moves the weights."""

    optimizer: str = "sgd"
    """sgd, adamw, or another name of `timm.optim.list_optimizers()`."""
    momentum: float = 0.9
    """Momentum of SGD; other optimizers have their own defaults."""
    weight_decay: float = 5e-4
    """Weight decay, on all parameters as published."""
    norm_weight_decay: float | None = None
    """Weight decay of the gains and biases of norms, in its place. None: the same."""
    bias_weight_decay: float | None = None
    """Weight decay of all other biases, likewise."""
    schedule: Schedule = "cosine"
    """cosine to `floor`, constant within an epoch (published); cosine-step follows it step by step; poly is (1 - step /
    total)^0.9, of segmentation; step30 is x 0.1 every 30 epochs, of ImageNet; of private training:
    halve is x 0.5 at 70 and 90 % of the run (TMLR), decay is x 0.99 each epoch (v1)."""
    floor: float = 0.01
    """Share of lr that the cosine ends at."""
    warmup: int = 0
    """Steps of linear warm-up, during which the schedule runs on."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up from 1 % of lr, after which the schedule begins (ConvNeXt)."""
    label_smoothing: float = 0.0
    """Probability mass spread over all classes."""
    ema: float = 0.0
    """Decay per step of the weight average that is evaluated; 0: none."""


@dataclass(frozen=True, kw_only=True)
class AugmentationSettings:
    """What happens to an image before the network sees it."""

    augment: Augment = "crop-flip"
    """Random crop after zero padding by an eighth of the image (4 pixels of 32), and horizontal flip; of ImageNet, a
    crop of 8 to 100 % of the image, resized; of segmentation, a crop of crop_height x crop_width, and scale by 0.5 to
    2.1 before it."""
    image_size: int | None = None
    """Of ImageNet: pixels of the square images that are trained on. None: 224."""
    test_resize: int | None = None
    """Of ImageNet: pixels that the shorter side of a test image is resized to. None: 256."""
    test_size: int | None = None
    """Of ImageNet: pixels of the square in the middle that is tested. None: 224."""
    trivial_augment: bool = False
    """Of ImageNet: one random operation of random strength on each image (TrivialAugment, wide)."""
    erase: float = 0.0
    """Of ImageNet: probability that a random rectangle of an image is erased."""
    mixup: float = 0.0
    """Mix pairs of images and labels by a share from Beta(mixup, mixup); 0: not. With cutmix too, each step draws one
    of the two."""
    cutmix: float = 0.0
    """Paste a rectangle of one image of each pair into the other, of an area from Beta(cutmix, cutmix); 0: not."""
    repeats: int = 1
    """Copies of each image in its batch, augmented differently; an epoch sees as many images, fewer different ones."""

    @property
    def mixed(self) -> bool:
        """Whether images are mixed with others."""
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings:
    """What only networks for segmentation need."""

    crop_height: int | None = None
    """Pixels of the images that a segmentation network is trained on. None: as high as the first image."""
    crop_width: int | None = None
    """Likewise."""
    class_weights: bool = False
    """Weigh the classes in the loss of segmentation as published for the data set."""
    sync_batchnorm: bool = False
    """On several GPUs, BatchNorm normalizes over the images of all."""


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Training with differential privacy."""

    epsilon: float | None = None
    """Train with differential privacy, spending at most this much in all; the noise follows from it."""
    delta: float | None = None
    """Probability that epsilon does not hold. None: the largest power of ten below 1 / training images."""
    noise_multiplier: float | None = None
    """Noise of private training as a multiple of clip, in place of the one that meets epsilon. With epsilon the run
    stops where the next step would overrun it; without, it just says what it has spent."""
    clip: float = 1.0
    """Norm that each image's gradient is clipped to in private training."""
    accountant: Literal["rdp", "prv", "gdp"] = "rdp"
    """rdp (Renyi), prv (tighter, slower), or gdp (optimistic: not an upper bound; to reproduce older figures)."""
    physical_batch_size: int | None = None
    """Images at once, per process, in private training: bounds the memory of their gradients. None: 256."""
    dp_mode: Literal["hooks", "ghost", "functorch"] = "hooks"
    """hooks keeps every image's gradient; ghost its norm only and passes backward twice; functorch runs each layer
    again (dropout 0 only)."""
    secure_noise: bool = False
    """Sum four draws per noise value against attacks on floating-point numbers (Opacus' secure mode)."""
    privacy_seed: int | None = None
    """For tests: sampling and noise follow from this number, and whoever knows it can remove the noise. None: from a
    key that the operating system draws, kept in the run folder until the run has finished."""

    @property
    def private(self) -> bool:
        """Whether gradients are clipped, noised and accounted for."""
        return self.epsilon is not None or self.noise_multiplier is not None

    @property
    def label(self) -> str:
        """What a private run's folder is called by, e.g. ``-e8``; empty of other runs."""
        spent = "" if self.epsilon is None else f"-e{self.epsilon:g}"
        return spent + ("" if self.noise_multiplier is None else f"-n{self.noise_multiplier:g}")
