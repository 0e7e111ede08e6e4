"""`report.html`: one self-contained page, light or dark as the reader's system is, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from experiments import plots, tables
from experiments.paper_table import SOURCE
from experiments.privacy_report import Section as Part
from experiments.published import setting_of
from experiments.results import Results, Row
from experiments.summary import Series, batch_sizes_of, headline, main_budget, series_of
from experiments.tables import Table, Text

STYLE = Path(__file__).with_name("page.css")
LIGHT = {plots.css_name(plots.INK): "#1f2430", plots.css_name(plots.FAINT): "#d5dae3"}
DARK = {plots.css_name(plots.INK): "#e6e9ef", plots.css_name(plots.FAINT): "#3b424f"}


def html(results: Results, reading: Sequence[str], private: Sequence[Part] = ()) -> str:
    """The page.

    Args:
        results: rows and learning curves.
        reading: paragraphs that say how the numbers were made.
        private: what `privacy_report.sections` gives.
    """
    if not results.rows:
        heads = ['<p class="eyebrow">digits</p>', "<h1>Private training</h1>"]
        return _document("Private training", "\n".join([*heads, *map(_part, private)]))
    rows = results.rows
    series, sizes = series_of(rows), batch_sizes_of(rows)
    networks = len({(s.model, s.norm) for s in series})
    body = [
        f'<p class="eyebrow">{escape(title(rows))}</p>',
        f"<h1>{escape(headline(rows)).replace(' %', '&nbsp;%')}</h1>",
        f'<p class="lead">{networks} networks, {_runs(rows)}; {escape(machine(rows))}</p>',
        f"<section><h2>{escape(accuracy_title(series, sizes))}</h2>",
        f'<div class="panels">{_figure(plots.accuracy_plot(series, sizes), "")}{_chips(series)}</div>',
        _table(tables.accuracy(rows), series),
        _list(tables.remarks(rows), "remarks"),
        "</section>",
        _curves(results, series, sizes),
        _section("What a training step costs", _table(tables.costs(rows), series) + _measured_on(rows)),
        *map(_part, private),
        _section("Setting", _table(tables.settings(rows)) + _commands(rows)),
        _section("How to read this", _list([*reading, *_paper_note(rows)], "reading")),
    ]
    return _document(title(rows), "\n".join(body))


def title(rows: Sequence[Row]) -> str:
    """What was compared on what."""
    models = list(dict.fromkeys(row.model for row in rows))
    return f"{' and '.join(dict.fromkeys(row.recipe for row in rows))}: {', '.join(models)} by normalization"


def machine(rows: Sequence[Row]) -> str:
    """Devices and torch versions the runs report."""
    devices = sorted({row.device or row.cost_device for row in rows if row.device or row.cost_device})
    versions = sorted({row.torch for row in rows if row.torch})
    return f"device {', '.join(devices) or 'not recorded'}, torch {', '.join(versions) or 'not recorded'}"


def commands(rows: Sequence[Row]) -> list[str]:
    """The commands that made the rows, each once."""
    return list(dict.fromkeys(row.command for row in rows if row.command))


def accuracy_title(series: Sequence[Series], sizes: Sequence[int]) -> str:
    """What the accuracy picture shows: the change from the largest to the smallest batch size, if epochs are equal."""
    changes = []
    for one in series:
        ends = [one.cells[size] for size in (sizes[0], sizes[-1]) if size in one.cells and one.cells[size].values]
        if len(ends) == 2 and ends[0].finished[0].epochs == ends[1].finished[0].epochs:
            changes.append((one, ends[0].mean - ends[1].mean))
    if len(sizes) < 2 or len(changes) < 2 or len({one.model for one, _ in changes}) > 1:
        return "Accuracy by batch size"
    texts = ", ".join(f"{one.label} {change:+.1f}".replace("-", "−") for one, change in changes)
    return f"From batch size {sizes[-1]} to {sizes[0]}: {texts} points"


def _document(name: str, body: str) -> str:
    light, dark = plots.themes()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(name)}</title>
<style>
:root {{ {_variables(LIGHT | light)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK | dark)} }} }}
{STYLE.read_text(encoding="utf-8")}</style>
</head>
<body><main>
{body}
</main></body>
</html>
"""


