"""Recipes of ImageNet, of ImageNet at 32 x 32, and of Tiny ImageNet."""

from __future__ import annotations

from experiments.recipe import Recipe, depth, norm_kind, scaling_of, tabulated
from experiments.settings import AugmentationSettings, OptimizationSettings


def imagenet(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ImageNet as in TMLR Table 2: 100 epochs, batch size 256, lr 0.1 with x 0.1 every 30, mean and SD removed for all.

    Command: ``accelerate launch --num_processes 8 -m experiments train imagenet --model knresnet18 --data-dir DIR``;
    of the competitors ``--model baseline_resnet18 --norm batch`` (group, layer).
    Hardware: eight GPUs. Hours, on the authors' eight A40: KNResNet-18 / 34 / 50 23 / 45 / 66, with BatchNorm 9 / 15 /
    22. Expected top-1 of the 50,000 validation images (published; 256 -> 224 pixels): 18 KN 71.17, BN 70.28, GN 68.93,
    LN 68.34; 34 74.60, 73.99, 72.63, 71.64; 50 76.54, 76.41, 75.92, 73.80 %. Another batch size scales the rate.
    """
    batch_size = 256 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=100,
        lr=tabulated({256: 0.1}, batch_size),
        optimization=OptimizationSettings(weight_decay=1e-4, schedule="step30"),
        augmentation=AugmentationSettings(augment="resized-crop-flip"),
    )


def imagenet_v1(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ImageNet as in the first version's Table 2: 100 epochs, batch size 32, cosine, inputs / 255 for kernel norm.

    Command: ``accelerate launch -m experiments train imagenet_v1 --model knresnet18_v1 --data-dir DIR``; of the
    competitors ``--model baseline_resnet18 --norm batch`` (group_of_32, layer).
    Hardware: one GPU. Hours, on the authors' A6000: KNResNet-18 / 34 / 50 425 / 557 / 710, with BatchNorm 35 / 55 /
    100. Expected top-1 (published): 18 KN 70.90, BN 69.67, GN 68.07, LN 67.37; 34 74.60, 73.33, 71.67, 71.37; 50 KN
    76.0 %; the paper takes its BN, GN and LN of depth 50 (76.4, 75.9, 74.7) from Wu & He (2018).
    """
    batch_size = 32 if batch_size is None else batch_size
    kernel50 = norm_kind(model, norm) == "kernel" and depth(model) == "50"
    return Recipe(
        batch_size=batch_size,
        epochs=100,
        lr=tabulated({32: 0.01 if kernel50 else 0.0125}, batch_size),
        scaling=scaling_of(model, norm),
        optimization=OptimizationSettings(weight_decay=1e-4, floor=0.001 if kernel50 else 0.01),
        augmentation=AugmentationSettings(augment="resized-crop-flip"),
    )


def imagenet_convnext(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ConvNeXt-T on ImageNet as in TMLR: 600 epochs of AdamW, batch size 1024, as torchvision trains its own.

    Command: ``accelerate launch --num_processes 4 -m experiments train imagenet_convnext --model knconvnext_tiny
    --data-dir DIR``; of the original ``--model baseline_convnext_tiny``.
    Hardware: four large GPUs; hours not published. Expected top-1 (published): KN 81.25, LN 80.87 %.
    5 epochs of warm-up, then cosine to 0; TrivialAugment (wide), erasing 0.1, mixup 0.2 or CutMix 1.0, four copies of
    each image in a batch, label smoothing 0.1; weight decay 0.05, none of it on norms; 176 pixels to train, 232 -> 224
    to test. The average's decay per step is that of torchvision's, which is 0.99998 adjusted to batch and epochs.
    Inputs have mean and SD removed, of both networks.
    """
    batch_size = 1024 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=600,
        lr=tabulated({1024: 1e-3}, batch_size),
        optimization=OptimizationSettings(
            optimizer="adamw",
            weight_decay=0.05,
            norm_weight_decay=0.0,
            schedule="cosine",
            floor=0.0,
            warmup_epochs=5,
            label_smoothing=0.1,
            ema=1 - 2e-5 * batch_size / 600,
        ),
        augmentation=AugmentationSettings(
            augment="resized-crop-flip",
            image_size=176,
            test_resize=232,
            test_size=224,
            trivial_augment=True,
            erase=0.1,
            mixup=0.2,
            cutmix=1.0,
            repeats=4,
        ),
    )


def imagenet32(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """ImageNet at 32 x 32 without privacy: the ceiling that `imagenet32_private` is to be compared with.

    Command: ``accelerate launch -m experiments train imagenet32 --model knresnet18 --data-dir DIR``; of the
    competitors ``--model baseline_resnet18 --norm batch`` (group, layer).
    Hardware: one GPU that holds the 3.9 GB of images; hours not measured. Expected: nothing published for these
    networks. Source: our own settings, those of TMLR's ImageNet with CIFAR's crop and flip; inputs / 255 for kernel
    norm, as in the papers' ImageNet32.
    """
    batch_size = 256 if batch_size is None else batch_size
    return Recipe(
        batch_size=batch_size,
        epochs=100,
        lr=tabulated({256: 0.1}, batch_size),
        scaling=scaling_of(model, norm),
        optimization=OptimizationSettings(weight_decay=1e-4, schedule="step30"),
    )


def tiny_imagenet(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """Tiny ImageNet as normalized convolution was published: 50 epochs, batch size 2, x 0.1 every 30, plain SGD.

    Command: ``accelerate launch -m experiments train tiny_imagenet --model nc_resnet50 --data-dir data``, against
    ``--model baseline_resnet50 --norm group``.
    Hardware: one GPU; hours not published. Expected of ResNet-50 (published as errors of 49.82 and 51.01): normalized
    convolution 50.18, GroupNorm 48.99 %. The learning rate at other batch sizes than 2 is in proportion; augmentation
    is not described, crop and flip are ours.
    """
    batch_size = 2 if batch_size is None else batch_size
    plain = OptimizationSettings(momentum=0.0, weight_decay=0.0, schedule="step30")
    return Recipe(batch_size=batch_size, epochs=50, lr=tabulated({2: 0.01}, batch_size), optimization=plain)
