"""`train(run)`: one training run in one folder, from nothing, from a checkpoint, or not at all if it has finished."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from experiments import data
from experiments.loop import Loop
from experiments.memory import release
from experiments.meter import NonFiniteLoss, reset_peak_memory
from experiments.micro_batch import OutOfMemory
from experiments.models import build_for, synchronize_batchnorm
from experiments.private_loop import PrivateLoop, check_model
from experiments.progress import Report
from experiments.randomness import fold
from experiments.run import Run
from experiments.run_folder import RunFolder, environment
from experiments.signals import StopRequest
from experiments.tasks import task_of
from knport.errors import KNPortError


def train(run: Run, *, quiet: bool = False, sets: data.Pair | None = None) -> dict[str, Any]:
    """Train, or go on, or return the stored result.

    Args:
        run: what to train; `experiments.run.resolve` makes one from a recipe.
        quiet: say nothing.
        sets: training and test images, in place of those that the recipe reads.

    Returns: ``top1, top5, best_top1`` in percent, or of segmentation ``miou, pixel_accuracy, mean_accuracy,
    best_miou``; ``test_loss, train_loss``, ``steps, epochs``, and ``seconds`` of training without evaluation. All but
    the best are of the last step, as in the papers.

    Raises: `KNPortError` for bad values, data or folders, a loss that is not finite (`NonFiniteLoss`), or a folder
    that cannot be written; `TrainingStopped`, a `SystemExit`, after SIGTERM or Ctrl-C once the state is saved.
    """
    try:
        return _open_and_train(run, quiet, sets)
    except OSError as error:
        failure = KNPortError(
            f"{run.run_dir}: {error}. What was saved before is whole: make room, or the folder writable, and the same"
            " command goes on from there"
        )
        for note in getattr(error, "__notes__", ()):
            failure.add_note(note)
        raise failure from error


def _open_and_train(run: Run, quiet: bool, sets: data.Pair | None) -> dict[str, Any]:
    run.validate()
    task_of(run).check(run)
    folder = RunFolder(run)
    stored = folder.stored()
    if stored is not None and stored["status"] == "finished":
        Report(run.run_dir, not quiet and start_accelerator(run).is_main_process).note("has finished; nothing to do")
        return stored["result"]
    accelerator = start_accelerator(run)
    _check_division(run, accelerator.num_processes)
    report = Report(run.run_dir, not quiet and accelerator.is_main_process)
    lock = folder.lock() if accelerator.is_main_process else nullcontext()
    with lock, StopRequest() as stop, _deterministic(), _trackers(accelerator, run):
        here = environment(accelerator.device, accelerator.num_processes)
        _note_changes(run, (stored or {}).get("environment", {}), here, report)
        loaded = sets or data.load(run)
        return _until_it_fits(lambda: _train(run, accelerator, folder, here, report, stop, loaded), accelerator, report)


def _until_it_fits(attempt: Callable[[], dict[str, Any]], accelerator: Accelerator, report: Report) -> dict[str, Any]:
    """Train; start again from the last checkpoint, with smaller micro-batches, each time that memory runs out."""
    scaler = accelerator.scaler.state_dict() if accelerator.scaler else {}
    while True:
        try:
            return attempt()
        except OutOfMemory as error:
            if not error.together:
                raise
            report.note(str(error))
        accelerator.free_memory()
        release()
        if accelerator.scaler:
            accelerator.scaler.load_state_dict(scaler)
        accelerator.wait_for_everyone()  # what to try next has been written


def _train(
    run: Run,
    accelerator: Accelerator,
    folder: RunFolder,
    here: dict[str, Any],
    report: Report,
    stop: StopRequest,
    sets: data.Pair,
) -> dict[str, Any]:
    train_set, test_set = sets
    for note in train_set.notes + test_set.notes:
        report.note(note)
    reset_peak_memory(accelerator.device)
    torch.manual_seed(fold(run.seed, "init"))
    task = task_of(run)(run, train_set, accelerator)
    net = _network(run, task, accelerator)
    content = {
        "environment": here,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "classes": train_set.num_classes,
        "train_images": len(train_set),
        "test_images": len(test_set),
        "status": "running",
        "result": None,
    }
    accelerator.wait_for_everyone()  # all have read run.json before it is written
    write = folder.write_run if accelerator.is_main_process else lambda content: None
    device = accelerator.device
    kind = PrivateLoop if run.private else Loop
    loop = kind(run, accelerator, task, net, train_set.to(device), test_set.to(device), folder, report, stop)
    content |= loop.record()
    write(content)
    try:
        loop.finish()
    except NonFiniteLoss as error:
        write(content | {"status": "failed", "error": str(error)})
        raise
    except (KNPortError, OSError) as error:
        if accelerator.num_processes > 1:
            error.add_note(f"(process {accelerator.process_index})")  # the others may know nothing of it
        raise
    finally:
        report.close()
    result = _result(folder, loop)
    write(content | loop.record() | {"status": "finished", "result": result})
    loop.close()
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    return result


def _network(run: Run, task: Any, accelerator: Accelerator) -> nn.Module:
    """The model of the run on the CPU, as it is before the first step."""
    net = build_for(run, task.network())
    if run.private:
        check_model(net, run)
    if run.segmentation.sync_batchnorm:
        net = synchronize_batchnorm(net, accelerator.device, accelerator.num_processes)
    return net


def _note_changes(run: Run, before: dict[str, Any], here: dict[str, Any], report: Report) -> None:
    """An interrupted run may go on elsewhere, but the bits then depend on the interruption: say so.

    Raises `KNPortError` for a private run: the steps since the checkpoint would get other draws, and be spent twice.
    """
    changed = [name for name in before if name != "commit" and before[name] != here.get(name)]
    if changed:
        listed = ", ".join(f"{name} was {before[name]} and is {here.get(name)}" for name in changed)
        if run.private and {"device", "processes", "torch"} & set(changed):
            raise KNPortError(
                f"{run.run_dir} began elsewhere ({listed}): there, the steps since the last checkpoint had other noise"
                " and dropout, so that their privacy would be spent twice; go on there, or give another --run-dir"
            )
        report.note(f"began elsewhere ({listed}): the result is as good, but not the same bits as without interruption")


def _result(folder: RunFolder, loop: Loop) -> dict[str, Any]:
    row = folder.last_row()
    return {
        **{name: row[name] for name in loop.task.metrics},
        f"best_{loop.task.score}": loop.state.best_score,
        **{name: row[name] for name in ("test_loss", "train_loss")},
        "steps": loop.state.step,
        "epochs": row["epoch"],
        "seconds": loop.state.seconds,
        **{name: row[name] for name in ("epsilon",) if name in row},
    }


def start_accelerator(run: Run) -> Accelerator:
    """A fresh accelerator: its state is global, and an earlier run of this process may have had another precision."""
    AcceleratorState._reset_state()
    GradientState._reset_state()
    has_accelerator = torch.accelerator.is_available()
    if run.mixed_precision == "fp16" and not has_accelerator:
        raise KNPortError("fp16 needs a GPU; on the CPU use --mixed-precision bf16 or no")
    accelerator = Accelerator(
        cpu=not has_accelerator,  # without it, two processes started on a CPU would train apart
        mixed_precision=run.mixed_precision,
        log_with=run.track,
        project_dir=str(Path(run.run_dir) / "track"),
    )
    if run.processes not in (None, accelerator.num_processes):
        raise KNPortError(
            f"processes is {run.processes}, but {accelerator.num_processes} started: use accelerate launch --multi_gpu"
            f" --num_processes {run.processes} -m experiments train ... (on CPUs too)"
        )
    return accelerator


def _check_division(run: Run, processes: int) -> None:
    share = processes * run.accumulate
    if run.batch_size % share and not run.private:  # of a batch that is drawn, the size is an expectation
        near = max(share, run.batch_size // share * share)
        raise KNPortError(
            f"batch size {run.batch_size} does not divide over {processes} processes x {run.accumulate} micro-batches:"
            f" it is the total; give a multiple of {share}, e.g. --batch-size {near}"
        )


@contextmanager
def _trackers(accelerator: Accelerator, run: Run) -> Iterator[None]:
    """The run's tracker, told the configuration as flat plain values, and closed at the end."""
    if run.track:
        if not accelerator.log_with:
            raise KNPortError(f"the tracker {run.track} is not installed: pip install {shlex.quote(run.track)}")
        config = {name: value if value is not None else "None" for name, value in run.flat().items()}
        accelerator.init_trackers("knport", config=json.loads(json.dumps(config)))
    try:
        yield
    finally:
        for tracker in accelerator.trackers:  # not accelerator.end_training: it also ends the process group
            tracker.finish()


@contextmanager
def _deterministic() -> Iterator[None]:
    """cuDNN's deterministic algorithms while training, so that a resumed run gives the same bits on a GPU too."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
