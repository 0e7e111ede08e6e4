"""The table of measurements: one CSV that only grows, a row per variant of a case."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from knport.errors import KNPortError

OUT = Path(__file__).parents[1] / "results" / "benchmarks" / "benchmarks.csv"
DIGITS = 5
WORDS = {float: "a number", int: "an integer"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant of one case; what nobody measured is None, an empty field in the file.

    Times are milliseconds of one step: median and quartiles over `repeats`. `ratio` is the time divided by that of
    `baseline` in the same round, `extra_ms` the difference of the two: medians and quartiles over the rounds that both
    took part in. Memory is in MiB.
    """

    date: str = ""
    commit: str = ""
    """Of the checkout; + where files differ from it."""
    device: str = ""
    torch: str = ""
    threads: int | None = None
    benchmark: str
    case: str
    variant: str
    mode: str
    """ "training" (forward and backward) or "inference" (evaluation mode, no gradients)."""
    engine: str = "eager"
    """ "eager" or "compiled"."""
    layout: str = "channels_last"
    dtype: str = "float32"
    """ "float32", or what autocast computes in."""
    N: int | None = None
    C_in: int | None = None
    C_out: int | None = None
    H: int | None = None
    W: int | None = None
    k: int | None = None
    stride: int | None = None
    dropout: float | None = None
    form: str = ""
    median_ms: float | None = None
    q25_ms: float | None = None
    q75_ms: float | None = None
    repeats: int | None = None
    baseline: str = ""
    ratio: float | None = None
    ratio_q25: float | None = None
    ratio_q75: float | None = None
    extra_ms: float | None = None
    extra_q25_ms: float | None = None
    extra_q75_ms: float | None = None
    peak_memory_mib: float | None = None
    """The most that was alive during a step beyond what was alive before it."""
    largest_tensor_mib: float | None = None
    """The largest single tensor made during a step."""
    saved_mib: float | None = None
    """What autograd keeps for the backward pass, the input among it, parameters and buffers not."""
    graph_breaks: int | None = None
    note: str = ""
    """The scale where it is not the paper's, or why there is no time."""


COLUMNS = tuple(field.name for field in fields(Row))
TYPES = {
    name: next((k for k in get_args(kind) if k is not type(None)), kind) for name, kind in get_type_hints(Row).items()
}


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows at the end of the file, which is made where there is none; nothing in it is changed.

    Raises:
        KNPortError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists() or path.stat().st_size == 0
    if not new:
        _check_columns(path)
    with path.open("a", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            table.writeheader()
        table.writerows({name: _text(value) for name, value in asdict(row).items()} for row in rows)


def read(path: Path) -> list[Row]:
    """All rows, oldest first.

    Raises:
        KNPortError: no such file, other columns, or a field that is no number where one is expected.
    """
    if not path.exists():
        raise KNPortError(f"{path}: no such file; `python -m experiments.benchmarks run --out {path}` makes it")
    _check_columns(path)
    with path.open(newline="", encoding="utf-8") as file:
        return [_parse(path, number, line) for number, line in enumerate(csv.DictReader(file), 2)]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Of every measurement that was repeated, the last one."""
    return list({_key(row): row for row in rows}.values())


def before(rows: Iterable[Row], count: int) -> list[Row]:
    """All rows but the last `count` of every measurement."""
    rows = list(rows)
    left = Counter(_key(row) for row in rows)
    found = []
    for row in rows:
        left[_key(row)] -= 1
        if left[_key(row)] >= count:
            found.append(row)
    return found


def _key(row: Row) -> tuple:
    return (
        row.device,
        row.threads,
        row.benchmark,
        row.case,
        row.variant,
        row.mode,
        row.engine,
        row.layout,
        row.dtype,
        row.note,
    )


def _check_columns(path: Path) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        header = tuple(next(csv.reader(file), ()))
    if header != COLUMNS:
        different = sorted(set(header) ^ set(COLUMNS)) or "their order"
        raise KNPortError(
            f"{path}: its columns are not those of this version (different: {different}); rows are only ever added, "
            "so give another file with --out, or move this one away"
        )


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def _parse(path: Path, number: int, line: dict[str, str]) -> Row:
    values = {}
    for name, text in line.items():
        try:
            if name in TYPES and text:
                values[name] = TYPES[name](text)
        except ValueError:
            expected = WORDS[TYPES[name]]
            raise KNPortError(f"{path}, line {number}: {name}={text!r}; expected {expected} or nothing") from None
    return Row(**values)
