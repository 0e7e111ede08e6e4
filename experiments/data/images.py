"""A labelled set of images held as one uint8 tensor, small enough to live on the device.

Letters: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from knport.errors import KNPortError


def scale(images: Tensor, scaling: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 (N, C, H, W) -> float32 of the same shape: ``unit`` is pixel / 255, ``standard`` also removes mean and SD.

    One elementwise operation after the other, so that the bits do not depend on how images are batched.
    """
    scaled = images.to(torch.float32).div_(255)
    if scaling == "unit":
        return scaled
    mean, std = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return scaled.sub_(mean).div_(std)


class Labelled:
    """Of any set with `labels`, `num_classes` and `take`: choosing a part of it."""

    def select(self, classes: int | None = None, count: int | None = None) -> Self:
        """The images of the first `classes` classes, and of those `count`, the first of each class in turn.

        The choice depends on the labels' order alone, never on a seed: class-balanced to one image as long as no
        class runs out.
        """
        chosen = self
        if classes is not None:
            if classes > self.num_classes:
                raise KNPortError(
                    f"classes is {classes}, but the set has {self.num_classes}: give --classes at most that"
                )
            chosen = replace(chosen.take(self.labels < classes), num_classes=classes)
        if count is not None:
            if count > len(chosen):
                raise KNPortError(
                    f"{count} images were asked for, but there are {len(chosen)}: ask for at most that many"
                )
            chosen = chosen.take(balanced_rows(chosen.labels, count))
        return chosen


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSet(Labelled):
    """Images and labels, and what scaling needs."""

    images: Tensor
    """uint8 (N, C, H, W)."""
    labels: Tensor
    """int64 (N,), 0 <= label < num_classes."""
    num_classes: int
    """Number of classes, whether or not all occur."""
    mean: tuple[float, ...]
    """Per channel, of pixel / 255 over the training images."""
    std: tuple[float, ...]
    """Per channel, likewise."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know, e.g. that the set is not of the official size."""

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> ImageSet:
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def scale(self, images: Tensor, scaling: str) -> Tensor:
        """uint8 (N, C, H, W) -> float32 of the same shape, by the function `scale` with the set's mean and SD."""
        return scale(images, scaling, self.mean, self.std)

    def take(self, rows: Tensor) -> ImageSet:
        """The images at these rows, or where a mask is true."""
        return replace(self, images=self.images[rows], labels=self.labels[rows])


def balanced_rows(labels: Tensor, count: int) -> Tensor:
    """Rows of `count` images, as many of each class as possible, the first of each class first; ascending."""
    by_class = torch.argsort(labels, stable=True)
    sizes = torch.bincount(labels)
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    turn = torch.empty_like(labels)  # how many images of the same class come before this one
    turn[by_class] = torch.arange(len(labels)) - starts
    return torch.argsort(turn, stable=True)[:count].sort().values
