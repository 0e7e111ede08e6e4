"""Two processes on CPUs (gloo): the same training as one, and what an interruption or a shortage may not change."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Processes, needs_fork, run_two
from test_memory import hungry, stored
from test_resume import Net, at_step, contents, saved_step, tiny
from test_train import TinyKN, rows, weights
from torch import nn

from experiments.run import Run
from experiments.train import train
from experiments.validate import validate
from knport.errors import KNPortError

pytestmark = needs_fork


@pytest.fixture
def kn_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"]))


class WithBatchNorm(TinyKN):
    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.fc(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3)))


def two(folder: Path, **settings) -> Run:
    return tiny(folder, processes=2, **settings)


def compared(tmp_path: Path, **settings) -> tuple[list[float], list[float]]:
    """The losses of every step on one process, and on two."""
    train(tiny(tmp_path / "one", **settings), quiet=True)
    run_two(lambda: train(two(tmp_path / "two", **settings), quiet=True), tmp_path / "processes")
    assert stored(tmp_path / "two")["environment"]["processes"] == 2
    one, both = ([row["loss"] for row in rows(tmp_path / name, "losses.csv")] for name in ("one", "two"))
    return one, both


@pytest.mark.parametrize("settings", [{}, {"accumulate": 2, "ema": 0.9, "label_smoothing": 0.1}])
def test_kernel_normalization_is_the_same_training(tmp_path, kn_net, settings):
    """To rounding, over all of it; 51 test images leave one process more than the other."""
    one, both = compared(tmp_path, test_images=51, **settings)
    assert both == pytest.approx(one, rel=1e-4)
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"), atol=1e-5, rtol=1e-4)
    logs = [rows(tmp_path / name) for name in ("one", "two")]
    assert [row["top1"] for row in logs[1]] == [row["top1"] for row in logs[0]]
    assert [row["test_loss"] for row in logs[1]] == pytest.approx([row["test_loss"] for row in logs[0]], rel=1e-4)


def test_batchnorm_is_not(tmp_path, monkeypatch):
    """Each process normalizes its half of the batch: from the first step on, another loss."""
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: WithBatchNorm(network["num_classes"]))
    one, both = compared(tmp_path, batch_size=4)
    assert abs(both[0] - one[0]) > 1e-4
    assert max(abs(a - b) for a, b in zip(one, both, strict=True)) > 1e-2


def test_what_they_say_and_what_one_process_measures_again(tmp_path, kn_net, monkeypatch):
    said = run_two(lambda: train(two(tmp_path / "run", test_images=51)), tmp_path / "processes")
    assert said.count("top-1") == 4, "one process speaks"
    monkeypatch.setattr("experiments.validate.build_for", lambda run, network: TinyKN(network["num_classes"]))
    result = stored(tmp_path / "run")["result"]
    again = validate(tmp_path / "run", quiet=True)
    assert (again["top1"], again["top5"]) == (result["top1"], result["top5"])
    run_two(lambda: validate(tmp_path / "run", again=True, quiet=True), tmp_path / "processes")
    measured = json.loads((tmp_path / "run" / "validate.json").read_text())["last"]
    assert measured["environment"]["processes"] == 2
    assert measured["measured"]["top1"] == result["top1"]
    assert measured["measured"]["test_loss"] == pytest.approx(result["test_loss"], rel=1e-6)


# Interruptions; the network of test_resume has BatchNorm's buffers and dropout


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """What two processes make when nobody interrupts them."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        use_net(patch)
        run_two(lambda: train(two(folder / "run"), quiet=True), folder)
    return contents(folder / "run")


def use_net(patch) -> None:
    patch.setattr("experiments.train.build_for", lambda run, network: Net(network["num_classes"]))


@pytest.fixture
def net(monkeypatch):
    use_net(monkeypatch)


def test_kill_9_at_a_random_step(tmp_path, net, uninterrupted):
    folder, steps = tmp_path / "run", sorted(random.SystemRandom().sample(range(3, 19), 2))
    for step in steps:
        with Processes(lambda: train(two(folder), quiet=True), tmp_path / "processes", 2) as processes:
            deadline = time.monotonic() + 200
            while saved_step(folder) < step // 3 * 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            processes.kill(signal.SIGKILL)
            assert set(processes.wait()) <= {-signal.SIGKILL, 0}, (steps, processes.said())
    run_two(lambda: train(two(folder), quiet=True), tmp_path / "processes")
    assert contents(folder) == uninterrupted, steps


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path, monkeypatch, net, uninterrupted, rank):
    def own_signal() -> None:
        if os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 7, own_signal)
        with Processes(lambda: train(two(folder)), tmp_path / "processes", 2) as processes:
            assert processes.wait() == [143, 143], processes.said()
            assert processes.said().count("stopped at step 7 of 20 and saved") == 1
    assert saved_step(folder) == 7
    run_two(lambda: train(two(folder), quiet=True), tmp_path / "processes")
    assert contents(folder) == uninterrupted


# Too little memory


def test_what_does_not_fit_on_one_process_is_halved_on_both(tmp_path, monkeypatch, capsys):
    """Found before the first step, while nobody waits for anybody."""
    hungry(monkeypatch, room=8)
    run_two(lambda: train(two(tmp_path / "whole"), quiet=True), tmp_path / "processes")

    def work() -> None:
        hungry(monkeypatch, room=4 if os.environ["RANK"] == "1" else 8)
        train(two(tmp_path / "short"))

    said = run_two(work, tmp_path / "processes")
    assert said.count("out of memory at step 0 with 8 images at once; going on") == 1
    assert stored(tmp_path / "short")["out_of_memory"] == [{"step": 0, "images_at_once": 4}]
    torch.testing.assert_close(weights(tmp_path / "short"), weights(tmp_path / "whole"), atol=2e-6, rtol=1e-5)


def test_later_both_end_and_the_same_command_goes_on(tmp_path, monkeypatch):
    def work() -> None:
        hungry(monkeypatch, room=4 if os.environ["RANK"] == "1" else 8, since=10)
        train(two(tmp_path / "run"), quiet=True)

    with Processes(work, tmp_path / "processes", 2) as processes:
        deadline = time.monotonic() + 200
        while 1 not in processes.ended() and time.monotonic() < deadline:
            time.sleep(0.01)
        processes.kill()  # as a launcher does when one of its processes has failed
        processes.wait()
        assert "out of memory at step 10 with 8 images at once in process 1; the same command" in processes.said()
    assert saved_step(tmp_path / "run") == 9
    run_two(work, tmp_path / "processes")
    assert stored(tmp_path / "run")["out_of_memory"] == [{"step": 10, "images_at_once": 4}]
    assert stored(tmp_path / "run")["result"]["steps"] == 20


def test_processes_that_know_nothing_of_each_other_are_refused(tmp_path, kn_net):
    with pytest.raises(KNPortError, match="processes is 2, but 1 started: use accelerate launch"):
        train(two(tmp_path / "run"), quiet=True)
