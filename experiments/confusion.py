"""Pixel accuracy, mean accuracy and mean IoU from one confusion matrix, summed over images and processes.

Letters: K classes; `matrix[i, j]` is the number of pixels of class i that were taken for class j.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.data.files import IGNORE


def confusion(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """int64 (K, K) of two integer tensors of one shape; pixels whose label is `IGNORE` do not count."""
    counted = labels != IGNORE
    pairs = labels[counted].long() * classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores(matrix: Tensor) -> dict[str, float]:
    """In percent: ``pixel_accuracy``, ``mean_accuracy`` over classes, ``miou``.

    The intersection of a class is what was rightly taken for it, its union what is it or was taken for it. Classes that
    neither occur nor were predicted have no IoU and are left out of the mean (of the official test images, none is);
    likewise for the accuracy of classes that do not occur. NaN where there is no pixel at all.
    """
    matrix = matrix.double()
    right, true, taken = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    union = true + taken - right
    return {
        "miou": 100 * float((right / union)[union > 0].mean()),
        "pixel_accuracy": 100 * float(right.sum() / matrix.sum()),
        "mean_accuracy": 100 * float((right / true)[true > 0].mean()),
    }
