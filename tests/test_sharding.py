"""Fully sharded training: the same as one process, in shares."""

from __future__ import annotations

import os

import pytest
import torch
from processes import Processes, needs_fork, run_two
from test_memory import stored
from test_resume import at_step, contents, crash, saved_step, tiny
from test_train import TinyKN, rows, weights

from experiments import sharding
from experiments.loop import Loop
from experiments.train import train
from knport.errors import KNPortError

SETTINGS = [{}, {"ema": 0.9, "accumulate": 2}, {"optimizer": "adamw", "lr": 0.003}]


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    """Every layer is a unit, and the network has an odd number of channels that two cannot share alike."""
    monkeypatch.setattr(sharding, "UNIT", 50)
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"]))


def sharded(folder, **settings) -> None:
    os.environ["ACCELERATE_USE_FSDP"] = "true"  # what `accelerate launch --config_file .../fsdp.yaml` sets
    train(tiny(folder, processes=2, **settings), quiet=True)


@needs_fork
@pytest.mark.parametrize("settings", SETTINGS)
def test_the_same_training_in_shares(tmp_path, monkeypatch, settings):
    def finish(loop):
        net = loop.state.net
        shares = sum(parameter.to_local().numel() for parameter in net.parameters())
        (tmp_path / f"share{loop.accelerator.process_index}").write_text(str(shares))
        original(loop)

    original = Loop.finish
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "finish", finish)
        run_two(lambda: sharded(tmp_path / "shares", **settings), tmp_path / "processes")
    train(tiny(tmp_path / "one", **settings), quiet=True)
    held = [int((tmp_path / f"share{rank}").read_text()) for rank in (0, 1)]
    assert sum(held) == stored(tmp_path / "one")["parameters"]
    assert max(held) < 0.7 * sum(held)
    one, both = ([row["loss"] for row in rows(tmp_path / name, "losses.csv")] for name in ("one", "shares"))
    assert both == pytest.approx(one, rel=1e-4)
    for name in ("last/model", "best/model", *(["last/in_training"] if "ema" in settings else [])):
        found, expected = (weights(tmp_path / folder, name) for folder in ("shares", "one"))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@needs_fork
def test_shares_go_on_to_the_same_bits_and_one_process_goes_on_from_them(tmp_path, monkeypatch):
    run_two(lambda: sharded(tmp_path / "whole", ema=0.9), tmp_path / "processes")
    for folder in ("shares", "alone"):
        with monkeypatch.context() as patch:
            at_step(patch, 11, crash)
            with Processes(lambda folder=folder: sharded(tmp_path / folder, ema=0.9), tmp_path / "processes", 2) as two:
                assert two.wait() == [1, 1], two.said()
        assert saved_step(tmp_path / folder) == 9
    run_two(lambda: sharded(tmp_path / "shares", ema=0.9), tmp_path / "processes")
    assert contents(tmp_path / "shares") == contents(tmp_path / "whole")
    result = train(tiny(tmp_path / "alone", ema=0.9), quiet=True)
    assert result["test_loss"] == pytest.approx(stored(tmp_path / "whole")["result"]["test_loss"], rel=1e-4)


@needs_fork
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"norm": "kernel", "noise_multiplier": 1.0, "privacy_seed": 3}, "private training does not work with FSDP"),
        ({"compile": True}, "--compile does not work with FSDP: leave it out"),
    ],
)
def test_what_has_not_been_made_to_work_is_refused(tmp_path, settings, words):
    with Processes(lambda: sharded(tmp_path / "run", **settings), tmp_path / "processes", 2) as two:
        assert two.wait() == [1, 1]
        assert words in two.said()


def test_who_shards(monkeypatch):
    assert not sharding.asked(2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert sharding.asked(2)
    assert not sharding.asked(1)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(KNPortError, match="DeepSpeed is not supported"):
        sharding.asked(2)
