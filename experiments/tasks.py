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

from experiments.data import data_set
from experiments.data.files import FileSet
from experiments.data.images import ImageSet
from experiments.evaluate import evaluate
from experiments.feed import Feed
from experiments.file_feed import FileFeed
from experiments.limits import FOR_PICTURES, FOR_SEGMENTATION, check_foreign
from experiments.mixing import MixedFeed
from experiments.pictures import TEST_SIZE, evaluate_pictures, picture_feed
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

    foreign = FOR_SEGMENTATION | FOR_PICTURES
    """Settings that have no meaning here, and what they are for."""
    augments = ("none", "crop", "crop-flip")
    """Those of `augment` that have one."""

    def __init__(self, run: Run, images: ImageSet | FileSet, accelerator: Accelerator):
        self.check(run)
        self.run, self.images, self.accelerator = run, images, accelerator

    @classmethod
    def check(cls, run: Run) -> None:
        """Raise `KNPortError` for settings that have no meaning here."""
        check_foreign(run, cls.foreign, cls.augments)

    def network(self) -> dict[str, Any]:
        """What `experiments.models.build` is to build."""
        _, channels, height, _ = self.images.images.shape
        return {"num_classes": self.images.num_classes, "in_chans": channels, "image_size": height}

    def feed(self, images: ImageSet) -> Feed | MixedFeed:
        """The batches of `images`, which are on the device."""
        return self._mixed(Feed(images, self.run, *self._place()))

    def _mixed(self, feed: Feed | FileFeed) -> Feed | FileFeed | MixedFeed:
        return MixedFeed(feed, self.run, self.images.num_classes) if self.run.augmentation.mixed else feed

    def _place(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def total(self, labels: Tensor) -> int:
        """What the losses of a step's micro-batches are divided by, given the labels of all of them."""
        return len(labels)

    def loss(self, logits: Tensor, labels: Tensor, total: int) -> Tensor:
        """A micro-batch's part of the step's loss, from float32 logits and labels or shares of the classes."""
        mean = F.cross_entropy(logits, labels, label_smoothing=self.run.optimization.label_smoothing)
        return mean * (len(labels) / total)

    def evaluate(
        self, model: nn.Module, images: ImageSet, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`test_loss` and `metrics` over all of `images`; None if `stopped` said so."""
        layout = {"scaling": self.run.scaling, "channels_last": self.run.channels_last}
        return evaluate(model, images, self.accelerator, **layout, stopped=stopped)


class Pictures(Classification):
    """One class for each photograph of any size, read when its step comes."""

    foreign = FOR_SEGMENTATION
    augments = ("none", "resized-crop-flip")

    @classmethod
    def check(cls, run: Run) -> None:
        """Raise `KNPortError` for settings that have no meaning here."""
        super().check(run)
        if run.private:
            raise KNPortError(f"{run.recipe} cannot be trained privately: leave --epsilon and --noise-multiplier out")

    def network(self) -> dict[str, Any]:
        """What `experiments.models.build` is to build: for the images that it is tested on."""
        size = self.run.augmentation.test_size or TEST_SIZE
        return {"num_classes": self.images.num_classes, "in_chans": 3, "image_size": size}

    def feed(self, images: FileSet) -> FileFeed | MixedFeed:
        """The batches of `images`, which threads decode."""
        return self._mixed(picture_feed(self.run, images, self.accelerator.device, *self._place()))

    def evaluate(
        self, model: nn.Module, images: FileSet, stopped: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """`test_loss` and `metrics` over all of `images`; None if `stopped` said so."""
        return evaluate_pictures(model, images, self.accelerator, self.run, stopped)


TASKS = {"camvid": Segmentation, "cityscapes": Segmentation, "imagenet": Pictures}  # by data set


def task_of(run: Run) -> type[Classification] | type[Segmentation]:
    """The kind of task of a run, by its recipe."""
    return TASKS.get(data_set(run.recipe), Classification)
