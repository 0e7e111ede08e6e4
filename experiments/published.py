"""Published scores, to stand beside ours: same data set, network, norm and batch size only."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.paper_table import Line, PaperTable, kind_in
from experiments.paper_tables import TABLES

DEPTHS = (18, 34, 50)


def published(recipe: str, model: str, kind: str, batch_size: int, classes: int | None = None) -> float | None:
    """The paper's score in percent for our cell (of several versions the last), None where no paper has such a cell.

    Args:
        recipe: ours.
        model: our name; a network ported by `knport.convert` is not one of the paper's.
        kind: of norm, as `experiments.summary.kind_of` says.
        batch_size: images per step.
        classes: of our run; scores on a part of the classes have no published counterpart.
    """
    for table, line, version in _lines(recipe):
        same = (standard_name(model), kind, None) == (line.model, kind_in(line, version), line.dropout)
        if not same or classes not in (None, table.classes):
            continue
        for column, value in zip(table.columns, line.values[version], strict=True):
            if value and (column.batch_size or table.batch_sizes[version]) == batch_size:
                return value.mean  # columns begin with what networks are ranked by
    return None


def standard_name(model: str) -> str:
    """Our name of a network that torchvision and timm have too."""
    library, _, name = model.rpartition("/")
    if library in ("timm", "torchvision") and name in {f"resnet{depth}" for depth in DEPTHS}:
        return f"baseline_{name}"
    if library == "timm" and name in {f"resnetv2_{depth}" for depth in DEPTHS}:
        return f"preact_resnet{name.removeprefix('resnetv2_')}"
    return model


def setting_of(recipe: str) -> str:
    """In words, what the published runs of a recipe were."""
    return next((f"{table.name}, {table.setting}" for table, *_ in _lines(recipe)), "")


def _lines(recipe: str) -> Iterator[tuple[PaperTable, Line, str]]:
    """Every line of the tables of a recipe, with the version that the recipe is of; the last version first."""
    for table in TABLES:
        for line in table.lines:
            for version in line.values:
                if table.recipes.get(version) == recipe:
                    yield table, line, version
