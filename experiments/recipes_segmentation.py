"""Recipes of segmentation: CityScapes, and CamVid as its small stand-in."""

from __future__ import annotations

from experiments.recipe import Recipe, norm_kind
from experiments.settings import AugmentationSettings, OptimizationSettings, SegmentationSettings


def camvid(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CamVid at 240 x 180, the small stand-in of CityScapes: 367 training and 233 test images, 11 classes.

    Command: ``accelerate launch -m experiments train camvid --model fcn_knresnet18 --data-dir data``.
    Hardware: one GPU, or a patient CPU with ``--epochs 10``. Expected: nothing published for these networks. Source:
    our own settings, those of CityScapes at the size of these images.
    """
    return Recipe(
        batch_size=16 if batch_size is None else batch_size,
        epochs=100,
        lr=0.01,
        optimization=OptimizationSettings(schedule="poly"),
        augmentation=AugmentationSettings(augment="scale-crop-flip"),
        segmentation=SegmentationSettings(crop_height=160, crop_width=224),
    )


def cityscapes(model: str, norm: str, batch_size: int | None = None) -> Recipe:
    """CityScapes as in Table 3: 500 epochs of crops of 1024 x 512, batch size 16, poly schedule, class weights.

    Command: ``accelerate launch --num_processes 2 -m experiments train cityscapes --model fcn_knresnet18 --data-dir
    DIR``; of the competitors ``--model fcn_resnet18 --norm batch`` (group, layer, local_context).
    Hardware: two GPUs. Hours, on the authors' two A40: KN of depth 18 / 34 / 50 29 / 48 / 54, BatchNorm (synchronized
    over both) 7 / 7 / 11. Expected mIoU on the 500 validation images (published, mean of 3 runs): KNResNet-18 / 34 / 50
    64.37 / 67.61 / 68.02, BatchNorm 63.90 / 66.94 / 65.19, LCN 62.25 / 64.75 / 64.03, GroupNorm 62.33 / 64.21 / 62.14,
    LayerNorm 59.10 / 60.19 / 57.88 %; the first version has the same recipe, but groups of 32 channels (group_of_32):
    59.74 / 61.41 / 60.10 %. Inputs have mean and SD removed, as in the code that the papers follow.
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
