"""What a recipe decides, and which of the papers' columns and rows a run belongs to."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from experiments import settings

LearningRates = Mapping[int, float]  # batch size -> learning rate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a recipe decides; each field is the field of `Run` with the same name."""

    batch_size: int
    """Images per optimizer step."""
    epochs: int
    """Passes over the training images."""
    lr: float
    """Peak learning rate."""
    scaling: str = "standard"
    """Inputs as pixel / 255 (unit) or with mean and SD removed (standard)."""
    activation: str | None = None
    """In the place of the model's ReLUs; None: the model's own."""
    optimization: settings.OptimizationSettings = field(default_factory=settings.OptimizationSettings)
    """How the loss moves the weights."""
    augmentation: settings.AugmentationSettings = field(default_factory=settings.AugmentationSettings)
    """What happens to an image before the network sees it."""
    segmentation: settings.SegmentationSettings = field(default_factory=settings.SegmentationSettings)
    """What only networks for segmentation need."""
    privacy: settings.PrivacySettings = field(default_factory=settings.PrivacySettings)
    """Training with differential privacy."""


def norm_kind(model: str, norm: str) -> str:
    """Which of the papers' columns a run belongs to: kernel, batch, group or layer.

    `original` is kernel for the hand-built kernel normalized networks (names in kn..., dp_kn... and fcn_kn...), group
    for those with GroupNorm and weight standardization (ws_...), layer for normalized convolutions (nc_...), else
    batch. Norms that the papers did not train (instance, ...) take the layer column, the most careful one; a kernel
    normalized network without its norm (none: the ablation) stays in its own.
    """
    name = model.rsplit("/", 1)[-1].lower().removeprefix("dp_").removeprefix("fcn_")
    own = {"kn": "kernel", "ws": "group", "nc": "layer"}.get(name[:2], "batch")
    kinds = {"original": own, "kernel": "kernel", "batch": "batch", "none": own if own == "kernel" else "layer"}
    return kinds.get(norm, "group" if norm.startswith("group") else "layer")


def scaling_of(model: str, norm: str) -> str:
    """Kernel normalized networks get pixel / 255, the others mean and SD removed: v1, and CIFAR in both versions."""
    return "unit" if norm_kind(model, norm) == "kernel" else "standard"


def depth(model: str) -> str:
    """The row of the papers' table: 18, 34, 50 or pre18, pre34, pre50; 18 for every network they did not train."""
    found = re.search(r"(pre)?(?:act_)?resnet(?:v2_)?(18|34|50)(?!\d)", model.rsplit("/", 1)[-1].lower())
    if found is None:
        return "18"
    return ("pre" if found[1] or "v2_" in found[0] else "") + found[2]


def tabulated(table: LearningRates, batch_size: int) -> float:
    """The learning rate at `batch_size`: the table's own value; between two entries along the straight line of log lr
    over log batch size; outside the table in proportion to the batch size."""
    below = max((b for b in table if b <= batch_size), default=None)
    above = min((b for b in table if b >= batch_size), default=None)
    if below is None or above is None:
        nearest = above if below is None else below
        return table[nearest] * batch_size / nearest
    if below == above:
        return table[below]
    share = math.log(batch_size / below) / math.log(above / below)
    return table[below] ** (1 - share) * table[above] ** share
