"""`python -m experiments.benchmarks.gpu`: on a machine with a GPU, test the kernels and measure, in under ten minutes.

The rows of the first benchmarks go into the committed CSV, with the device's name. Those made with other kernels than a
user would get (`KNPORT_KERNELS`) go into files of their own: they say whether the choice is right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import tyro

from experiments.benchmarks.rows import OUT
from experiments.benchmarks.run import QUICK_OUT

BUDGET = 570.0


class Step(NamedTuple):
    """One command of the script."""

    name: str
    seconds: float
    """An estimate of how long it takes; it is left out when less than that is left."""
    arguments: tuple[str, ...]
    """Of the Python interpreter."""
    kernels: str = "auto"
    """KNPORT_KERNELS"""


def steps(out: Path, runs: Path) -> list[Step]:
    """What is done, the most telling first.

    Args:
        out: the CSV of what users get.
        runs: the folder of what is measured for comparison.
    """

    def measure(*names: str, seconds: float, csv: Path = out, engine: str = "eager") -> tuple[str, ...]:
        where = ("--device", "cuda", "--dtype", "bfloat16", "--layouts", "channels_last")
        how = ("--engine", engine, "--seconds", str(seconds), "--out", str(csv))
        return ("-m", "experiments.benchmarks", "run", *names, *where, *how)

    plain = measure("layers", seconds=2, csv=runs / "gpu-plain-operators.csv")
    traced = measure("layers", seconds=2, csv=runs / "gpu-compiled-triton.csv", engine="compiled")
    return [
        Step("tests of the kernels", 120, ("-m", "pytest", "-q", "tests/test_triton.py", "-m", "not slow")),
        Step("layers", 60, measure("layers", seconds=2)),
        Step("layers compiled", 100, measure("layers", seconds=2, engine="compiled")),
        Step("networks", 90, measure("networks", seconds=4)),
        Step("layers on plain operators", 60, plain, "eager"),
        Step("layers compiled, Triton kernels", 100, traced, "triton"),
    ]


def perform(plan: list[Step], budget: float) -> int:
    """Run the steps one after the other; the number of those that failed. Each is named with its outcome and time."""
    begin, failed = time.monotonic(), 0
    for step in plan:
        left = budget - (time.monotonic() - begin)
        if left < step.seconds:
            print(f"left out: {step.name}: takes about {step.seconds:.0f} s, {max(left, 0):.0f} s are left", flush=True)
            continue
        started = time.monotonic()
        print(f"== {step.name}", flush=True)
        outcome = _run(step, left)
        failed += outcome != "done"
        print(f"== {step.name}: {outcome}, {time.monotonic() - started:.0f} s", flush=True)
    return failed


def _run(step: Step, seconds: float) -> str:
    environment = {**os.environ, "KNPORT_KERNELS": step.kernels}
    try:
        done = subprocess.run([sys.executable, *step.arguments], env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"


def gpu(*, out: Path = OUT, runs: Path = QUICK_OUT.parent, seconds: float = BUDGET) -> int:
    """Test the Triton kernels on this machine's GPU and measure layers and networks; the exit code.

    Args:
        out: the CSV that rows are appended to.
        runs: the folder of the rows that were made with other kernels than users get.
        seconds: for all of it; what there is no time for is named and left out.
    """
    if not torch.cuda.is_available():
        print("error: PyTorch finds no CUDA device here; the tests run in Triton's interpreter on any machine:\n"
              "  pytest tests/test_triton.py", file=sys.stderr)  # fmt: skip
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    runs.mkdir(parents=True, exist_ok=True)
    return 1 if perform(steps(out, runs), seconds) else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(gpu, prog="python -m experiments.benchmarks.gpu"))
