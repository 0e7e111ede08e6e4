"""The pictures of a comparison, drawn by matplotlib as SVG whose colours are the page's own.

One colour and one marker per kind of norm, the same in every picture (Okabe and Ito's palette, told apart by
colour-blind readers); one line style per model. Each panel is a small picture of its own, so that a narrow screen
stacks them. Text stays text: it takes the page's font and can be selected.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from experiments.labels import Metric
from experiments.summary import Series, main_budget, metric_of

INK, FAINT = "#1f2430", "#c9ced8"
# kind of norm -> (colour on light, colour on dark, marker)
STYLES = {
    "kernel": ("#d55e00", "#ff8c42", "o"),
    "batch": ("#0072b2", "#5ab4ee", "s"),
    "group": ("#009e73", "#2bcf9f", "^"),
    "layer": ("#b0609a", "#e49ccf", "D"),
    "instance": ("#8a7a00", "#e0cc3c", "v"),
    "group_ws": ("#6a51c7", "#a99bf5", "<"),
    "local_context": ("#a5522b", "#d9926b", "p"),
    "normalized": ("#b3123c", "#ff6f8d", "h"),
    "none": ("#6b7280", "#a3abb8", "x"),
}
OTHER = ("#40454f", "#c9ced8", "P")
LINES = ("-", "--", ":", "-.")
LEAST_SPAN = 5.0
PANEL = (4.9, 3.2)  # inches of 72 units: drawn for a phone's width, scaled up on a desk


def style(series: Series) -> tuple[str, str, str]:
    """(light colour, dark colour, marker) of a network's norm."""
    return STYLES.get(series.kind, OTHER)


def css_name(colour: str) -> str:
    """The CSS variable that stands for one of our colours."""
    return f"--c{colour.lstrip('#')}"


def themes() -> tuple[dict[str, str], dict[str, str]]:
    """CSS variables of the norms' colours for a light and for a dark page."""
    styles = [*STYLES.values(), OTHER]
    return {css_name(s[0]): s[0] for s in styles}, {css_name(s[0]): s[1] for s in styles}


def accuracy_plot(series: Sequence[Series], batch_sizes: Sequence[int], *, themed: bool = True) -> str:
    """SVG: the score against batch size, a line per network, bars of one SD where there are seeds for it.

    Cells of another budget than most at their batch size are left to the table: a line to them would show the budget.
    """
    figure, axes = panel()
    labels = []
    main = {size: main_budget(series, size) for size in batch_sizes}
    for one, line in zip(series, _lines(axes, series, batch_sizes, main), strict=True):
        if line is not None:
            x, y = line.lines[0].get_data()
            labels.append((x[-1], y[-1], name_of(one, series), style(one)[0]))
    axes.set_xticks(range(len(batch_sizes)), [str(size) for size in batch_sizes])
    axes.set_xlim(-0.25, len(batch_sizes) - 1 + (0.9 if len(batch_sizes) < 3 else 1.0))
    axes.set_xlabel("batch size")
    widen(axes)
    _finish(axes, score_of(series).axis, labels)
    return to_svg(figure, themed)


def accuracy_lines(
    axes: Axes, series: Sequence[Series], batch_sizes: Sequence[int], main: Mapping[int, tuple]
) -> dict[str, ErrorbarContainer]:
    """Draw the lines of `accuracy_plot`; returns what stands for each kind of norm in a legend."""
    lines = _lines(axes, series, batch_sizes, main)
    return {one.label.removesuffix(", as built"): line for one, line in zip(series, lines, strict=True) if line}


def _lines(
    axes: Axes, series: Sequence[Series], batch_sizes: Sequence[int], main: Mapping[int, tuple]
) -> list[ErrorbarContainer | None]:
    """A line per network, None for one without a cell under the main budget."""
    drawn: list[ErrorbarContainer | None] = []
    for number, one in enumerate(series):
        cells = [(size, one.cells[size]) for size in batch_sizes if size in one.cells]
        points = [(size, cell) for size, cell in cells if cell.values and cell.budget == main[size]]
        x, y = [batch_sizes.index(size) for size, _ in points], [cell.mean for _, cell in points]
        # a small offset keeps the bars of networks with equal accuracies apart
        x = [position + 0.03 * (number - (len(series) - 1) / 2) for position in x]
        bars = [cell.sd or 0.0 for _, cell in points]
        options = {"markersize": 6, "capsize": 0, "elinewidth": 1.4}
        drawn.append(axes.errorbar(x, y, bars, **_line(one, series), **options) if points else None)
    return drawn


