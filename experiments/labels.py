"""What norms and scores are called in tables, pictures and sentences."""

from __future__ import annotations

from typing import NamedTuple

NORM_LABELS = {
    "batch": "BatchNorm",
    "group": "GroupNorm",
    "group_ws": "GroupNorm + WS",
    "kernel": "KernelNorm",
    "layer": "LayerNorm",
    "instance": "InstanceNorm",
    "local_context": "LocalContextNorm",
    "normalized": "normalized convolution",
    "positional": "PositionalNorm",
    "frn": "FilterResponseNorm",
    "evonorm_s0": "EvoNorm-S0",
    "group_of_32": "GroupNorm, groups of 32",
    "none": "no norm",
}


class Metric(NamedTuple):
    """What runs are ranked by: its name in the log, in a sentence, and as the title of an axis."""

    column: str
    name: str
    axis: str


METRICS = {
    "top1": Metric("top1", "top-1 accuracy", "top-1 accuracy [%]"),
    "miou": Metric("miou", "mean IoU", "mean IoU [%]"),
}
