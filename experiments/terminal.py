"""A table on the terminal: rich where there is one, aligned plain text where output goes to a file or a log."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable

from experiments.tables import Table, Text


def show(table: Table, console: Console | None = None) -> None:
    """Print a table to the console (standard output by default)."""
    console = console or Console()
    if console.is_terminal:
        console.print(_rich(table))
    else:
        console.file.write(plain(table))


def plain(table: Table) -> str:
    """Aligned columns of plain text; the best value of a column carries a star."""
    rows = [[_one(cell) for cell in row] for row in table.rows]
    widths = [max(map(len, column)) for column in zip(table.header, *rows, strict=True)]
    lines = [table.header, ["-" * width for width in widths], *rows]
    aligned = [
        [text.ljust(width) if i < table.names else text.rjust(width) for i, (text, width) in enumerate(pairs)]
        for pairs in (list(zip(line, widths, strict=True)) for line in lines)
    ]
    return "\n".join("  ".join(line).rstrip() for line in aligned) + "\n"


def _one(cell: Text) -> str:
    return ("* " if cell.strong else "") + cell.text + (f" ({cell.small})" if cell.small else "")


def _rich(table: Table) -> RichTable:
    shown = RichTable()
    for i, name in enumerate(table.header):
        shown.add_column(name, justify="left" if i < table.names else "right")
    for row in table.rows:
        small = [f" [dim]{cell.small}[/dim]" if cell.small else "" for cell in row]
        texts = [f"[bold green]{cell.text}[/bold green]" if cell.strong else cell.text for cell in row]
        shown.add_row(*(text + extra for text, extra in zip(texts, small, strict=True)))
    return shown
