"""The tables of a comparison as text, for every medium: report page, Markdown, README, terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import NamedTuple

from experiments.results import Row
from experiments.summary import Cell, batch_sizes_of, best_norms, format_cell, main_budget, rankings, series_of

OTHER_BUDGET = "†"


class Text(NamedTuple):
    """A table cell: its text, whether it is the best of its column, a remark in small print beside it."""

    text: str
    strong: bool = False
    small: str = ""


class Table(NamedTuple):
    """`names` is the number of leading columns that hold names; the others hold numbers and are right-aligned."""

    header: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]
    names: int = 2

    def markdown(self) -> str:
        """As a GitHub table; the best value of a column is bold."""
        rule = ["---"] * self.names + ["---:"] * (len(self.header) - self.names)
        lines = [self.header, rule, *([_markdown(cell) for cell in row] for row in self.rows)]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Section(NamedTuple):
    """A part of the report: SVG pictures, a table, remarks in small print and the commands that made it."""

    title: str
    pictures: tuple[str, ...]
    table: Table
    remarks: tuple[str, ...]
    commands: tuple[str, ...]
    lead: str = ""
    """A sentence before the table."""

    def markdown(self) -> list[str]:
        """As paragraphs of Markdown, without pictures."""
        texts = [f"## {self.title}", self.lead, self.table.markdown(), "\n".join(f"- {text}" for text in self.remarks)]
        return [text for text in texts if text] + [f"```\n{command}\n```" for command in self.commands]


def accuracy(rows: Iterable[Row]) -> Table:
    """Networks down, batch sizes across: mean ± SD of the score over seeds, and the paper's value if it has one."""
    rows = list(rows)
    series, sizes = series_of(rows), batch_sizes_of(rows)
    papers = {size for size in sizes if any(s.cells[size].published for s in series if size in s.cells)}
    header = ["model", "norm"]
    for size in sizes:
        header += [f"batch size {size}"] + ["paper"] * (size in papers)
    best = {size: best_norms(series, size) for size in sizes}
    main = {size: main_budget(series, size) for size in sizes}
    lines = []
    for one in series:
        line = [Text(one.model), Text(one.label)]
        for size in sizes:
            cell = one.cells.get(size)
            line.append(_accuracy_cell(cell, (one.model, one.norm) in best[size], main[size]))
            if size in papers:
                line.append(Text(f"{cell.published:.1f}" if cell and cell.published else ""))
        lines.append(tuple(line))
    return _without_single_model(Table(tuple(header), tuple(lines)))


FURTHER = (("pixel_accuracy", "pixel accuracy"), ("mean_accuracy", "mean accuracy"), ("top5", "top-5"))


def further(rows: Iterable[Row]) -> Table | None:
    """The other measures of segmentation, as mean ± SD over seeds; None where nothing else was measured."""
    rows = list(rows)
    known = [(name, label) for name, label in FURTHER if any(getattr(row, name, None) is not None for row in rows)]
    if not known:
        return None
    header = ("model", "norm", "batch size", *(label for _, label in known))
    lines = []
    for one in series_of(rows):
        for size, cell in sorted(one.cells.items()):
            values = [Text(spread([getattr(row, name) for row in cell.finished])) for name, _ in known]
            lines.append((Text(one.model), Text(one.label), Text(str(size)), *values))
    return _without_single_model(Table(header, tuple(lines), names=3))


def spread(values: Iterable[float | None], digits: int = 1) -> str:
    """``41.9 ± 0.4``, without SD for one value, "" for none."""
    values = [value for value in values if value is not None]
    if not values:
        return ""
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{sd}"


def costs(rows: Iterable[Row]) -> Table:
    """Batch sizes and networks down; what was not measured stays blank."""
    header = ("batch size", "model", "norm", "parameters", "MACs per image", "ms per step", "times original")
    header += ("peak MiB", "saved MiB")
    lines = []
    rows = list(rows)
    for size in batch_sizes_of(rows):
        for one in series_of(rows):
            row = next((r for r in rows if (r.model, r.norm, r.batch_size) == (one.model, one.norm, size)), None)
            if row and (row.parameters or row.ms_per_step):
                lines.append((Text(str(size)), Text(one.model), Text(one.label), *_cost_cells(row)))
    return _without_single_model(_without_blank_columns(Table(header, tuple(lines), names=3)))


