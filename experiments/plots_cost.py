"""Cost against score: what a point of accuracy costs in time, memory and multiply-accumulates.

A picture per cost at one batch size: a marker per network, its colour and shape the kind of norm, bars of one SD where
there are seeds for it. Up and to the left is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.plots import INK, name_of, panel, score_of, spread_out, style, to_svg, widen
from experiments.results import Row
from experiments.summary import Series, main_budget


class CostAxis(NamedTuple):
    """A cost: its column of `results.csv`, what divides it, and the title of its axis."""

    column: str
    unit: float
    title: str


COSTS = (
    CostAxis("ms_per_step", 1.0, "ms per training step"),
    CostAxis("peak_mib", 1.0, "peak MiB of a training step"),
    CostAxis("macs", 1e6, "million MACs per image"),
)
NAMED = 7  # points that can be named in one small picture


class Point(NamedTuple):
    """A network in the picture."""

    x: float
    y: float
    sd: float
    network: Series


def cost_plots(series: Sequence[Series], batch_size: int) -> list[str]:
    """SVG per cost with at least two networks measured, under the budget of most networks at this batch size."""
    found = [(axis, points_of(series, batch_size, axis)) for axis in COSTS]
    return [_plot(points, axis, series) for axis, points in found if len(points) > 1]


def points_of(series: Sequence[Series], batch_size: int, axis: CostAxis) -> list[Point]:
    """The networks with this cost and a score, as points."""
    main = main_budget(series, batch_size)
    points = []
    for one in series:
        cell = one.cells.get(batch_size)
        if cell is None or cell.mean is None or cell.budget != main:
            continue
        cost = _cost(cell.rows, axis)
        if cost is not None:
            points.append(Point(cost, cell.mean, cell.sd or 0.0, one))
    return points


def _cost(rows: Sequence[Row], axis: CostAxis) -> float | None:
    values = [getattr(row, axis.column) for row in rows if getattr(row, axis.column) is not None]
    return values[0] / axis.unit if values else None


def _plot(points: Sequence[Point], axis: CostAxis, series: Sequence[Series]) -> str:
    figure, axes = panel()
    for point in points:
        colour, _, marker = style(point.network)
        options = {"color": colour, "marker": marker, "markersize": 7, "elinewidth": 1.4, "linestyle": "none"}
        axes.errorbar([point.x], [point.y], [point.sd], **options)
    axes.set_xlabel(axis.title, color=INK)
    axes.set_title(score_of(series).axis, loc="left", fontsize=10.5, color=INK, pad=8)
    _scale(axes, [point.x for point in points])
    widen(axes)
    if len(points) <= NAMED:
        _names(axes, points, series)
    return to_svg(figure, themed=True)


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where the dearest network costs more than five times the cheapest, else from zero."""
    top = max(values)
    if top > 5 * min(values):
        axes.set_xscale("log")
        axes.set_xlim(min(values) / 1.6, top * 4)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
    else:
        axes.set_xlim(0, top * 1.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))


def _names(axes: Axes, points: Sequence[Point], series: Sequence[Series]) -> None:
    """The network's name beside each point, moved up or down where names would meet."""
    low, high = axes.get_ylim()
    places = spread_out([point.y for point in points], (high - low) * 0.085)
    for point, place in zip(points, places, strict=True):
        colour = style(point.network)[0]
        name = name_of(point.network, series)
        where = {"xytext": (9, 0), "textcoords": "offset points", "va": "center", "fontsize": 9.5}
        axes.annotate(name, (point.x, place), color=colour, **where)
