"""The batches of a run whose images are decoded when their step comes, as a function of the step.

Letters: N images, B images per step over all processes, b = B / processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sized
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from experiments.feed import check_batch_size, epoch_order
from experiments.run import Run

Sample = tuple[np.ndarray, np.ndarray]  # image uint8 (H, W, C); label or labels, uint8 or int64
THREADS = min(8, os.cpu_count() or 1)  # decoding and resampling let go of Python's lock


class FileFeed:
    """`batch(step)` gives this process's share of a step's images, as `experiments.feed.Feed` does.

    Threads prepare the next step's while this one is computed. They draw nothing: what happens to an image in an
    epoch is drawn beforehand, for all images at once.

    Args:
        images: the set, for its length.
        run: order and batch size.
        sample: image and labels of a row, given that row of what `draw` gave.
        draw: of an epoch, one row per image.
        to_float: uint8 (b, C, H, W) on the device -> what the network is given.
        device: where batches go.
        rank, world: this process and their number.
    """

    def __init__(
        self,
        images: Sized,
        run: Run,
        sample: Callable[[int, list[float]], Sample],
        draw: Callable[[int], Tensor],
        to_float: Callable[[Tensor], Tensor],
        device: torch.device,
        rank: int = 0,
        world: int = 1,
    ):
        check_batch_size(images, run)
        self.images, self.run, self.sample, self.draw = images, run, sample, draw
        self.to_float, self.device, self.rank, self.world = to_float, device, rank, world
        self.steps_per_epoch = len(images) // run.batch_size
        self._pool = ThreadPoolExecutor(THREADS)
        self._begun: dict[int, list[Future]] = {}  # of this step and the next
        self._epoch = -1

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 (b, C, H, W) and labels int64 (b, ...) of step `step`, on the device.

        Raises `KNPortError` for a damaged file.
        """
        now = self._begun.get(step) or self._begin(step)
        self._begun = {step + 1: self._begin(step + 1)}
        images, labels = zip(*(future.result() for future in now), strict=True)
        pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # (b, H, W, C) -> (b, C, H, W)
        layout = torch.channels_last if self.run.channels_last else torch.contiguous_format
        pixels = self.to_float(pixels.to(self.device)).contiguous(memory_format=layout)
        return pixels, torch.from_numpy(np.stack(labels)).to(self.device).long()

    def _begin(self, step: int) -> list[Future]:
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(len(self.images), self.run, epoch)
            self._draws = self.draw(epoch)
        rows = self._order[place, self.rank :: self.world].tolist()
        return [self._pool.submit(self.sample, row, self._draws[row].tolist()) for row in rows]
