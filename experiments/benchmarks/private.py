"""Time of one step of private training: kernel normalization against GroupNorm, and each way to per-sample gradients.

    python -m experiments.benchmarks.private --image-size 32 --batch-size 16

A step is forward, loss, backward, clipping, noise and SGD, in float32 and channels-last, on images already there. The
ways take turns, in another order each round, so that a busy machine disturbs all alike. One line per way is added to
the CSV: median and 20 / 80 % quantiles, in milliseconds. ``functorch`` is what Opacus falls back to for layers it has
no rule for; it allows no dropout. ``plain`` is the step without privacy.
"""

from __future__ import annotations

import random
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import tyro

from experiments.cost import cost_device
from experiments.models import build
from experiments.results import append_rows
from experiments.run_folder import environment, processor
from knport import privacy

COLUMNS = ("date", "model", "norm", "dropout", "mode", "image_size", "batch_size", "metric", "y_50", "y_20", "y_80")
COLUMNS += ("times_group_hooks", "rounds", "device", "processor", "torch", "opacus", "commit")


class Way(NamedTuple):
    """One line of the table."""

    norm: str
    dropout: float
    mode: str


WAYS = (
    Way("kernel", 0.05, "hooks"),
    Way("kernel", 0.05, "ghost"),
    Way("kernel", 0.0, "hooks"),
    Way("kernel", 0.0, "functorch"),
    Way("group", 0.0, "hooks"),
    Way("group", 0.0, "ghost"),
    Way("kernel", 0.05, "plain"),
    Way("group", 0.0, "plain"),
)


def benchmark(
    *,
    model: str = "cifar_resnet8",
    image_size: int = 32,
    batch_size: int = 16,
    rounds: int = 15,
    threads: int = 1,
    out: Path = Path("experiments/results/benchmarks/private.csv"),
) -> None:
    """Measure, print, and add a line per way to a CSV.

    Args:
        model: what `python -m experiments train` takes.
        image_size: height and width in pixels; 3 channels, 10 classes.
        batch_size: images of a step.
        rounds: steps of each way, after two that are not counted.
        threads: of torch on the CPU.
        out: the CSV; made with a header where it does not exist.
    """
    torch.set_num_threads(threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch_size, device=device) % 10
    steps = {way: make_step(way, model, images, labels) for way in WAYS}
    times = interleave(steps, rounds, device)
    shared = {"date": date.today().isoformat(), "model": model, "image_size": image_size, "batch_size": batch_size}
    here = environment(device, 1)
    shared |= {
        "metric": "ms per step",
        "rounds": rounds,
        "device": cost_device(device),
        "processor": processor(),
    }
    shared |= {name: here[name] for name in ("torch", "opacus", "commit")}
    rows = [shared | way._asdict() | _quantiles(way, times) for way in WAYS]
    for row in rows:
        print(f"{row['norm']:7} dropout {row['dropout']:<5} {row['mode']:10} {row['y_50']:>8} ms", flush=True)
    append_rows(out, COLUMNS, rows)


def make_step(way: Way, model: str, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """A function that makes one step of a network of its own."""
    from opacus.grad_sample.utils import prepare_module
    from opacus.optimizers import get_optimizer_class
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    torch.manual_seed(0)
    net = build(model, way.norm, num_classes=10, image_size=images.shape[-1], dropout=way.dropout)
    net = net.to(images.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, fused=False)
    if way.mode != "plain":
        clip = {"max_grad_norm": 1.0} if way.mode == "ghost" else {}
        net = prepare_module(privacy.prepare(net), way.mode, loss_reduction="sum", **clip)
        kind = get_optimizer_class("flat", False, way.mode)
        optimizer = kind(optimizer, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(images))

    def step() -> None:
        losses = F.cross_entropy(net(images), labels, reduction="none")
        loss = losses.sum()
        if way.mode == "ghost":
            loss = DPTensorFastGradientClipping(net, optimizer, losses, "sum")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def interleave(steps: dict[Way, Callable[[], None]], rounds: int, device: torch.device) -> dict[Way, list[float]]:
    """Milliseconds of each way in each round; a different order in every round."""
    shuffle, times = random.Random(0), {way: [] for way in steps}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
        for number in range(rounds + 2):
            for way in shuffle.sample(list(steps), len(steps)):
                _wait(device)
                start = time.perf_counter()
                steps[way]()
                _wait(device)
                if number >= 2:
                    times[way].append(1e3 * (time.perf_counter() - start))
    return times


def _quantiles(way: Way, times: dict[Way, list[float]]) -> dict[str, str]:
    cuts = statistics.quantiles(times[way], n=5, method="inclusive")
    found = {"y_50": statistics.median(times[way]), "y_20": cuts[0], "y_80": cuts[-1]}
    pairs = zip(times[way], times[Way("group", 0.0, "hooks")], strict=True)
    found["times_group_hooks"] = statistics.median(own / group for own, group in pairs)  # within a round
    return {name: f"{value:.4g}" for name, value in found.items()}


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    tyro.cli(benchmark, config=(tyro.conf.OmitArgPrefixes,))
