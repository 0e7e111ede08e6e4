"""Which networks are compared as one backbone: a hand-built kernel normalized network stands beside its original."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import architectures
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
    """Rows of tables that are older than the column `original`, with it."""
    return tuple(row if row.original else replace(row, original=original_of(row.model)) for row in rows)
