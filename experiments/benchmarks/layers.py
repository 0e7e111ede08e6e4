"""`layers`, `reach`, `forms`, `stem`: one layer, against convolution + BatchNorm, the other norms, and its own forms.

A training step is forward and backward with a random gradient of the output, the input's gradient included; inference
is evaluation mode without gradients, where the forms of dropout are one and the same. Shapes are those of feature maps
in ResNets for small and for large images.

The forms that draw masks and the published one, which unfolds every unit, are a benchmark of their own: what they write
to memory would slow down whatever runs after them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import nn

from experiments.benchmarks import competitors as names
from experiments.benchmarks.competitors import competitor
from experiments.benchmarks.measure import Case
from experiments.benchmarks.options import Options

SHAPES = ((16, 64, 32, 3), (16, 256, 16, 2), (8, 64, 56, 3), (32, 128, 16, 3))  # N, C, H = W, k
QUICK = ((2, 32, 8, 3),)
# On GPUs more images: at the sizes above the time is that of starting kernels.
GPU_IMAGES = 16
LAYERS = (names.CONV, names.BATCH, names.GROUP, names.LAYER, names.PLAIN, names.MOMENTS)
FORMS = (names.PLAIN, names.MOMENTS, names.SHARED, names.UNIT, names.PUBLISHED, names.PUBLISHED_PLAIN)
# What `reach` measures beside the baseline: a KNConv2d of each dropout, and the same with less around it.
REACH = {
    names.PLAIN: (names.STRAIGHT_PLAIN, names.ALONE_PLAIN),
    names.MOMENTS: (names.STRAIGHT, names.ALONE),
}
STEMS = (names.CONV, names.BATCH, names.PLAIN)
COMPILED = (names.BATCH, names.PLAIN, names.MOMENTS)  # the others would only add minutes of compiling


def cases(options: Options) -> Iterator[Case]:
    """Every shape in both layouts and both modes."""
    chosen = COMPILED if options.engine == "compiled" else LAYERS
    for layout in options.layouts:
        yield from _cases("layers", options, layout, {"training": chosen, "inference": chosen}, names.BATCH)


def form_cases(options: Options) -> Iterator[Case]:
    """Every shape in both modes; eager and channels_last."""
    in_evaluation = tuple(name for name in FORMS if name not in (names.SHARED, names.UNIT))
    chosen = {"training": FORMS, "inference": in_evaluation}
    yield from _cases("forms", options, "channels_last", chosen, names.MOMENTS)


def reach_cases(options: Options) -> Iterator[Case]:
    """What is to be gained in an eager network beyond what a KNConv2d does: its operators without the Python around
    them, and what torch.compile makes of the layer by itself. On CPUs."""
    if options.device != "cpu":
        return
    for n, channels, side, k in QUICK if options.quick else SHAPES:
        geometry = {"in_channels": channels, "out_channels": channels, "kernel_size": k, "padding": k // 2}
        for mode in ("training", "inference"):
            variants = [competitor(names.BATCH, geometry)]
            for name, (straight, alone) in REACH.items():
                ours = competitor(name, geometry)
                p = ours.columns["dropout"]
                build = partial(names.StraightKNConv2d, **geometry, size=(side, side), dropout=p)
                variants += [ours, replace(ours, name=straight, build=build)]
                variants.append(replace(ours, name=alone, engine="compiled"))
            yield Case(
                benchmark="reach",
                name=f"N{n} C{channels} {side}x{side} k{k}",
                variants=tuple(variants),
                baseline=names.BATCH,
                shape=(n, channels, side, side),
                mode=mode,
                seconds=12.0 if mode == "training" else 6.0,
                columns={"C_out": channels, "k": k, "stride": 1},
            )


def stem_cases(options: Options) -> Iterator[Case]:
    """The stem of a ResNet, with ReLU and max-pooling: what a compiler makes of it with and without a norm."""
    images, side = (1, 32) if options.quick else (4, 224)
    geometry = {"in_channels": 3, "out_channels": 64, "kernel_size": 7, "stride": 2, "padding": 3}
    stems = {name: competitor(name, geometry, engine=options.engine) for name in STEMS}

    def build(name: str) -> nn.Module:
        return nn.Sequential(stems[name].build(), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1))

    yield Case(
        benchmark="stem",
        name=f"N{images} C3 {side}x{side} k7 stride 2, ReLU, max-pooling",
        variants=tuple(replace(stem, build=partial(build, name)) for name, stem in stems.items()),
        baseline=names.BATCH,
        shape=(images, 3, side, side),
        seconds=8.0,
        columns={"C_out": 64, "k": 7, "stride": 2},
    )


def _cases(benchmark: str, options: Options, layout: str, chosen: dict[str, tuple], baseline: str) -> Iterator[Case]:
    for n, channels, side, k in QUICK if options.quick else SHAPES:
        n *= GPU_IMAGES if options.device == "cuda" else 1
        geometry = {"in_channels": channels, "out_channels": channels, "kernel_size": k, "padding": k // 2}
        engine = options.engine if benchmark == "layers" else "eager"
        for mode, variants in chosen.items():
            yield Case(
                benchmark=benchmark,
                name=f"N{n} C{channels} {side}x{side} k{k}",
                variants=tuple(competitor(name, geometry, engine=engine) for name in variants),
                baseline=baseline,
                shape=(n, channels, side, side),
                mode=mode,
                layout=layout,
                seconds=8.0 if mode == "training" else 4.0,
                columns={"C_out": channels, "k": k, "stride": 1},
            )
