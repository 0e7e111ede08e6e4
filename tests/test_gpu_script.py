"""The GPU script, without a GPU: what it runs, what it leaves out and says so, what it returns."""

import inspect
import subprocess
import sys
import typing

import pytest
import torch
import tyro

from experiments.benchmarks import gpu
from experiments.benchmarks.run import run


def test_steps_run_in_order_and_a_failure_is_counted(capfd):
    plan = [
        gpu.Step("first", 0, ("-c", "import os; print('kernels', os.environ['KNPORT_KERNELS'])"), "triton"),
        gpu.Step("second", 0, ("-c", "raise SystemExit(3)")),
        gpu.Step("third", 1e6, ("-c", "print('never')")),
    ]
    assert gpu.perform(plan, budget=100) == 1
    said = capfd.readouterr().out
    assert said.index("kernels triton") < said.index("second: failed with exit code 3")
    assert "left out: third" in said and "never" not in said


def test_a_step_is_stopped_when_the_time_is_over(capfd):
    assert gpu.perform([gpu.Step("endless", 0, ("-c", "import time; time.sleep(60)"))], budget=0.5) == 1
    assert "stopped after" in capfd.readouterr().out


def test_all_steps_fit_into_ten_minutes(tmp_path):
    assert sum(step.seconds for step in gpu.steps(tmp_path / "a.csv", tmp_path)) <= gpu.BUDGET < 600


def test_the_benchmarks_know_their_arguments(tmp_path, monkeypatch):
    """Each command of the script is one that `run` takes."""
    called = []

    def stand_in(**kwargs):
        called.append(kwargs)

    for step in gpu.steps(tmp_path / "a.csv", tmp_path):
        if step.arguments[:3] == ("-m", "experiments.benchmarks", "run"):
            parsed = tyro.cli(_signature_of_run(stand_in), args=list(step.arguments[3:]))
            assert parsed is None
    assert [call["names"] for call in called] == [("layers",), ("layers",), ("networks",), ("layers",), ("layers",)]
    assert all(call["device"] == "cuda" and call["dtype"] == "bfloat16" for call in called)


def _signature_of_run(function):
    function.__signature__ = inspect.signature(run, eval_str=True)
    function.__annotations__ = typing.get_type_hints(run, include_extras=True)
    return function


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.gpu"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr and "tests/test_triton.py" in done.stderr
