"""The two tables of a comparison: `results.csv`, one row per run, and `curves.csv`, one row per evaluation.

The tables alone are enough to make the report again, so they are what gets committed. `collect.py` makes them from run
folders.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

from knport.errors import KNPortError

SCORES = ("top1", "top5", "miou", "pixel_accuracy", "mean_accuracy")  # in percent
CURVE_COLUMNS = ("step", "epoch", "lr", "train_loss", "test_loss", *SCORES, "images_per_second", "seconds")


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a CSV that only grows, and the header to a new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


class Key(NamedTuple):
    """What tells one run of a comparison from another."""

    model: str
    norm: str
    batch_size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.model} {self.norm} batch {self.batch_size} seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one training step of one network costs; what nobody measured is None.

    Times are milliseconds per step: median and 20 % / 80 % quantiles over rounds. `slowdown` is the time divided by
    that of its backbone's `original` norm in the same round. Memory is in MiB. `macs` are multiply-accumulates of
    one image's forward pass in convolutions and linear layers.
    """

    norm_family: str = ""
    parameters: int | None = None
    macs: int | None = None
    ms_per_step: float | None = None
    ms_per_step_q20: float | None = None
    ms_per_step_q80: float | None = None
    slowdown: float | None = None
    slowdown_q20: float | None = None
    slowdown_q80: float | None = None
    peak_mib: float | None = None
    saved_mib: float | None = None
    cost_device: str = ""


@dataclass(frozen=True, kw_only=True)
class Row(Cost):
    """One run: its setting, its result (scores in percent) and its network's cost. One line of `results.csv`.

    `score` names the column that runs are ranked by: ``top1``, or ``miou`` of segmentation. `original` is the network
    that a hand-built one is the kernel normalized form of; both are compared as one backbone.
    """

    recipe: str
    model: str
    norm: str
    batch_size: int
    seed: int
    original: str = ""
    score: str = "top1"
    epochs: float | None = None
    steps: int | None = None
    lr: float | None = None
    dropout: float | None = None
    train_images: int | None = None
    test_images: int | None = None
    classes: int | None = None
    top1: float | None = None
    best_top1: float | None = None
    miou: float | None = None
    best_miou: float | None = None
    pixel_accuracy: float | None = None
    mean_accuracy: float | None = None
    train_loss: float | None = None
    test_loss: float | None = None
    seconds: float | None = None
    device: str = ""
    torch: str = ""
    status: str = "not run"
    reason: str = ""
    command: str = ""

    @property
    def key(self) -> Key:
        """The run's place in the grid."""
        return Key(self.model, self.norm, self.batch_size, self.seed)

    @property
    def value(self) -> float | None:
        """The score after the last step, in percent."""
        return getattr(self, self.score)

    @property
    def backbone(self) -> str:
        """What a network is compared within: a hand-built kernel normalized one stands beside its original."""
        return self.original or self.model

    @property
    def finished(self) -> bool:
        """Whether the run ended with a score."""
        return self.status == "finished" and self.value is not None


COST_FIELDS = tuple(f.name for f in fields(Cost))
COLUMNS = (*(f.name for f in fields(Row) if f.name not in COST_FIELDS), *COST_FIELDS)
TYPES = get_type_hints(Row)
DECIMALS = dict.fromkeys((*SCORES, "best_top1", "best_miou"), 2)
DECIMALS |= {"train_loss": 4, "test_loss": 4, "seconds": 1, "images_per_second": 1}
WORDS = ("recipe", "model", "norm")


class Results(NamedTuple):
    """The rows of `results.csv` and the rows of `curves.csv` (dicts: recipe, the `Key` fields, `CURVE_COLUMNS`)."""

    rows: tuple[Row, ...]
    curves: tuple[dict[str, Any], ...]


def read(path: Path) -> Results:
    """Read `results.csv` (a file, or the folder it lies in) and the `curves.csv` beside it, if any.

    Raises:
        KNPortError: there is no such file, or a column is missing.
    """
    path = path / "results.csv" if path.is_dir() else path
    if not path.exists():
        raise KNPortError(f"{path}: no such file; `python -m experiments compare` writes one, or name a run folder")
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    required = [f.name for f in fields(Row) if f.default is MISSING]
    missing = [name for name in required if lines and name not in lines[0]]
    if missing:
        raise KNPortError(f"{path}: columns missing: {', '.join(missing)}; expected those of experiments.results.Row")
    beside = path.with_name("curves.csv")
    return Results(tuple(_parse_row(line) for line in lines), tuple(_read_curves(beside)) if beside.exists() else ())


def write(folder: Path, results: Results) -> None:
    """Write `results.csv` and `curves.csv`, each by renaming a finished temporary file."""
    rows = [{name: _text(name, getattr(row, name)) for name in COLUMNS} for row in results.rows]
    write_text(folder / "results.csv", _csv(COLUMNS, rows))
    used = [name for name in CURVE_COLUMNS if any(line.get(name) is not None for line in results.curves)]
    names = ("recipe", *Key._fields, *(used or CURVE_COLUMNS))
    curves = [{name: _text(name, line.get(name)) for name in names} for line in results.curves]
    write_text(folder / "curves.csv", _csv(names, curves))


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old content or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _csv(names: Iterable[str], lines: Iterable[Mapping[str, str]]) -> str:
    names, buffer = list(names), StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


def _text(name: str, value: Any) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if name in DECIMALS:
        return f"{value:.{DECIMALS[name]}f}"
    digits = 8 if name == "lr" else 4
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def _parse_row(line: Mapping[str, str]) -> Row:
    found = Row(**{name: _parse(TYPES[name], line[name]) for name in COLUMNS if line.get(name)})
    if found.score not in SCORES:
        raise KNPortError(f"score is {found.score!r} in a results.csv; expected one of {', '.join(SCORES)}")
    return found


def _parse(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    return float(text) if float in get_args(kind) else int(text)


def _read_curves(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    return [{name: text if name in WORDS else number(text) for name, text in line.items()} for line in lines]


def number(text: str | None) -> float | int | None:
    """The number a CSV field holds, None for an empty field."""
    if not text:
        return None
    value = float(text)
    return int(value) if value.is_integer() and "." not in text and "e" not in text else value
