"""Which networks are compared as one backbone: a hand-built kernel normalized network stands beside its original."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

import timm
import torch
import torchvision

import architectures
from experiments.cost import norm_family
from experiments.results import Row

# Networks of other hand-built norms, and their originals
NORMALIZED = {
    "nc_cifar_resnet8x2": "cifar_resnet8x2",
    **{f"{kind}_resnet{depth}": f"baseline_resnet{depth}" for kind in ("nc", "nc_ws", "ws") for depth in (18, 50)},
}


def original_of(model: str) -> str:
    """The network that a hand-built one is compared with, "" where that is itself."""
    if model in NORMALIZED:
        return NORMALIZED[model]
    return (architectures.original_of(model) or "") if model in architectures.list_models() else ""


def with_originals(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows with their original and kind of norm, which older tables and comparisons without costs do not have."""
    return tuple(
        replace(row, original=row.original or original_of(row.model), norm_family=row.norm_family or _family(row))
        for row in rows
    )


def _family(row: Row) -> str:
    return built_in(row.model) if row.norm == "original" else row.norm


@functools.cache
def built_in(model: str) -> str:
    """The kind of norm in a network as it is built, as `norm_family` says; "" for a name that is not known."""
    library, _, name = model.rpartition("/")
    known = {"timm": timm.is_model, "torchvision": torchvision.models.list_models(torchvision.models).__contains__}
    with torch.device("meta"):  # no weights
        if model in architectures.list_models():
            return norm_family(architectures.create_model(model))
        if library not in known or not known[library](name):
            return ""
        make = timm.create_model if library == "timm" else torchvision.models.get_model
        return norm_family(make(name))
