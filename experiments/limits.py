"""What the settings of a `Run` may be: the range of every number, the names of every choice, and what goes together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from experiments.run import Run

INFINITY = float("inf")
# Settings that are counts: the least allowed. A count that may be left out is a number or None.
LEAST = {
    **dict.fromkeys(("batch_size", "epochs", "accumulate", "steps", "classes", "train_images", "test_images"), 1),
    **dict.fromkeys(("checkpoint_every", "processes", "physical_batch_size", "crop_height", "crop_width"), 1),
    **dict.fromkeys(("image_size", "test_resize", "test_size", "repeats"), 1),
    **dict.fromkeys(("warmup", "warmup_epochs", "seed"), 0),
}
SHARES = ("ema", "label_smoothing", "momentum", "dropout", "floor", "erase")  # in [0, 1)
POSITIVE_OR_ZERO = ("mixup", "cutmix", "weight_decay", "norm_weight_decay", "bias_weight_decay")
POSITIVE = ("lr", "eval_every", "clip", "epsilon")  # finite and above 0


# Settings that only some tasks can do with -> which.
FOR_SEGMENTATION = dict.fromkeys(("crop_height", "crop_width", "class_weights"), "segmentation")
FOR_CLASSIFICATION = dict.fromkeys(("mixup", "cutmix", "repeats"), "classification")
PHOTOGRAPHS = "photographs read from files"
FOR_PICTURES = dict.fromkeys(("image_size", "test_resize", "test_size", "trivial_augment", "erase"), PHOTOGRAPHS)
AUGMENT_FOR = {
    "crop": "small images and segmentation",
    "crop-flip": "small images and segmentation",
    "resized-crop-flip": PHOTOGRAPHS,
    "scale-crop-flip": "segmentation",
}


def check(run: Run) -> None:
    """Raise `KNPortError` for the first setting of `run` that cannot be trained with."""
    values = run.flat()
    for name, least in LEAST.items():
        _require(_none(values, name) or values[name] >= least, name, values[name], f"at least {least}", values)
    for name in SHARES:
        _require(_none(values, name) or 0 <= values[name] < 1, name, values[name], "in [0, 1)", values)
    for name in POSITIVE:
        fits = _none(values, name) or 0 < values[name] < INFINITY
        _require(fits, name, values[name], "a finite number above 0", values)
    for name in POSITIVE_OR_ZERO:
        fits = _none(values, name) or 0 <= values[name] < INFINITY
        _require(fits, name, values[name], "a finite number of at least 0", values)
    for name, known in choices().items():
        _require(values[name] in known, name, values[name], f"one of {', '.join(map(str, known))}")
    _check_batch(run)
    _check_privacy(run)


@cache
def choices() -> dict[str, tuple[Any, ...]]:
    """Plain name -> allowed values, of every setting that is a choice of names."""
    from experiments.run import GROUPS, Run

    hints = {name: hint for kind in (Run, *GROUPS.values()) for name, hint in get_type_hints(kind).items()}
    return {name: named for name, hint in hints.items() if (named := _names(hint))}


def _names(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, and None where it may be left out; empty of other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint)
    if any(get_origin(part) is Literal for part in parts):
        return tuple(value for part in parts for value in (get_args(part) or (None,)))
    return ()


def check_foreign(run: Run, foreign: Mapping[str, str], augments: Sequence[str]) -> None:
    """Raise `KNPortError` if one of the settings `foreign` is not its default, or `augment` none of `augments`."""
    from experiments.run import DEFAULTS
    from knport.errors import KNPortError

    values = run.flat()
    for name, purpose in foreign.items():
        if values[name] != DEFAULTS[name]:
            flag = f"--{name.replace('_', '-')}"
            raise KNPortError(f"{name} is {values[name]!r}, which is for {purpose}: {run.recipe} has no use for {flag}")
    augment = run.augmentation.augment
    if augment not in augments:
        raise KNPortError(
            f"augment is {augment!r}, which is for {AUGMENT_FOR[augment]}: {run.recipe} has no use for it, set"
            f" --augment to one of {', '.join(augments)}"
        )


def _check_batch(run: Run) -> None:
    copies, size = run.augmentation.repeats, run.batch_size
    least = copies * (2 if run.augmentation.mixed else 1)
    _require(size % least == 0, "batch_size", size, f"a multiple of {least}: copies of an image, and pairs to mix")


def _check_privacy(run: Run) -> None:
    privacy = run.privacy
    delta, noise = privacy.delta, privacy.noise_multiplier
    _require(delta is None or 0 < delta < 1, "delta", delta, "in (0, 1), or None")
    _require(
        noise is None or 0 <= noise < INFINITY, "noise_multiplier", noise, "a finite number of at least 0, or None"
    )
    if not privacy.private:
        for name in ("physical_batch_size", "privacy_seed"):
            _require(getattr(privacy, name) is None, name, getattr(privacy, name), "None without --epsilon")
        _require(not privacy.secure_noise, "secure_noise", True, "False without --epsilon")
        return
    for name, usual in (("mixup", 0), ("cutmix", 0), ("repeats", 1)):
        value = run.flat()[name]
        _require(value == usual, name, value, f"{usual} with --epsilon: an image must not show in another's gradient")
    _require(run.accumulate == 1, "accumulate", run.accumulate, "1 with --epsilon (see --physical-batch-size)")
    scaled = "no or bf16 with --epsilon: scaled gradients cannot be clipped"
    _require(run.mixed_precision != "fp16", "mixed_precision", "fp16", scaled)
    _require(not run.compile, "compile", True, "False with --epsilon: Opacus' hooks cannot be compiled")


def _none(values: dict[str, Any], name: str) -> bool:
    """Whether a setting that may be left out is."""
    from experiments.run import DEFAULTS

    return values[name] is None and DEFAULTS[name] is None


def _require(condition: bool, name: str, value: Any, expected: str, values: dict[str, Any] | None = None) -> None:
    if condition:
        return
    from experiments.run import DEFAULTS
    from knport.errors import KNPortError  # importing knport imports torch: not paid by --help

    expected += ", or None" if values is not None and DEFAULTS[name] is None else ""
    raise KNPortError(f"{name} is {value!r}; expected {expected}: set --{name.replace('_', '-')}")
