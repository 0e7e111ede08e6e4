"""A grid of trainings as one array of Slurm jobs, by submitit: one job per run that has not finished.

Runs are folders on a file system that all machines share, and nothing else is shared: a job that is preempted, killed
or submitted twice goes on where its folder stands, and two jobs cannot train in one folder. When they are through, the
`compare` command with the same grid finds every run finished, measures costs and writes the report.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.collect import write_notes
from experiments.compare import command_line, say
from experiments.grid import grid, parse_fields, planned_row
from experiments.run import Run
from experiments.run_folder import RunFolder
from experiments.signals import TrainingStopped
from experiments.train import train
from knport.errors import KNPortError


@dataclass(frozen=True)
class Job:
    """What submitit calls on the machine: `train(run)`, back in the queue when the time limit comes."""

    run: Run

    def __call__(self) -> dict[str, Any] | None:
        """The result of the run; None on all processes but the first."""
        back_in_queue = signal.getsignal(signal.SIGUSR2)  # submitit's; training has its own, which saves first
        first = _join_group()
        try:
            result = train(self.run)
        except TrainingStopped as stopped:
            if not first:
                return None  # the first process speaks for all
            if stopped.number == signal.SIGUSR2 and callable(back_in_queue):
                back_in_queue(signal.SIGUSR2, None)
            raise
        return result if first else None

    def checkpoint(self, *_: Any) -> Any:
        """Asked by submitit before it requeues: the same again, since the folder knows the rest."""
        return _submitit().helpers.DelayedSubmission(self)


def submit(
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
    data_dir: str = "data",
    out: str = "",
    cluster: Literal["slurm", "local"] = "slurm",
    at_once: int = 16,
    hours: float = 24.0,
    processes: int = 1,
    gpus: int = 1,
    cpus: int = 8,
    mem_gb: float = 32.0,
    requeues: int = 10,
    slurm: Sequence[str] = (),
    wait: bool = False,
    dry_run: bool = False,
) -> list[str]:
    """Send every run of a grid that has not finished to Slurm, as one array of jobs.

    Args:
        recipe: what to train (see list).
        models: names of `architectures`, timm/NAME or torchvision/NAME.
        norms: original, kernel, or competitors of `knport.replace_norm`.
        batch_sizes: images per step.
        seeds: of initialization, order, augmentation and dropout.
        epochs: none for the recipe's, one value for all batch sizes, or one for each.
        steps: optimizer steps in place of epochs, given likewise.
        lr: peak learning rates, given likewise.
        extra: further cells, as of `compare`.
        override: further fields of a run for all cells, as FIELD=VALUE.
        data_dir: folder of the data set, or its parent, as the machines see it.
        out: folder of the run folders [runs/RECIPE]; submitit's own files go to OUT/jobs.
        cluster: slurm; local starts all jobs at once on this machine.
        at_once: jobs of the array that may run at the same time.
        hours: time limit of a job; a training that needs more is requeued.
        processes: of one training, on one machine.
        gpus: per machine; 0 for none.
        cpus: per process.
        mem_gb: per machine.
        requeues: times that a job may reach its time limit.
        slurm: further options of sbatch, as KEY=VALUE, e.g. partition=gpu constraint=h100.
        wait: return when all jobs have ended.
        dry_run: say what would be submitted, and submit nothing.

    Returns:
        The ids of the jobs.

    Raises:
        KNPortError: an unknown name, a run folder of another configuration, no submitit or no Slurm, or with `wait`
            a job that failed.
    """
    folder = Path(out or f"runs/{recipe}")
    lists = {"models": models, "norms": norms, "batch_sizes": batch_sizes, "seeds": seeds}
    per_batch_size = {"epochs": epochs, "steps": steps, "lr": lr}
    fixed = {"data_dir": data_dir, "processes": processes} | parse_fields(override)
    runs = grid(recipe, **lists, per_batch_size=per_batch_size, extra=extra, out=folder, **fixed)
    left = [run for run in runs if (RunFolder(run).stored() or {}).get("status") != "finished"]
    say(f"{len(runs)} runs, {len(runs) - len(left)} of them finished; to submit: {len(left)}")
    for run in left:
        say(f"  {run.run_dir}")
    words = {"extra": extra, "override": override, "data_dir": data_dir, "out": out}
    command = command_line(recipe, lists | per_batch_size | words)
    if dry_run or not left:
        say(f"for the report:\n  {command}" if not left else "nothing submitted: --dry-run")
        return []
    options = {"timeout_min": max(1, round(60 * hours)), "tasks_per_node": processes, "gpus_per_node": gpus}
    options |= {"cpus_per_task": cpus, "mem_gb": mem_gb, "slurm_array_parallelism": at_once, "name": f"knport-{recipe}"}
    options |= {f"slurm_{name}": value for name, value in map(_option, slurm)}
    jobs = _send([Job(run) for run in left], folder / "jobs", cluster, requeues, options)
    write_notes(folder, [planned_row(run, command) for run in left], {})
    ids = [job.job_id for job in jobs]
    say(f"jobs {', '.join(ids)}; their words: {folder / 'jobs'}; when they are through:\n  {command}")
    if wait:
        _wait(jobs, left)
    return ids


def _send(calls: list[Job], folder: Path, cluster: str, requeues: int, options: dict[str, Any]) -> list[Any]:
    submitit = _submitit()
    try:
        further = {"slurm_max_num_timeout": requeues} if cluster == "slurm" else {}
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster, **further)
        executor.update_parameters(**options)
        with executor.batch():
            jobs = [executor.submit(call) for call in calls]
    except (RuntimeError, NameError, TypeError, submitit.core.utils.FailedJobError) as error:
        raise KNPortError(f"{cluster} did not take the jobs: {error}") from error
    return jobs


def _wait(jobs: list[Any], runs: list[Run]) -> None:
    failed = [f"  {run.run_dir}: {_reason(job)}" for job, run in _ended(jobs, runs)]
    if failed:
        raise KNPortError(
            "\n".join([f"{len(failed)} of {len(jobs)} jobs failed; the same command tries again", *failed])
        )


def _ended(jobs: list[Any], runs: list[Run]) -> list[tuple[Any, Run]]:
    """Jobs, once ended, whose run has not finished."""
    pairs = list(zip(jobs, runs, strict=True))
    for job in jobs:
        job.wait()
    return [(job, run) for job, run in pairs if (RunFolder(run).stored() or {}).get("status") != "finished"]


def _reason(job: Any) -> str:
    """The last line of a traceback, which submitit frames by lines of its own."""
    lines = str(job.exception()).splitlines()
    return next((line for line in reversed(lines) if re.match(r"[\w.]+: ", line)), "no error; was it cancelled?")


def _join_group() -> bool:
    """Tell torch of the other processes of this job, if there are any; whether this is the first."""
    environment = _submitit().JobEnvironment()
    if environment.num_tasks == 1:
        return True
    _submitit().helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)  # accelerate chooses
    return environment.global_rank == 0


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise KNPortError(f"slurm option {text!r}; expected KEY=VALUE, e.g. partition=gpu")
    return name.replace("-", "_"), int(value) if value.isdigit() else value


def _submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        raise KNPortError("submit needs submitit: pip install submitit") from error
    return submitit
