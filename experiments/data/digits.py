"""scikit-learn's handwritten digits: 1,797 real 8 x 8 images that come with the package."""

from __future__ import annotations

import torch

from experiments.data.images import ImageSet

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
