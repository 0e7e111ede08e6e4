"""Random scale, crop and flip of an image together with its pixels' classes, as CityScapes is trained on.

The crop is resampled straight from the source, so that a large image is never enlarged whole. Letters: H x W pixels of
the crop.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from experiments.data.files import IGNORE
from experiments.randomness import generator

SCALES = 17  # 0.5, 0.6, ... 2.1, as in the published code
Resampling = Image.Resampling


def draw(kind: str, seed: int, epoch: int, count: int) -> Tensor:
    """What epoch `epoch` does to each of `count` images, drawn for all at once and indexed by image.

    Args:
        kind: of ``scale-crop-flip``, what is not named is left out; ``none`` takes the upper left corner.

    Returns: float64 (count, 4): the scale; the place of the crop from top and from left, 0 to 1 of what there is
    room for; 1 for a flip.
    """
    random = torch.rand(count, 4, generator=generator(seed, "augment", epoch), dtype=torch.float64)
    scale, down, right, flip = random.unbind(1)
    parts = kind.split("-")
    scale = (scale * SCALES).floor() / 10 + 0.5 if "scale" in parts else torch.ones_like(scale)
    crop = 1.0 if "crop" in parts else 0.0
    flip = (flip < 0.5).double() if "flip" in parts else torch.zeros_like(flip)
    return torch.stack([scale, down * crop, right * crop, flip], dim=1)


def scale_crop_flip(
    image: Image.Image, labels: Image.Image, size: tuple[int, int], drawn: list[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The crop of the scaled image; where that is smaller than the crop: black below and at the right, and ignored.

    Args:
        image: of mode RGB; resampled by PIL's triangle filter, which also averages where it makes smaller.
        labels: of mode L and the same size; resampled to the nearest.
        size: H, W.
        drawn: a row of `draw`.

    Returns: uint8 (H, W, 3) and uint8 (H, W).
    """
    scale, down, across, flip = drawn
    top, bottom, rows = _window(image.height, scale, size[0], down)
    left, right, columns = _window(image.width, scale, size[1], across)
    pixels, classes = np.zeros((*size, 3), np.uint8), np.full(size, IGNORE, np.uint8)
    box = (left, top, right, bottom)
    pixels[:rows, :columns] = np.asarray(image.resize((columns, rows), Resampling.BILINEAR, box))
    classes[:rows, :columns] = np.asarray(labels.resize((columns, rows), Resampling.NEAREST, box))
    return (pixels[:, ::-1], classes[:, ::-1]) if flip else (pixels, classes)


def _window(length: int, scale: float, wanted: int, place: float) -> tuple[float, float, int]:
    """Along one side: start and end in the source's pixels, and the number of pixels that they become."""
    scaled = max(1, round(length * scale))
    taken = min(scaled, wanted)
    start = int(place * (scaled - taken + 1))
    return start * length / scaled, (start + taken) * length / scaled, taken
