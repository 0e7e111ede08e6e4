"""`table6` and `table8`: the settings in which the TMLR paper (Nasirigerdeh et al., 2024) gives times.

Table 6 is the training of ResNet-18/34/50 on ImageNet, 224 x 224, 32 images per GPU, with BatchNorm as PyTorch has it,
with BatchNorm of primitive operators, and the KNResNets. Table 8 is the inference of four KNConv 3 x 3 of 256 channels
on 256 images of 32, 64 and 128 pixels, stride 1 and 2. A CPU gets fewer and smaller images unless `--full` is given;
`note` says how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn

import architectures
from experiments.benchmarks import competitors as names
from experiments.benchmarks.competitors import PrimitiveBatchNorm2d, UnfoldKNConv, conv_with
from experiments.benchmarks.measure import Case, Variant
from experiments.benchmarks.options import Options
from knport import KNConv2d

BATCHNORM, PRIMITIVE = "ResNet BatchNorm", "ResNet BatchNorm of primitives"
IMAGES6, SIDE6, IMAGES8 = 32, 224, 256
LAYERS, CHANNELS = 4, 256
UNFOLD_UP_TO = 64  # pixels: nine copies of every map, and more, in gigabytes above that


def table6(options: Options) -> Iterator[Case]:
    """A ResNet with both BatchNorms and the KNResNet, of every depth."""
    full = options.full or options.device == "cuda"
    images, side = (IMAGES6, SIDE6) if full else (8, 128)
    images, side = (1, 96) if options.quick else (images, side)
    for depth in (18,) if options.quick else (18, 34, 50):
        variants = {
            BATCHNORM: _network(f"baseline_resnet{depth}"),
            PRIMITIVE: lambda depth=depth: _with_primitives(_network(f"baseline_resnet{depth}")()),
            f"KNResNet-{depth}": _network(f"knresnet{depth}"),
        }
        for mode in ("training",) if options.quick else ("training", "inference"):
            yield Case(
                benchmark="table6",
                name=f"ResNet-{depth}",
                variants=tuple(Variant(name=n, build=b, engine=options.engine) for n, b in variants.items()),
                baseline=BATCHNORM,
                shape=(images, 3, side, side),
                mode=mode,
                classes=1000,
                seconds=8.0 if mode == "training" else 4.0,
                columns={"note": f"{images} of {IMAGES6} images, {side} of {SIDE6} pixels"},
            )


def table8(options: Options) -> Iterator[Case]:
    """Stacks of four layers, inference, every layer with the stride."""
    full = options.full or options.device == "cuda"
    images, channels = (IMAGES8 if full else 2), CHANNELS
    if options.quick:
        images, channels = 1, 16
    for side in (32,) if options.quick else (32, 64, 128):
        for stride in (1, 2):
            yield Case(
                benchmark="table8",
                name=f"{side} px stride {stride}",
                variants=tuple(_stacks(channels, stride, options.engine, unfold=side <= UNFOLD_UP_TO)),
                baseline=names.BATCH,
                shape=(images, channels, side, side),
                mode="inference",
                seconds=5.0,
                columns={
                    "C_out": channels,
                    "k": 3,
                    "stride": stride,
                    "note": f"{images} of {IMAGES8} images, {channels} of {CHANNELS} channels",
                },
            )


def _network(name: str) -> Callable[[], nn.Module]:
    return lambda: architectures.create_model(name)


def _with_primitives(model: nn.Module) -> nn.Module:
    for path, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            model.set_submodule(path, PrimitiveBatchNorm2d(module.num_features))
    return model


def _stacks(channels: int, stride: int, engine: str, *, unfold: bool) -> Iterator[Variant]:
    geometry = {"in_channels": channels, "out_channels": channels, "kernel_size": 3, "stride": stride, "padding": 1}
    layers: dict[str, Callable[[], nn.Module]] = {
        names.CONV: lambda: nn.Conv2d(**geometry, bias=False),
        names.BATCH: lambda: conv_with(nn.BatchNorm2d, geometry),
        names.MOMENTS: lambda: KNConv2d(**geometry, dropout=names.DROPOUT),
    }
    if unfold and engine == "eager":
        layers[names.PUBLISHED] = lambda: UnfoldKNConv(**geometry, dropout=names.DROPOUT)
    for name, layer in layers.items():
        yield Variant(
            name=name,
            build=lambda layer=layer: nn.Sequential(*(layer() for _ in range(LAYERS))),
            baseline=names.MOMENTS if name == names.PUBLISHED else None,
            every=3 if name == names.PUBLISHED else 1,
            engine=engine,
            columns={"dropout": names.DROPOUT} if name in (names.MOMENTS, names.PUBLISHED) else {},
        )