def _variables(values: dict[str, str]) -> str:
    return " ".join(f"{name}: {value};" for name, value in values.items())


def _part(part: Part) -> str:
    pictures = "".join(_figure(svg, "") for svg in part.pictures)
    commands = "".join(f"<pre>{escape(command)}</pre>" for command in part.commands)
    content = f'<div class="panels">{pictures}</div>{_table(part.table)}{_list(part.remarks, "remarks")}{commands}'
    return _section(part.title, content)


def _section(name: str, content: str) -> str:
    return f"<section><h2>{escape(name)}</h2>\n{content}\n</section>"


def _curves(results: Results, series: Sequence[Series], sizes: Sequence[int]) -> str:
    sizes = [size for size in sizes if any(line["batch_size"] == size for line in results.curves)]
    figures = [_figure(plots.curves_plot(series, results.curves, size), f"batch size {size}") for size in sizes]
    if not figures:
        return ""
    return _section("Accuracy by epoch", f'<div class="panels">{"".join(figures)}</div>')


def _figure(svg: str, caption: str) -> str:
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{caption}{svg}</figure>"


def _chips(series: Sequence[Series]) -> str:
    """Mean accuracies in large type beside the picture: the first thing to see."""
    blocks = []
    for size in sorted({size for one in series for size in one.cells}):
        cells = [(one, one.cells[size]) for one in series if size in one.cells and one.cells[size].values]
        cells.sort(key=lambda pair: -pair[1].mean)
        main = main_budget(series, size)
        lines = [
            f"<li>{_dot(one)}<b>{cell.mean:.1f}{tables.budget_mark(cell, main)}</b>"
            f"<span>{escape(plots.name_of(one, series))}</span></li>"
            for one, cell in cells
        ]
        blocks.append(f'<div class="chip"><h3>batch size {size}</h3><ol>{"".join(lines)}</ol></div>')
    return f'<div class="chips">{"".join(blocks)}</div>'


def _table(table: Table, series: Sequence[Series] = ()) -> str:
    dots = {one.label: _dot(one) for one in series}
    head = "".join(f"<th{_align(table, i)}>{escape(name)}</th>" for i, name in enumerate(table.header))
    lines = []
    for row in table.rows:
        cells = "".join(f"<td{_align(table, i, cell)}>{_cell(cell, dots)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _align(table: Table, column: int, cell: Text | None = None) -> str:
    if column >= table.names:
        return ' class="number"'
    return ' class="long"' if cell and len(cell.text) > 30 else ""


def _cell(cell: Text, dots: dict[str, str]) -> str:
    text = f"<strong>{escape(cell.text)}</strong>" if cell.strong else escape(cell.text)
    quiet = ' class="quiet"' if cell.text in ("not run", "running", "failed") else ""
    small = f" <small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<span{quiet}>{dots.get(cell.text, '')}{text}</span>{small}"


def _dot(one: Series) -> str:
    return f'<span class="dot" style="background:var({plots.css_name(plots.style(one)[0])})"></span>'


def _list(texts: Sequence[str], kind: str) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>' if texts else ""


def _commands(rows: Sequence[Row]) -> str:
    return "".join(f"<pre>{escape(command)}</pre>" for command in commands(rows))


def measured_on(rows: Sequence[Row]) -> str:
    """Where the times and memory were measured; empty if nowhere."""
    devices = sorted({row.cost_device for row in rows if row.cost_device})
    return f"Measured on {', '.join(devices)}." if devices else ""


def _measured_on(rows: Sequence[Row]) -> str:
    return f'<p class="note">{escape(measured_on(rows))}</p>' if measured_on(rows) else ""


def _paper_note(rows: Sequence[Row]) -> list[str]:
    return [f"paper: {SOURCE}; {setting_of(rows[0].recipe)}."] if "paper" in tables.accuracy(rows).header else []


def _runs(rows: Sequence[Row]) -> str:
    finished, seeds = sum(row.finished for row in rows), len({row.seed for row in rows})
    return f"{finished} finished runs of {len(rows)}, {seeds} seed{'s' if seeds > 1 else ''}"
