"""The batches of a private run: every image is drawn by itself, with the same probability, at every step.

That is what the accountants assume: an epoch's shuffled batches, which see each image exactly once, are not covered
by their epsilon (Chua et al., 2024). A batch has any size, none too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.data.augment import crop_flip, draw
from experiments.data.images import ImageSet
from experiments.feed import Feed
from experiments.run import Run
from experiments.secret import Secret


class PoissonFeed(Feed):
    """`rows(step)` says which images this process has at a step; `images(step, rows)` makes a part of them.

    The draw is the same for any number of processes, of which each takes every `world`-th image.
    """

    def __init__(self, images: ImageSet, run: Run, secret: Secret, rank: int = 0, world: int = 1):
        super().__init__(images, run, rank, world)
        self.secret, self.sample_rate = secret, run.batch_size / len(images)

    def rows(self, step: int) -> list[int]:
        """Rows of the images of step `step` for this process, ascending."""
        random = self.secret.generator(torch.device("cpu"), "sample", step)
        drawn = torch.rand(len(self.images), dtype=torch.float64, generator=random) < self.sample_rate
        return drawn.nonzero().flatten()[self.rank :: self.world].tolist()

    def images_of(self, step: int, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Images float32 (b, C, H, W) and labels int64 (b,) of some rows.

        An image's augmentation follows from the seed, the step and its own row, not from who is drawn with it.
        """
        chosen = torch.tensor(rows, dtype=torch.int64)
        draws = draw(self.run.augmentation.augment, self.run.seed, step, len(self.images), self.padding)
        chosen, draws = chosen.to(self.device), None if draws is None else draws[chosen].to(self.device)
        images = self.images.images[chosen]
        if draws is not None:
            images = crop_flip(images, draws, self.padding)
        images = self.images.scale(images, self.run.scaling)
        if self.run.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, self.images.labels[chosen]
