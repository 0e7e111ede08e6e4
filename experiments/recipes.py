"""Recipes: the settings of one table of the papers as a function of the model, the norm and the batch size.

A recipe states the command, the hardware, the accuracy to expect and where the numbers come from. Learning rates are
the published ones where the papers give them for (model, norm, batch size), and follow `tabulated` elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from experiments import recipes_private as private
from experiments.recipe import Recipe, norm_kind
from experiments.settings import AugmentationSettings, OptimizationSettings, SegmentationSettings

LearningRates = Mapping[int, float]  # batch size -> learning rate

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

# TMLR Appendix C (batch size 128); the values at 32 are of the authors' README.
CIFAR10_LR: Mapping[str, LearningRates] = {
    "kernel": {32: 0.05, 128: 0.1},
    "batch": {128: 0.1},
    "group": {32: 0.0125, 128: 0.05},
    "layer": {128: 0.05},
}


def depth(model: str) -> str:
    """The row of the papers' table: 18, 34, 50 or pre18, pre34, pre50; 18 for every network they did not train."""
    name = model.rsplit("/", 1)[-1].lower()
    number = next((number for number in ("50", "34", "18") if name.endswith(f"resnet{number}")), "18")
    return f"pre{number}" if "pre" in name and "resnet" in name else number


def tabulated(table: LearningRates, batch_size: int) -> float:
    """The learning rate at `batch_size`: the table's own value; between two entries along the straight line of log lr
    over log batch size; outside the table in proportion to the batch size."""
    below = max((b for b in table if b <= batch_size), default=None)
    above = min((b for b in table if b >= batch_size), default=None)
    if below is None or above is None:
        nearest = above if below is None else below
        return table[nearest] * batch_size / nearest
    if below == above:
        return table[below]
    share = math.log(batch_size / below) / math.log(above / below)
    return table[below] ** (1 - share) * table[above] ** share


