"""The batches of a run: which images, in which order, augmented how, as a function of the step.

Letters: N images, B images per step over all processes, b = B / processes.
"""

from __future__ import annotations

from collections.abc import Sized

import torch
from torch import Tensor

from experiments.data.augment import crop_flip, draw
from experiments.data.images import ImageSet
from experiments.mixing import shared
from experiments.randomness import generator
from experiments.run import Run
from knport.errors import KNPortError

CHUNK_IMAGES = 512  # images prepared at once, so that a batch of 2 costs little more than a slice


class Feed:
    """`batch(step)` gives this process's share of a step's images.

    An epoch is a permutation of the training images cut into batches of B; what does not fill a batch is left out
    of that epoch. Process `rank` of `world` takes every `world`-th image of a batch, so that the batch of a step does
    not depend on the number of processes. Only the current epoch and chunk are kept, for speed.
    """

    def __init__(self, images: ImageSet, run: Run, rank: int = 0, world: int = 1):
        check_batch_size(images, run)
        self.images, self.run, self.rank, self.world = images, run, rank, world
        self.device = images.images.device
        self.padding = max(1, images.images.shape[-1] // 8)
        self.steps_per_epoch = len(images) // run.batch_size
        self.chunk_steps = max(1, CHUNK_IMAGES * world // run.batch_size)
        self._epoch = self._chunk = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 (b, C, H, W) and labels int64 (b,) of step `step`, on the device of the image set."""
        chunk, place = divmod(step % self.steps_per_epoch, self.chunk_steps)
        epoch = step // self.steps_per_epoch
        if (epoch, chunk) != (self._epoch, self._chunk):
            self._prepare(epoch, chunk)
        return self._images[place], self._labels[place]

    def _prepare(self, epoch: int, chunk: int) -> None:
        if epoch != self._epoch:
            self._keys = self._order(epoch).to(self.device)
            count = len(self.images) * self.run.augmentation.repeats
            draws = draw(self.run.augmentation.augment, self.run.seed, epoch, count, self.padding)
            self._draws = None if draws is None else draws.to(self.device)
        self._epoch, self._chunk = epoch, chunk
        keys = self._keys[chunk * self.chunk_steps : (chunk + 1) * self.chunk_steps]  # (steps, b)
        rows = keys.flatten() % len(self.images)
        images = self.images.images[rows]  # (steps * b, C, H, W)
        if self._draws is not None:
            images = crop_flip(images, self._draws[keys.flatten()], self.padding)
        images = self.images.scale(images, self.run.scaling)
        if self.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        self._images = images.split(keys.shape[1])
        self._labels = self.images.labels[rows].split(keys.shape[1])

    def _order(self, epoch: int) -> Tensor:
        """Keys of the images of each step of the epoch for this process, (steps, b)."""
        return shared(epoch_order(len(self.images), self.run, epoch), self.run, self.rank, self.world)


def epoch_order(count: int, run: Run, epoch: int) -> Tensor:
    """Keys of the images of each step of the epoch, (steps, B), of `count` images.

    A key is an image's row, plus `count` for its second copy in the batch, twice that for its third (repeated
    augmentation). The copies of different images lie side by side, those of one image apart.
    """
    order, repeats = torch.randperm(count, generator=generator(run.seed, "order", epoch)), run.augmentation.repeats
    steps = count // run.batch_size
    rows = order[: steps * run.batch_size // repeats].view(steps, 1, -1)
    copies = torch.arange(repeats).view(1, -1, 1) * count
    return (rows + copies).flatten(1)  # (steps, repeats, B/repeats) -> (steps, B)


def check_batch_size(images: Sized, run: Run) -> None:
    """Raise `KNPortError` if the images do not fill one batch."""
    if len(images) < run.batch_size:
        raise KNPortError(f"batch size {run.batch_size} is more than the {len(images)} training images: give less")
