"""The batches of a run whose images are decoded when their step comes, as a function of the step.

Letters: N images, B images per step over all processes, b = B / processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.feed import check_batch_size, epoch_order
from experiments.mixing import shared
from experiments.run import Run

Sample = tuple[np.ndarray, np.ndarray]  # image uint8 (H, W, C); label or labels, uint8 or int64
MOST_THREADS = 32  # decoding and resampling let go of Python's lock, putting batches together does not


class FileFeed:
    """`batch(step)` gives this process's share of a step's images, as `experiments.feed.Feed` does.

    Threads prepare the next steps' while this one is computed, in any order: what happens to an image in an epoch
    follows from what was drawn for it alone.

    Args:
        images: the set, for its length.
        run: order and batch size.
        sample: image and labels of a row, given what `draw` has for it.
        draw: of an epoch, what happens to each image, by key (see `experiments.feed.epoch_order`).
        to_float: uint8 (b, C, H, W) on the device -> what the network is given.
        device: where batches go.
        rank, world: this process and their number.
    """

    def __init__(
        self,
        images: Sized,
        run: Run,
        sample: Callable[[int, Any], Sample],
        draw: Callable[[int], Any],
        to_float: Callable[[Tensor], Tensor],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ):
        check_batch_size(images, run)
        self.images, self.run, self.sample, self.draw = images, run, sample, draw
        self.to_float, self.device, self.rank, self.world = to_float, device, rank, world
        self.steps_per_epoch = len(images) // run.batch_size
        self.threads = threads()
        self.ahead = max(1, 2 * self.threads * world // run.batch_size)  # steps, so that no thread waits
        self._pool = ThreadPoolExecutor(self.threads)
        self._begun: dict[int, list[Future]] = {}  # of this step and the next ones
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 (b, C, H, W) and labels int64 (b, ...) of step `step`, on the device.

        Raises `KNPortError` for a damaged file.
        """
        wanted = range(step, step + self.ahead + 1)
        self._begun = {number: self._begun.get(number) or self._begin(number) for number in wanted}
        samples = [future.result() for future in self._begun.pop(step)]
        return as_batch(samples, self.to_float, self.device, channels_last=self.run.channels_last)

    def _begin(self, step: int) -> list[Future]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            order = epoch_order(len(self.images), self.run, epoch)
            self._epoch, self._order = epoch, shared(order, self.run, self.rank, self.world)
            self._draws = self.draw(epoch)
        keys = self._order[place].tolist()
        return [self._pool.submit(self.sample, key % len(self.images), self._draws[key]) for key in keys]


def as_batch(
    samples: Sequence[Sample], to_float: Callable[[Tensor], Tensor], device: torch.device, *, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """Images float32 (b, C, H, W) and labels int64 (b, ...) on the device."""
    images, labels = zip(*samples, strict=True)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (b, H, W, C) -> (b, C, H, W)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    pixels = to_float(pixels.to(device)).contiguous(memory_format=layout)
    return pixels, torch.from_numpy(np.stack(labels)).to(device).long()


def threads() -> int:
    """For each process of this machine its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
