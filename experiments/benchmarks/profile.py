"""`python -m experiments.benchmarks profile`: where a layer's step goes, operator by operator.

An operator counts as the convolution, as a pass over a full-size tensor, or as one on maps of a single channel; what is
left of the step is Python, autograd and the dispatch of operators.
"""

from __future__ import annotations

import csv
import datetime
import math
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler

import knport
from experiments.benchmarks.layers import SHAPES

RESULTS = Path("experiments/results/benchmarks/profile.csv")
KINDS = ("convolution", "full-size", "maps")
FIELDS = ("date", "torch", "threads", "case", "layer", "step_ms", *(f"{k}_ms" for k in KINDS), "rest_ms",
          "full-size_calls", "maps_calls")  # fmt: skip


class Parts(NamedTuple):
    """Milliseconds of one step by kind of operator, and operators by kind."""

    milliseconds: dict[str, float]
    calls: dict[str, float]


def profile(*, threads: int = 2, steps: int = 30, out: Path = RESULTS) -> None:
    """Print where the training step of each layer goes, and append it to the CSV.

    Args:
        threads: of torch.
        steps: of which the median is taken.
        out: the CSV.
    """
    torch.set_num_threads(threads)
    for n, channels, side, k in SHAPES:
        x = torch.randn(n, channels, side, side).to(memory_format=torch.channels_last).requires_grad_()
        for name, layer in _layers(channels, k).items():
            row = _row(x, layer, steps)
            case = {"case": f"N{n} C{channels} {side}x{side} k{k}", "layer": name}
            about = {"date": f"{datetime.date.today()}", "torch": torch.__version__.split("+")[0], "threads": threads}
            _append(out, about | case | row)
            print("  ".join(f"{key} {value}" for key, value in (case | row).items()), flush=True)


def _layers(channels: int, k: int) -> dict[str, nn.Module]:
    geometry = {"kernel_size": k, "padding": k // 2}
    layers = {
        "Conv2d+BatchNorm2d": nn.Sequential(
            nn.Conv2d(channels, channels, bias=False, **geometry), nn.BatchNorm2d(channels)
        ),
        "KNConv2d p=0": knport.KNConv2d(channels, channels, dropout=0.0, **geometry),
        "KNConv2d moments": knport.KNConv2d(channels, channels, **geometry),
    }
    return {name: layer.to(memory_format=torch.channels_last) for name, layer in layers.items()}


def _row(x: torch.Tensor, layer: nn.Module, steps: int) -> dict[str, str]:
    cotangent = torch.randn_like(layer(x))

    def step() -> None:
        layer(x).backward(cotangent)
        x.grad = None

    times = []
    for _ in range(steps + 3):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    total = statistics.median(times[3:])
    parts = measure(step, x.numel() // 2)
    milliseconds = {f"{kind}_ms": f"{parts.milliseconds[kind]:.2f}" for kind in KINDS}
    rest = total - sum(parts.milliseconds.values())
    calls = {f"{kind}_calls": f"{parts.calls[kind]:.0f}" for kind in KINDS[1:]}
    return {"step_ms": f"{total:.2f}"} | milliseconds | {"rest_ms": f"{rest:.2f}"} | calls


def measure(step, full: int, steps: int = 10) -> Parts:
    """Profile `step`; tensors of at least `full` entries count as full-size."""
    with profiler(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(steps):
            step()
    milliseconds, calls = dict.fromkeys(KINDS, 0.0), dict.fromkeys(KINDS, 0.0)
    for event in recorded.events():
        if event.name.startswith("aten::") and event.self_cpu_time_total > 0:
            kind = _kind(event, full)
            milliseconds[kind] += event.self_cpu_time_total / 1e3 / steps
            calls[kind] += 1 / steps
    return Parts(milliseconds, calls)


def _kind(event, full: int) -> str:
    if "convolution" in event.name:
        return "convolution"
    sizes = [math.prod(shape) for shape in event.input_shapes if shape and isinstance(shape[0], int)]
    return "full-size" if max(sizes, default=0) >= full else "maps"


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if new:
            writer.writeheader()
        writer.writerow(row)
