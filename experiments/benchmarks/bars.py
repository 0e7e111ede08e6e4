"""`python -m experiments.benchmarks bars`: what was measured beside what was asked; what nobody measured is blank."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.benchmarks import competitors as names
from experiments.benchmarks import growth, layers, networks
from experiments.benchmarks.memory import MIB
from experiments.benchmarks.rows import OUT, Row, before, latest, read
from experiments.markers import rewrite
from experiments.tables import Table, Text

BEGIN, END = "<!-- bars: made by python -m experiments.benchmarks bars --into -->", "<!-- end of bars -->"
EARLIER = 3
"""Measurements before the latest whose ratios the table shows too, be they of older kernels."""
FLOAT = 4
MOST_MAPS = 16
"""One-channel maps that a layer may keep beside its two full-size tensors."""
K_SQUARED = 1.5
"""A tensor so many times as large as the layer's input, output and weight would hold unfolded units."""


class Result(NamedTuple):
    """A figure, and whether it meets its bar; None where there is no bar."""

    figure: str
    met: bool | None = None


class Bar(NamedTuple):
    """A line of the acceptance table; `judge` gives None where the rows are not all there."""

    what: str
    bar: str
    judge: Callable[[Rows], Result | None]


class Rows:
    """The latest rows of one device and number of threads.

    device: its name, as in the rows; None for the one measured last.
    """

    def __init__(self, rows: Iterable[Row], *, cuda: bool, threads: int, device: str | None = None):
        rows = [row for row in rows if row.device.startswith("cuda") == cuda and (cuda or row.threads == threads)]
        self.devices = list(dict.fromkeys(row.device for row in reversed(rows)))
        """All that there are, the one measured last first."""
        self.device = device or next(iter(self.devices), "")
        self.all = [row for row in rows if row.device == self.device]
        self.rows = latest(self.all)
        self.which = {"cuda": cuda, "threads": threads, "device": self.device}

    def before(self, count: int) -> Rows:
        """As these were `count` measurements ago."""
        return Rows(before(self.all, count), **self.which)

    def where(self, **columns) -> list[Row]:
        """The rows with a time that have these entries; eager, float32 and channels_last unless said otherwise."""
        usual = {"engine": "eager", "dtype": "float32", "layout": "channels_last"}
        wanted = {**usual, **columns}
        found = [row for row in self.rows if all(getattr(row, name) == value for name, value in wanted.items())]
        return [row for row in found if row.median_ms is not None]

    def layers(self, variant: str, mode: str = "training", **columns) -> list[Row]:
        return self.where(**{"benchmark": "layers", "variant": variant, "mode": mode, **columns})


def bars(*, csv: Path = OUT, threads: int = 2, into: Path | None = None) -> None:
    """Print the acceptance table.

    Args:
        csv: the rows.
        threads: only CPU rows with so many.
        into: a Markdown file; what stands between its two marker comments is replaced by the table, and by the pictures
            that `plot` has put beside the file.
    """
    rows = read(csv)
    text = "\n\n".join(filter(None, (table(rows, threads), reach(rows, threads))))
    print(text)
    if into is not None:
        pictures = [f"![{path.stem.replace('_', ' of ', 1)}]({path.name})" for path in _pictures(into.parent)]
        rewrite(into, BEGIN, END, "\n\n".join([text, *pictures]))


def table(rows: list[Row], threads: int) -> str:
    """As Markdown, with a line on where the figures come from.

    The CPU measured last is judged; what others showed stands beside it, be it of older kernels.
    """
    cpu, gpu = Rows(rows, cuda=False, threads=threads), Rows(rows, cuda=True, threads=threads)
    others = [Rows(rows, cuda=False, threads=threads, device=device) for device in cpu.devices[1:]]
    lines = [(*_line(bar, cpu), *(Text(_figure(bar, other)) for other in others)) for bar in CPU_BARS]
    lines += [(*_line(bar, gpu), *(Text("") for _ in others)) for bar in GPU_BARS]
    header = ("", "measured", "bar", "met", f"the {EARLIER} before", *(f"on {other.device}" for other in others))
    markdown = Table(header, tuple(lines), names=1).markdown()
    return "\n\n".join([markdown, *filter(None, (_source(found.rows) for found in (cpu, *others, gpu)))])


def reach(rows: list[Row], threads: int) -> str:
    """What an eager network can reach, as Markdown: a KNConv2d, its operators alone, and compiled by itself."""
    cpu = Rows(rows, cuda=False, threads=threads)
    plain, moments = ((name, *others) for name, others in layers.REACH.items())
    kinds = (("KNConv2d", "eager"), ("its operators alone", "eager"), ("compiled by itself", "compiled"))
    lines = []
    for (kind, engine), without, drawn in zip(kinds, plain, moments, strict=True):
        measured = [(without, "training"), (drawn, "training"), (drawn, "inference")]
        found = [cpu.layers(variant, mode, benchmark="reach", engine=engine) for variant, mode in measured]
        if not all(found):
            return ""
        lines.append(tuple(map(Text, (kind, *(_median_and_worst([row.ratio for row in each]) for each in found)))))
    lines.append(tuple(map(Text, ("bar", "1.05, worst 1.15", "1.10, worst 1.20", "1.10"))))
    header = (f"in an eager network, in one run / {BN}", "training, dropout 0", "training, dropout 0.05", "inference")
    return Table(header, tuple(lines), names=1).markdown()


