"""A run that is stopped, killed or damaged goes on to the same bits."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from processes import Processes, needs_fork, run_two
from safetensors.torch import load_file
from torch import nn

import knport
from experiments import checkpoint
from experiments.loop import Loop
from experiments.run import Run, resolve
from experiments.signals import TrainingStopped
from experiments.train import train
from knport.errors import KNPortError

TIMES = ("images_per_second", "peak_mib", "seconds")


class Net(nn.Module):
    """Everything that keeps or draws something: BatchNorm's buffers, kernel normalization's dropout."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.kn = knport.KNConv2d(6, 8, 3, stride=2, dropout=0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.kn(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))


@pytest.fixture(autouse=True)
def net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: Net(network["num_classes"]))


@pytest.fixture(autouse=True)
def one_thread():
    """A forked child cannot use the parent's thread pool, and sums must be cut alike in both."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(folder: Path, **settings) -> Run:
    """20 steps, 5 an epoch, with a checkpoint every 3 and an evaluation every 5."""
    fixed = {"batch_size": 16, "epochs": 4, "train_images": 80, "test_images": 50, "checkpoint_every": 3}
    return resolve("digits", run_dir=str(folder), **{**fixed, **settings})


def contents(folder: Path) -> dict[str, object]:
    """All that must not depend on interruptions: tensors bit by bit, and the logs without times."""
    found: dict[str, object] = {}
    for path in sorted(folder.glob("*/*.safetensors")):
        if path.parent.name in ("last", "best"):
            for name, value in load_file(path).items():
                found[f"{path.parent.name}/{path.stem}/{name}"] = value.numpy().tobytes()
    with (folder / "log.csv").open() as file:
        found["log"] = [{key: row[key] for key in row if key not in TIMES} for row in csv.DictReader(file)]
    found["losses"] = (folder / "losses.csv").read_text()
    result = json.loads((folder / "run.json").read_text())["result"]
    found["result"] = {key: value for key, value in result.items() if key not in TIMES}
    return found


def saved_step(folder: Path) -> int:
    try:
        return json.loads((folder / "last" / "state.json").read_text())["step"]
    except FileNotFoundError:  # between the two renames of a checkpoint, or before the first
        return -1


def at_step(monkeypatch, step: int, action) -> None:
    """Do `action` once, when `step` steps are done."""
    original = Loop._train_step

    def train_step(loop):
        original(loop)
        if loop.state.step == step and not done:
            done.append(step)
            action()

    done: list[int] = []
    monkeypatch.setattr(Loop, "_train_step", train_step)


def crash() -> None:
    raise RuntimeError("pulled the plug")


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "accumulate": 2, "mixed_precision": "bf16", "eval_every": 0.5}])
@pytest.mark.parametrize("steps", [(1,), (3,), (5,), (13,), (20,), (4, 11)])
def test_the_bits_do_not_depend_on_a_crash(tmp_path, monkeypatch, steps, settings):
    train(tiny(tmp_path / "whole", **settings), quiet=True)
    for step in steps:
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(RuntimeError, match="plug"):
                train(tiny(tmp_path / "crashed", **settings), quiet=True)
    train(tiny(tmp_path / "crashed", **settings), quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def wait_for_step(processes: Processes, folder: Path, step: int) -> None:
    """Until that step has been saved, or the processes have ended."""
    deadline = time.monotonic() + 200
    while saved_step(folder) < step and not processes.ended():
        assert time.monotonic() < deadline, processes.said()
        time.sleep(0.001)


@needs_fork
def test_kill_9_at_a_random_step(tmp_path):
    settings, step = {"epochs": 40, "ema": 0.9}, random.SystemRandom().randrange(3, 190)
    with Processes(lambda: train(tiny(tmp_path / "killed", **settings), quiet=True), tmp_path / "processes") as killed:
        wait_for_step(killed, tmp_path / "killed", step)
        killed.kill(signal.SIGKILL)
        assert killed.wait()[0] in (-signal.SIGKILL, 0), killed.said()
    train(tiny(tmp_path / "killed", **settings), quiet=True)
    train(tiny(tmp_path / "whole", **settings), quiet=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), step


@pytest.mark.parametrize("step", [2, 5, 20])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_leaves(tmp_path, monkeypatch, capsys, step, number, code):
    train(tiny(tmp_path / "whole"), quiet=True)
    capsys.readouterr()
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingStopped) as stopped:
            train(tiny(tmp_path / "stopped"))
    assert stopped.value.code == code
    assert f"stopped at step {step} of 20" in capsys.readouterr().out
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "stopped" / "last" / "state.json").read_text())["step"] == step
    train(tiny(tmp_path / "stopped"))
    assert f"going on from step {step} of 20" in capsys.readouterr().out
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_going_on_elsewhere_is_said(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        at_step(patch, 4, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(tmp_path / "run"), quiet=True)
    path = tmp_path / "run" / "run.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 4'))
    train(tiny(tmp_path / "run"))
    assert "began elsewhere (processes was 4 and is 1)" in capsys.readouterr().out


def test_a_signal_during_evaluation_saves_and_the_evaluation_is_repeated(tmp_path, monkeypatch):
    train(tiny(tmp_path / "whole"), quiet=True)
    original = Loop._share_buffers

    def share_buffers(loop):
        original(loop)
        if loop.state.step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "_share_buffers", share_buffers)
        with pytest.raises(TrainingStopped):
            train(tiny(tmp_path / "stopped"), quiet=True)
    state = json.loads((tmp_path / "stopped" / "last" / "state.json").read_text())
    assert (state["step"], state["evaluated"]) == (10, 5)
    train(tiny(tmp_path / "stopped"), quiet=True)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["missing", "cut", "one bit"])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "sha256.json"])
def test_a_damaged_checkpoint_is_said_and_the_previous_used(tmp_path, monkeypatch, capsys, name, how):
    with monkeypatch.context() as patch:
        at_step(patch, 11, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(tmp_path / "run"), quiet=True)
    damage(tmp_path / "run" / "last" / name, how)
    whole = train(tiny(tmp_path / "whole"), quiet=True)
    capsys.readouterr()
    result = train(tiny(tmp_path / "run"))
    said = capsys.readouterr().out
    assert "damaged; using" in said
    assert "going on from step 6 of 20" in said
    assert result["test_loss"] == whole["test_loss"]


def test_no_readable_checkpoint_is_an_error_that_touches_nothing(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_step(patch, 11, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(tmp_path / "run"), quiet=True)
    for name in ("last", "previous"):
        damage(tmp_path / "run" / name / "model.safetensors", "cut")
    with pytest.raises(KNPortError, match=r"last.*damaged.*previous.*damaged.*delete the run folder"):
        train(tiny(tmp_path / "run"), quiet=True)
    assert (tmp_path / "run" / "last" / "optimizer.safetensors").exists()


@pytest.mark.parametrize("moment", ["write", "first rename", "second rename"])
def test_a_checkpoint_is_whole_or_not_there(tmp_path, monkeypatch, moment):
    last, previous = tmp_path / "last", tmp_path / "previous"
    for step in (1, 2):
        checkpoint.write(last, {"model": {"w": torch.full((3,), float(step))}}, {"step": step}, previous=previous)
    renames = []

    def rename(path, target):
        renames.append(path)
        if len(renames) == {"first rename": 1, "second rename": 2}.get(moment):
            crash()
        path.replace(target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        if moment == "write":
            patch.setattr(checkpoint, "_sha256", lambda path: crash())
        with pytest.raises(RuntimeError, match="plug"):
            checkpoint.write(last, {"model": {"w": torch.full((3,), 3.0)}}, {"step": 3}, previous=previous)
    _, tensors, state, problems = checkpoint.newest([last, previous])
    assert state["step"] == 2
    assert tensors["model"]["w"].tolist() == [2, 2, 2]
    assert not problems


def test_tied_weights_are_saved(tmp_path):
    weight = torch.arange(3.0)
    checkpoint.write(tmp_path / "c", {"model": {"a": weight, "b": weight}}, {})
    assert checkpoint.read(tmp_path / "c")[0]["model"]["b"].tolist() == [0, 1, 2]


def test_two_trainings_in_one_folder(tmp_path, monkeypatch):
    caught = []

    def start_another() -> None:
        with pytest.raises(KNPortError, match="another process is training here"):
            train(tiny(tmp_path / "run"), quiet=True)
        caught.append(True)

    at_step(monkeypatch, 4, start_another)
    train(tiny(tmp_path / "run"), quiet=True)
    assert caught


# The commands, as users start them


FLAGS = {
    "--norm": "group",
    "--batch-size": "4",
    "--epochs": "20",
    "--train-images": "80",
    "--test-images": "50",
    "--checkpoint-every": "7",
}
ONE = (sys.executable, "-m")
TWO = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m")


def start(command: tuple[str, ...], folder: Path) -> subprocess.Popen:
    flags = [part for pair in FLAGS.items() for part in pair]
    return subprocess.Popen(
        [*command, "experiments", "train", "digits", *flags, "--run-dir", str(folder)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_checkpoint(process: subprocess.Popen, folder: Path) -> None:
    """Until a new checkpoint has been written: the training is in mid-epoch."""
    deadline = time.monotonic() + 200
    before = saved_step(folder)
    while saved_step(folder) <= before:
        assert process.poll() is None, process.communicate(timeout=60)[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def kill_all(process: subprocess.Popen) -> None:
    """What is left of a process and of those it started; a launcher's workers are in groups of their own."""
    if process.poll() is None:
        for started in [*psutil.Process(process.pid).children(recursive=True), process]:
            started.kill()
        process.wait(timeout=60)


