"""Run a grid of trainings, measure what their networks cost, and write the report.

The same command goes on where it stopped: finished runs are skipped, interrupted ones resumed, failed ones tried again.
"""

from __future__ import annotations

import inspect
import math
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from experiments import activations, data, predictions, tables, terminal
from experiments.backbones import statement
from experiments.collect import collect, cost_key, read_notes, write_notes
from experiments.cost import Batch, Network, cost_device, measure
from experiments.grid import grid, key_of, parse_fields, planned_row
from experiments.models import NORMS, list_models
from experiments.models import build as build_model
from experiments.originals import original_of
from experiments.report import report
from experiments.results import Cost, write
from experiments.run import Run
from experiments.run_folder import RunFolder
from experiments.saved_run import open_run
from experiments.segmentation import Segmentation, Upsample
from experiments.tasks import task_of
from experiments.train import start_accelerator, train
from knport.errors import KNPortError, UnknownName

FAILURES = (KNPortError, RuntimeError, ValueError, OSError)


def say(text: str) -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def compare(
    recipe: tyro.conf.Positional[str],
    *,
    models: Sequence[str] = ("cifar_resnet8",),
    norms: Sequence[str] = ("original", "group", "kernel"),
    batch_sizes: Sequence[int] = (2, 32),
    seeds: Sequence[int] = (0, 1),
    epochs: Sequence[int] = (),
    steps: Sequence[int] = (),
    lr: Sequence[float] = (),
    extra: Sequence[str] = (),
    override: Sequence[str] = (),
    classes: int | None = None,
    train_images: int | None = None,
    test_images: int | None = None,
    dropout: float | None = None,
    eval_every: float | None = None,
    data_dir: str = "data",
    out: str = "",
    cost_seconds: float = 20.0,
    quiet: bool = False,
    command: Annotated[str, tyro.conf.Suppress] = "",
) -> Path:
    """Train every model with every norm at every batch size and seed, and report.

    Args:
        recipe: digits, cifar10, cifar100, camvid, ... (see list).
        models: names of `architectures`, timm/NAME or torchvision/NAME.
        norms: original, kernel, or competitors of `knport.replace_norm`.
        batch_sizes: images per step.
        seeds: of initialization, order, augmentation and dropout.
        epochs: passes over the training images: none for the recipe's, one value for all batch sizes, or one for each.
        steps: optimizer steps in place of epochs, given likewise.
        lr: peak learning rates, given likewise.
        extra: further cells, ``MODEL:NORM:BATCH_SIZE[:FIELD=VALUE...]``, e.g. a large network with a smaller budget.
        classes: only the first so many classes.
        train_images: only so many training images, class-balanced.
        test_images: only so many test images.
        dropout: of every kernel normalization layer; None: the model's own.
        override: further fields of a run for all cells, as FIELD=VALUE, e.g. mixed_precision=bf16 augment=none.
        eval_every: epochs between evaluations.
        data_dir: folder of the data set, or its parent.
        out: folder of the report and the run folders [runs/RECIPE].
        cost_seconds: about how long the timing of all networks may take, per batch size; 0 leaves costs unmeasured.
        quiet: say one line per run, not one per evaluation.
        command: to state in the report instead of the one that these arguments spell.

    Returns:
        The path of `report.html`.

    Raises:
        KNPortError: before any training, for unknown names, missing data, or a run folder of another configuration.
    """
    folder = Path(out or f"runs/{recipe}")
    options = {"classes": classes, "train_images": train_images, "test_images": test_images, "dropout": dropout}
    options |= {"eval_every": eval_every, "data_dir": data_dir}
    lists = {"models": models, "norms": norms, "batch_sizes": batch_sizes, "seeds": seeds}
    per_batch_size = {"epochs": epochs, "steps": steps, "lr": lr}
    further = parse_fields(override)
    runs = grid(recipe, **lists, per_batch_size=per_batch_size, extra=extra, out=folder, **options | further)
    words = {"extra": extra, "override": override} | options | {"out": out}
    command = command or command_line(recipe, lists | per_batch_size | words)
    return run_grid(runs, folder, command=command, cost_seconds=cost_seconds, quiet=quiet)


def run_grid(runs: Sequence[Run], folder: Path, *, command: str, cost_seconds: float, quiet: bool = False) -> Path:
    """Measure, train and report a list of runs; see `compare`."""
    _check_names(runs)
    finished = {key_of(run) for run in runs if (RunFolder(run).stored() or {}).get("status") == "finished"}
    train_set, _ = data.load(runs[0])
    write_notes(folder, [planned_row(run, command) for run in runs], {})
    try:
        if cost_seconds:
            _measure_costs(runs, folder, train_set, cost_seconds)
        _say_plan(runs, finished, folder, len(train_set))
        for number, run in enumerate(runs, 1):
            _run_cell(run, f"[{number}/{len(runs)}] {key_of(run)}", folder, command, quiet, key_of(run) in finished)
        look_inside(runs)
    except (KeyboardInterrupt, SystemExit):
        say(f"\nStopped. Nothing is lost; to go on:\n  {command}")
        raise
    finally:
        page = report(folder)
    rows = collect(folder).rows
    terminal.show(tables.accuracy(rows))
    for line in (statement(rows), *tables.remarks(rows), f"Report: {page}"):
        say(line)
    return page


