"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images that come with the package; also enlarged to 32 x 32."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from experiments.data.images import ImageSet

LARGE = 32  # pixels per side of the enlarged images
TEST_EVERY = 5  # every fifth image of each class, in file order, is a test image


def digits(data_dir: str = "") -> tuple[ImageSet, ImageSet]:
    """1,442 training and 355 test images, (1, 8, 8), 10 classes; the 17 grey levels are spread over 0..255.

    `data_dir` is not used: there is no file to have.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    grey = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)  # (N, 1, 8, 8)
    turn = torch.zeros_like(labels)
    for label in range(10):
        rows = labels == label
        turn[rows] = torch.arange(int(rows.sum()))
    test = turn % TEST_EVERY == TEST_EVERY - 1
    pixels = grey[~test].double() / 255
    mean, std = (float(pixels.mean()),), (float(pixels.std(correction=0)),)
    return tuple(
        ImageSet(images=grey[rows], labels=labels[rows], num_classes=10, mean=mean, std=std) for rows in (~test, test)
    )


def digits32(data_dir: str = "") -> tuple[ImageSet, ImageSet]:
    """The same images at 32 x 32 by bilinear interpolation, for networks that halve their maps four times or more.

    What is subtracted and divided by stays that of the 8 x 8 images.
    """
    return tuple(replace(images, images=_enlarged(images.images)) for images in digits(data_dir))


def _enlarged(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 1, 8, 8) -> (N, 1, 32, 32)."""
    large = F.interpolate(images.double(), size=(LARGE, LARGE), mode="bilinear", align_corners=False)
    return large.round().to(torch.uint8)
