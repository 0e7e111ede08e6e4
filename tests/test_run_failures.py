"""A disk that is full, a folder that cannot be written, a second process, damaged data: one message, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
from cifar_files import write_cifar
from processes import Processes, needs_fork
from safetensors import SafetensorError
from test_resume import Net, at_step, contents, crash, saved_step, tiny
from test_train import TinyKN

from experiments.__main__ import main
from experiments.loop import Loop
from experiments.run import resolve
from experiments.train import train
from knport.errors import KNPortError


@pytest.fixture(autouse=True)
def net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: Net(network["num_classes"]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What `tiny` makes when nothing fails."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.train.build_for", lambda run, network: Net(network["num_classes"]))
        train(tiny(folder), quiet=True)
    return contents(folder)


def command(folder: Path) -> list[str]:
    """The command that makes `tiny(folder)`."""
    settings = {"batch-size": 16, "epochs": 4, "train-images": 80, "test-images": 50, "checkpoint-every": 3}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["train", "digits", *flags, "--run-dir", str(folder)]


def crashed(folder: Path, monkeypatch, step: int = 7) -> None:
    """A run with a checkpoint of step 6."""
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(folder), quiet=True)


def one_message(said: str) -> str:
    errors = [line for line in said.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(errors) == 1, said
    return errors[0]


# The disk


@needs_fork
@pytest.mark.parametrize("limit", [64, 3000])
def test_files_that_cannot_grow(tmp_path, monkeypatch, whole, limit):
    """The system refuses to write beyond `limit` bytes, in the middle of a file."""
    folder = tmp_path / "run"
    crashed(folder, monkeypatch)

    reading, writing = os.pipe()  # a log would not grow either

    def work() -> None:
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        sys.exit(main(command(folder)))

    with Processes(work, tmp_path / "processes") as process:
        assert process.wait() == [2]
    os.close(writing)
    with os.fdopen(reading) as said:
        error = one_message(said.read())
    assert "File too large" in error and "What was saved before is whole" in error
    assert saved_step(folder) == 6
    train(tiny(folder), quiet=True)
    assert contents(folder) == whole


def refuse(number: int):
    def function(*args, **kwargs):
        raise OSError(number, os.strerror(number), "a file")

    return function


def no_space(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("place", "action", "words"),
    [
        ("experiments.checkpoint.save_file", no_space, "No space left on device"),
        ("experiments.checkpoint._replace", refuse(errno.EROFS), "Read-only file system"),
        ("experiments.run_folder.write_text", refuse(errno.EDQUOT), "quota exceeded"),
        ("experiments.run_folder.RunFolder.append_losses", refuse(errno.ENOSPC), "No space left"),
        ("experiments.run_folder.RunFolder.append_log", refuse(errno.EACCES), "Permission denied"),
    ],
)
@pytest.mark.parametrize("started", [False, True])
def test_what_cannot_be_written_is_said_and_nothing_lost(
    tmp_path, monkeypatch, capsys, whole, place, action, words, started
):
    folder = tmp_path / "run"
    if started:
        crashed(folder, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(place, action)
        assert main(command(folder)) == 2
    assert words in one_message(capsys.readouterr().err)
    assert saved_step(folder) in ((6, 9) if started else (-1, 3))
    train(tiny(folder), quiet=True)
    assert contents(folder) == whole


def test_a_log_row_that_was_cut_off(tmp_path, monkeypatch, whole):
    """The disk was full in the middle of a row: it is written again."""
    crashed(tmp_path / "run", monkeypatch, 16)
    for name in ("log.csv", "losses.csv"):
        with (tmp_path / "run" / name).open("a") as file:
            file.write("19,0.2")
    train(tiny(tmp_path / "run"), quiet=True)
    assert contents(tmp_path / "run") == whole


@pytest.mark.parametrize("where", ["file", "file/run"])
def test_a_file_in_the_place_of_the_folder(tmp_path, capsys, where):
    (tmp_path / "file").write_text("")
    assert main(command(tmp_path / where)) == 2
    assert str(tmp_path / where) in one_message(capsys.readouterr().err)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_for_reading_only(tmp_path, capsys):
    (tmp_path / "readonly").mkdir(mode=0o500)
    assert main(command(tmp_path / "readonly" / "run")) == 2
    assert "Permission denied" in one_message(capsys.readouterr().err)


# Others


@needs_fork
def test_another_process_in_the_folder(tmp_path, monkeypatch, capsys, whole):
    """It is told; when the first is killed, the folder is free, and goes on."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: time.sleep(60))
        with Processes(lambda: train(tiny(folder), quiet=True), tmp_path / "processes") as first:
            deadline = time.monotonic() + 200
            while saved_step(folder) < 6 and time.monotonic() < deadline:
                time.sleep(0.002)
            assert main(command(folder)) == 2
            assert "another process is training here" in one_message(capsys.readouterr().err)
            first.kill(signal.SIGKILL)
            first.wait()
    train(tiny(folder), quiet=True)
    assert contents(folder) == whole


@needs_fork
def test_what_one_of_two_processes_meets_is_said(tmp_path, monkeypatch):
    """And by that process, since the first knows nothing of it."""
    original = Loop._train_step

    def train_step(loop):
        if os.environ["RANK"] == "1" and loop.state.step == 4:
            raise KNPortError("photo.png: no whole image")
        original(loop)

    monkeypatch.setattr(Loop, "_train_step", train_step)
    with Processes(lambda: sys.exit(main(command(tmp_path / "run"))), tmp_path / "processes", 2) as two:
        deadline = time.monotonic() + 200
        while 1 not in two.ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        two.kill()
        assert two.wait()[1] == 2
        assert "error: photo.png: no whole image (process 1)" in two.said()


# Data


def test_a_damaged_data_file_costs_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: Colour(network["num_classes"]))
    write_cifar(tmp_path, "cifar100", "binary", count=100)
    fixed = {"batch_size": 10, "steps": 9, "checkpoint_every": 3, "data_dir": str(tmp_path)}
    train(resolve("cifar100", run_dir=str(tmp_path / "whole"), **fixed), quiet=True)
    run = resolve("cifar100", run_dir=str(tmp_path / "run"), **fixed)
    with monkeypatch.context() as patch:
        at_step(patch, 5, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(run, quiet=True)
    path = next(tmp_path.rglob("train.bin"))
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    with pytest.raises(KNPortError, match=r"train\.bin"):
        train(run, quiet=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "running"
    path.write_bytes(good)
    train(run, quiet=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


class Colour(TinyKN):
    def forward(self, x):
        return super().forward(x.mean(1, keepdim=True))
