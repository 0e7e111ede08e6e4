"""One comparison on the page: scores, curves, costs, activations, predictions, setting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape

from experiments import plots, predictions, tables
from experiments.activations import Stage, activations_plot
from experiments.backbones import groups as groups_of
from experiments.comparison import Comparison, Prediction
from experiments.page_parts import blocks, bullets, dot, figure, folded, note, panels, section, table
from experiments.paper_table import SOURCE
from experiments.plots_cost import cost_plots
from experiments.published import setting_of
from experiments.results import Results, Row
from experiments.summary import Series, batch_sizes_of, main_budget, metric_of, series_of

BESIDE = 2  # backbones whose scores are also shown in large type


def body(one: Comparison) -> str:
    """All sections of a comparison."""
    rows = one.results.rows
    series, sizes = series_of(rows), batch_sizes_of(rows)
    return "\n".join(
        filter(
            None,
            [
                section(accuracy_title(series, sizes), _scores(rows, series, sizes)),
                section(f"{_name(rows)} by epoch", _curves(one.results, series, sizes)),
                section("What a training step costs", _costs(rows, series, sizes)),
                section("Scale of activations by stage", _activations(one.stages, series)),
                section("Predictions", _predictions(one.predictions, series, rows[0].recipe)),
                section("Setting", table(tables.settings(rows)) + _commands(rows) + _paper(rows)),
            ],
        )
    )


def accuracy_title(series: Sequence[Series], sizes: Sequence[int]) -> str:
    """What the picture shows: the change from the largest to the smallest batch size, if epochs are equal."""
    changes = []
    for one in series:
        ends = [one.cells[size] for size in (sizes[0], sizes[-1]) if size in one.cells and one.cells[size].values]
        if len(ends) == 2 and ends[0].finished[0].epochs == ends[1].finished[0].epochs:
            changes.append((one, ends[0].mean - ends[1].mean))
    if len(sizes) < 2 or len(changes) < 2 or len({one.backbone for one in series}) > 1:
        rows = [row for one in series for cell in one.cells.values() for row in cell.rows]
        return f"{_name(rows)} by batch size" if len(sizes) > 1 else f"{_name(rows)} at batch size {sizes[0]}"
    texts = ", ".join(f"{one.label} {change:+.1f}".replace("-", "−") for one, change in changes)
    return f"From batch size {sizes[-1]} to {sizes[0]}: {texts} points"


def _name(rows: Sequence[Row]) -> str:
    name = metric_of(rows).name
    return "Accuracy" if name == "top-1 accuracy" else name[0].upper() + name[1:]


def _caption(group: Sequence[Series], groups: Sequence[Sequence[Series]]) -> str:
    return group[0].backbone if len(groups) > 1 else ""


def _scores(rows: Sequence[Row], series: Sequence[Series], sizes: Sequence[int]) -> str:
    groups = groups_of(series)
    groups = [group for group in groups if len(group) > 1] or groups
    pictures = [figure(plots.accuracy_plot(group, sizes), _caption(group, groups)) for group in groups]
    pictures = pictures if len(sizes) > 1 else []
    chips = [_chips(series)] if len(groups) <= BESIDE else []
    further = tables.further(rows)
    more = folded("Further measures", table(further, series)) if further else ""
    return (
        panels([*pictures, *chips])
        + table(tables.accuracy(rows), series)
        + bullets(tables.remarks(rows), "remarks")
        + more
    )


def _chips(series: Sequence[Series]) -> str:
    """Mean scores in large type beside the picture: the first thing to see."""
    found = []
    for size in sorted({size for one in series for size in one.cells}):
        cells = [(one, one.cells[size]) for one in series if size in one.cells and one.cells[size].values]
        cells.sort(key=lambda pair: -pair[1].mean)
        main = main_budget(series, size)
        lines = [
            f"<li>{dot(one)}<b>{cell.mean:.1f}{tables.budget_mark(cell, main)}</b>"
            f"<span>{escape(plots.name_of(one, series))}</span></li>"
            for one, cell in cells
        ]
        found.append(f'<div class="chip"><h3>batch size {size}</h3><ol>{"".join(lines)}</ol></div>')
    return f'<div class="chips">{"".join(found)}</div>'


def _curves(results: Results, series: Sequence[Series], sizes: Sequence[int]) -> str:
    groups = groups_of(series)
    figures: list[str] = []
    for size in sizes:
        lines = [line for line in results.curves if line["batch_size"] == size]
        for group in groups:
            networks = {(one.model, one.norm) for one in group}
            if len({line["epoch"] for line in lines if (line["model"], line["norm"]) in networks}) > 1:
                caption = f"{_caption(group, groups)} batch size {size}".strip()
                figures.append(figure(plots.curves_plot(group, lines, size), caption))
    shown, rest = figures[:6], figures[6:]
    return panels(shown) + (folded("All curves", panels(rest)) if rest else "")


def _costs(rows: Sequence[Row], series: Sequence[Series], sizes: Sequence[int]) -> str:
    """The table, and cost against score: the smallest batch size open, the others folded."""
    pictures = [(size, [figure(svg) for svg in cost_plots(series, size)]) for size in sizes]
    pictures = [(size, figures) for size, figures in pictures if figures]
    text = ""
    for number, (size, figures) in enumerate(pictures):
        name = f"Cost against {metric_of(rows).name} at batch size {size}"
        content = _legend(series) + panels(figures)
        text += f"<h3>{escape(name)}</h3>{content}" if not number else folded(name, content)
    costs = tables.costs(rows)
    where = note(measured_on(rows))
    return text + (table(costs, series) + where if costs.rows else "")


def _legend(series: Sequence[Series]) -> str:
    """Colours of the norms, where pictures have too many points to name."""
    kinds = {one.label.removesuffix(", as built"): one for one in series}
    items = "".join(f"<span>{dot(one)}{escape(label)}</span>" for label, one in kinds.items())
    return f'<p class="legend">{items}</p>'


def _activations(stages: Sequence[Stage], series: Sequence[Series]) -> str:
    figures = []
    groups = groups_of(series)
    for size in sorted({stage.batch_size for stage in stages}):
        here = [stage for stage in stages if stage.batch_size == size]
        for group in groups:
            if {(one.model, one.norm) for one in group} & {(stage.model, stage.norm) for stage in here}:
                caption = f"{_caption(group, groups)} batch size {size}".strip()
                figures.append(figure(activations_plot(group, here), caption))
    return (_legend(series) + panels(figures)) if figures else ""


def _predictions(pictures: Sequence[Prediction], series: Sequence[Series], recipe: str) -> str:
    """The colours of the classes; per test image a row: the image, the true classes, what each network made of it."""
    if not pictures:
        return ""
    labels = {(one.model, one.norm): plots.name_of(one, series) for one in series}
    several = len({picture.batch_size for picture in pictures}) > 1
    text = _classes(recipe)
    for file in list(dict.fromkeys(picture.file for picture in pictures)):
        mine = [one for network in labels for one in pictures if (one.file, one.model, one.norm) == (file, *network)]
        cells = [("image", mine[0].image), ("truth", mine[0].truth)]
        for one in mine:
            size = f", batch size {one.batch_size}" if several else ""
            cells.append((f"{labels[one.model, one.norm]}{size}", one.predicted))
        figures = [figure(f'<img alt="{escape(name)} of {escape(file)}" src="{uri}">', name) for name, uri in cells]
        text += f'<div class="pictures">{"".join(figures)}</div>'
    return text


def _classes(recipe: str) -> str:
    """The colour of each class."""
    pairs = zip(predictions.PALETTES[recipe], predictions.NAMES[recipe], strict=True)
    spots = [
        f'<span><span class="dot" style="background:rgb{tuple(colour)}"></span>{escape(name)}</span>'
        for colour, name in pairs
    ]
    return f'<p class="legend">{"".join(spots)}</p>'


def commands(rows: Sequence[Row]) -> list[str]:
    """The commands that made the rows, each once."""
    return list(dict.fromkeys(row.command for row in rows if row.command))


def measured_on(rows: Sequence[Row]) -> str:
    """Where the times and memory were measured; empty if nowhere."""
    devices = sorted({row.cost_device for row in rows if row.cost_device})
    return f"Measured on {', '.join(devices)}." if devices else ""


def _commands(rows: Sequence[Row]) -> str:
    """Where there are several, with the number of rows that each made."""
    counts = Counter(row.command for row in rows if row.command)
    if len(counts) < 2:
        return blocks(list(counts))
    return "".join(
        note(f"{count} row{'s' if count > 1 else ''} by:") + blocks([command]) for command, count in counts.items()
    )


def _paper(rows: Sequence[Row]) -> str:
    shown = "paper" in tables.accuracy(rows).header
    return note(f"paper: {SOURCE}; {setting_of(rows[0].recipe)}.") if shown else ""
