"""Pieces of `report.html`: sections, tables, figures, lists, as HTML text."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from experiments import plots
from experiments.summary import Series
from experiments.tables import Section, Table, Text

STATES = ("not run", "running", "failed")


def section(name: str, content: str, level: int = 2) -> str:
    """A card with a heading; nothing where there is no content."""
    return f"<section><h{level}>{escape(name)}</h{level}>\n{content}\n</section>" if content else ""


def part(one: Section) -> str:
    """A `Section`: pictures, table, remarks, commands."""
    pictures = "".join(figure(svg) for svg in one.pictures)
    panels = f'<div class="panels">{pictures}</div>' if pictures else ""
    lead = f'<p class="note">{escape(one.lead)}</p>' if one.lead else ""
    return section(one.title, lead + panels + table(one.table) + bullets(one.remarks, "remarks") + blocks(one.commands))


def folded(name: str, content: str) -> str:
    """Shown when asked for."""
    return f"<details><summary>{escape(name)}</summary>\n{content}\n</details>"


def panels(figures: Sequence[str]) -> str:
    """Figures side by side where the screen is wide enough."""
    return f'<div class="panels">{"".join(figures)}</div>' if figures else ""


def figure(content: str, caption: str = "") -> str:
    """A picture with its caption."""
    caption = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{caption}{content}</figure>"


def table(one: Table, series: Sequence[Series] = ()) -> str:
    """A table that scrolls by itself where it is wider than the screen; norms carry their colour."""
    dots = {s.label: dot(s) for s in series}
    head = "".join(f"<th{_align(one, i)}>{escape(name)}</th>" for i, name in enumerate(one.header))
    lines = []
    for row in one.rows:
        cells = "".join(f"<td{_align(one, i, cell)}>{_cell(cell, dots)}</td>" for i, cell in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def dot(one: Series) -> str:
    """A spot in the colour of the network's norm."""
    return f'<span class="dot" style="background:var({plots.css_name(plots.style(one)[0])})"></span>'


def bullets(texts: Sequence[str], kind: str) -> str:
    """A list in small print."""
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<ul class="{kind}">{items}</ul>' if texts else ""


def note(text: str) -> str:
    """A line in small print."""
    return f'<p class="note">{escape(text)}</p>' if text else ""


def blocks(commands: Sequence[str]) -> str:
    """Commands to copy."""
    return "".join(f"<pre>{escape(command)}</pre>" for command in commands)


def _align(one: Table, column: int, cell: Text | None = None) -> str:
    if cell and cell.text.startswith("python "):
        return ' class="command"'
    if column >= one.names and one.header[column] not in ("command", "on", "version"):
        return ' class="number"'
    return ' class="long"' if cell and len(cell.text) > 30 else ""


def _cell(cell: Text, dots: dict[str, str]) -> str:
    text = escape(cell.text)
    if cell.text.startswith("python "):
        text = f"<code>{text}</code>"
    elif cell.text in dots:  # which stays with the first word
        first, _, rest = text.partition(" ")
        text = f'<span class="key">{dots[cell.text]}{first}</span> {rest}'.rstrip()
    else:
        text = text.replace("_", "_<wbr>")
    text = f"<strong>{text}</strong>" if cell.strong else text
    quiet = ' class="quiet"' if cell.text in STATES else ""
    small = f" <small>{escape(cell.small)}</small>" if cell.small else ""
    return f"<span{quiet}>{text}</span>{small}"
