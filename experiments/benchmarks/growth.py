"""`growth`: how the cost of kernel normalization grows with the kernel, the channels, the resolution and the batch.

`kernel`, `channels`, `resolution`, `batch` vary one of them; in each case a KNConv and a convolution with BatchNorm
stand beside the same convolution alone. `extra_ms` is then what normalization adds, and 1 - 1 / ratio its share.

`statistics` is the time of the statistics by themselves: a kernel normalized convolution of one 1 x 1 filter whose
window is k x k. It runs what every KNConv runs to normalize by k x k units, while the convolution, a single filter,
stays the same; all k are timed in turn, and the baseline is k = 2.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.benchmarks import competitors as names
from experiments.benchmarks.competitors import competitor
from experiments.benchmarks.measure import Case, Variant
from experiments.benchmarks.options import Options
from knport import KNConv2d

KERNELS, CHANNELS, SIDES, BATCHES = range(1, 8), (16, 64, 256, 512), (8, 16, 32, 64), (1, 2, 8, 32, 128)
FIRST = 2
"""The kernel that the statistics' growth is counted from."""


def cases(options: Options) -> Iterator[Case]:
    """Points of the four curves, and the statistics by themselves."""
    if options.quick:
        yield from (_point("kernel", k, options, n=1, channels=16, side=8, k=k) for k in (1, 3))
        yield from _statistics(options, 1, 16, 8)
        return
    n = 16 * (16 if options.device == "cuda" else 1)
    yield from _statistics(options, n, 64, 32)
    yield from (_point("kernel", k, options, n=n, k=k) for k in KERNELS)
    yield from (_point("channels", c, options, n=n, channels=c, side=16) for c in CHANNELS)
    yield from (_point("resolution", side, options, n=n, side=side) for side in SIDES)
    yield from (_point("batch", batch, options, n=batch, side=16) for batch in BATCHES)


def _point(curve: str, x: int, options: Options, *, n: int, channels: int = 64, side: int = 32, k: int = 3) -> Case:
    geometry = {"in_channels": channels, "out_channels": channels, "kernel_size": k, "padding": k // 2}
    chosen = (names.CONV, names.BATCH, names.PLAIN, names.MOMENTS)
    return Case(
        benchmark="growth",
        name=f"{curve} {x}",
        variants=tuple(competitor(name, geometry, engine=options.engine) for name in chosen),
        baseline=names.CONV,
        shape=(n, channels, side, side),
        seconds=3.0,
        columns={"C_out": channels, "k": k, "stride": 1},
    )


def _statistics(options: Options, n: int, channels: int, side: int) -> Iterator[Case]:
    variants = tuple(
        Variant(
            name=f"k={k}",
            build=lambda k=k: KNConv2d(channels, 1, 1, norm_window=k, dropout=0.0),
            engine=options.engine,
            columns={"k": k, "dropout": 0.0},
        )
        for k in KERNELS
    )
    for mode in ("training", "inference"):
        yield Case(
            benchmark="growth",
            name="statistics",
            variants=variants,
            baseline=f"k={FIRST}",
            shape=(n, channels, side, side),
            mode=mode,
            seconds=4.0,
            columns={"C_out": 1, "stride": 1},
        )