def _line(bar: Bar, rows: Rows) -> tuple[Text, ...]:
    result = bar.judge(rows) or Result("")
    met = "" if result.met is None else "yes" if result.met else "no"
    earlier = [bar.judge(rows.before(count)) for count in range(1, EARLIER + 1)]
    ratios = [found.figure.split(",")[0] for found in earlier if found is not None]
    shown = ", ".join(ratio for ratio in ratios if ratio.replace(".", "", 1).isdigit())
    return Text(bar.what), Text(result.figure), Text(bar.bar), Text(met), Text(shown)


def _figure(bar: Bar, rows: Rows) -> str:
    result = bar.judge(rows)
    return "" if result is None else result.figure


def _source(rows: list[Row]) -> str:
    if not rows:
        return ""
    dates, commits = sorted(row.date[:10] for row in rows), sorted({row.commit[:9] for row in rows})
    days = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    threads = f", {rows[0].threads} threads" if rows[0].device.startswith("cpu") else ""
    torch = ", ".join(sorted({row.torch for row in rows}))
    return f"{rows[-1].device}{threads}, torch {torch}, {days}, commit {', '.join(commits)}"


def _ratios(choose: Callable[[Rows], list[Row]], median: float, worst: float | None = None):
    """Judge the ratios of rows: their median, and where it is given the worst of them."""

    def judge(rows: Rows) -> Result | None:
        found = [row.ratio for row in choose(rows) if row.ratio is not None]
        if not found:
            return None
        middle, top = statistics.median(found), max(found)
        return Result(_median_and_worst(found), middle <= median and (worst is None or top <= worst))

    return judge


def _median_and_worst(ratios: list[float]) -> str:
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle}, worst {max(ratios):.2f} of {len(ratios)}"


def _published(rows: Rows) -> Result | None:
    found = [row.ratio for row in rows.layers(names.PUBLISHED, benchmark="forms", k=3) if row.ratio is not None]
    return Result(f"{statistics.median(found):.1f}, least {min(found):.1f}", min(found) >= 5) if found else None


def _saved(rows: Rows) -> Result | None:
    """What a layer keeps beyond x and the convolution's output, in one-channel maps; and its largest tensor."""
    found = [row for row in rows.layers(names.MOMENTS) if row.saved_mib is not None and row.largest_tensor_mib]
    if not found:
        return None
    maps, largest = [], []
    for row in found:
        # every shape keeps its size, or for an even kernel grows by one
        o, p = row.H + 1 - row.k % 2, row.W + 1 - row.k % 2
        x, y, one = (FLOAT * row.N * size / MIB for size in (row.C_in * row.H * row.W, row.C_out * o * p, o * p))
        weight = FLOAT * row.C_in * row.C_out * row.k**2 / MIB
        maps.append((row.saved_mib - x - y) / one)
        largest.append(row.largest_tensor_mib / max(x, y, weight))
    figure = f"2 and {max(maps):.1f} maps; largest tensor {max(largest):.2f} of a full-size one"
    return Result(figure, max(maps) <= MOST_MAPS and max(largest) <= K_SQUARED)


def _network(family: str, variant: str, engine: str = "eager"):
    columns = {"benchmark": "networks", "variant": variant, "mode": "training", "engine": engine}
    return lambda rows: _largest_batch(rows.where(**columns), family)


def _largest_batch(rows: list[Row], family: str) -> list[Row]:
    """Of a family's cases the one with the most images."""
    rows = [row for row in rows if row.case.startswith(f"{family} ")]
    most = max((row.N for row in rows), default=0)
    return [row for row in rows if most == row.N]


def _quotient(column: str, other: str, most: float | None):
    """KNResNet-18 / another variant of the same case in one column."""

    def judge(rows: Rows) -> Result | None:
        mine = _network("knresnet18", networks.KNRESNET)(rows)
        base = _network("knresnet18", other)(rows)
        if not mine or not base or not getattr(mine[0], column) or not getattr(base[0], column):
            return None
        quotient = getattr(mine[0], column) / getattr(base[0], column)
        return Result(f"{quotient:.2f}", None if most is None else quotient <= most)

    return judge


def _flat(rows: Rows) -> Result | None:
    found = {}
    for mode in ("training", "inference"):
        grown = [row for row in rows.where(benchmark="growth", case="statistics", mode=mode) if row.k > growth.FIRST]
        if not grown:
            return None
        found[mode] = max(row.ratio for row in grown)
    return Result(", ".join(f"{mode} {ratio:.2f}" for mode, ratio in found.items()), max(found.values()) <= 1.15)


def _compiled(rows: Rows) -> Result | None:
    found = rows.where(benchmark="compile", variant="compiled", mode="training", engine="compiled")
    found = _largest_batch(found, "knresnet18")
    if not found or found[0].ratio is None:
        return None
    row = found[0]
    return Result(f"{row.graph_breaks} breaks, {row.ratio:.2f}", row.graph_breaks == 0 and row.ratio <= 1)


