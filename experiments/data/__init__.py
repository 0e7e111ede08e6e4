"""Data sets, read from their real formats on disk: small images as one uint8 tensor, large ones file by file."""

from __future__ import annotations

from experiments.data.cifar import cifar10, cifar100
from experiments.data.digits import digits
from experiments.data.files import FileSet, SegmentationSet
from experiments.data.imagenet import imagenet, tiny_imagenet
from experiments.data.imagenet32 import imagenet32
from experiments.data.images import ImageSet
from experiments.data.streets import camvid, cityscapes
from experiments.run import Run

READERS = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "tiny_imagenet": tiny_imagenet,
    "camvid": camvid,
    "cityscapes": cityscapes,
    "digits_private": digits,
    "cifar10_private": cifar10,
    "imagenet32_private": imagenet32,
    "imagenet32_private_v1": imagenet32,
}


Pair = tuple[ImageSet, ImageSet] | tuple[SegmentationSet, SegmentationSet]


def load(run: Run) -> Pair:
    """Train and test images of the run's recipe, on the CPU, restricted to its classes and numbers of images.

    Raises `KNPortError` for a missing or damaged file: which one, what was expected, how to get it.
    """
    train, test = READERS[run.recipe](run.data_dir)
    return train.select(run.subset.classes, run.subset.train_images), test.select(
        run.subset.classes, run.subset.test_images
    )


__all__ = ["READERS", "FileSet", "ImageSet", "Pair", "SegmentationSet", "imagenet", "load"]
