"""The cost of a training step: counts against pencil and paper, memory against known cases, times against sleep."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from experiments.cost import (
    MIB,
    Batch,
    TrainingStep,
    cost_device,
    describe,
    measure,
    norm_family,
    peak_memory,
    saved_activations,
    time_steps,
)
from experiments.live_tensors import LiveTensors
from knport import KernelNorm2d, KNConv2d, KNLinear, LocalContextNorm, NormalizedConv2d, UnknownName

FLOAT = 4


def network(norm: str) -> nn.Module:
    conv = KNConv2d(3, 8, 3, padding=1) if norm == "kernel" else nn.Conv2d(3, 8, 3, padding=1)
    layers = {"kernel": nn.Identity(), "original": nn.BatchNorm2d(8), "slow": Slow(), "none": nn.Identity()}
    return nn.Sequential(conv, layers[norm], nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


class Slow(nn.Module):
    def forward(self, x):
        time.sleep(0.02)
        return x


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return Batch(torch.randn(4, 3, 8, 8), torch.arange(4))


def test_counts_of_a_known_network():
    cost = describe(network("original"), (3, 8, 8))
    assert cost.parameters == (3 * 9 * 8 + 8) + 2 * 8 + (8 * 5 + 5)
    assert cost.macs == 8 * 8 * 8 * 3 * 9 + 8 * 5


def test_macs_count_convolutions_and_not_statistics():
    assert describe(network("kernel"), (3, 8, 8)).macs == describe(network("none"), (3, 8, 8)).macs


@pytest.mark.parametrize(
    ("layers", "family"),
    [
        ([nn.Conv2d(1, 1, 1)], "none"),
        ([nn.BatchNorm1d(2)], "batch"),
        ([nn.GroupNorm(2, 4)], "group"),
        ([nn.GroupNorm(1, 4)], "layer"),
        ([nn.LayerNorm(4)], "layer"),
        ([nn.InstanceNorm2d(4)], "instance"),
        ([NormalizedConv2d(3, 4, 1)], "normalized"),
        ([LocalContextNorm(4, 2)], "local_context"),
        ([KNLinear(4, 4)], "kernel"),
        ([nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.BatchNorm2d(4)], "batch"),
        ([nn.BatchNorm2d(4), nn.BatchNorm2d(4), KernelNorm2d()], "kernel"),
    ],
)
def test_norm_family(layers, family):
    assert norm_family(nn.Sequential(*layers)) == family


def test_live_tensors_of_a_chain():
    """Three exponentials of 1 MiB: a leaf and three results; in backward two gradients meet before the first goes."""
    size = 256 * 1024
    leaf = torch.zeros(size, requires_grad=True)
    with LiveTensors([leaf]) as live:
        out = leaf.exp().exp().exp()
        assert live.now == live.peak == 4 * MIB
        out.sum().backward()
        assert live.now == pytest.approx(3 * MIB, abs=64)  # leaf, its gradient, out
        assert live.peak == pytest.approx(6 * MIB, abs=64)
        del out
        assert live.now == pytest.approx(2 * MIB, abs=64)


def test_live_tensors_counts_a_storage_once():
    with LiveTensors() as live:
        x = torch.zeros(256, 1024)
        views = [x.t(), x[3:], x.view(-1), x.detach()]
        x.add_(1)
        assert live.now == live.peak == MIB, len(views)


def test_saved_activations_of_a_linear_network():
    """ReLU and Linear save their input or output once; the loss saves its log-probabilities and the labels."""
    rows, width, classes = 64, 128, 10
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes))
    batch = Batch(torch.randn(rows, width), torch.arange(rows) % classes)
    expected = FLOAT * rows * (width + width + classes) + 8 * rows + FLOAT  # + the summed weight of the loss
    assert saved_activations(model, batch) * MIB == pytest.approx(expected, abs=64)


def test_peak_memory_of_a_linear_network():
    """Wide weights, tiny batch: at the optimizer step weights, gradients and momentum live, and little more."""
    width = 512
    model = nn.Linear(width, width, bias=False)
    batch = Batch(torch.randn(2, width), torch.zeros(2, dtype=torch.long))
    weights = FLOAT * width * width / MIB
    assert 3 * weights < peak_memory(model, batch) < 3.1 * weights


def test_peak_memory_grows_with_the_batch(batch):
    larger = Batch(torch.randn(64, 3, 8, 8), torch.arange(64) % 5)
    small, large = (peak_memory(network("original"), b) for b in (batch, larger))
    assert large > 8 * small


def test_a_training_step_trains(batch):
    model = network("none")
    before = [p.detach().clone() for p in model.parameters()]
    TrainingStep(model, batch)()
    assert all((p != q).any() for p, q in zip(model.parameters(), before, strict=True))


def test_times_are_paired_and_notice_the_slow_one(batch):
    times = time_steps({("m", norm): network(norm) for norm in ("original", "slow", "none")}, batch, seconds=0.2)
    assert len({len(values) for values in times.values()}) == 1 and len(times["m", "slow"]) >= 5
    assert min(times["m", "slow"]) >= 0.02 > sorted(times["m", "none"])[0]


def test_measure(batch):
    costs = measure(lambda model, norm: network(norm), [("m", "original"), ("m", "kernel")], batch, seconds=0.2)
    original, kernel = costs["m", "original"], costs["m", "kernel"]
    assert original.slowdown == original.slowdown_q20 == original.slowdown_q80 == 1
    assert kernel.ms_per_step_q20 <= kernel.ms_per_step <= kernel.ms_per_step_q80
    assert (original.norm_family, kernel.norm_family) == ("batch", "kernel")
    assert kernel.cost_device == cost_device(batch.images.device) and kernel.saved_mib > 0 and kernel.peak_mib > 0


def test_measure_without_the_original_has_no_ratio(batch):
    cost = measure(lambda model, norm: network(norm), [("m", "kernel")], batch, seconds=0.1)["m", "kernel"]
    assert cost.slowdown is None and cost.ms_per_step > 0


def test_measure_leaves_out_what_cannot_make_a_step(batch):
    def build(model, norm):
        if norm == "unknown":
            raise UnknownName("norm", norm, ["original"])
        return network("original") if norm == "original" else nn.Linear(7, 7)

    assert list(measure(build, [("m", "broken"), ("m", "original")], batch, seconds=0.1)) == [("m", "original")]
    with pytest.raises(UnknownName):
        measure(build, [("m", "unknown")], batch, seconds=0.1)
