"""Measure a saved model again, exactly: every test image once, on any number of processes.

Takes a run folder (its last, best, or with a weight average the weights in training), or a folder of `knport.save`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import nn

import knport
from experiments import checkpoint, data
from experiments.grid import parse_fields
from experiments.models import KN_CONVS, build_for
from experiments.progress import Report
from experiments.run import Run, resolve
from experiments.run_folder import environment, write_text
from experiments.saved_run import read_run
from experiments.tasks import task_of
from experiments.train import start_accelerator
from knport.errors import KNPortError

Which = Literal["last", "best", "in_training"]
RECORD = "validate.json"


@dataclass(frozen=True)
class Saved:
    """Weights on disk and how to test them."""

    run: Run
    folder: Path
    """Where the record goes."""
    weights: Path
    """The file."""
    name: str
    """What it is called in the record."""
    logged: dict[str, Any]
    """What training said of it."""


def validate(
    folder: tyro.conf.Positional[Path],
    *,
    weights: Which = "last",
    data_dir: str | None = None,
    recipe: str = "",
    override: Sequence[str] = (),
    again: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Evaluate a saved model on its recipe's test images, and say whether that is what training logged.

    The numbers are kept in validate.json in the folder; the same weights and settings are not measured twice.

    Args:
        folder: of a run, or of `knport.save`.
        weights: of a run: those of the last step, the best ones, or in_training, which the average (`--ema`) follows.
        data_dir: folder of the data set, or its parent. None: the run's.
        recipe: of a folder of `knport.save`, which does not know its data.
        override: settings to change, as FIELD=VALUE, e.g. test_images=500 mixed_precision=bf16 scaling=unit.
        again: measure even if the numbers are there.
        quiet: say nothing.

    Returns:
        `test_loss` and the task's metrics in percent.

    Raises:
        KNPortError: no such folder, damaged weights, a model that does not fit the data.
    """
    changes = parse_fields(override) | ({} if data_dir is None else {"data_dir": data_dir})
    saved = _of_run(folder, weights, changes) if (folder / "run.json").exists() else _of_knport(folder, recipe, changes)
    accelerator = start_accelerator(saved.run)
    report = Report(str(saved.folder), not quiet and accelerator.is_main_process)
    key = _key(saved)
    known = _record(saved.folder).get(saved.name, {})
    accelerator.wait_for_everyone()  # all have read the record before it is written
    if known.get("key") == key and not again:
        report.note("measured before; --again measures anew")
        measured = known["measured"]
    else:
        measured = _measure(saved, accelerator)
        if accelerator.is_main_process:
            here = environment(accelerator.device, accelerator.num_processes)
            _write(saved, {"key": key, "measured": measured, "environment": here}, report)
    _tell(saved, measured, report)
    return measured


def _of_run(folder: Path, weights: Which, changes: dict[str, Any]) -> Saved:
    run, result = read_run(folder)
    # measuring needs as many processes as there happen to be, and no tracker
    run = run.but(processes=None, track=None, run_dir=str(folder)).but(**changes)
    run.validate()
    where, name = ("best", "model") if weights == "best" else ("last", "model" if weights == "last" else "in_training")
    file = folder / where / f"{name}.safetensors"
    if not file.exists():
        hint = "the run has no weight average" if weights == "in_training" else "nothing has been saved yet"
        raise KNPortError(f"{file} is missing: {hint}")
    logged = result if weights == "last" and not changes.keys() - {"data_dir"} else {}
    return Saved(run, folder, file, weights, logged)


def _of_knport(folder: Path, recipe: str, changes: dict[str, Any]) -> Saved:
    if not (folder / "knport.json").exists():
        what = "does not exist" if not folder.is_dir() else "has neither run.json nor knport.json"
        raise KNPortError(f"{folder} {what}; expected the folder of a run, or of knport.save")
    if not recipe:
        raise KNPortError(f"{folder} says nothing of its data: give --recipe, e.g. --recipe cifar100")
    converted = any(isinstance(module, KN_CONVS) for module in knport.load(folder).modules())
    run = resolve(recipe, norm="kernel" if converted else "original", **changes)
    return Saved(run, folder, folder / "model.safetensors", "model", {})


def _measure(saved: Saved, accelerator) -> dict[str, float]:
    run = saved.run
    train_set, test_set = data.load(run)
    task = task_of(run)(run, train_set, accelerator)
    net = _load(saved, task.network())
    layout = torch.channels_last if run.channels_last else torch.preserve_format
    net = net.to(accelerator.device, memory_format=layout)
    try:
        return task.evaluate(net, test_set.to(accelerator.device))
    except (RuntimeError, IndexError) as error:
        sizes = ", ".join(f"{name} {value}" for name, value in task.network().items())
        raise KNPortError(f"{saved.weights}: the model does not fit {run.recipe} ({sizes}): {error}") from error


def _load(saved: Saved, network: dict[str, Any]) -> nn.Module:
    if saved.name == "model":
        return knport.load(saved.folder)
    run = saved.run
    net = build_for(run, network)
    tensors, _ = checkpoint.read(saved.weights.parent)
    try:
        net.load_state_dict(tensors[saved.weights.stem])
    except RuntimeError as error:
        raise KNPortError(f"{saved.weights} does not fit {run.model} with --norm {run.norm}: {error}") from error
    return net


def _key(saved: Saved) -> dict[str, Any]:
    """What the numbers depend on."""
    with saved.weights.open("rb") as file:
        sum_of = hashlib.file_digest(file, "sha256").hexdigest()
    tested = ("recipe", "classes", "test_images", "scaling", "mixed_precision", "channels_last", "dropout")
    settings = saved.run.flat()
    return {"sha256": sum_of} | {name: settings[name] for name in tested}


def _tell(saved: Saved, measured: dict[str, float], report: Report) -> None:
    report.note(f"{saved.name}: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()))
    for name in task_of(saved.run).metrics:
        logged = saved.logged.get(name)
        if logged is not None and abs(logged - measured[name]) > 1e-3:
            report.note(f"training logged {name} {logged:.4f}: another device, precision, library or data set?")


def _record(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}


def _write(saved: Saved, row: dict[str, Any], report: Report) -> None:
    try:
        write_text(saved.folder / RECORD, json.dumps(_record(saved.folder) | {saved.name: row}, indent=1) + "\n")
    except OSError as error:
        report.note(f"not kept: {error}")  # the numbers are still printed: a folder may be for reading only
