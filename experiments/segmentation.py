"""Segmentation as a task of the training loop: a class for every pixel.

Letters: B images, K classes, H x W pixels, h x w positions of the network's map.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.confusion import confusion, scores
from experiments.data import crops
from experiments.data.files import IGNORE, SegmentationSet
from experiments.data.images import scale
from experiments.file_feed import FileFeed, Sample
from experiments.limits import FOR_CLASSIFICATION, FOR_PICTURES, check_foreign
from experiments.run import Run
from knport.errors import KNPortError

KINDS = ("none", "crop", "crop-flip", "scale-crop-flip")


class Segmentation:
    """Trains on crops with cross-entropy at every pixel; tests on whole images.

    Args:
        run: the run.
        images: to train on.
        accelerator: of this process.
    """

    metrics = ("miou", "pixel_accuracy", "mean_accuracy")
    """Columns of the log, all in percent."""
    score = "miou"
    """What the best weights are best in."""

    def __init__(self, run: Run, images: SegmentationSet, accelerator: Accelerator):
        self.check(run)
        if run.segmentation.class_weights and images.weights is None:
            raise KNPortError(f"class_weights is True, but none are published for {run.recipe}: leave them out")
        self.run, self.images, self.accelerator, self.device = run, images, accelerator, accelerator.device
        first = images.load(0)[0]
        self.size = run.segmentation.crop_height or first.height, run.segmentation.crop_width or first.width
        weights = images.weights if run.segmentation.class_weights else [1.0] * images.num_classes
        self.weights = torch.tensor(weights, device=self.device)

    @staticmethod
    def check(run: Run) -> None:
        """Raise `KNPortError` for settings that have no meaning here."""
        if run.private:
            raise KNPortError(f"{run.recipe} cannot be trained privately: leave --epsilon and --noise-multiplier out")
        check_foreign(run, FOR_CLASSIFICATION | FOR_PICTURES, KINDS)

    def network(self) -> dict[str, Any]:
        """What `experiments.models.build` is to build: a network with a map of class scores."""
        return {"num_classes": self.images.num_classes, "in_chans": 3, "image_size": min(self.size), "dense": True}

    def feed(self, images: SegmentationSet) -> FileFeed:
        """Crops, drawn by (seed, epoch, image)."""

        def sample(row: int, drawn: Tensor) -> Sample:
            return crops.scale_crop_flip(*images.load(row), self.size, drawn.tolist())

        def draw(epoch: int) -> Tensor:
            return crops.draw(self.run.augmentation.augment, self.run.seed, epoch, len(images))

        places = self.accelerator.process_index, self.accelerator.num_processes
        return FileFeed(images, self.run, sample, draw, self._to_float, self.device, *places)

    def total(self, labels: Tensor) -> Tensor:
        """What the summed loss of a step's pixels (B, H, W) is divided by: their weights, as a mean over processes.

        So the gradient is that of the weighted mean over all pixels of the step, on any number of processes and with
        any number of micro-batches.
        """
        counted = torch.bincount(labels[labels != IGNORE], minlength=len(self.weights))
        return self.accelerator.reduce((counted * self.weights).sum(), "mean").clamp_min(1e-6)  # none counts: loss 0

    def loss(self, logits: Tensor, labels: Tensor, total: Tensor) -> Tensor:
        """Cross-entropy of float32 logits (B, K, h, w) at the pixels of labels (B, H, W), summed, by `total`."""
        each = upsample(logits, labels.shape[1:]).permute(0, 2, 3, 1).flatten(0, 2)  # (B, K, H, W) -> (B*H*W, K)
        options = {"ignore_index": IGNORE, "label_smoothing": self.run.optimization.label_smoothing, "reduction": "sum"}
        return F.cross_entropy(each, labels.flatten(), self.weights, **options) / total

    def evaluate(
        self, model: nn.Module, images: SegmentationSet, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Unweighted cross-entropy per pixel, `scores` in percent, over every pixel of every whole image exactly once.

        One image at a time, of any size; process r of w takes images r, r + w, ... `stopped` is asked before each,
        equally often on all processes; when it says so the answer is None. The model's mode is restored.
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        classes = images.num_classes
        matrix = torch.zeros(classes, classes, dtype=torch.int64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        was_training = model.training
        model.eval()
        try:
            for first in range(0, math.ceil(len(images) / world) * world, world):
                if stopped():
                    return None
                if first + rank < len(images):
                    further = self._test(model, *images.load(first + rank))
                    matrix, loss = matrix + further[0], loss + further[1]
        finally:
            model.train(was_training)
        matrix, loss = (self.accelerator.reduce(value, "sum") for value in (matrix, loss))
        return {"test_loss": float(loss / matrix.sum()), **scores(matrix)}

    @torch.no_grad()
    def _test(self, model: nn.Module, image, annotation) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0)  # (H, W, C) -> (1, C, H, W)
        labels = torch.from_numpy(np.asarray(annotation).copy()).to(self.device).long()
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        with self.accelerator.autocast():
            logits = model(self._to_float(pixels.to(self.device)).contiguous(memory_format=layout)).float()
        each = upsample(logits, labels.shape)[0].flatten(1).T  # (1, K, H, W) -> (H*W, K)
        loss = F.cross_entropy(each, labels.flatten(), ignore_index=IGNORE, reduction="none").sum(dtype=torch.float64)
        return confusion(each.argmax(1), labels.flatten(), each.shape[1]), loss

    def _to_float(self, images: Tensor) -> Tensor:
        return scale(images, self.run.scaling, self.images.mean, self.images.std)


class Upsample(nn.Module):
    """`upsample` to a given (H, W) as a module: (B, K, h, w) -> (B, K, H, W)."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self.size = size

    def forward(self, maps: Tensor) -> Tensor:
        return upsample(maps, self.size)


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear interpolation (B, K, h, w) -> (B, K, H, W), as `F.interpolate` (align_corners=False) does it.

    As two matrix products: unlike that function's, their gradient on a GPU does not depend on the order of threads.
    """
    down, across = (_interpolation(n, m, maps) for n, m in zip(maps.shape[2:], size, strict=True))
    return down @ maps @ across.T


def _interpolation(n: int, m: int, like: Tensor) -> Tensor:
    """The (m, n) matrix of linear interpolation from n to m points."""
    points = torch.eye(n, dtype=like.dtype, device=like.device).unsqueeze(0)  # a signal per point
    return F.interpolate(points, size=m, mode="linear", align_corners=False)[0].T
