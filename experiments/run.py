"""One training run, fully resolved: what `train` is given, what `run.json` holds, what the command line sets."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import tyro

from experiments import recipes

CHOICES = {
    "schedule": ("cosine", "cosine-step", "constant", "poly", "step30", "halve", "decay"),
    "mixed_precision": ("no", "bf16", "fp16"),
    "scaling": ("unit", "standard"),
    "augment": ("none", "crop", "crop-flip", "scale-crop-flip"),
    "activation": ("relu", "mish", None),
    "dropout_form": ("moments", "shared", "unit", None),
    "accountant": ("rdp", "prv", "gdp"),
    "dp_mode": ("hooks", "ghost", "functorch"),
}
# Fields that say where, how often and on what to work, not what to compute: a folder may be resumed with others.
INCIDENTAL = frozenset({"data_dir", "run_dir", "processes", "track", "checkpoint_every"})


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. Defaults shown are the recipe's; any flag overrides them.

    The same command resumes a run that was killed, and returns at once if it has finished.
    """

    recipe: tyro.conf.Positional[str] = "digits"
    """Data set and published settings: digits, cifar10, cifar100, camvid, cityscapes, ... (see list)."""
    model: str = "cifar_resnet8"
    """A name of `architectures`, timm/NAME or torchvision/NAME."""
    norm: str = "original"
    """original (the model as it is), kernel (= knport.convert), or a competitor: group, layer, instance, batch, ..."""
    batch_size: int = 32
    """Images per optimizer step, over all processes and micro-batches."""
    epochs: int = 15
    """Passes over the training images; the last incomplete batch of each is dropped."""
    steps: int | None = None
    """Optimizer steps, in place of epochs; the schedule is scaled to them."""
    seed: int = 0
    """Decides initialization, order, augmentation and dropout; never the choice of images."""
    data_dir: str = "data"
    """Folder of the data set, or its parent. digits needs none."""
    run_dir: str = ""
    """Folder of this run [runs/RECIPE/MODEL-NORM-bBATCH-sSEED, of a private run with -eEPSILON]."""
    lr: float = 0.05
    """Peak learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay of SGD, on all parameters as published."""
    schedule: Literal["cosine", "cosine-step", "constant", "poly", "step30", "halve", "decay"] = "cosine"
    """cosine to 1 %, constant within an epoch (published); cosine-step follows it step by step; poly is (1 - step /
    total)^0.9, of segmentation; step30 is x 0.1 every 30 epochs, of ImageNet; of private training:
    halve is x 0.5 at 70 and 90 % of the run (TMLR), decay is x 0.99 each epoch (v1)."""
    warmup: int = 0
    """Steps of linear warm-up."""
    label_smoothing: float = 0.0
    """Probability mass spread over all classes."""
    ema: float = 0.0
    """Decay per step of the weight average that is evaluated; 0: none."""
    dropout: float | None = None
    """Dropout of every kernel normalization layer (the final KernelNorm: min(5p, 0.25)). None: the model's own."""
    dropout_form: Literal["moments", "shared", "unit"] | None = None
    """Form of that dropout (see knport.KNConv2d). None: the model's own."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision."""
    scaling: Literal["unit", "standard"] = "standard"
    """Inputs as pixel / 255, or with mean and SD removed."""
    augment: Literal["none", "crop", "crop-flip", "scale-crop-flip"] = "crop-flip"
    """Random crop after zero padding by an eighth of the image (4 pixels of 32), and horizontal flip; of segmentation,
    a crop of crop_height x crop_width, and scale by 0.5 to 2.1 before it."""
    crop_height: int | None = None
    """Pixels of the images that a segmentation network is trained on. None: as high as the first image."""
    crop_width: int | None = None
    """Likewise."""
    class_weights: bool = False
    """Weigh the classes in the loss of segmentation as published for the data set."""
    sync_batchnorm: bool = False
    """On several GPUs, BatchNorm normalizes over the images of all."""
    activation: Literal["relu", "mish"] | None = None
    """Replace the model's ReLUs by this; None: the model's own."""
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
    classes: int | None = None
    """Use only the first so many classes."""
    train_images: int | None = None
    """Use only so many training images: the first of each class, class-balanced, the same for every seed."""
    test_images: int | None = None
    """Use only so many test images, chosen likewise."""
    eval_every: float = 1.0
    """Epochs between evaluations; the last step is always evaluated."""
    checkpoint_every: int | None = None
    """Steps between checkpoints. None: half an epoch, but not within 5 seconds of the last."""
    processes: int | None = None
    """Fail unless exactly so many processes were started."""
    track: Literal["tensorboard", "wandb", "trackio", "mlflow"] | None = None
    """Also log to this tracker, in RUN_DIR/track."""
    compile: bool = False
    """Use torch.compile."""
    channels_last: bool = True
    """Use the channels-last memory format."""

    def __post_init__(self):
        if not self.run_dir:
            spent = "" if self.epsilon is None else f"-e{self.epsilon:g}"
            spent += "" if self.noise_multiplier is None else f"-n{self.noise_multiplier:g}"
            name = f"{self.model.replace('/', '-')}-{self.norm}-b{self.batch_size}{spent}-s{self.seed}"
            object.__setattr__(self, "run_dir", f"runs/{self.recipe}/{name}")

    @property
    def private(self) -> bool:
        """Whether gradients are clipped, noised and accounted for."""
        return self.epsilon is not None or self.noise_multiplier is not None

    def validate(self) -> None:
        """Raise `KNPortError` for the first field whose value cannot be trained with."""
        recipes.get(self.recipe)
        for name, low in (("batch_size", 1), ("epochs", 1), ("accumulate", 1), ("warmup", 0), ("seed", 0)):
            _require(getattr(self, name) >= low, name, getattr(self, name), f"at least {low}")
        for name in (
            "steps",
            "classes",
            "train_images",
            "test_images",
            "checkpoint_every",
            "processes",
            "physical_batch_size",
            "crop_height",
            "crop_width",
        ):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or None")
        for name in ("ema", "label_smoothing", "momentum"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.dropout is None or 0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1), or None")
        _require(self.lr > 0, "lr", self.lr, "above 0")
        _require(self.eval_every > 0, "eval_every", self.eval_every, "above 0 epochs")
        for name, known in CHOICES.items():
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {', '.join(map(str, known))}")
        self._validate_privacy()

    def _validate_privacy(self) -> None:
        finite = float("inf")
        for name in ("epsilon", "delta", "noise_multiplier"):
            value = getattr(self, name)
            low, high = (0, 1 if name == "delta" else finite)
            fits = value is None or low < value < high or (name == "noise_multiplier" and value == 0)
            _require(fits, name, value, "in (0, 1), or None" if name == "delta" else "a finite number above 0, or None")
        _require(0 < self.clip < finite, "clip", self.clip, "a finite number above 0")
        if not self.private:
            for name in ("physical_batch_size", "privacy_seed"):
                _require(getattr(self, name) is None, name, getattr(self, name), "None without --epsilon")
            _require(not self.secure_noise, "secure_noise", True, "False without --epsilon")
            return
        _require(self.accumulate == 1, "accumulate", self.accumulate, "1 with --epsilon (see --physical-batch-size)")
        _require(
            self.mixed_precision != "fp16",
            "mixed_precision",
            "fp16",
            "no or bf16 with --epsilon: scaled gradients cannot be clipped",
        )
        _require(not self.compile, "compile", True, "False with --epsilon: Opacus' hooks cannot be compiled")


