"""`python -m experiments.benchmarks plot`: the pictures of README and docs, drawn from the CSV alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import matplotlib
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from experiments.benchmarks import competitors as names
from experiments.benchmarks import networks
from experiments.benchmarks.bars import Rows
from experiments.benchmarks.rows import OUT, Row, read
from experiments.plots import FAINT, INK, OTHER, STYLES, to_svg
from experiments.results import write_text
from knport.errors import KNPortError, UnknownName

COLOURS = {
    names.CONV: OTHER[0],
    names.BATCH: STYLES["batch"][0],
    names.GROUP: STYLES["group"][0],
    names.LAYER: STYLES["layer"][0],
    names.PLAIN: "#f0a35e",
    names.MOMENTS: STYLES["kernel"][0],
    names.SHARED: "#a8620f",
    names.UNIT: "#6f3a00",
    names.PUBLISHED: STYLES["none"][0],
}
IN_LAYERS = (names.CONV, names.GROUP, names.LAYER, names.PLAIN, names.MOMENTS)
IN_FORMS = (names.SHARED, names.UNIT, names.PUBLISHED)
IN_NETWORKS = (networks.KNRESNET, networks.KNRESNET_PLAIN, networks.CONVERTED, networks.ENLARGED)
IN_GROWTH = (names.BATCH, names.PLAIN, names.MOMENTS)


def plot(
    pictures: tyro.conf.Positional[tuple[str, ...]] = (),
    *,
    csv: Path = OUT,
    folder: Path = Path("docs"),
    threads: int = 2,
    device: Literal["cpu", "cuda"] = "cpu",
    on: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None,
) -> None:
    """Draw layers.svg, growth.svg and networks.svg, as far as there are rows for them.

    Args:
        pictures: layers, growth, networks; none means all.
        csv: the rows.
        folder: where the pictures go, as benchmark_NAME.svg (benchmark_NAME_cuda.svg for a GPU).
        threads: only CPU rows with so many.
        device: whose rows.
        on: of several such devices the one of this name, as in the CSV; None for the one measured last.
    """
    for name in pictures:
        if name not in PICTURES:
            raise UnknownName("picture", name, PICTURES)
    rows = Rows(read(csv), cuda=device == "cuda", threads=threads, device=on)
    if on is not None and on not in rows.devices:
        raise UnknownName("device", on, rows.devices)
    if not rows.rows:
        raise KNPortError(f"{csv} has no rows of {device} with {threads} threads; measure, or give other --threads")
    drawn = 0
    for name in pictures or PICTURES:
        svg = PICTURES[name](rows)
        if svg is not None:
            path = folder / f"benchmark_{name}{'_cuda' if device == 'cuda' else ''}.svg"
            write_text(path, svg)
            print(path)
            drawn += 1
    if not drawn:
        raise KNPortError(f"{csv} has no rows of the benchmarks {', '.join(pictures or PICTURES)}")


def layers_picture(rows: Rows) -> str | None:
    """Training steps as multiples of convolution + BatchNorm; the other forms as multiples of ours beside them."""
    cases = list(dict.fromkeys(row.case for row in rows.layers(names.MOMENTS)))
    if not cases:
        return None
    figure, (left, right) = _figure((9.6, 3.6), 1, 2, width_ratios=[1.7, 1])
    _bars(left, {variant: _by_case(rows.layers(variant), cases) for variant in IN_LAYERS}, cases)
    _line_at_one(left, "Conv2d+BatchNorm2d", names.BATCH)
    _headline(figure, _where(rows))
    _title(left, "training step / Conv2d+BatchNorm2d")
    _bars(right, {v: _by_case(rows.layers(v, benchmark="forms"), cases) for v in IN_FORMS}, cases)
    _line_at_one(right, None, names.MOMENTS)
    _title(right, "training step / KNConv2d moments")
    for ax in (left, right):
        ax.set_xticks(range(len(cases)), [_wrapped(case) for case in cases], fontsize=8)
    _legend(figure, (left, right), columns=4)
    return to_svg(figure, themed=False)


def growth_picture(rows: Rows) -> str | None:
    """What BatchNorm and kernel normalization add to the convolution, over four sizes."""
    points = [row for row in rows.where(benchmark="growth", mode="training") if row.case != "statistics"]
    if not points:
        return None
    figure, axes = _figure((9.6, 5.6), 2, 2)
    curves = ("kernel", "channels", "resolution", "batch")
    labels = ("kernel size", "channels", "height and width", "images")
    for ax, curve, label in zip(axes.flat, curves, labels, strict=True):
        mine = [row for row in points if row.case.startswith(f"{curve} ") and row.variant in IN_GROWTH]
        for variant in IN_GROWTH:
            _curve(ax, [row for row in mine if row.variant == variant], variant)
        ax.set_xlabel(label, color=INK)
        if curve != "kernel":
            _logarithmic(ax, [row.extra_ms for row in mine])
    _statistics(axes.flat[0], rows)
    axes.flat[0].set_ylim(bottom=0)
    _headline(figure, f"ms that normalization adds to the training step of the convolution; {_where(rows)}")
    _legend(figure, axes.flat[:1], columns=4)
    return to_svg(figure, themed=False)


def networks_picture(rows: Rows) -> str | None:
    """Training steps and saved activations of networks as multiples of their BatchNorm form's."""
    found = [row for row in rows.where(benchmark="networks", mode="training") if row.variant in IN_NETWORKS]
    if not found:
        return None
    figure, (left, right) = _figure((9.6, 0.9 + 0.42 * len(found)), 1, 2, sharey=True)
    places = range(len(found), 0, -1)
    labels = [f"{row.case}\n{row.variant.removeprefix('KNResNet-18').strip() or 'p=0.05'}" for row in found]
    colour = COLOURS[names.MOMENTS]
    errors = [[row.ratio - row.ratio_q25 for row in found], [row.ratio_q75 - row.ratio for row in found]]
    left.barh(places, [row.ratio for row in found], 0.6, xerr=errors, color=colour, ecolor=INK)
    saved = [_saved_ratio(row, rows) for row in found]
    right.barh(places, saved, 0.6, color=colour)
    for ax, values in ((left, [row.ratio for row in found]), (right, saved)):
        ax.axvline(1, color=COLOURS[names.BATCH], linewidth=1.4)
        ax.grid(axis="x", color=FAINT, linewidth=0.6)
        ax.grid(axis="y", visible=False)
        for place, value in zip(places, values, strict=True):
            ax.annotate(
                f"{value:.2f}", (0, place), xytext=(4, 0), textcoords="offset points", va="center", color="white"
            )
    left.set_yticks(places, labels, fontsize=8)
    _headline(figure, _where(rows))
    _title(left, "training step / BatchNorm form")
    _title(right, "saved activations / BatchNorm form")
    return to_svg(figure, themed=False)


