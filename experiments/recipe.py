"""What a recipe decides, and which of the papers' columns a run belongs to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe decides; each field is the field of `Run` with the same name."""

    batch_size: int
    """Images per optimizer step."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD."""
    schedule: str = "cosine"
    """Shape of the learning rate."""
    scaling: str = "standard"
    """Inputs as pixel / 255 (unit) or with mean and SD removed (standard)."""
    augment: str = "crop-flip"
    """Augmentation of the training images."""
    crop_height: int | None = None
    """Pixels of the images that a segmentation network is trained on."""
    crop_width: int | None = None
    """Likewise."""
    class_weights: bool = False
    """Weigh the classes in the loss of segmentation as published."""
    sync_batchnorm: bool = False
    """On several GPUs, BatchNorm normalizes over the images of all."""
    activation: str | None = None
    """In the place of the model's ReLUs; None: the model's own."""
    epsilon: float | None = None
    """Target of private training; None: training is not private."""
    delta: float | None = None
    """Its delta; None: the largest power of ten below 1 / training images."""
    clip: float = 1.0
    """Norm that each image's gradient is clipped to."""
    physical_batch_size: int | None = None
    """Images at once in private training."""


def norm_kind(model: str, norm: str) -> str:
    """Which of the papers' columns a run belongs to: kernel, batch, group or layer.

    `original` is kernel for the hand-built kernel normalized networks (names in kn..., dp_kn... and fcn_kn...), else
    batch. Norms that the papers did not train (instance, none, ...) take the layer column, the most careful one.
    """
    name = model.rsplit("/", 1)[-1].lower()
    if norm == "kernel" or (norm == "original" and name.removeprefix("dp_").removeprefix("fcn_").startswith("kn")):
        return "kernel"
    return {"original": "batch", "batch": "batch", "group": "group"}.get(norm, "layer")
