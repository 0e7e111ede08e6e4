"""Recipes of CIFAR-10 and CIFAR-100.

Learning rates are the published ones where there are any for (model, norm, batch size), and follow `tabulated`
elsewhere. The papers found them by halving from 0.2 until the accuracy fell: ``python -m experiments search-lr``.
"""

from __future__ import annotations

from collections.abc import Mapping

from experiments.recipe import LearningRates, Recipe, depth, norm_kind, scaling_of, tabulated
from experiments.settings import OptimizationSettings

# TMLR Table 5 (CIFAR-100), batch sizes 2, 32, 256, by depth; "pre" = the pre-activation variant where it differs.
CIFAR100_LR: Mapping[tuple[str, str], LearningRates] = {
    ("kernel", "18"): {2: 0.0015625, 32: 0.05, 256: 0.2},
    ("kernel", "34"): {2: 0.0015625, 32: 0.05, 256: 0.2},
    ("kernel", "50"): {2: 0.0015625, 32: 0.025, 256: 0.2},
    ("batch", "18"): {2: 0.00078125, 32: 0.025, 256: 0.2},
    ("batch", "34"): {2: 0.00078125, 32: 0.025, 256: 0.1},
    ("batch", "pre34"): {2: 0.000390625, 32: 0.025, 256: 0.2},
    ("batch", "50"): {2: 0.000390626, 32: 0.0125, 256: 0.1},
    ("batch", "pre50"): {2: 0.000195313, 32: 0.0125, 256: 0.2},
    ("group", "18"): {2: 0.0015625, 32: 0.025, 256: 0.1},
    ("group", "34"): {2: 0.0015625, 32: 0.025, 256: 0.1},
    ("group", "50"): {2: 0.00078125, 32: 0.0125, 256: 0.05},
    ("group", "pre50"): {2: 0.0015625, 32: 0.025, 256: 0.1},
    ("layer", "18"): {2: 0.0015625, 32: 0.0125, 256: 0.05},
    ("layer", "34"): {2: 0.0015625, 32: 0.0125, 256: 0.05},
    ("layer", "50"): {2: 0.00078125, 32: 0.0125, 256: 0.05},
    ("layer", "pre50"): {2: 0.0015625, 32: 0.0125, 256: 0.05},
}
# The first version's, where it differs: its GroupNorm has groups of 32 channels, TMLR's has 32 groups.
CIFAR100_V1_LR: Mapping[tuple[str, str], LearningRates] = CIFAR100_LR | {
    ("kernel", "50"): {2: 0.003125, 32: 0.05, 256: 0.2},
    ("group", "18"): {2: 0.0015625, 32: 0.0125, 256: 0.05},
    ("group", "34"): {2: 0.0015625, 32: 0.0125, 256: 0.05},
}
# TMLR Appendix C (batch size 128); the values at 32 are of the authors' README.
CIFAR10_LR: Mapping[str, LearningRates] = {
    "kernel": {32: 0.05, 128: 0.1},
    "batch": {128: 0.1},
    "group": {32: 0.0125, 128: 0.05},
    "layer": {128: 0.05},
}


