"""`layers`: one layer, against convolution + BatchNorm and the other norms.

A training step is forward and backward with a random gradient of the output, the input's gradient included; inference
is evaluation mode without gradients, where the forms of dropout are one and the same. Shapes are those of feature maps
in ResNets for small and for large images.
"""

from __future__ import annotations

from collections.abc import Iterator

from experiments.benchmarks import competitors as names
from experiments.benchmarks.competitors import competitor
from experiments.benchmarks.measure import Case
from experiments.benchmarks.options import Options

SHAPES = ((16, 64, 32, 3), (16, 256, 16, 2), (8, 64, 56, 3), (32, 128, 16, 3))  # N, C, H = W, k
QUICK = ((2, 32, 8, 3),)
# On GPUs more images: at the sizes above the time is that of starting kernels.
GPU_IMAGES = 16
ALL = (
    names.CONV,
    names.BATCH,
    names.GROUP,
    names.LAYER,
    names.PLAIN,
    names.MOMENTS,
    names.SHARED,
    names.UNIT,
    names.PUBLISHED,
    names.PUBLISHED_PLAIN,
)
COMPILED = (names.BATCH, names.PLAIN, names.MOMENTS)  # the others would only add minutes of compiling


def cases(options: Options) -> Iterator[Case]:
    """Every shape in both layouts and both modes."""
    for n, channels, side, k in QUICK if options.quick else SHAPES:
        n *= GPU_IMAGES if options.device == "cuda" else 1
        geometry = {"in_channels": channels, "out_channels": channels, "kernel_size": k, "padding": k // 2}
        for layout in options.layouts:
            for mode in ("training", "inference"):
                chosen = _names(options.engine, mode)
                yield Case(
                    benchmark="layers",
                    name=f"N{n} C{channels} {side}x{side} k{k}",
                    variants=tuple(competitor(name, geometry, engine=options.engine) for name in chosen),
                    baseline=names.BATCH,
                    shape=(n, channels, side, side),
                    mode=mode,
                    layout=layout,
                    seconds=12.0 if mode == "training" else 5.0,
                    columns={"C_out": channels, "k": k, "stride": 1},
                )


def _names(engine: str, mode: str) -> list[str]:
    chosen = COMPILED if engine == "compiled" else ALL
    return [name for name in chosen if mode == "training" or name not in (names.SHARED, names.UNIT)]
