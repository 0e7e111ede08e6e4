"""The tables of the papers as facts: scores in percent, SD over three runs where one is published."""

from __future__ import annotations

from experiments.paper_table import NCNN, TMLR, V1, Column, Line, PaperTable, Value


def values(*numbers: float | tuple[float, float] | None) -> tuple[Value | None, ...]:
    return tuple(None if n is None else Value(*n) if isinstance(n, tuple) else Value(n) for n in numbers)


def both(*numbers: float) -> dict[str, tuple[Value | None, ...]]:
    return {TMLR: values(*numbers), V1: values(*numbers)}


def versions(tmlr: tuple, v1: tuple) -> dict[str, tuple[Value | None, ...]]:
    return {TMLR: values(*tmlr), V1: values(*v1)}


def kernel(depth: int, tmlr: tuple, v1: tuple, prefix: str = "knresnet", widths: bool = True) -> list[Line]:
    """KN networks: the two versions have different widths, except of segmentation."""
    name, ours = f"KNResNet-{depth}", f"{prefix}{depth}"
    if not widths:
        return [Line(name, "kernel", ours, "original", versions(tmlr, v1))]
    first = Line(name, "kernel", ours, "original", {TMLR: values(*tmlr)})
    return [first, Line(f"{name}, v1 widths", "kernel", f"{ours}_v1", "original", {V1: values(*v1)})]


def rivals(kind: str, given: dict[tuple[str, int], dict], norm: str) -> list[Line]:
    ours = {"ResNet": "baseline_resnet", "PreactResNet": "preact_resnet", "FCN": "fcn_resnet"}
    shown = {"FCN": "ResNet"}
    return [
        Line(f"{shown.get(family, family)}-{depth}", kind, f"{ours[family]}{depth}", norm, found)
        for (family, depth), found in given.items()
    ]