def cifar100(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-100 as in TMLR Table 1: 150 epochs, batch size 2, 32 or 256, inputs / 255 for kernel norm.

    Command: ``accelerate launch -m experiments train cifar100 --model knresnet18 --batch-size 32 --data-dir data``;
    of the competitors ``--model baseline_resnet18 --norm batch`` (group, layer) or ``--model preact_resnet18``.
    Hardware: one GPU. Hours, on the authors' A6000 at batch size 32: KNResNet-18 / 34 / 50 6.2 / 8.5 / 12.8, with
    BatchNorm 1.0 / 1.9 / 2.8. Expected at batch size 2 / 32 / 256 (published, mean of 3 runs, last epoch): KNResNet-18
    79.10 / 79.29 / 78.84, ResNet-18 with BatchNorm 72.11 / 78.52 / 77.72, GroupNorm 74.62 / 74.46 / 74.46, LayerNorm
    72.68 / 73.17 / 71.99 %; of the others see ``python -m experiments list tables``. The ablation: KNResNet-50 at
    batch size 32 80.18 %, ``--dropout 0`` 78.32 %, ``--norm none`` (no kernel normalization) 71.48 %. The strongest
    rival, which the papers did not run: ``--model baseline_resnet18 --norm group_ws``.
    """
    return _cifar100(CIFAR100_LR, model, norm, batch_size)


def cifar100_v1(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-100 as in the first version's Table 1: `cifar100` with its own learning rates, for its own networks.

    Command: ``accelerate launch -m experiments train cifar100_v1 --model knresnet18_v1 --batch-size 32 --data-dir
    data``; of the competitors as in `cifar100`, with ``--norm group_of_32`` (groups of 32 channels).
    Hardware: one GPU; hours as `cifar100`. Expected at batch size 2 / 32 / 256 (published): KNResNet-18 79.09 / 79.02 /
    78.85, KNResNet-34 79.25 / 79.47 / 79.16, KNResNet-50 80.25 / 80.15 / 79.70, ResNet-18 with GroupNorm 73.97 / 73.89
    / 72.21 %. The ablation: KNResNet-50 at batch size 32 with ``--dropout 0`` 78.96 %.
    """
    return _cifar100(CIFAR100_V1_LR, model, norm, batch_size)


def cifar10(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-10 as in TMLR Appendix C: 70 epochs, batch size 128, no weight decay, inputs / 255 for kernel norm.

    Command: ``accelerate launch -m experiments train cifar10 --model knresnet18 --data-dir data``; of the competitors
    ``--model baseline_resnet18 --norm batch`` (group, layer).
    Hardware: one GPU; hours not published. Expected of ResNet-18 (published, last epoch): KN 93.27, BN 92.11, GN
    90.58, LN 90.32 %.
    """
    batch_size = 128 if batch_size is None else batch_size
    return _cifar10(model, norm, batch_size, 70, tabulated(CIFAR10_LR[norm_kind(model, norm)], batch_size))


def cifar10_readme(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-10 as in the README of the authors' code: 75 epochs at batch size 32, no weight decay.

    Command: ``accelerate launch -m experiments train cifar10_readme --model knresnet18 --data-dir data``.
    Hardware: one GPU; hours not published. Expected: not published. Learning rates are given of KN (0.05) and GN
    (0.0125); others take GN's.
    """
    batch_size = 32 if batch_size is None else batch_size
    lr = tabulated(CIFAR10_LR["kernel" if norm_kind(model, norm) == "kernel" else "group"], batch_size)
    return _cifar10(model, norm, batch_size, 75, lr)


def cifar10_nc(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-10 as normalized convolution was published (Kim, 2020): 50 epochs, batch size 2, x 0.1 every 30, plain SGD.

    Command: ``accelerate launch -m experiments train cifar10_nc --model nc_resnet18 --data-dir data``, against
    ``--model baseline_resnet18 --norm group``.
    Hardware: one GPU; hours not published. Expected of ResNet-18 (published as errors of 8.52 and 10.14): normalized
    convolution 91.48, GroupNorm 89.86 %. Augmentation is not described, crop and flip are ours.
    """
    batch_size = 2 if batch_size is None else batch_size
    plain = OptimizationSettings(momentum=0.0, weight_decay=0.0, schedule="step30")
    return Recipe(batch_size=batch_size, epochs=50, lr=tabulated({2: 0.01}, batch_size), optimization=plain)


def _cifar100(tables: Mapping[tuple[str, str], LearningRates], model: str, norm: str, batch_size: int | None) -> Recipe:
    batch_size = 32 if batch_size is None else batch_size
    kind, row = norm_kind(model, norm), depth(model)
    table = tables.get((kind, row)) or tables[kind, row.removeprefix("pre")]
    return Recipe(batch_size=batch_size, epochs=150, lr=tabulated(table, batch_size), scaling=scaling_of(model, norm))


def _cifar10(model: str, norm: str, batch_size: int, epochs: int, lr: float) -> Recipe:
    no_decay = OptimizationSettings(weight_decay=0.0)
    scaling = scaling_of(model, norm)
    return Recipe(batch_size=batch_size, epochs=epochs, lr=lr, scaling=scaling, optimization=no_decay)