def _require(condition: bool, name: str, value: Any, expected: str) -> None:
    if not condition:
        from knport.errors import KNPortError  # importing knport imports torch: not paid by --help

        raise KNPortError(f"{name} is {value!r}; expected {expected}: set --{name.replace('_', '-')}")


def resolve(
    recipe: str,
    *,
    model: str = Run.model,
    norm: str = Run.norm,
    batch_size: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Run:
    """The recipe's settings for this model, norm and batch size as a `Run`; `overrides` are fields of `Run`.

    Raises: `UnknownName` for an unknown recipe or field, `KNPortError` for a value out of range.
    """
    known = {field.name for field in fields(Run)}
    for name in overrides:
        if name not in known:
            from knport.errors import UnknownName

            raise UnknownName("field of Run", name, known)
    defaults = asdict(recipes.get(recipe)(model, norm, batch_size))
    run = Run(**{"recipe": recipe, "model": model, "norm": norm, "seed": seed, **defaults, **overrides})
    run.validate()
    return run


def differences(stored: dict[str, Any], run: Run) -> dict[str, tuple[Any, Any]]:
    """Fields that change what is computed and differ: name -> (stored value, value of `run`)."""
    now, defaults = asdict(run), {field.name: field.default for field in fields(Run)}
    names = [name for name in now if name not in INCIDENTAL]
    then = {name: stored.get(name, defaults[name]) for name in names}  # a field may be newer than the folder
    return {name: (then[name], now[name]) for name in names if then[name] != now[name]}
