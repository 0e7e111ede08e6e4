"""Recipes of private training (DP-SGD): as `recipes.py`, with the privacy to spend.

Every network without BatchNorm can take part: kernel normalized ones as they are (`--norm original`) or converted
(`--norm kernel`), others with `--norm group` or `--norm layer`.
"""

from __future__ import annotations

from typing import Any

from experiments.recipe import Recipe, norm_kind, scaling_of
from experiments.settings import AugmentationSettings, OptimizationSettings, PrivacySettings, Schedule

# At batch size 256 and epsilon 8, best by a seed that is not among the reported ones: of 4, 8, 16 (kernel: of 8, 16)
DIGITS_LR = {"kernel": 16.0, "group": 16.0, "layer": 8.0}


def digits_private(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """scikit-learn's 8 x 8 digits at epsilon 8, delta 1e-4: 1,442 training images, nothing to download.

    Command: ``python -m experiments train digits_private --norm kernel``.
    Hardware: one CPU core, about half a minute. Expected of cifar_resnet8: KN 96, LN 78, GN 74 %
    (experiments/results/private_digits, by ``python -m experiments privacy``). Source: our own settings. As in the
    papers all norms but kernel normalization get inputs without mean and SD; those of the digits are computed from the
    training images, outside epsilon, so give --scaling unit where that matters.
    """
    batch_size = 256 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=8,
        lr=DIGITS_LR.get(norm_kind(model, norm), 8.0) * batch_size / 256,
        scaling=scaling_of(model, norm),
        optimization=_plain_sgd("cosine-step"),
        augmentation=AugmentationSettings(augment="none"),
        privacy=PrivacySettings(epsilon=8.0, delta=1e-4),
    )


def cifar10_private(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CIFAR-10 at epsilon 8, delta 1e-5, for the small networks of private training.

    Command: ``accelerate launch -m experiments train cifar10_private --model dp_knresnet8 --data-dir data``; of the
    competitors ``--model cifar_resnet8x2 --norm group``. Hardware: one GPU. Expected: not published, and not run to
    the end by this project. Source: optimizer, decay and clipping as in the papers' ImageNet32 recipe, at a batch
    size for 50,000 images.
    """
    batch_size = 1024 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=60,
        lr=2.0 * batch_size / 1024,
        scaling=scaling_of(model, norm),
        activation="mish",
        optimization=_plain_sgd("halve"),
        augmentation=AugmentationSettings(augment="none"),
        privacy=PrivacySettings(epsilon=8.0, delta=1e-5, clip=1.5),
    )


def imagenet32_private(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ImageNet32 at epsilon 8, delta 8e-7, as in TMLR Table 4: 100 epochs, batch size 8192, lr 4 halved at 70 and 90.

    Command: ``accelerate launch -m experiments train imagenet32_private --model dp_knresnet18 --data-dir data``; of the
    competitors ``--model baseline_resnet18 --norm group`` (or layer). Hardware: one large GPU; hours not published.
    Expected (published): KN 22.01, GN 20.99, LN 20.81 %. The published delta is slightly above 1 / 1,281,167 images.
    """
    return Recipe(
        batch_size=8192 if batch_size is None else batch_size,
        epochs=100,
        lr=4.0,
        optimization=_plain_sgd("halve"),
        privacy=PrivacySettings(epsilon=8.0, delta=8e-7, clip=2.0, physical_batch_size=128),
        **_imagenet32(model, norm),
    )


def imagenet32_private_v1(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ImageNet32 at epsilon 8, delta 1e-5, as in the first version's Table 4: lr 3 x 0.99 per epoch.

    Command: ``accelerate launch -m experiments train imagenet32_private_v1 --model dp_knresnet18 --data-dir data``; of
    the competitors ``--model baseline_resnet18 --norm group_of_32`` (or layer). Hardware: one large GPU; hours not
    published. Batch size 8192 for kernel normalization, 4096 for the others. Expected (published): KN 21.16, GN 19.33,
    LN 18.97 %. Its delta is 13 times 1 / 1,281,167 images: `imagenet32_private` is the recipe to use.
    """
    usual = 8192 if norm_kind(model, norm) == "kernel" else 4096
    return Recipe(
        batch_size=usual if batch_size is None else batch_size,
        epochs=100,
        lr=3.0,
        optimization=_plain_sgd("decay"),
        privacy=PrivacySettings(epsilon=8.0, delta=1e-5, clip=2.0, physical_batch_size=128),
        **_imagenet32(model, norm),
    )


def _imagenet32(model: str, norm: str) -> dict[str, Any]:
    none = AugmentationSettings(augment="none")
    return {"scaling": scaling_of(model, norm), "activation": "mish", "augmentation": none}


def _plain_sgd(schedule: Schedule) -> OptimizationSettings:
    return OptimizationSettings(momentum=0.0, weight_decay=0.0, schedule=schedule)