PICTURES: dict[str, Callable[[Rows], str | None]] = {
    "layers": layers_picture,
    "growth": growth_picture,
    "networks": networks_picture,
}


def _figure(size: tuple[float, float], *grid, **options) -> tuple[Figure, Axes]:
    ratios = {"gridspec_kw": {"width_ratios": w}} if (w := options.pop("width_ratios", None)) else {}
    with matplotlib.rc_context({"font.size": 9.5}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(*grid, **options, **ratios)
    for ax in axes.flat:
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.spines["bottom"].set_color(FAINT)
        ax.grid(axis="y", color=FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(length=0, labelcolor=INK)
    return figure, axes


def _by_case(rows: Sequence[Row], cases: Sequence[str]) -> list[Row | None]:
    return [next((row for row in rows if row.case == case and row.ratio is not None), None) for case in cases]


def _bars(ax: Axes, found: dict[str, list[Row | None]], cases: Sequence[str]) -> None:
    """A group of bars per case, with quartiles and the figure above each."""
    width = 0.84 / len(found)
    for number, (variant, rows) in enumerate(found.items()):
        for place, row in enumerate(rows):
            if row is None:
                continue
            x = place + width * (number - (len(found) - 1) / 2)
            errors = [[row.ratio - row.ratio_q25], [row.ratio_q75 - row.ratio]]
            label = _name(variant) if place == 0 else None
            ax.bar(x, row.ratio, 0.9 * width, yerr=errors, color=COLOURS[variant], ecolor=INK, label=label)
            text = f"{row.ratio:.2f}" if row.ratio < 3 else f"{row.ratio:.1f}"
            ax.annotate(text, (x, row.ratio_q75), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=7)
    ax.set_xlim(-0.6, len(cases) - 0.4)


def _where(rows: Rows) -> str:
    threads = rows.rows[-1].threads
    return rows.device if rows.device.startswith("cuda") else f"{rows.device}, {threads} threads"


def _curve(ax: Axes, rows: Sequence[Row], variant: str) -> None:
    rows = sorted(rows, key=lambda row: int(row.case.split()[1]))
    x = [int(row.case.split()[1]) for row in rows]
    colour = COLOURS[variant]
    # what noise has made negative cannot be told from the convolution: a gap
    extra = [row.extra_ms if row.extra_ms and row.extra_ms > 0 else math.nan for row in rows]
    ax.plot(x, extra, color=colour, marker="o", markersize=4, label=_name(variant))
    ax.fill_between(x, [r.extra_q25_ms for r in rows], [r.extra_q75_ms for r in rows], color=colour, alpha=0.15, lw=0)


def _logarithmic(ax: Axes, values: Sequence[float | None]) -> None:
    """Both axes; the medians say how far up and down, not a quartile near zero."""
    positive = [value for value in values if value and value > 0]
    if not positive:  # nothing measured, or nothing that could be told from the convolution
        return
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.set_ylim(min(positive) / 2, max(positive) * 2)


def _statistics(ax: Axes, rows: Rows) -> None:
    """The statistics by themselves, over the kernel size."""
    found = sorted(rows.where(benchmark="growth", case="statistics", mode="inference"), key=lambda row: row.k)
    if found:
        times = [row.median_ms for row in found]
        ax.plot([row.k for row in found], times, color=INK, linestyle="--", label="statistics alone, forward")


def _saved_ratio(row: Row, rows: Rows) -> float:
    base = rows.where(benchmark="networks", mode="training", case=row.case, variant=row.baseline)
    return row.saved_mib / base[0].saved_mib if base and row.saved_mib and base[0].saved_mib else float("nan")


def _line_at_one(ax: Axes, label: str | None, variant: str) -> None:
    ax.axhline(1, color=COLOURS[variant], linewidth=1.4, zorder=3, label=label)


def _name(variant: str) -> str:
    """For readers who have not read the table."""
    known = {
        names.PLAIN: "KNConv2d, dropout 0",
        names.MOMENTS: "KNConv2d, dropout 0.05 (moments)",
        names.SHARED: "shared mask",
        names.UNIT: "mask per unit",
        names.PUBLISHED: "as published (unfold)",
    }
    return known.get(variant, variant)


def _wrapped(case: str) -> str:
    """ "N16 C64 32x32 k3" on two lines."""
    images, channels, size, kernel = case.split()
    return f"{images} {channels}\n{size} {kernel}"


def _headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=9.5, color=INK)


def _title(ax: Axes, text: str) -> None:
    ax.set_title(text, loc="left", fontsize=9.5, color=INK)


def _legend(figure: Figure, axes: Sequence[Axes], columns: int) -> None:
    found = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