def curves_plot(series: Sequence[Series], curves: Iterable[dict[str, Any]], batch_size: int) -> str:
    """SVG: the score on the test images after each epoch at one batch size, mean over seeds, with their range."""
    figure, axes = panel()
    score = score_of(series)
    lines = [line for line in curves if line["batch_size"] == batch_size and line.get(score.column) is not None]
    labels = []
    for one in series:
        by_epoch: dict[float, list[float]] = {}
        for line in lines:
            if (line["model"], line["norm"]) == (one.model, one.norm):
                by_epoch.setdefault(line["epoch"], []).append(line[score.column])
        if not by_epoch:
            continue
        x = sorted(by_epoch)
        y = [sum(by_epoch[e]) / len(by_epoch[e]) for e in x]
        axes.plot(x, y, **_line(one, series), markersize=4, markevery=max(1, len(x) // 8))
        axes.fill_between(
            x, [min(by_epoch[e]) for e in x], [max(by_epoch[e]) for e in x], color=style(one)[0], alpha=0.14, lw=0
        )
        labels.append((x[-1], y[-1], name_of(one, series), style(one)[0]))
    last = max((x for x, *_ in labels), default=1)
    axes.set_xlim(0, last * 1.38)
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=5, integer=True))
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= last])
    axes.set_xlabel("epoch")
    _finish(axes, score.axis, labels)
    return to_svg(figure, themed=True)


def score_of(series: Sequence[Series]) -> Metric:
    """What the networks are ranked by."""
    return metric_of(row for one in series for cell in one.cells.values() for row in cell.rows)


def panel() -> tuple[Figure, Axes]:
    """An empty picture in our style."""
    with matplotlib.rc_context({"font.size": 10.5}):
        figure = Figure(figsize=PANEL, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    """Horizontal lines and no frame."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(y=0.1)
    axes.tick_params(length=0, labelcolor=INK)
    axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))


def _line(one: Series, series: Sequence[Series]) -> dict[str, Any]:
    models = list(dict.fromkeys(s.model for s in series))
    colour, _, marker = style(one)
    width = 2.4 if one.kind == "kernel" else 1.7
    return {
        "color": colour,
        "marker": marker,
        "linestyle": LINES[models.index(one.model) % len(LINES)],
        "linewidth": width,
    }


def name_of(one: Series, series: Sequence[Series]) -> str:
    """The norm, or where that is not unique, or built into the network, the model too."""
    model = one.model.rsplit("/", 1)[-1]
    if one.norm == "original" and one.kind == "kernel":
        return model
    return one.label if [s.label for s in series].count(one.label) == 1 else f"{model} {one.label}"


def _finish(axes: Axes, title: str, labels: list[tuple[float, float, str, str]]) -> None:
    """Title where an axis label would be turned on its side, and names at the ends of the lines, moved apart."""
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.xaxis.label.set_color(INK)
    low, high = axes.get_ylim()
    height = (high - low) * 0.085
    places = spread_out([y for _, y, _, _ in labels], height)
    right = max((x for x, *_ in labels), default=0)
    for (_, _, name, colour), place in zip(labels, places, strict=True):
        axes.annotate(name, (right, place), xytext=(9, 0), textcoords="offset points", va="center", color=colour)


def widen(axes: Axes) -> None:
    """At least `LEAST_SPAN` points of accuracy: a zoom on noise would look like a difference."""
    low, high = axes.get_ylim()
    lack = max(0.0, LEAST_SPAN - (high - low)) / 2
    top = max(high, min(high + lack, 100.0))
    axes.set_ylim(min(low - lack, top - LEAST_SPAN) if lack else low, top)


def spread_out(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved as little as needed for neighbours to be at least `gap` apart, in the order given."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    places = [heights[i] for i in order]
    for _ in range(50):
        for i, j in pairwise(range(len(places))):
            lack = gap - (places[j] - places[i])
            if lack > 0:
                places[i] -= lack / 2
                places[j] += lack / 2
    return [places[order.index(i)] for i in range(len(heights))]


def to_svg(figure: Figure, themed: bool) -> str:
    """As SVG: in the page's colours and font where `themed`, else on its own."""
    buffer = io.StringIO()
    # a fixed salt and no date: the same numbers give the same file
    with matplotlib.rc_context({"svg.fonttype": "none" if themed else "path", "svg.hashsalt": "knport"}):
        figure.savefig(buffer, format="svg", transparent=themed, metadata={"Date": None})
    text = buffer.getvalue()
    if not themed:
        return text
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour in (INK, FAINT, *(s[0] for s in (*STYLES.values(), OTHER))):
        text = re.sub(colour, f"var({css_name(colour)})", text, flags=re.IGNORECASE)
    text = re.sub(r"font: [^;\"]*'[^;\"]*", "font: 10.5px inherit", text)
    return re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
