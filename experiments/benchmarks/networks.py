"""`networks` and `compile`: training steps of whole networks.

`networks` sets KNResNet-18 beside its twin with BatchNorm (see `twin`) and beside ResNet-18, and converted networks
beside their originals. A step is forward, cross-entropy and backward, without an optimizer, which costs the same with
every norm. `compile` times each network compiled and eager in turn and counts graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import nn
from torchvision.models import resnet18

import architectures
from experiments.benchmarks.measure import Case, Variant
from experiments.benchmarks.options import Options
from experiments.benchmarks.twin import batchnorm_twin, materialize
from knport import KNConfig, convert

CLASSES, SMALL, LARGE, NATIVE = 100, (3, 32, 32), (3, 64, 64), (3, 224, 224)
KNRESNET, KNRESNET_PLAIN, TWIN, RESNET = "KNResNet-18", "KNResNet-18 p=0", "its BatchNorm twin", "ResNet-18 BatchNorm"
ORIGINAL, CONVERTED, ENLARGED = "original", "convert enlarge=none", "convert enlarge=2x2"
CONVERTED_PLAIN = "convert enlarge=none p=0"
LONG = ("knresnet18", "resnet18-224")  # families whose training steps are timed for longer
Build = Callable[[], nn.Module]


def cases(options: Options) -> Iterator[Case]:
    """KNResNet-18, a converted ResNet-18 and a converted small ResNet, training and inference."""
    for family, batch, builds, baseline, image in _families(options):
        for mode in ("training",) if options.quick else ("training", "inference"):
            yield Case(
                benchmark="networks",
                name=f"{family} batch {batch}",
                variants=tuple(_variant(name, build, options.engine) for name, build in builds.items()),
                baseline=baseline,
                shape=(batch, *image),
                mode=mode,
                classes=CLASSES,
                seconds=20.0 if mode == "training" and family in LONG else 6.0,
            )


def compile_cases(options: Options) -> Iterator[Case]:
    """The kernel normalized network of each family, compiled against eager."""
    ours = {"knresnet18": KNRESNET, "resnet18": CONVERTED, "resnet18-224": CONVERTED, "cifar_resnet8x2": CONVERTED}
    for family, batch, builds, _, image in _families(options):
        build = builds[ours[family]]
        for mode in ("training",) if options.quick else ("training", "inference"):
            yield Case(
                benchmark="compile",
                name=f"{family} batch {batch}",
                variants=(_variant("eager", build, "eager"), _variant("compiled", build, "compiled")),
                baseline="eager",
                shape=(batch, *image),
                mode=mode,
                classes=CLASSES,
                seconds=15.0 if mode == "training" and family == "knresnet18" else 5.0,
            )


def _families(options: Options) -> Iterator[tuple[str, int, dict[str, Build], str, tuple[int, int, int]]]:
    """Name, batch size, builders by variant, baseline, image."""
    converted = _converted(lambda: architectures.create_model("cifar_resnet8x2", num_classes=CLASSES))
    if options.quick:
        yield "cifar_resnet8x2", 2, converted, ORIGINAL, (3, 16, 16)
        return
    images = 8 if options.device == "cuda" else 1  # small batches leave a GPU idle
    for batch in (32 * images, 2):
        yield "knresnet18", batch, _knresnet18(), TWIN, SMALL
    for name, batch, size in (("resnet18", 8, LARGE), ("resnet18-224", 4, NATIVE)):
        yield name, batch * images, _converted(lambda: resnet18(num_classes=CLASSES)), ORIGINAL, size
    for batch in (32 * images, 2):
        yield "cifar_resnet8x2", batch, converted, ORIGINAL, SMALL


def _knresnet18() -> dict[str, Build]:
    def build(name: str = "knresnet18", **kwargs) -> nn.Module:
        return architectures.create_model(name, num_classes=CLASSES, low_resolution=True, **kwargs)

    return {
        KNRESNET: build,
        KNRESNET_PLAIN: lambda: build(dropout=0.0),
        TWIN: lambda: materialize(batchnorm_twin(build()), (2, *SMALL)),
        RESNET: lambda: build("baseline_resnet18"),
    }


def _converted(original: Build) -> dict[str, Build]:
    return {
        ORIGINAL: original,
        CONVERTED: lambda: convert(original(), KNConfig(enlarge="none")),
        CONVERTED_PLAIN: lambda: convert(original(), KNConfig(enlarge="none", dropout=0.0)),
        ENLARGED: lambda: convert(original()),
    }


def _variant(name: str, build: Build, engine: str) -> Variant:
    return Variant(name=name, build=build, engine=engine)