def _gpu_layers(variant: str = names.MOMENTS, engine: str = "eager"):
    return lambda rows: rows.layers(variant, dtype="bfloat16", engine=engine)


def _gpu_peak(rows: Rows) -> Result | None:
    quotients = []
    for engine in ("eager", "compiled"):
        base = {row.case: row.peak_memory_mib for row in _gpu_layers(names.BATCH, engine)(rows)}
        for row in _gpu_layers(engine=engine)(rows):
            if row.peak_memory_mib and base.get(row.case):
                quotients.append(row.peak_memory_mib / base[row.case])
    return Result(f"{max(quotients):.2f} at worst", max(quotients) <= 1) if quotients else None


def _compiled_layers(variant: str, mode: str = "training"):
    return lambda rows: rows.layers(variant, mode, engine="compiled")


BN = "Conv2d+BatchNorm2d"
CPU_BARS = (
    Bar(
        f"training step, dropout 0, channels_last / {BN}",
        "<= 1.05 median, none over 1.15",
        _ratios(lambda rows: rows.layers(names.PLAIN), 1.05, 1.15),
    ),
    Bar(
        "the same, dropout 0.05 (moments)",
        "<= 1.10 median, none over 1.20",
        _ratios(lambda rows: rows.layers(names.MOMENTS), 1.10, 1.20),
    ),
    Bar(
        f"both compiled: training step, dropout 0 / {BN}",
        "<= 1.05 median, none over 1.15",
        _ratios(_compiled_layers(names.PLAIN), 1.05, 1.15),
    ),
    Bar(
        "both compiled, dropout 0.05",
        "<= 1.10 median, none over 1.20",
        _ratios(_compiled_layers(names.MOMENTS), 1.10, 1.20),
    ),
    Bar(
        "both compiled, inference",
        "<= 1.10 median",
        _ratios(_compiled_layers(names.MOMENTS, "inference"), 1.10),
    ),
    Bar(
        "contiguous, dropout 0.05",
        "<= 1.20 median, none over 1.35",
        _ratios(lambda rows: rows.layers(names.MOMENTS, layout="contiguous"), 1.20, 1.35),
    ),
    Bar(
        f"inference, channels_last / {BN} in eval",
        "<= 1.10 median",
        _ratios(lambda rows: rows.layers(names.MOMENTS, "inference"), 1.10),
    ),
    Bar(
        "inference, contiguous",
        "<= 1.10 median",
        _ratios(lambda rows: rows.layers(names.MOMENTS, "inference", layout="contiguous"), 1.10),
    ),
    Bar("unfolded units as published / ours, training, k = 3", ">= 5", _published),
    Bar("saved by a layer: full-size tensors and one-channel maps", f"2 and <= {MOST_MAPS} maps; no k² tensor", _saved),
    Bar(
        "KNResNet-18 training step / its BatchNorm twin",
        "<= 1.10",
        _ratios(_network("knresnet18", networks.KNRESNET), 1.10),
    ),
    Bar("KNResNet-18 saved activations / its twin", "<= 1.0", _quotient("saved_mib", networks.TWIN, 1.0)),
    Bar("KNResNet-18 training step / ResNet-18 (half the MACs)", "", _quotient("median_ms", networks.RESNET, None)),
    Bar("KNResNet-18 saved activations / ResNet-18", "", _quotient("saved_mib", networks.RESNET, None)),
    Bar(
        'convert(resnet18, enlarge="none") training step / the original, 224 x 224',
        "<= 1.10",
        _ratios(_network("resnet18-224", networks.CONVERTED), 1.10),
    ),
    Bar("the same, dropout 0", "<= 1.10", _ratios(_network("resnet18-224", networks.CONVERTED_PLAIN), 1.10)),
    Bar(
        "the same, both compiled",
        "<= 1.10",
        _ratios(_network("resnet18-224", networks.CONVERTED, "compiled"), 1.10),
    ),
    Bar(
        "the same, both compiled, dropout 0",
        "<= 1.10",
        _ratios(_network("resnet18-224", networks.CONVERTED_PLAIN, "compiled"), 1.10),
    ),
    Bar("the same, eager, 64 x 64", "<= 1.10", _ratios(_network("resnet18", networks.CONVERTED), 1.10)),
    Bar("statistics of k = 3 to 7 / k = 2, at most", "<= 1.15", _flat),
    Bar("KNResNet-18 compiled / eager training step", "0 breaks, <= 1.0", _compiled),
)
GPU_BARS = (
    Bar(f"GPU, bf16, channels_last, compiled / {BN}", "<= 1.0 median", _ratios(_gpu_layers(engine="compiled"), 1.0)),
    Bar("GPU, bf16, channels_last, eager", "<= 1.15 median", _ratios(_gpu_layers(), 1.15)),
    Bar(f"GPU, bf16, peak memory / {BN}", "<= 1.0", _gpu_peak),
)


def _pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("benchmark_*.svg"))
