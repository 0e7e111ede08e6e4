"""`python -m experiments.benchmarks profile`: where a step goes, of layers (in inference too) and of whole networks.

    convolution     the convolutions themselves, forward and backward
    batchnorm       BatchNorm, forward and backward
    passes          of KNConv over feature maps: sums over channels, scale and shift, the input's gradient
    filters         of KNConv over its filters: their sums, centring, the sums' gradient
    maps            of KNConv over one-channel maps: the statistics of the units, dropout's draws
    rest            everything else: other layers, autograd, Python

KNConv's parts are timed around the functions of `knport.kernels` that do them, in the steps whose median is `step`, all
variants in turn. PyTorch has no such functions around its own: the profiler times them, in steps of their own, and
what these took more or less than those is in `rest`, which can come out below 0.
"""

from __future__ import annotations

import csv
import datetime
import functools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiler
from torchvision.models import resnet18

import knport
from experiments.benchmarks.competitors import BATCH, MOMENTS, PLAIN
from experiments.benchmarks.layers import SHAPES
from experiments.benchmarks.networks import CLASSES, CONVERTED, CONVERTED_PLAIN, ORIGINAL
from experiments.benchmarks.run import settle_heap
from experiments.benchmarks.timing import interleaved
from experiments.markers import rewrite
from experiments.run_folder import environment
from experiments.tables import Table, Text
from knport import KNConfig
from knport.kernels import cpu, cpu_conv

RESULTS = Path("experiments/results/benchmarks/profile.csv")
KN_PARTS: dict[str, tuple[tuple[ModuleType, str], ...]] = {
    "convolution": ((cpu_conv, "_convolve"), (cpu_conv, "_convolve_backward")),
    "passes": tuple(
        (cpu, name)
        for name in (
            "channel_sums",
            "subtract_outer",
            "scale_and_shift",
            "scale_and_shift_backward",
            "add_input_gradient",
        )
    ),
    "filters": ((cpu_conv, "filter_sums"), (cpu_conv, "_centred"), (cpu_conv, "_of_filters")),
    "maps": ((cpu_conv, "statistics"), (cpu_conv, "statistics_backward")),
}
TORCH_PARTS = {"convolution": ("convolution",), "batchnorm": ("native_batch_norm",)}
PARTS = ("convolution", "batchnorm", "passes", "filters", "maps")
COPY = "a copy of x"
"""What one pass that reads a feature map and writes one takes at least."""
ABOUT = ("commit", "device", "torch", "threads")
FIELDS = ("date", *ABOUT, "case", "variant", "step_ms", *(f"{part}_ms" for part in PARTS), "rest_ms")
BEGIN, END = "<!-- profile: made by python -m experiments.benchmarks profile --into -->", "<!-- end of profile -->"
# The acceptance bars, on the step with BatchNorm; in inference that of a converted network holds for all.
BARS = {PLAIN: 1.05, MOMENTS: 1.10, CONVERTED_PLAIN: 1.10, CONVERTED: 1.10}
Step = Callable[[], None]


