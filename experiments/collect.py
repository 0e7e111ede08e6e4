"""From run folders to rows: what a comparison folder holds.

One run folder per cell of the grid (`run.json`, `log.csv`), and `compare.json` with what no run knows: the planned
cells, the command, the measured costs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.results import CURVE_COLUMNS, Cost, Key, Results, Row, number, write_text
from knport.errors import KNPortError

NOTES = "compare.json"
RESULT_COLUMNS = ("top1", "best_top1", "miou", "best_miou", "pixel_accuracy", "mean_accuracy")


def collect(folder: Path) -> Results:
    """Gather every run folder under `folder`, with the planned cells and costs of `compare.json` where there is one.

    A cell that was planned and never started is a row with status "not run".
    """
    notes = read_notes(folder)
    rows: dict[Key, Row] = {}
    curves: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*/run.json")):
        row = row_of_run(read_json(path))
        rows[row.key] = row
        curves += curve_of_run(row, path.with_name("log.csv"))
    planned = [Row(**cell) for cell in notes["cells"]]
    rows |= {cell.key: _planned_and_found(cell, rows.get(cell.key, cell)) for cell in planned}
    return Results(tuple(_with(row, **notes["costs"].get(cost_key(row), {})) for row in rows.values()), tuple(curves))


def row_of_run(record: Mapping[str, Any]) -> Row:
    """One row from the content of a `run.json`."""
    run, result, environment = record["run"], record.get("result") or {}, record.get("environment") or {}
    known = {name: run.get(name) for name in ("recipe", "model", "norm", "batch_size", "seed", "epochs", "lr")}
    counts = {name: record.get(name) for name in ("classes", "train_images", "test_images", "parameters")}
    known["epochs"] = result.get("epochs", known["epochs"])  # of a run by steps, those it came to
    names = ("steps", "train_loss", "test_loss", "seconds", *(name for name in result if name in RESULT_COLUMNS))
    score = next((name.removeprefix("best_") for name in result if name.startswith("best_")), "top1")
    return Row(
        **known,
        **counts,
        **{name: result.get(name) for name in names},
        score=score,
        dropout=run.get("dropout"),
        device=str(environment.get("device", "")),
        torch=str(environment.get("torch", "")),
        status=record.get("status", "running"),
        reason=str(record.get("error") or record.get("reason") or ""),
    )


def curve_of_run(row: Row, path: Path) -> list[dict[str, Any]]:
    """The evaluations of one run's `log.csv`; empty where the run has logged nothing yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = [{name: number(line.get(name)) for name in CURVE_COLUMNS} for line in csv.DictReader(file)]
    return [{"recipe": row.recipe, **row.key._asdict(), **line} for line in lines]


def cost_key(row: Row) -> str:
    """The key of a network's cost in `compare.json`: costs do not depend on the seed."""
    return f"{row.model} {row.norm} {row.batch_size}"


def read_notes(folder: Path) -> dict[str, Any]:
    """The content of `compare.json`, empty where there is none: `cells` (planned rows) and `costs` by `cost_key`."""
    path = folder / NOTES
    return {"cells": [], "costs": {}} | (read_json(path) if path.exists() else {})


def write_notes(folder: Path, cells: Iterable[Row], costs: Mapping[str, Cost]) -> None:
    """Write `compare.json`; cells of earlier comparisons in the same folder are kept."""
    old = read_notes(folder)
    kept = {Row(**cell).key: cell for cell in old["cells"]} | {row.key: _filled(row) for row in cells}
    notes = {"cells": list(kept.values()), "costs": old["costs"] | {key: _filled(c) for key, c in costs.items()}}
    write_text(folder / NOTES, json.dumps(notes, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        KNPortError: the file is damaged; the message names it.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise KNPortError(f"{path}: not valid JSON ({error}); remove the file or its folder and run again") from error


def _planned_and_found(planned: Row, found: Row) -> Row:
    """Command and original are only known to the plan, and so is a failure that a run could not record itself."""
    known = {name: getattr(planned, name) for name in ("command", "original", "score")}
    if planned.status == "failed" and not found.finished:
        known |= {"status": "failed", "reason": planned.reason}
    return _with(found, **known)


def _with(row: Row, **values: Any) -> Row:
    return Row(**{**asdict(row), **{k: v for k, v in values.items() if v not in (None, "")}})


def _filled(record: Row | Cost) -> dict[str, Any]:
    return {name: value for name, value in asdict(record).items() if value not in (None, "")}
