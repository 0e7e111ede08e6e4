"""Accuracy by form of dropout: the evidence for the default. One CSV row per finished run, appended.

    python -m experiments.dropout_forms --data-dir DIR

trains one network with each form and seed on the same images in the same order; what is there is not trained again.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import tyro

from experiments.results import append_rows
from experiments.run import Run, resolve
from experiments.train import train

RESULTS = Path("experiments/results/dropout_forms/results.csv")
FORMS = ("moments", "shared", "unit")
COLUMNS = ("recipe", "model", "norm", "batch_size", "epochs", "lr", "classes", "dropout", "dropout_form", "seed")
MEASURED = ("top1", "seconds", "device", "torch")


def dropout_forms(
    *,
    data_dir: str = "data",
    recipe: str = "cifar100",
    model: str = "cifar_resnet8x2",
    batch_size: int = 32,
    epochs: int = 3,
    lr: float = 0.05,
    classes: int = 20,
    dropout: float | None = None,
    forms: Sequence[str] = FORMS,
    seeds: Sequence[int] = (0, 1, 2),
    out: Path = RESULTS,
) -> None:
    """Train `model` (converted) with every form of dropout and seed, and print means and SDs.

    Args:
        data_dir: folder of the data set, or its parent.
        recipe, model, batch_size, epochs, lr, classes, dropout: as `train`.
        forms: of dropout, see `knport.KNConv2d`.
        seeds: of initialization, order, augmentation and dropout.
        out: the CSV.
    """
    setting = {"model": model, "norm": "kernel", "batch_size": batch_size, "epochs": epochs, "lr": lr}
    setting |= {"classes": classes, "dropout": dropout, "data_dir": data_dir}
    for seed in seeds:  # forms side by side, so that an interrupted grid can be compared
        for form in forms:
            where = f"runs/dropout_forms/{model}-b{batch_size}-{form}-s{seed}"
            run = resolve(recipe, **setting, seed=seed, dropout_form=form, run_dir=where)
            if _key(run.flat()) not in {_key(row) for row in read(out)}:
                _append(out, run, train(run, quiet=True))
                print(f"{form}, seed {seed}: {read(out)[-1]['top1']} %", flush=True)
    print(summary(read(out)))


def summary(rows: Sequence[dict[str, str]]) -> str:
    """One line per form: mean and SD of the accuracy over seeds, and the time of a run."""
    lines = []
    for form in dict.fromkeys(row["dropout_form"] for row in rows):
        mine = [row for row in rows if row["dropout_form"] == form]
        accuracy = [float(row["top1"]) for row in mine]
        spread = f" +- {statistics.stdev(accuracy):.2f}" if len(accuracy) > 1 else ""
        seconds = statistics.median(float(row["seconds"]) for row in mine)
        lines.append(
            f"{form:8s} {statistics.mean(accuracy):6.2f}{spread} % top-1 (n={len(accuracy)}), {seconds:.0f} s a run"
        )
    return "\n".join(lines)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of the CSV; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _key(values: dict) -> tuple[str, ...]:
    return tuple("" if values[name] is None else str(values[name]) for name in COLUMNS)


def _append(path: Path, run: Run, result: dict) -> None:
    device = "cpu" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    measured = (f"{result['top1']:.2f}", f"{result['seconds']:.0f}", device, torch.__version__.split("+")[0])
    columns = (*COLUMNS, *MEASURED)
    append_rows(path, columns, [dict(zip(columns, (*_key(run.flat()), *measured), strict=True))])


if __name__ == "__main__":
    tyro.cli(dropout_forms)
