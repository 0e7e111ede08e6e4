"""The papers' tables filled in: what was published, what was measured here on the whole data set, and how to run it."""

from __future__ import annotations

from collections.abc import Sequence

from experiments import paper_tables, tables
from experiments.labels import NORM_LABELS
from experiments.paper_table import TMLR, Column, Line, PaperTable, Value, kind_in
from experiments.paper_tables import TABLES
from experiments.published import standard_name
from experiments.results import Row
from experiments.tables import Section, Table, Text

READING = (
    "paper: the value of the final paper (TMLR 2024), that of the first submission (v1, 2022) in small print; in "
    "the tables of Kim et al. (2020), theirs. ours: mean ± SD of n seeds of our runs of the same cell on the whole "
    "data set, with their epochs. Runs on a part of the data stand in the comparisons above, not here."
)


def sections(rows: Sequence[Row]) -> list[Section]:
    """One section for each table of the papers."""
    found = [_section(table, rows) for table in TABLES]
    return [*found, _times()]


def measured(table: PaperTable, rows: Sequence[Row]) -> tuple[int, int]:
    """(cells of the table with runs of ours, all its cells)."""
    cells = [
        bool(ours(table, line, version, number, rows))
        for line in table.lines
        for version in line.values
        for number, value in enumerate(line.values[version])
        if value
    ]
    return sum(cells), len(cells)


def ours(table: PaperTable, line: Line, version: str, number: int, rows: Sequence[Row]) -> list[Row]:
    """Our finished runs of a cell: same recipe, network, norm and batch size, on all classes and training images."""
    column = table.columns[number]
    wanted = (table.recipes[version], line.model, kind_in(line, version), _batch_size(table, column, version))
    return [row for row in rows if _cell_of(row) == wanted and _whole(row, table) and row.dropout == line.dropout]


def command(table: PaperTable, line: Line, version: str) -> str:
    """What starts the runs of a line; B stands for the batch sizes of the columns."""
    words = ["python -m experiments train", table.recipes[version], "--model", line.model]
    norm = line.norm_of(version)
    words += ["--norm", norm] if norm != "original" else []
    words += ["--batch-size B"] if any(column.batch_size for column in table.columns) else []
    words += [f"--dropout {line.dropout:g}"] if line.dropout is not None else []
    return " ".join([*words, "--data-dir DIR"])


def _section(table: PaperTable, rows: Sequence[Row]) -> Section:
    header = ["network", "norm"]
    for column in table.columns:
        header += [f"{column.label}: paper", "ours"]
    lines = [_line(table, line, rows) for line in table.lines]
    done, cells = measured(table, rows)
    lead = f"Measured here: {done} of {cells} cells." if done else f"Not run here: none of the {cells} cells."
    setting = table.setting[0].upper() + table.setting[1:]
    body = Table((*header, "command"), tuple(lines))
    return Section(f"{table.name}: {table.title}", (), body, (f"Published: {setting}.",), (), lead)


def _line(table: PaperTable, line: Line, rows: Sequence[Row]) -> tuple[Text, ...]:
    cells = [Text(line.network), Text(NORM_LABELS.get(line.kind, line.kind))]
    latest = next(iter(line.values))
    for number in range(len(table.columns)):
        versions = {version: values[number] for version, values in line.values.items() if values[number]}
        cells += [_published(versions), _measured(table, line, number, rows)]
    return (*cells, Text(command(table, line, latest)))


def _published(versions: dict[str, Value]) -> Text:
    if not versions:
        return Text("")
    latest, *older = versions
    other = ", ".join(f"{version.split()[0]} {_number(versions[version])}" for version in older)
    return Text(_number(versions[latest]), small=other or ("" if latest == TMLR else latest.split()[0]))


def _number(value: Value) -> str:
    return f"{value.mean:.2f}" + (f" ± {value.sd:.2f}" if value.sd is not None else "")


def _measured(table: PaperTable, line: Line, number: int, rows: Sequence[Row]) -> Text:
    score = table.columns[number].score
    for version in line.values:
        found = ours(table, line, version, number, rows)
        if found:
            epochs = sorted({f"{row.epochs:g}" for row in found if row.epochs})
            small = f"n={len(found)}, {' or '.join(epochs)} epochs"
            return Text(tables.spread([getattr(row, score) for row in found], digits=2), small=small)
    return Text("not run")


def _times() -> Section:
    lines = tuple(tuple(map(Text, line)) for line in paper_tables.TIMES)
    table = Table(paper_tables.TIMES_HEADER, lines)
    lead = "As published, minutes and seconds per epoch. Ours are milliseconds per step, beside each comparison above."
    return Section("Table 6: time of an epoch of training", (), table, (), (), lead)


def _cell_of(row: Row) -> tuple[str, str, str, int]:
    kind = row.norm_family if row.norm == "original" else row.norm
    return row.recipe, standard_name(row.model), kind, row.batch_size


def _whole(row: Row, table: PaperTable) -> bool:
    return row.finished and row.classes == table.classes and row.train_images in (None, table.images)


def _batch_size(table: PaperTable, column: Column, version: str) -> int:
    return column.batch_size or table.batch_sizes[version]
