"""Data sets, read from their real formats on disk: small images as one uint8 tensor, large ones file by file."""

from __future__ import annotations

from experiments.data.cifar import cifar10, cifar100
from experiments.data.digits import digits, digits32
from experiments.data.files import FileSet, SegmentationSet
from experiments.data.imagenet import imagenet, tiny_imagenet
from experiments.data.imagenet32 import imagenet32
from experiments.data.images import ImageSet
from experiments.data.streets import camvid, cityscapes
from experiments.run import Run

READERS = {
    "digits": digits,
    "digits32": digits32,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "imagenet32": imagenet32,
    "imagenet": imagenet,
    "camvid": camvid,
    "cityscapes": cityscapes,
}

Pair = tuple[ImageSet, ImageSet] | tuple[FileSet, FileSet] | tuple[SegmentationSet, SegmentationSet]


def data_set(recipe: str) -> str:
    """The data set of a recipe, whose name begins with it: of `imagenet32_private_v1`, `imagenet32`."""
    return next(name for name in READERS if f"{recipe}_".startswith(f"{name}_"))


def load(run: Run) -> Pair:
    """Train and test images of the run's recipe, on the CPU, restricted to its classes and numbers of images.

    Raises `KNPortError` for a missing or damaged file: which one, what was expected, how to get it.
    """
    train, test = READERS[data_set(run.recipe)](run.data_dir)
    return train.select(run.subset.classes, run.subset.train_images), test.select(
        run.subset.classes, run.subset.test_images
    )


__all__ = ["READERS", "FileSet", "ImageSet", "Pair", "SegmentationSet", "data_set", "load"]