def digits(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """scikit-learn's 8 x 8 digits: 1,797 real images inside the package, nothing to download.

    Command: ``python -m experiments train digits --norm kernel``.
    Hardware: one CPU core, about a minute. Expected: about 98 % for every norm. Source: our own settings.
    """
    batch_size = 32 if batch_size is None else batch_size
    lr = tabulated({2: 0.005, 32: 0.05}, batch_size)
    return Recipe(
        batch_size=batch_size,
        epochs=15,
        lr=lr,
        optimization=OptimizationSettings(schedule="cosine-step"),
        augmentation=AugmentationSettings(augment="crop"),
    )


def cifar10(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-10 as in TMLR Appendix C: 70 epochs, batch size 128, no weight decay, inputs / 255 for kernel norm.

    Command: ``accelerate launch -m experiments train cifar10 --model knresnet18 --data-dir data``.
    Hardware: one GPU. Expected of ResNet-18 (published, last epoch): KN 93.27, BN 92.11, GN 90.58, LN 90.32 %.
    """
    batch_size = 128 if batch_size is None else batch_size
    kind = norm_kind(model, norm)
    lr = tabulated(CIFAR10_LR[kind], batch_size)
    scaling = "unit" if kind == "kernel" else "standard"
    no_decay = OptimizationSettings(weight_decay=0.0)
    return Recipe(batch_size=batch_size, epochs=70, lr=lr, scaling=scaling, optimization=no_decay)


def cifar100(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-100 as in TMLR Table 1: 150 epochs, batch size 2, 32 or 256, inputs / 255 for kernel norm.

    Command: ``accelerate launch -m experiments train cifar100 --model knresnet18 --batch-size 32 --data-dir data``.
    Hardware: one GPU (the authors: an A6000, 2.5 minutes an epoch at batch size 32). Expected at batch size
    2 / 32 / 256 (published, mean of 3 runs, last epoch): KNResNet-18 79.10 / 79.29 / 78.84, ResNet-18 with BatchNorm
    72.11 / 78.52 / 77.72, GroupNorm 74.62 / 74.46 / 74.46, LayerNorm 72.68 / 73.17 / 71.99 %.
    """
    batch_size = 32 if batch_size is None else batch_size
    kind, row = norm_kind(model, norm), depth(model)
    table = CIFAR100_LR.get((kind, row)) or CIFAR100_LR[kind, row.removeprefix("pre")]
    scaling = "unit" if kind == "kernel" else "standard"
    return Recipe(batch_size=batch_size, epochs=150, lr=tabulated(table, batch_size), scaling=scaling)


def camvid(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CamVid at 240 x 180, the small stand-in of CityScapes: 367 training and 233 test images, 11 classes.

    Command: ``accelerate launch -m experiments train camvid --model fcn_knresnet18 --data-dir data``.
    Hardware: one GPU, or a patient CPU with ``--epochs 10``. Expected: nothing published for these networks. Source:
    our own settings, those of CityScapes at the size of these images.
    """
    batch_size = 16 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=100,
        lr=0.01,
        optimization=OptimizationSettings(schedule="poly"),
        augmentation=AugmentationSettings(augment="scale-crop-flip"),
        segmentation=SegmentationSettings(crop_height=160, crop_width=224),
    )


def cityscapes(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CityScapes as in Table 3: 500 epochs of crops of 1024 x 512, batch size 16, poly schedule, class weights.

    Command: ``accelerate launch -m experiments train cityscapes --model fcn_knresnet18 --data-dir data``.
    Hardware: two GPUs (the authors: two A40, 3.5 minutes an epoch with KN, 47 s with BatchNorm, which is synchronized
    over both). Expected mIoU on the 500 validation images (published, mean of 3 runs): KNResNet-18 / 34 / 50 64.37 /
    67.61 / 68.02, BatchNorm 63.90 / 66.94 / 65.19, LCN 62.25 / 64.75 / 64.03, GroupNorm 62.33 / 64.21 / 62.14,
    LayerNorm 59.10 / 60.19 / 57.88 %.
    """
    return Recipe(
        batch_size=16 if batch_size is None else batch_size,
        epochs=500,
        lr=0.01,
        optimization=OptimizationSettings(schedule="poly"),
        augmentation=AugmentationSettings(augment="scale-crop-flip"),
        segmentation=SegmentationSettings(
            crop_height=512,
            crop_width=1024,
            class_weights=True,
            sync_batchnorm=norm_kind(model, norm) == "batch",
        ),
    )


def tiny_imagenet(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """Tiny ImageNet as normalized convolution was published: 50 epochs, batch size 2, x 0.1 every 30, plain SGD.

    Command: ``accelerate launch -m experiments train tiny_imagenet --model resnet50 --norm group --data-dir data``.
    Hardware: one GPU. Expected of ResNet-50 (published): GroupNorm 48.99, normalized convolution 50.18 %. The learning
    rate at other batch sizes than 2 is in proportion; augmentation is not described, crop and flip are ours.
    """
    batch_size = 2 if batch_size is None else batch_size
    lr = tabulated({2: 0.01}, batch_size)
    plain = OptimizationSettings(momentum=0.0, weight_decay=0.0, schedule="step30")
    return Recipe(batch_size=batch_size, epochs=50, lr=lr, optimization=plain)


RECIPES: Mapping[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        cifar10,
        cifar100,
        tiny_imagenet,
        camvid,
        cityscapes,
        private.digits_private,
        private.cifar10_private,
        private.imagenet32_private,
        private.imagenet32_private_v1,
    )
}


def get(name: str) -> Callable[..., Recipe]:
    """The recipe of that name; `UnknownName` with the nearest names otherwise."""
    if name not in RECIPES:
        from knport.errors import UnknownName  # importing knport imports torch: not paid by --help

        raise UnknownName("recipe", name, RECIPES)
    return RECIPES[name]
