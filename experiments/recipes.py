"""Recipes: the settings of one table of the papers as a function of the model, the norm and the batch size.

A recipe states the command, the hardware, the hours, the accuracy to expect and where the numbers come from. Its name
begins with that of its data set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments import recipes_cifar as cifar
from experiments import recipes_imagenet as imagenet
from experiments import recipes_private as private
from experiments import recipes_segmentation as segmentation
from experiments.recipe import Recipe, tabulated
from experiments.settings import AugmentationSettings, OptimizationSettings


def digits(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """scikit-learn's 8 x 8 digits: 1,797 real images inside the package, nothing to download.

    Command: ``python -m experiments train digits --norm kernel``.
    Hardware: one CPU core, about a minute. Expected: about 98 % for every norm. Source: our own settings.
    """
    batch_size = 32 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=15,
        lr=tabulated({2: 0.005, 32: 0.05}, batch_size),
        optimization=OptimizationSettings(schedule="cosine-step"),
        augmentation=AugmentationSettings(augment="crop"),
    )


def digits32(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """The digits enlarged to 32 x 32 pixels, for networks whose last maps would else be smaller than a pixel.

    Command: ``python -m experiments train digits32 --model timm/test_resnet --norm kernel``.
    Hardware: one CPU core, a minute or two. Expected of small networks after 150 steps: about 98 %, see
    experiments/results/converted_digits. Source: our own settings; AdamW, which transformers need, for every network.
    """
    batch_size = 32 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=5,
        lr=tabulated({2: 0.0005, 32: 0.002}, batch_size),
        optimization=OptimizationSettings(optimizer="adamw", weight_decay=0.05, schedule="cosine-step", warmup=20),
        augmentation=AugmentationSettings(augment="crop"),
    )


RECIPES: Mapping[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        digits32,
        cifar.cifar10,
        cifar.cifar10_readme,
        cifar.cifar10_nc,
        cifar.cifar100,
        cifar.cifar100_v1,
        imagenet.tiny_imagenet,
        imagenet.imagenet32,
        imagenet.imagenet,
        imagenet.imagenet_v1,
        imagenet.imagenet_convnext,
        segmentation.camvid,
        segmentation.cityscapes,
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
