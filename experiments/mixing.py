"""Mixup and CutMix (Zhang et al., 2018; Yun et al., 2019) of a step's images, as a function of the step.

Images are mixed in pairs, the two that lie side by side in the batch of all processes: each becomes a share of itself
and the rest of the other. A process has whole pairs, so that the result does not depend on the number of processes.
As in torchvision's reference training a step has one share for all its images, and one of the two methods.

Letters: B images per step over all processes, b = B / processes, K classes, C channels, H x W pixels.
"""

from __future__ import annotations

import math
from random import Random

import torch.nn.functional as F
from torch import Tensor

from experiments.randomness import fold
from experiments.run import Run


class MixedFeed:
    """The batches of another feed, mixed: labels become shares of the classes.

    Args:
        feed: with `batch(step)` and `steps_per_epoch`; gives whole pairs.
        run: seed, mixup and cutmix.
        num_classes: K.
    """

    def __init__(self, feed, run: Run, num_classes: int):
        self.feed, self.run, self.num_classes = feed, run, num_classes
        self.steps_per_epoch = feed.steps_per_epoch

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images float32 (b, C, H, W) and shares of the classes float32 (b, K)."""
        images, labels = self.feed.batch(step)
        random = Random(fold(self.run.seed, "mix", step))
        alphas = {mixup: self.run.augmentation.mixup, cutmix: self.run.augmentation.cutmix}
        methods = [method for method, alpha in alphas.items() if alpha > 0]
        method = methods[int(random.random() * len(methods))]
        share = random.betavariate(alphas[method], alphas[method])
        images, share = method(images, share, random)
        shares = F.one_hot(labels, self.num_classes).to(images.dtype)
        return images, share * shares + (1 - share) * partner(shares)


def partner(x: Tensor) -> Tensor:
    """The other of each pair, (b, ...) -> (b, ...)."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # (b, ...) -> (b/2, 2, ...) -> (b, ...)


def mixup(images: Tensor, share: float, random: Random) -> tuple[Tensor, float]:
    """The weighted mean of both images of each pair (b, C, H, W), and the weight of the own."""
    return images.lerp(partner(images), 1 - share), share


def cutmix(images: Tensor, share: float, random: Random) -> tuple[Tensor, float]:
    """A box of the other image in each (b, C, H, W), and the share of pixels that are the own.

    The box has 1 - share of the area around a uniform centre, less what is outside of the image.
    """
    height, width = images.shape[2:]
    row, column = int(random.random() * height), int(random.random() * width)
    half = 0.5 * math.sqrt(1 - share)
    top, bottom = max(0, row - int(half * height)), min(height, row + int(half * height))
    left, right = max(0, column - int(half * width)), min(width, column + int(half * width))
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = partner(images)[:, :, top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def shared(order: Tensor, run: Run, rank: int, world: int) -> Tensor:
    """The places of a step's images (steps, B) that process `rank` of `world` has, (steps, b).

    Every `world`-th image, or, of images to mix, every `world`-th pair.
    """
    if not run.augmentation.mixed:
        return order[:, rank::world]
    return order.unflatten(1, (-1, 2))[:, rank::world].flatten(1)  # (steps, B) -> (steps, B/2, 2) -> (steps, b)
