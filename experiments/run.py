"""One training run, fully resolved: what `train` is given, what `run.json` holds, what the command line sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal

import tyro

from experiments import recipes, settings
from experiments.limits import check

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
    """Peak learning rate."""
    dropout: float | None = None
    """Dropout of every kernel normalization layer (the final KernelNorm: min(5p, 0.25)). None: the model's own."""
    dropout_form: Literal["moments", "shared", "unit"] | None = None
    """Form of that dropout (see knport.KNConv2d). None: the model's own."""
    activation: Literal["relu", "mish"] | None = None
    """Replace the model's ReLUs by this; None: the model's own."""
    scaling: Literal["unit", "standard"] = "standard"
    """Inputs as pixel / 255, or with mean and SD removed."""
    accumulate: int = 1
    """Micro-batches per optimizer step."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Autocast precision."""
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
    optimization: settings.OptimizationSettings = field(default_factory=settings.OptimizationSettings)
    """How the loss moves the weights."""
    augmentation: settings.AugmentationSettings = field(default_factory=settings.AugmentationSettings)
    """What happens to an image before the network sees it."""
    subset: settings.SubsetSettings = field(default_factory=settings.SubsetSettings)
    """Which of the data set's images are used."""
    segmentation: settings.SegmentationSettings = field(default_factory=settings.SegmentationSettings)
    """What only networks for segmentation need."""
    privacy: settings.PrivacySettings = field(default_factory=settings.PrivacySettings)
    """Training with differential privacy."""

    def __post_init__(self):
        if not self.run_dir:
            name = f"{self.model.replace('/', '-')}-{self.norm}-b{self.batch_size}{self.privacy.label}-s{self.seed}"
            object.__setattr__(self, "run_dir", f"runs/{self.recipe}/{name}")

    @property
    def private(self) -> bool:
        """Whether gradients are clipped, noised and accounted for."""
        return self.privacy.private

    def flat(self) -> dict[str, Any]:
        """Every setting by its plain name, those of the groups too: what `run.json` holds."""
        return flat(self)

    def but(self, **changes: Any) -> Run:
        """This run with other values, by plain name. Raises `UnknownName` for what is no field."""
        return from_flat(self.flat() | changes)

    def validate(self) -> None:
        """Raise `KNPortError` for the first field whose value cannot be trained with."""
        recipes.get(self.recipe)
        check(self)


GROUPS = {f.name: f.default_factory for f in fields(Run) if is_dataclass(f.default_factory)}
GROUP_OF = {f.name: group for group, kind in GROUPS.items() for f in fields(kind)}
# Plain name of every setting -> its default.
DEFAULTS = {f.name: f.default for f in fields(Run) if f.name not in GROUPS} | {
    f.name: f.default for kind in GROUPS.values() for f in fields(kind)
}


def flat(record: Any) -> dict[str, Any]:
    """The fields of a dataclass by plain name, with those of the groups in it."""
    found = {}
    for name, value in asdict(record).items():
        found |= value if name in GROUPS else {name: value}
    return found


def from_flat(values: Mapping[str, Any]) -> Run:
    """The run with these settings, by plain name; the rest have their defaults. Raises `UnknownName` for others."""
    own: dict[str, Any] = {}
    grouped: dict[str, dict[str, Any]] = {name: {} for name in GROUPS}
    for name, value in values.items():
        if name not in DEFAULTS:
            from knport.errors import UnknownName  # importing knport imports torch: not paid by --help

            raise UnknownName("field of Run", name, DEFAULTS)
        (grouped[GROUP_OF[name]] if name in GROUP_OF else own)[name] = value
    return Run(**own, **{group: GROUPS[group](**chosen) for group, chosen in grouped.items()})


def resolve(
    recipe: str,
    *,
    model: str = Run.model,
    norm: str = Run.norm,
    batch_size: int | None = None,
    seed: int = 0,
    **overrides: Any,
) -> Run:
    """The recipe's settings for this model, norm and batch size as a `Run`; `overrides` are settings by plain name.

    Raises: `UnknownName` for an unknown recipe or field, `KNPortError` for a value out of range.
    """
    chosen = flat(recipes.get(recipe)(model, norm, batch_size))
    run = from_flat({"recipe": recipe, "model": model, "norm": norm, "seed": seed} | chosen | overrides)
    run.validate()
    return run


def differences(stored: Mapping[str, Any], run: Run) -> dict[str, tuple[Any, Any]]:
    """Settings that change what is computed and differ: plain name -> (stored value, value of `run`).

    Args:
        stored: as `Run.flat` gives them; a setting may be newer than the folder they are from.
        run: of now.
    """
    now = {name: value for name, value in run.flat().items() if name not in INCIDENTAL}
    then = {name: stored.get(name, DEFAULTS[name]) for name in now}
    return {name: (then[name], now[name]) for name in now if then[name] != now[name]}
