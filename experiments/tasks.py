"""What the training loop leaves to the task: network, batches, loss, and what is measured.

A task is a class with `metrics`, `score` and `check`, made of (run, training images, accelerator), with `network`,
`feed`, `total`, `loss` and `evaluate` as `Classification` has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.data.images import ImageSet
from experiments.evaluate import evaluate
from experiments.feed import Feed
from experiments.run import Run
from experiments.segmentation import Segmentation
from knport.errors import KNPortError


class Classification:
    """One class for each image.

    Args:
        run: the run.
        images: to train on.
        accelerator: of this process.
    """

    metrics = ("top1", "top5")
    """Columns of the log, all in percent."""
    score = "top1"
    """What the best weights are best in."""

    def __init__(self, run: Run, images: ImageSet, accelerator: Accelerator):
        self.check(run)
        self.run, self.images, self.accelerator = run, images, accelerator

    @staticmethod
    def check(run: Run) -> None:
        """Raise `KNPortError` for settings that have no meaning here."""
        for name, given in (
            ("augment", run.augmentation.augment if run.augmentation.augment.startswith("scale") else None),
            ("crop_height", run.segmentation.crop_height),
            ("crop_width", run.segmentation.crop_width),
            ("class_weights", run.segmentation.class_weights or None),
        ):
            if given is not None:
                flag = f"--{name.replace('_', '-')}"
                raise KNPortError(f"{name} is {given!r}, which is for segmentation: {run.recipe} has no use for {flag}")

    def network(self) -> dict[str, Any]:
        """What `experiments.models.build` is to build."""
        _, channels, height, _ = self.images.images.shape
        return {"num_classes": self.images.num_classes, "in_chans": channels, "image_size": height}

    def feed(self, images: ImageSet) -> Feed:
        """The batches of `images`, which are on the device."""
        return Feed(images, self.run, self.accelerator.process_index, self.accelerator.num_processes)

    def total(self, labels: Tensor) -> int:
        """What the losses of a step's micro-batches are divided by, given the labels of all of them."""
        return len(labels)

    def loss(self, logits: Tensor, labels: Tensor, total: int) -> Tensor:
        """A micro-batch's part of the step's loss, from float32 logits."""
        mean = F.cross_entropy(logits, labels, label_smoothing=self.run.optimization.label_smoothing)
        return mean * (len(labels) / total)

    def evaluate(
        self, model: nn.Module, images: ImageSet, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`test_loss` and `metrics` over all of `images`; None if `stopped` said so."""
        layout = {"scaling": self.run.scaling, "channels_last": self.run.channels_last}
        return evaluate(model, images, self.accelerator, **layout, stopped=stopped)


TASKS = {"camvid": Segmentation, "cityscapes": Segmentation}


def task_of(run: Run) -> type[Classification] | type[Segmentation]:
    """The kind of task of a run, by its recipe."""
    return TASKS.get(run.recipe, Classification)