def interrupt(command: tuple[str, ...], folder: Path, number: int) -> tuple[int, str]:
    """Start, and send the signal in mid-run to the process that was started; its exit code and its words."""
    process = start(command, folder)
    try:
        wait_for_checkpoint(process, folder)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        if number == signal.SIGKILL:  # kills the launcher before it could end its workers
            for worker in workers:
                worker.kill()
        said = process.communicate(timeout=120)[0]
    finally:
        kill_all(process)
    assert json.loads((folder / "run.json").read_text())["status"] == "running"
    return process.returncode, said


def whole(folder: Path) -> dict[str, object]:
    """What the command makes, made in this process: of an interrupted run the rest."""
    settings = {flag[2:].replace("-", "_"): int(value) if value.isdigit() else value for flag, value in FLAGS.items()}
    train(resolve("digits", **settings, run_dir=str(folder)), quiet=True)
    return contents(folder)


@pytest.mark.slow
def test_the_command_survives_signals(tmp_path, monkeypatch):
    monkeypatch.undo()  # the recipe's own network
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        found, said = interrupt(ONE, tmp_path / "run", number)
        assert found == code, said
        assert ("stopped at step" in said) == (number != signal.SIGKILL)
        assert "Traceback" not in said
    assert whole(tmp_path / "run") == whole(tmp_path / "whole")


@pytest.mark.slow
@needs_fork
def test_two_processes_survive_sigterm(tmp_path, monkeypatch):
    """Sent to the launcher, which passes it on. kill -9 is in test_two_processes."""
    monkeypatch.undo()
    code, said = interrupt(TWO, tmp_path / "run", signal.SIGTERM)
    assert code == 1, "the launcher's own"
    assert said.count("stopped at step") == 1
    for name in ("run", "whole"):
        run_two(lambda name=name: whole(tmp_path / name), tmp_path / "processes")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["environment"]["processes"] == 2
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")
