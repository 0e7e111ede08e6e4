"""Running out of memory: the run goes on with smaller micro-batches, and nothing else changes."""

from __future__ import annotations

import json

import pytest
import torch
from test_resume import at_step, contents, crash, tiny
from test_train import TinyKN, weights
from torch import nn

from experiments.data.images import ImageSet
from experiments.evaluate import evaluate
from experiments.loop import Loop
from experiments.memory import is_out_of_memory
from experiments.micro_batch import MicroBatch, OutOfMemory
from experiments.run import resolve
from experiments.run_folder import read_rows
from experiments.train import start_accelerator, train
from knport.errors import KNPortError

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 7.79 GiB"


class Hungry(TinyKN):
    """Runs out of memory in the backward pass of more than `room` images from step `since` on."""

    room, since, dropout, batchnorm, step = 4, 0, 0.0, False, 0

    def __init__(self, num_classes: int):
        super().__init__(num_classes, self.dropout)
        self.norm = nn.BatchNorm2d(6) if self.batchnorm else nn.Identity()

    def forward(self, x):
        y = self.fc(self.conv2(self.norm(self.conv1(x)).relu()).relu().mean((2, 3)))
        if self.training and len(x) > self.room and self.step >= self.since:
            y.register_hook(run_out)
        return y


def run_out(_) -> None:
    raise torch.OutOfMemoryError(CUDA)


def hungry(monkeypatch, **attributes) -> None:
    kind = type("Hungry", (Hungry,), attributes)
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: kind(network["num_classes"]))
    original = Loop._train_step

    def train_step(loop):
        kind.step = loop.state.step
        original(loop)

    monkeypatch.setattr(Loop, "_train_step", train_step)


def stored(folder) -> dict:
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize("batch_size", [16, 13])
def test_the_same_training_in_smaller_parts(tmp_path, monkeypatch, capsys, batch_size):
    settings = {"batch_size": batch_size, "steps": 8}
    hungry(monkeypatch, room=batch_size)
    whole = train(tiny(tmp_path / "whole", **settings), quiet=True)
    hungry(monkeypatch)
    result = train(tiny(tmp_path / "short", **settings))
    said = capsys.readouterr().out
    assert f"out of memory at step 0 with {batch_size} images at once; going on" in said
    assert said.count("out of memory") == 2
    assert "same to rounding" in said
    expected = [{"step": 0, "images_at_once": images} for images in (4, (batch_size + 1) // 2)]
    assert stored(tmp_path / "short")["out_of_memory"] == expected
    assert "out_of_memory" not in stored(tmp_path / "whole")
    torch.testing.assert_close(weights(tmp_path / "short"), weights(tmp_path / "whole"), atol=2e-6, rtol=1e-5)
    assert result["test_loss"] == pytest.approx(whole["test_loss"], rel=1e-5)


def test_the_bits_are_those_of_micro_batches_from_the_start(tmp_path, monkeypatch):
    """What the failed passes did to gradients, to BatchNorm's buffers and to dropout's draws is gone."""
    hungry(monkeypatch, room=16, dropout=0.2, batchnorm=True)
    train(tiny(tmp_path / "parts", accumulate=4), quiet=True)
    hungry(monkeypatch, dropout=0.2, batchnorm=True)
    train(tiny(tmp_path / "short"), quiet=True)
    assert contents(tmp_path / "short") == contents(tmp_path / "parts")


@pytest.mark.parametrize("step", [8, 11])
def test_later_in_a_run_and_with_a_crash(tmp_path, monkeypatch, step):
    """Memory runs out at step 10, after the checkpoint of step 9; the crash is before or behind that."""
    hungry(monkeypatch, since=10, dropout=0.2)
    train(tiny(tmp_path / "whole"), quiet=True)
    assert [row["step"] for row in stored(tmp_path / "whole")["out_of_memory"]] == [10, 10]
    with monkeypatch.context() as patch:
        at_step(patch, step, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(tiny(tmp_path / "crashed"), quiet=True)
    train(tiny(tmp_path / "crashed"), quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_batchnorm_is_told_apart(tmp_path, monkeypatch, capsys):
    hungry(monkeypatch, room=8, batchnorm=True)
    train(tiny(tmp_path / "run", steps=2))
    said = capsys.readouterr().out
    assert "its 1 BatchNorm layers now normalize 8 images at a time, which is another training" in said


def test_private_training_too(tmp_path, monkeypatch):
    private = {"norm": "kernel", "noise_multiplier": 1.0, "privacy_seed": 7, "steps": 4}
    hungry(monkeypatch, room=100)
    train(tiny(tmp_path / "whole", **private), quiet=True)
    hungry(monkeypatch)
    train(tiny(tmp_path / "short", **private), quiet=True)
    assert stored(tmp_path / "short")["out_of_memory"][0]["images_at_once"] == 4
    assert stored(tmp_path / "short")["privacy"] == stored(tmp_path / "whole")["privacy"]
    torch.testing.assert_close(weights(tmp_path / "short"), weights(tmp_path / "whole"), atol=2e-6, rtol=1e-5)


def test_one_image_that_does_not_fit_is_the_end(tmp_path, monkeypatch):
    hungry(monkeypatch, room=0)
    with pytest.raises(KNPortError, match="out of memory with one image at a time: take a smaller network"):
        train(tiny(tmp_path / "run"), quiet=True)


def test_other_errors_are_none_of_this(tmp_path, monkeypatch):
    def fail(self, x):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    hungry(monkeypatch, forward=fail)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(tiny(tmp_path / "run"), quiet=True)
    assert not (tmp_path / "run" / "micro_batch.csv").exists()


def test_what_is_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)  # what the CPU's allocator really says
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("out of luck"))
    assert not is_out_of_memory(KeyError("out of memory."))


def test_of_several_processes_one_gives_up_for_the_next_start(tmp_path):
    """In the middle of a step the others wait in a collective: this start ends, the next one knows."""
    accelerator = type("", (), {"process_index": 1, "num_processes": 2})()
    batch = MicroBatch(tmp_path, 16)
    with pytest.raises(OutOfMemory, match=r"at step 5 with 16 images at once in process 1; the same command goes on"):
        batch.give_up(5, TinyKN(10), accelerator)
    again = MicroBatch(tmp_path, 16)
    assert [again.at(step) for step in (4, 5, 6)] == [16, 8, 8]
    with pytest.raises(OutOfMemory):
        again.give_up(5, TinyKN(10), accelerator, together=True)  # the first process writes
    assert len(read_rows(tmp_path / "micro_batch.csv")) == 1


def test_evaluation_splits_what_does_not_fit():
    images = torch.randint(0, 256, (70, 1, 8, 8), dtype=torch.uint8)
    test = ImageSet(images=images, labels=torch.arange(70) % 10, num_classes=10, mean=(0.5,), std=(0.5,))
    net, sizes = TinyKN(10).eval(), []

    class Small(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            if len(x) > 20:
                run_out(None)
            return net(x)

    accelerator = start_accelerator(resolve("digits"))
    whole = evaluate(net, test, accelerator, scaling="unit")
    found = evaluate(Small(), test, accelerator, scaling="unit")
    assert found == pytest.approx(whole)
    assert max(size for size in sizes if size <= 20) == 18