def _check_names(runs: Sequence[Run]) -> None:
    """Raise `UnknownName` for a model or norm that does not exist, before hours are spent on the others."""
    for what, known in (("norm", NORMS), ("model", list_models())):
        unknown = {getattr(run, what) for run in runs} - set(known)
        if unknown:
            raise UnknownName(what, min(unknown), known)


def command_line(recipe: str, options: dict[str, Any]) -> str:
    """The shell command that gives these options; an absolute data folder is written as DIR."""
    words = ["python", "-m", "experiments", "compare", recipe]
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare).parameters.items()}
    for name, value in options.items():
        values = [str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)]
        if (
            value in (None, "")
            or (value in ((), []) and not defaults[name])
            or (name == "data_dir" and value == "data")
        ):
            continue
        if name in ("data_dir", "out") and Path(value).is_absolute():
            values = ["DIR"]
        words += [f"--{name.replace('_', '-')}", *values]
    return shlex.join(words)


def _run_cell(run: Run, name: str, folder: Path, command: str, quiet: bool, finished: bool) -> None:
    if finished:
        say(f"{name}: already finished")
        return
    start = time.perf_counter()
    try:
        result = train(run, quiet=quiet)
    except FAILURES as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        write_notes(folder, [planned_row(run, command, status="failed", reason=reason)], {})
        say(f"{name}: failed, {reason}")
    else:
        write_notes(folder, [planned_row(run, command)], {})
        say(f"{name}: {result[task_of(run).score]:.1f} % in {time.perf_counter() - start:.0f} s")
    write(folder, collect(folder))


def look_inside(runs: Sequence[Run]) -> None:
    """Activation statistics, and of segmentation predictions, of the first finished seed of every network."""
    first: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        if (RunFolder(run).stored() or {}).get("status") == "finished":
            first.setdefault((run.model, run.norm, run.batch_size), run)
    for run in first.values():
        folder = Path(run.run_dir)
        drawn = task_of(run) is not Segmentation or (folder / predictions.FOLDER).exists()
        if drawn and (folder / activations.FILE).exists():
            continue
        try:
            saved = open_run(folder)
            if not drawn:
                predictions.write(saved)
            activations.write(folder / activations.FILE, activations.measure(saved))
        except FAILURES as error:  # of a network that was trained: its row stays
            say(f"{folder}: no activation statistics, {error}")


def _measure_costs(runs: Sequence[Run], folder: Path, train_set: Any, seconds: float) -> None:
    """Measure the networks of each batch size together, unless all of them were measured on this device before."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    known = read_notes(folder)["costs"]
    for size in sorted({run.batch_size for run in runs}):
        here = {(run.model, run.norm): run for run in runs if run.batch_size == size}
        keys = {network: cost_key(planned_row(run, "")) for network, run in here.items()}
        if all(known.get(key, {}).get("cost_device") == cost_device(device) for key in keys.values()):
            continue
        say(f"measuring a training step of {len(here)} networks at batch size {size}")
        task = _task(runs[0], train_set)
        network, shape = task.network(), _image_shape(task)
        images = torch.randn(size, *shape, device=device)
        places = (size, *shape[1:]) if network.get("dense") else (size,)
        batch = Batch(images, torch.arange(math.prod(places), device=device).view(places) % network["num_classes"])
        originals = {model: original_of(model) for model, _ in here}
        costs = measure(_builder(here, network, shape), here, batch, seconds=seconds, originals=originals)
        write_notes(folder, [], {keys[network]: cost for network, cost in costs.items()})


def _task(run: Run, train_set: Any) -> Any:
    return task_of(run)(run, train_set, start_accelerator(run))


def _image_shape(task: Any) -> tuple[int, int, int]:
    """(C, H, W) of what the network is trained on."""
    network = task.network()
    return network["in_chans"], *getattr(task, "size", (network["image_size"], network["image_size"]))


def _builder(
    runs: dict[Network, Run], network: dict[str, Any], shape: tuple[int, int, int]
) -> Callable[..., torch.nn.Module]:
    def build(model: str, norm: str) -> torch.nn.Module:
        torch.manual_seed(0)
        options = {"dropout": runs[model, norm].dropout, "dropout_form": runs[model, norm].dropout_form}
        net = build_model(model, norm, **network, **options)
        return torch.nn.Sequential(net, Upsample(shape[1:])) if network.get("dense") else net

    return build


def _say_plan(runs: Sequence[Run], finished: set, folder: Path, images: int) -> None:
    left = [run for run in runs if key_of(run) not in finished]
    costs = {key: Cost(**cost) for key, cost in read_notes(folder)["costs"].items()}
    times = [costs.get(cost_key(planned_row(run, "")), Cost()).ms_per_step for run in left]
    estimate = ""
    if left and all(times):
        counts = [run.steps or run.epochs * ((run.subset.train_images or images) // run.batch_size) for run in left]
        minutes = sum(count * ms for count, ms in zip(counts, times, strict=True)) / 60_000
        estimate = f", about {minutes:.1f} minutes of training steps to go"
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them finished before{estimate}")