def profile(*, threads: int = 2, seconds: float = 12.0, out: Path = RESULTS, into: Path | None = None) -> None:
    """Print where the step of each layer and network goes, and append it to the CSV.

    Args:
        threads: of torch.
        seconds: for the steps of one case.
        out: the CSV.
        into: a Markdown file; what stands between its two marker comments is replaced by the table of the latest rows.
    """
    torch.set_num_threads(threads)
    settle_heap()
    here = environment(torch.device("cpu"), 1)
    about = {"date": f"{datetime.date.today()}"} | {name: here[name] for name in ABOUT}
    for case, variants in [*_layers(), *_networks()]:
        for variant, parts in measure(variants, seconds).items():
            figures = {f"{part}_ms": f"{1e3 * parts[part]:.2f}" for part in ("step", *PARTS, "rest") if part in parts}
            row = {"case": case, "variant": variant} | figures
            _append(out, about | row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if into is not None:
        rewrite(into, BEGIN, END, table(out))


def table(path: Path) -> str:
    """The latest row of every case and variant as a Markdown table, in milliseconds; of the device measured last."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    latest = {(row["case"], row["variant"]): row for row in rows if row["device"] == rows[-1]["device"]}
    cases = list(dict.fromkeys(case for case, _ in latest))
    first: dict[str, float] = {}
    lines = []
    for (case, variant), row in sorted(latest.items(), key=lambda item: cases.index(item[0][0])):
        step = float(row["step_ms"])
        times = step / first.setdefault(case, step)
        parts = [row[f"{part}_ms"] for part in (*PARTS, "rest")]
        lines.append(tuple(map(Text, (case, variant, row["step_ms"], f"{times:.2f}", *parts))))
    header = ("", "", "step, ms", "times the first", *PARTS, "rest")
    lead = (
        "What a bar leaves for KNConv: the bar times the step, less convolution and rest of the variant with BatchNorm."
    )
    last = next(reversed(latest.values()))
    source = f"{last['device']}, {last['threads']} threads, torch {last['torch']}, {last['date']}, "
    source += f"commit {last['commit'][:9]}"
    return "\n\n".join([Table(header, tuple(lines)).markdown(), source, lead, _room(latest).markdown()])


def _room(latest: dict[tuple[str, str], dict[str, str]]) -> Table:
    """What each bar leaves, beside what the parts of a KNConv take, in milliseconds."""
    lines = []
    for (case, variant), row in latest.items():
        if variant not in BARS:
            continue
        bar = BARS[CONVERTED] if case.endswith("inference") else BARS[variant]
        base = latest.get((case, BATCH)) or latest[case, ORIGINAL]
        left = bar * float(base["step_ms"]) - float(base["convolution_ms"]) - float(base["rest_ms"])
        passes = float(row["passes_ms"]) + float(row["filters_ms"])
        measured = float(row["step_ms"]) / float(base["step_ms"])
        figures = (f"{bar:.2f}", f"{left:.2f}", f"{passes:.2f}", row["maps_ms"], f"{measured:.2f}")
        lines.append(tuple(map(Text, (case, variant, *figures))))
    header = ("", "", "bar", "it leaves, ms", "passes and filters", "maps", "measured / BatchNorm")
    return Table(header, tuple(lines))


def measure(variants: dict[str, tuple[Step, bool]], seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of a step and of its parts, by variant; a variant is its step and whether KNConvs are in it."""
    own: dict[str, list[Counter]] = {name: [] for name in variants}

    def timed(name: str, step: Step) -> None:
        with _clock() as parts:
            step()
        own[name].append(parts)

    steps = {name: functools.partial(timed, name, step) for name, (step, _) in variants.items()}
    for step in steps.values():
        step()
        step()
    for parts in own.values():
        parts.clear()
    times = interleaved(steps, seconds=seconds, least=5)
    found = {}
    for name, (step, ours) in variants.items():
        total = statistics.median(times[name].values())
        if ours:
            parts = {part: statistics.median(counted[part] for counted in own[name]) for part in KN_PARTS}
        else:
            parts = _profiled(step)
        found[name] = {"step": total, **parts, "rest": total - sum(parts.values())}
    return found


@contextmanager
def _clock() -> Iterator[Counter]:
    """Seconds by part of `KN_PARTS` while this is open; what a function calls of another part counts there only."""
    spent: Counter = Counter()
    inner = [0.0]  # seconds in timed functions that were called by the innermost one that is open
    undo = []

    def timed(part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args, **kwargs):
            inner.append(0.0)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            elapsed = time.perf_counter() - start
            spent[part] += elapsed - inner.pop()
            inner[-1] += elapsed
            return result

        return call

    for part, functions in KN_PARTS.items():
        for module, name in functions:
            undo.append((module, name, getattr(module, name)))
            setattr(module, name, timed(part, getattr(module, name)))
    try:
        yield spent
    finally:
        for module, name, function in undo:
            setattr(module, name, function)


def _profiled(step: Step, steps: int = 20) -> dict[str, float]:
    """Seconds of one step by part of `TORCH_PARTS`."""
    with profiler(activities=[ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
    parts = dict.fromkeys(TORCH_PARTS, 0.0)
    for event in recorded.events():
        for part, names in TORCH_PARTS.items():
            if event.name.startswith("aten::") and any(name in event.name for name in names):
                parts[part] += event.self_cpu_time_total / 1e6 / steps
    return parts


def _layers() -> Iterator[tuple[str, dict[str, tuple[Step, bool]]]]:
    for n, channels, side, k in SHAPES:
        geometry = {"kernel_size": k, "padding": k // 2}
        norm = nn.Sequential(nn.Conv2d(channels, channels, bias=False, **geometry), nn.BatchNorm2d(channels))
        layers = {
            BATCH: norm,
            PLAIN: knport.KNConv2d(channels, channels, dropout=0.0, **geometry),
            MOMENTS: knport.KNConv2d(channels, channels, **geometry),
        }
        x = torch.randn(n, channels, side, side).to(memory_format=torch.channels_last)
        for mode, step in (("", _layer_step), (", inference", _layer_inference)):
            steps = {name: step(layer, x) for name, layer in layers.items()}
            if not mode:
                steps[COPY] = functools.partial(torch.empty_like(x).copy_, x), False
            yield f"N{n} C{channels} {side}x{side} k{k}{mode}", steps


def _layer_step(layer: nn.Module, x: torch.Tensor) -> tuple[Step, bool]:
    layer = layer.to(memory_format=torch.channels_last)
    x = x.detach().to(memory_format=torch.channels_last).requires_grad_()
    cotangent = torch.randn_like(layer(x))

    def step() -> None:
        layer(x).backward(cotangent)
        x.grad = None

    return step, isinstance(layer, knport.KNConv2d)


def _layer_inference(layer: nn.Module, x: torch.Tensor) -> tuple[Step, bool]:
    layer = layer.to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.no_grad():
            layer.eval()(x)
        layer.train()

    return step, isinstance(layer, knport.KNConv2d)


def _networks() -> Iterator[tuple[str, dict[str, tuple[Step, bool]]]]:
    for batch, side in ((4, 224), (8, 64)):
        original = resnet18(num_classes=CLASSES)
        networks = {
            ORIGINAL: original,
            CONVERTED_PLAIN: knport.convert(original, KNConfig(enlarge="none", dropout=0.0)),
            CONVERTED: knport.convert(original, KNConfig(enlarge="none")),
        }
        x = torch.randn(batch, 3, side, side).to(memory_format=torch.channels_last)
        steps = {name: _network_step(network, x, network is not original) for name, network in networks.items()}
        yield f"resnet18 batch {batch} {side}x{side}", steps


def _network_step(network: nn.Module, x: torch.Tensor, ours: bool) -> tuple[Step, bool]:
    network = network.to(memory_format=torch.channels_last)
    target = torch.arange(len(x)) % CLASSES

    def step() -> None:
        F.cross_entropy(network(x), target).backward()
        network.zero_grad(set_to_none=True)

    return step, ours


def _append(path: Path, row: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