def settings(rows: Iterable[Row]) -> Table:
    """What was run: one line per batch size and setting, networks that share it together."""
    header = ("batch size", "networks", "epochs", "steps", "learning rate", "dropout", "training images")
    header += ("test images", "classes", "seeds")
    rows = [row for row in rows if row.status != "not run"]
    groups: dict[tuple, list[Row]] = {}
    for row in sorted(rows, key=lambda r: r.batch_size):
        key = (row.batch_size, row.epochs, row.lr, row.dropout, row.train_images, row.test_images, row.classes)
        groups.setdefault(key, []).append(row)
    lines = []
    for (size, epochs, lr, dropout, train, test, classes), group in groups.items():
        models = {row.model for row in rows}
        names = [s.label if len(models) == 1 else f"{s.model} {s.label}" for s in series_of(group)]
        steps = max((row.steps or 0 for row in group), default=0)
        seeds = sorted({row.seed for row in group})
        cells = (str(size), ", ".join(names), _plain(epochs), _count(steps or None), _plain(lr), _plain(dropout))
        cells += (_count(train), _count(test), _plain(classes), " ".join(map(str, seeds)))
        lines.append(tuple(map(Text, cells)))
    return _without_blank_columns(Table(header, tuple(lines)))


def remarks(rows: Iterable[Row]) -> list[str]:
    """What a reader must know before trusting the table: failures, runs that are missing, unequal budgets."""
    rows = list(rows)
    series = series_of(rows)
    notes = [f"Failed: {row.key}{': ' + row.reason if row.reason else ''}." for row in rows if row.status == "failed"]
    open_ = [row for row in rows if row.status not in ("failed", "finished")]
    if open_:
        notes.append(
            f"{len(open_)} of {len(rows)} runs have not finished: " + ", ".join(str(r.key) for r in open_) + "."
        )
    for size in batch_sizes_of(rows):
        main = main_budget(series, size)
        cells = [(s, s.cells[size]) for s in series if size in s.cells]
        ranked = {(s.model, s.norm) for found in rankings(series, size) if len(found) > 1 for s in found}
        other = [(s, f"{s.model} {s.label}") for s, cell in cells if cell.finished and cell.budget != main]
        alone = [name for s, name in other if (s.model, s.norm) not in ranked]
        together = [name for s, name in other if (s.model, s.norm) in ranked]
        mixed = [f"{s.model} {s.label}" for s, cell in cells if len({(r.lr, r.steps) for r in cell.finished}) > 1]
        if alone:
            notes.append(f"{OTHER_BUDGET} {', '.join(alone)} at batch size {size}: another budget, not ranked.")
        if together:
            names = ", ".join(together)
            notes.append(f"{OTHER_BUDGET} {names} at batch size {size}: another budget, ranked among themselves.")
        if mixed:
            notes.append(f"{', '.join(mixed)} at batch size {size}: the seeds differ in budget or learning rate.")
    return notes


def budget_mark(cell: Cell, main: tuple) -> str:
    """A dagger on a result that was not made under the main budget."""
    return OTHER_BUDGET if cell.budget != main else ""


def _accuracy_cell(cell: Cell | None, best: bool, main: tuple) -> Text:
    if cell is None or cell.mean is None:
        return Text(format_cell(cell))
    small = f"n={len(cell.values)}" + (f", {cell.failed} failed" if cell.failed else "")
    return Text(format_cell(cell) + budget_mark(cell, main), best, small)


def _cost_cells(row: Row) -> tuple[Text, ...]:
    return (
        Text(_amount(row.parameters)),
        Text(_amount(row.macs)),
        _median(row.ms_per_step, row.ms_per_step_q20, row.ms_per_step_q80),
        _slowdown(row),
        Text(_digits(row.peak_mib)),
        Text(_digits(row.saved_mib)),
    )


def _slowdown(row: Row) -> Text:
    """To the original of its backbone, which need not have been measured beside it."""
    if row.norm == "original" and row.slowdown == 1:
        return Text("" if row.original else "1")
    return _median(row.slowdown, row.slowdown_q20, row.slowdown_q80)


def _median(value: float | None, low: float | None, high: float | None) -> Text:
    return Text("") if value is None else Text(_digits(value), small=f"{_digits(low)} to {_digits(high)}")


def _digits(value: float | None) -> str:
    """Three digits, never an exponent."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _amount(value: float | None) -> str:
    if value is None:
        return ""
    return f"{_digits(value / 1e6)} M" if value >= 1e6 else f"{_digits(value / 1e3)} k"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _without_single_model(table: Table) -> Table:
    """One model is named in the title and need not be repeated in every line."""
    column = table.header.index("model")
    return table if len({row[column] for row in table.rows}) > 1 else _without(table, {column})


def _without_blank_columns(table: Table) -> Table:
    filled = {i for row in table.rows for i, cell in enumerate(row) if cell.text}
    return _without(table, set(range(table.names, len(table.header))) - filled)


def _without(table: Table, columns: set[int]) -> Table:
    header, *rows = [tuple(x for i, x in enumerate(line) if i not in columns) for line in (table.header, *table.rows)]
    return Table(header, tuple(rows), table.names - sum(i < table.names for i in columns))


def _markdown(cell: Text) -> str:
    text = f"**{cell.text}**" if cell.strong else cell.text
    return f"{text} ({cell.small})" if cell.small else text
