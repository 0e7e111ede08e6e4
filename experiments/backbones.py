"""Several backbones at once, as a statement, a table and a picture: kernel normalization against its best rival."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments import plots
from experiments.results import Row
from experiments.summary import (
    Series,
    batch_sizes_of,
    clearly_apart,
    format_cell,
    headline,
    main_budget,
    rankings,
    series_of,
)
from experiments.tables import Table, Text, budget_mark

SEVERAL = 3  # backbones from which counts say more than one of them
COLUMNS = 3  # panels side by side


def statement(rows: Sequence[Row]) -> str:
    """`headline`, or of several backbones in how many kernel normalization is ahead, level and behind."""
    rows = list(rows)
    series = series_of(rows)
    counted = [(size, _outcomes(series, size)) for size in batch_sizes_of(rows)]
    if max((len(found) for _, found in counted), default=0) < SEVERAL:
        return headline(rows)
    parts = [f"at batch size {size} {_counts(found)}" for size, found in counted if found]
    text = "Kernel normalization against the best other norm: " + "; ".join(parts)
    seeds = min(len(cell.values) for one in series for cell in one.cells.values() if cell.values)
    return text + ("." if seeds > 1 else " (one seed in places: its spread is not known).")


def _outcomes(series: Sequence[Series], size: int) -> list[str]:
    """Of each backbone with kernel normalization and a rival under the same budget: ahead, level or behind."""
    found = []
    for group in rankings(list(series), size):
        kernel = [one.cells[size] for one in group if one.kind == "kernel"]
        rivals = [one.cells[size] for one in group if one.kind != "kernel"]
        if kernel and rivals:
            ours, best = (max(cells, key=lambda cell: cell.mean) for cells in (kernel, rivals))
            apart = clearly_apart(ours, best)
            found.append("level" if not apart else "ahead" if ours.mean > best.mean else "behind")
    return found


def _counts(found: Sequence[str]) -> str:
    words = [f"{word} in {found.count(word)}" for word in ("ahead", "level", "behind") if word in found]
    return f"{', '.join(words)} of {len(found)} networks"


def groups(series: Sequence[Series]) -> list[list[Series]]:
    """The networks of each backbone."""
    found: dict[str, list[Series]] = {}
    for one in series:
        found.setdefault(one.backbone, []).append(one)
    return list(found.values())


def matrix(rows: Sequence[Row], batch_size: int) -> Table:
    """Backbones down, norms across, at one batch size; the best of each backbone is bold.

    A hand-built kernel normalized network and a converted one stand in columns of their own.
    """
    series = [one for one in series_of(rows) if batch_size in one.cells]
    labels = sorted({one.label for one in series}, key=lambda label: _place(label, series))
    main = main_budget(series, batch_size)
    lines = []
    for group in groups(series):
        cells = {one.label: one.cells[batch_size] for one in group}
        own = main_budget(group, batch_size)
        ranked = [cell.mean for cell in cells.values() if cell.mean is not None and cell.budget == own]
        line = [Text(group[0].backbone)]
        for label in labels:
            cell = cells.get(label)
            mark = budget_mark(cell, main) if cell and cell.values else ""
            best = bool(cell and len(ranked) > 1 and cell.budget == own and cell.mean == max(ranked))
            small = f"n={len(cell.values)}" if cell and cell.values else ""
            line.append(Text((format_cell(cell) if cell else "") + mark, best, small))
        lines.append(tuple(line))
    return Table(("network", *labels), tuple(lines), names=1)


def _place(label: str, series: Sequence[Series]) -> tuple[bool, int]:
    """Norms in the order in which they appear, kernel normalization last."""
    first = next(i for i, one in enumerate(series) if one.label == label)
    return series[first].kind == "kernel", first


def picture(rows: Sequence[Row]) -> str:
    """SVG on its own: score against batch size, a panel for each backbone."""
    series, sizes = series_of(rows), batch_sizes_of(rows)
    members = [group for group in groups(series) if any(cell.values for one in group for cell in one.cells.values())]
    columns = min(COLUMNS, len(members))
    height = math.ceil(len(members) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * height + 0.5), layout="constrained")
    FigureCanvasSVG(figure)
    grid = list(figure.subplots(height, columns, sharex=True, squeeze=False).flat)
    handles: dict[str, object] = {}
    for axes, group in zip(grid, members, strict=False):
        plots.plain(axes)
        main = {size: main_budget(group, size) for size in sizes}
        handles |= plots.accuracy_lines(axes, group, sizes, main)
        axes.set_title(group[0].backbone, fontsize=9.5, color=plots.INK, loc="left")
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        plots.widen(axes)
    for axes in grid[len(members) :]:
        axes.set_axis_off()
    figure.supxlabel("batch size", fontsize=9.5, color=plots.INK)
    figure.supylabel(plots.score_of(series).axis, fontsize=9.5, color=plots.INK)
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, frameon=False, fontsize=9)
    return plots.to_svg(figure, themed=False)
