"""ImageNet's photographs as batches: decoded, augmented and put together by threads when their step comes.

Letters: B images, S pixels of a square, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from random import Random

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.data import pictures
from experiments.data.files import FileSet
from experiments.data.images import scale
from experiments.evaluate import evaluate_batches, shard
from experiments.file_feed import FileFeed, Sample, as_batch, threads
from experiments.randomness import fold
from experiments.run import Run

SIZE, TEST_RESIZE, TEST_SIZE = 224, 256, 224  # pixels, where the run does not say


class EpochDraws:
    """A generator for each image of an epoch, by key."""

    def __init__(self, seed: int, epoch: int):
        self.seed, self.epoch = seed, epoch

    def __getitem__(self, key: int) -> Random:
        return Random(fold(self.seed, "augment", self.epoch, key))


def picture_feed(run: Run, images: FileSet, device: torch.device, rank: int, world: int) -> FileFeed:
    """The training batches of process `rank` of `world`, augmented as `run.augmentation` says."""
    settings, size = run.augmentation, run.augmentation.image_size or SIZE
    value = erased_value(run, images)

    def sample(row: int, random: Random) -> Sample:
        image, label = images.load(row)
        if settings.augment == "none":
            image = pictures.middle(image, size, size)
        else:
            image = pictures.resized_crop(image, size, random)
        if settings.trivial_augment:
            image = pictures.trivial_augment(image, random)
        pixels = np.asarray(image)
        if settings.erase:
            pixels = pictures.erase(pixels, settings.erase, value, random)
        return pixels, np.asarray(label)

    def draw(epoch: int) -> EpochDraws:
        return EpochDraws(run.seed, epoch)

    return FileFeed(images, run, sample, draw, _scaling(run, images), device, rank, world)


def evaluate_pictures(
    model: nn.Module, images: FileSet, accelerator: Accelerator, run: Run, stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """What `experiments.evaluate.evaluate` gives, of the middle of each picture; threads read one batch ahead."""
    resize = run.augmentation.test_resize or TEST_RESIZE
    size = run.augmentation.test_size or TEST_SIZE
    batches = shard(len(images), accelerator.process_index, accelerator.num_processes)
    to_float = _scaling(run, images)

    def read(row: int) -> Sample:
        image, label = images.load(row)
        return np.asarray(pictures.middle(image, resize, size)), np.asarray(label)

    with ThreadPoolExecutor(threads()) as pool:
        begun = [[pool.submit(read, row) for row in batches[0]]]

        def batch(rows: list[int]) -> tuple[Tensor, Tensor]:
            number = len(begun)
            if number < len(batches):
                begun.append([pool.submit(read, row) for row in batches[number]])
            samples = [future.result() for future in begun[number - 1]]
            begun[number - 1] = []
            return as_batch(samples, to_float, accelerator.device, channels_last=run.channels_last)

        try:
            return evaluate_batches(model, len(images), batch, accelerator, stopped)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def erased_value(run: Run, images: FileSet) -> np.ndarray:
    """The byte of each channel (C,) that scaling makes (nearly) 0: erased pixels carry no signal."""
    mean = images.mean if run.scaling == "standard" else [0.0] * len(images.mean)
    return np.asarray([round(255 * value) for value in mean], np.uint8)


def _scaling(run: Run, images: FileSet) -> Callable[[Tensor], Tensor]:
    return lambda pixels: scale(pixels, run.scaling, images.mean, images.std)
