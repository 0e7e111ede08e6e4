"""What the report is made from: the comparisons and the other results that lie in folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from experiments import activations, predictions, privacy_report
from experiments.collect import NOTES, collect, read_json
from experiments.originals import with_originals
from experiments.results import Results, read
from experiments.tables import Section
from knport.errors import KNPortError


class Prediction(NamedTuple):
    """What one network made of one test image: three data URIs."""

    file: str
    model: str
    norm: str
    batch_size: int
    image: str
    truth: str
    predicted: str


class Comparison(NamedTuple):
    """One recipe's rows of one folder, with what belongs to them."""

    name: str
    results: Results
    stages: tuple[activations.Stage, ...] = ()
    predictions: tuple[Prediction, ...] = ()


class Found(NamedTuple):
    """Everything that a folder holds for the report."""

    comparisons: tuple[Comparison, ...]
    sections: tuple[Section, ...]
    """Of private training."""


def find(folder: Path) -> Found:
    """The comparisons (run folders, or else a `results.csv`) and tables of private training in a folder.

    Raises:
        KNPortError: no such folder, nothing in it, or a damaged file.
    """
    if not folder.is_dir():
        raise KNPortError(f"{folder}: no such folder; expected one with run folders or a results.csv")
    private = tuple(privacy_report.sections(folder))
    if private and not holds_runs(folder) and not (folder / "results.csv").exists():
        return Found((), private)
    results = collect(folder)
    results = results if results.rows else read(folder)
    if not results.rows:
        raise KNPortError(f"{folder}: no run in it; start one with `python -m experiments compare RECIPE`")
    return Found(tuple(_split(folder, results)), private)


def holds_runs(folder: Path) -> bool:
    """Whether there are run folders, or the plan of a comparison."""
    return (folder / NOTES).exists() or any(folder.glob("*/run.json"))


def is_comparison(path: Path) -> bool:
    """Whether a `results.csv` is a table of runs; other programs here write files of that name too."""
    with path.open(newline="") as file:
        return {"recipe", "model", "norm", "batch_size", "seed", "status"} <= set(csv.DictReader(file).fieldnames or ())


def read_stages(folder: Path) -> list[activations.Stage]:
    """Activation statistics in the folder and its run folders, each run's once."""
    files = [folder / activations.FILE, *sorted(folder.glob(f"*/{activations.FILE}"))]
    found = {stage[:5]: stage for file in files for stage in activations.read(file)}
    return list(found.values())


def _split(folder: Path, results: Results) -> list[Comparison]:
    """A folder with several recipes is several comparisons."""
    stages, pictures = read_stages(folder), _read_predictions(folder)
    found = []
    for recipe in dict.fromkeys(row.recipe for row in results.rows):
        rows = with_originals(row for row in results.rows if row.recipe == recipe)
        curves = tuple(line for line in results.curves if line.get("recipe", recipe) == recipe)
        networks = {(row.model, row.norm, row.batch_size) for row in rows}
        mine = tuple(stage for stage in stages if stage[:3] in networks)
        drawn = tuple(picture for picture in pictures if picture[1:4] in networks)
        found.append(Comparison(folder.name, Results(rows, curves), mine, drawn))
    return found


def _read_predictions(folder: Path) -> Sequence[Prediction]:
    found = []
    for run in sorted(path.parent for path in folder.glob("*/run.json")):
        files = sorted((run / predictions.FOLDER).glob("*.png"))
        if files:
            settings = read_json(run / "run.json")["run"]
            network = settings["model"], settings["norm"], settings["batch_size"]
            found += [Prediction(path.stem, *network, *predictions.thirds(path)) for path in files]
    return found