CIFAR100 = PaperTable(
    "Table 1", "CIFAR-100, top-1 [%]", {TMLR: "cifar100", V1: "cifar100_v1"}, {},
    (Column("batch size 2", "top1", 2), Column("batch size 32", "top1", 32), Column("batch size 256", "top1", 256)),
    (
        *kernel(18, ((79.10, 0.10), (79.29, 0.02), (78.84, 0.10)), ((79.09, 0.15), (79.02, 0.10), (78.85, 0.10))),
        *kernel(34, ((79.28, 0.09), (79.53, 0.15), (79.16, 0.21)), ((79.25, 0.07), (79.47, 0.15), (79.16, 0.21))),
        *kernel(50, ((80.24, 0.18), (80.18, 0.10), (80.09, 0.26)), ((80.25, 0.35), (80.15, 0.11), (79.70, 0.12))),
        *rivals("batch", {
            ("ResNet", 18): both(72.11, 78.52, 77.72), ("PreactResNet", 18): both(72.57, 78.32, 77.83),
            ("ResNet", 34): both(73.06, 79.21, 78.27), ("PreactResNet", 34): both(72.20, 79.09, 78.59),
            ("ResNet", 50): both(71.02, 80.39, 77.89), ("PreactResNet", 50): both(70.83, 80.28, 78.88),
        }, "original"),
        *rivals("group", {
            ("ResNet", 18): versions((74.62, 74.46, 74.46), (73.97, 73.89, 72.21)),
            ("PreactResNet", 18): versions((74.82, 74.74, 74.62), (73.60, 74.11, 72.82)),
            ("ResNet", 34): versions((75.76, 75.72, 75.44), (74.86, 74.43, 73.00)),
            ("PreactResNet", 34): versions((75.82, 75.85, 75.76), (74.44, 74.28, 73.67)),
            ("ResNet", 50): versions((77.03, 77.02, 74.79), (76.69, 76.77, 75.07)),
            ("PreactResNet", 50): versions((75.67, 76.08, 75.52), (75.06, 75.17, 74.35)),
        }, "group"),
        *rivals("layer", {
            ("ResNet", 18): both(72.68, 73.17, 71.99), ("PreactResNet", 18): both(73.51, 73.36, 72.91),
            ("ResNet", 34): both(73.74, 73.88, 72.48), ("PreactResNet", 34): both(74.79, 74.34, 73.10),
            ("ResNet", 50): both(75.83, 75.74, 74.37), ("PreactResNet", 50): both(74.28, 74.57, 73.41),
        }, "layer"),
    ),
    "150 epochs on all 50,000 training images, learning rate tuned per cell, 3 runs", 100, 50_000,
)  # fmt: skip
CIFAR10 = PaperTable(
    "Appendix C", "CIFAR-10, top-1 [%]", {TMLR: "cifar10"}, {}, (Column("batch size 128", "top1", 128),),
    (
        Line("KNResNet-18", "kernel", "knresnet18", "original", {TMLR: values(93.27)}),
        Line("ResNet-18", "batch", "baseline_resnet18", "original", {TMLR: values(92.11)}),
        Line("ResNet-18", "group", "baseline_resnet18", "group", {TMLR: values(90.58)}),
        Line("ResNet-18", "layer", "baseline_resnet18", "layer", {TMLR: values(90.32)}),
    ),
    "70 epochs without weight decay", 10, 50_000,
)  # fmt: skip
IMAGENET = PaperTable(
    "Table 2", "ImageNet, top-1 [%]", {TMLR: "imagenet", V1: "imagenet_v1"}, {TMLR: 256, V1: 32}, (Column("top-1"),),
    (
        *kernel(18, (71.17,), (70.90,)), *kernel(34, (74.60,), (74.60,)), *kernel(50, (76.54,), (76.0,)),
        *rivals("batch", {
            ("ResNet", 18): versions((70.28,), (69.67,)), ("ResNet", 34): versions((73.99,), (73.33,)),
            ("ResNet", 50): versions((76.41,), (76.4,)),
        }, "original"),
        *rivals("group", {
            ("ResNet", 18): versions((68.93,), (68.07,)), ("ResNet", 34): versions((72.63,), (71.67,)),
            ("ResNet", 50): versions((75.92,), (75.9,)),
        }, "group"),
        *rivals("layer", {
            ("ResNet", 18): versions((68.34,), (67.37,)), ("ResNet", 34): versions((71.64,), (71.37,)),
            ("ResNet", 50): versions((73.80,), (74.7,)),
        }, "layer"),
    ),
    "100 epochs; TMLR: batch size 8 x 32, v1: batch size 32", 1000, 1_281_167,
)  # fmt: skip
CONVNEXT = PaperTable(
    "ConvNeXt", "ImageNet, ConvNeXt-T, top-1 [%]", {TMLR: "imagenet_convnext"}, {TMLR: 1024}, (Column("top-1"),),
    (
        Line("KN-ConvNeXt-T", "kernel", "knconvnext_tiny", "original", {TMLR: values(81.25)}),
        Line("ConvNeXt-T", "layer", "baseline_convnext_tiny", "original", {TMLR: values(80.87)}),
    ),
    "600 epochs, batch size 4 x 256", 1000, 1_281_167,
)  # fmt: skip
CITYSCAPES = PaperTable(
    "Table 3", "CityScapes, 500 validation images [%]", {TMLR: "cityscapes", V1: "cityscapes"}, {TMLR: 16, V1: 16},
    (Column("mIoU", "miou"), Column("pixel accuracy", "pixel_accuracy"), Column("mean accuracy", "mean_accuracy")),
    (
        *kernel(18, ((64.37, 0.14), 93.73, 73.46), ((64.51, 0.33), 93.72, 73.43), "fcn_knresnet", widths=False),
        *kernel(34, ((67.61, 0.17), 94.13, 76.58), ((67.76, 0.32), 94.19, 76.85), "fcn_knresnet", widths=False),
        *kernel(50, ((68.02, 0.13), 94.22, 77.03), ((68.16, 0.11), 94.24, 77.26), "fcn_knresnet", widths=False),
        *rivals("batch", {
            ("FCN", 18): both(63.90, 93.77, 73.15), ("FCN", 34): both(66.94, 94.27, 76.50),
            ("FCN", 50): both(65.19, 93.98, 74.65),
        }, "original"),
        *rivals("local_context", {
            ("FCN", 18): both(62.25, 92.99, 71.59), ("FCN", 34): both(64.75, 93.31, 74.25),
            ("FCN", 50): both(64.03, 93.07, 73.40),
        }, "local_context"),
        *rivals("group", {
            ("FCN", 18): versions((62.33, 93.23, 71.58), (59.74, 92.68, 69.14)),
            ("FCN", 34): versions((64.21, 93.59, 74.32), (61.41, 92.94, 71.21)),
            ("FCN", 50): versions((62.14, 93.34, 71.66), (60.10, 92.84, 69.28)),
        }, "group"),
        *rivals("layer", {
            ("FCN", 18): both(59.10, 92.42, 69.43), ("FCN", 34): both(60.19, 92.73, 70.12),
            ("FCN", 50): both(57.88, 92.31, 68.25),
        }, "layer"),
    ),
    "500 epochs of crops of 1024 x 512, batch size 16", 19, 2975,
)  # fmt: skip
ABLATION = PaperTable(
    "Ablation", "CIFAR-100, KNResNet-50 at batch size 32, top-1 [%]", {TMLR: "cifar100", V1: "cifar100_v1"}, {},
    (Column("batch size 32", "top1", 32),),
    (
        Line("KNResNet-50 without kernel normalization", "none", "knresnet50", "none", {TMLR: values(71.48)}),
        Line("KNResNet-50 without dropout", "kernel", "knresnet50", "original", {TMLR: values(78.32)}, 0.0),
        Line("the same, v1 widths", "kernel", "knresnet50_v1", "original", {V1: values(78.96)}, 0.0),
    ),
    "as Table 1", 100, 50_000,
)  # fmt: skip
PRIVATE = PaperTable(
    "Table 4", "ImageNet32 with differential privacy, epsilon 8, top-1 [%]",
    {TMLR: "imagenet32_private", V1: "imagenet32_private_v1"}, {TMLR: 8192, V1: 8192}, (Column("top-1"),),
    (
        Line("KNResNet-18", "kernel", "dp_knresnet18", "original", versions((22.01,), (21.16,))),
        Line("ResNet-18", "group", "baseline_resnet18", "group", versions((20.99,), (19.33,))),
        Line("ResNet-18", "layer", "baseline_resnet18", "layer", versions((20.81,), (18.97,))),
    ),
    "100 epochs; delta 8e-7 in TMLR, 1e-5 in v1, whose GroupNorm and LayerNorm had batch size 4096", 1000, 1_281_167,
)  # fmt: skip
MICRO_BATCHES = PaperTable(
    "Kim et al., Table 1", "Normalized convolution at batch size 2, top-1 [%]", {NCNN: "tiny_imagenet"}, {NCNN: 2},
    (Column("Tiny ImageNet"),),
    (
        Line("ResNet-50", "normalized", "nc_resnet50", "original", {NCNN: values(50.18)}),
        Line("ResNet-50", "group", "baseline_resnet50", "group", {NCNN: values(48.99)}),
    ),
    "50 epochs; published as errors", 200, 100_000,
)  # fmt: skip
MICRO_BATCHES_CIFAR10 = PaperTable(
    "Kim et al., Table 1", "Normalized convolution at batch size 2, top-1 [%]", {NCNN: "cifar10_nc"}, {NCNN: 2},
    (Column("CIFAR-10"),),
    (
        Line("ResNet-18", "normalized", "nc_resnet18", "original", {NCNN: values(91.48)}),
        Line("ResNet-18", "group", "baseline_resnet18", "group", {NCNN: values(89.86)}),
    ),
    "50 epochs; published as errors", 10, 50_000,
)  # fmt: skip
TABLES = (
    CIFAR100, IMAGENET, CONVNEXT, CITYSCAPES, PRIVATE, CIFAR10, ABLATION, MICRO_BATCHES, MICRO_BATCHES_CIFAR10,
)  # fmt: skip
# Table 6: minutes and seconds of an epoch of training as published; BatchNorm is cuDNN's.
TIMES_HEADER = ("data set", "network", "BatchNorm", "kernel normalization", "on", "version")
TIMES = (
    ("CIFAR-100", "ResNet-18", "0:24", "2:28", "one A6000, batch size 32", V1),
    ("CIFAR-100", "ResNet-34", "0:45", "3:25", "one A6000, batch size 32", V1),
    ("CIFAR-100", "ResNet-50", "1:07", "5:08", "one A6000, batch size 32", V1),
    ("ImageNet", "ResNet-18", "21:00", "255:00", "one A6000, batch size 32", V1),
    ("ImageNet", "ResNet-34", "33:00", "334:00", "one A6000, batch size 32", V1),
    ("ImageNet", "ResNet-50", "60:00", "426:00", "one A6000, batch size 32", V1),
    ("ImageNet", "ResNet-18", "5:28", "13:58", "eight A40, batch size 256", TMLR),
    ("ImageNet", "ResNet-34", "9:12", "27:15", "eight A40, batch size 256", TMLR),
    ("ImageNet", "ResNet-50", "13:23", "39:33", "eight A40, batch size 256", TMLR),
    ("CityScapes", "ResNet-18", "0:47", "3:30", "two A40, batch size 16", V1),
    ("CityScapes", "ResNet-34", "0:52", "5:42", "two A40, batch size 16", V1),
    ("CityScapes", "ResNet-50", "1:22", "6:30", "two A40, batch size 16", V1),
)
