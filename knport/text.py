"""Tables on a terminal or in a log: aligned plain text for `print`, coloured columns for `rich.print`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Row = Sequence[str]


def aligned(heading: Row, rows: Iterable[Row], *, right: Iterable[int] = ()) -> str:
    """Columns of plain text under a heading; those whose number is in `right` are flush right, the last runs on."""
    lines, right = [heading, *rows], set(right)
    last = len(heading) - 1
    widths = [max(len(line[i]) for line in lines) for i in range(len(heading))]

    def cell(text: str, i: int) -> str:
        if i in right:
            return text.rjust(widths[i])
        return text if i == last else text.ljust(widths[i])

    return "\n".join("  ".join(cell(text, i) for i, text in enumerate(line)).rstrip() for line in lines)


def coloured(heading: Row, rows: Iterable[Row], *, right: Iterable[int] = (), styles: dict[str, str] | None = None):
    """The same as a `rich.table.Table`; `styles` is the colour of a cell by its text."""
    from rich.table import Table
    from rich.text import Text

    right = set(right)
    table = Table()
    for i, name in enumerate(heading):
        table.add_column(name, justify="right" if i in right else "left")
    for row in rows:
        table.add_row(*(Text(text, style=(styles or {}).get(text, "")) for text in row))
    return table
