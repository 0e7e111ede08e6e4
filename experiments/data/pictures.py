"""What ImageNet's photographs go through: crop, flip, TrivialAugment and erasing to train, the middle of each to test.

Everything drawn comes from a generator of its own for each image, so that threads may share the work in any order.
The operations are torchvision's, and the recipes those of its reference training. Letters: S pixels of a square.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

BILINEAR = InterpolationMode.BILINEAR
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a training crop
ERASED_AREA, ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)
TRIES = 10
BINS = 31  # strengths of TrivialAugment
Operation = Callable[[Image.Image, float], Image.Image]


def random_crop(width: int, height: int, random: Random) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3 (log-uniform).

    Where ten draws do not fit into the image: the largest box in the middle whose ratio is allowed.
    """
    for _ in range(TRIES):
        w, h = _drawn_sides(width * height, AREA, RATIO, random)
        if 0 < w <= width and 0 < h <= height:
            left, top = _below(width - w + 1, random), _below(height - h + 1, random)
            return left, top, left + w, top + h
    w, h = width, height
    if width / height < RATIO[0]:
        h = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        w = round(height * RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def resized_crop(image: Image.Image, size: int, random: Random, *, flip: bool = True) -> Image.Image:
    """A random crop as S x S, mirrored half of the time."""
    cut = image.crop(random_crop(image.width, image.height, random))
    resized = cut.resize((size, size), Image.Resampling.BILINEAR)
    return F.hflip(resized) if random.random() < 0.5 and flip else resized


def middle(image: Image.Image, resize: int, size: int) -> Image.Image:
    """The S x S in the middle once the shorter side has `resize` pixels; black around where that is too small."""
    return F.center_crop(F.resize(image, resize, BILINEAR), [size, size])


def trivial_augment(image: Image.Image, random: Random) -> Image.Image:
    """One of 14 operations at one of 31 strengths, each as likely (Müller & Hutter, 2021; the wide space)."""
    name = OPERATIONS[_below(len(OPERATIONS), random)]
    strength, sign = _below(BINS, random) / (BINS - 1), 1 if random.random() < 0.5 else -1
    return apply(image, name, strength, sign)


def apply(image: Image.Image, name: str, strength: float, sign: int) -> Image.Image:
    """The operation `name` of `OPERATIONS` at a strength from 0 to 1; the sign is of those that have two directions."""
    if name in GEOMETRIC:
        return _affine(image, name, sign * strength * GEOMETRIC[name])
    if name in ENHANCING:
        return ENHANCING[name](image, 1 + sign * strength * 0.99)
    if name == "posterize":
        return F.posterize(image, 8 - round(strength * 6))
    if name == "solarize":
        return F.solarize(image, 255 * (1 - strength))
    return {"identity": lambda same: same, "autocontrast": F.autocontrast, "equalize": F.equalize}[name](image)


def erase(pixels: np.ndarray, probability: float, value: np.ndarray, random: Random) -> np.ndarray:
    """With that probability, a copy of uint8 (S, S, 3) with a random rectangle of `value` (3,) in it.

    2 to 33 % of the area at an aspect ratio of 0.3 to 3.3; where ten draws do not fit, nothing is erased.
    """
    if random.random() >= probability:
        return pixels
    height, width = pixels.shape[:2]
    for _ in range(TRIES):
        h, w = _drawn_sides(width * height, ERASED_AREA, ERASED_RATIO, random)
        if h < height and w < width:
            top, left = _below(height - h + 1, random), _below(width - w + 1, random)
            pixels = pixels.copy()
            pixels[top : top + h, left : left + w] = value
            break
    return pixels


def _drawn_sides(area: int, share: tuple[float, float], ratio: tuple[float, float], random: Random) -> tuple[int, int]:
    """Two sides of a rectangle with a uniform share of the area and a log-uniform ratio of the first to the second."""
    wanted = area * (share[0] + (share[1] - share[0]) * random.random())
    low, high = map(math.log, ratio)
    drawn = math.exp(low + (high - low) * random.random())
    return round(math.sqrt(wanted * drawn)), round(math.sqrt(wanted / drawn))


def _below(count: int, random: Random) -> int:
    return int(random.random() * count)


def _affine(image: Image.Image, name: str, amount: float) -> Image.Image:
    """Rotate by degrees, shear by a slope, or shift by pixels; what comes from outside is black."""
    if name == "rotate":
        return F.rotate(image, amount, BILINEAR)
    shear, shift, slope = [0.0, 0.0], [0, 0], math.degrees(math.atan(amount))
    if name.startswith("shear"):
        shear[name.endswith("y")] = slope
        return F.affine(image, 0.0, shift, 1.0, shear, BILINEAR, center=[0, 0])
    shift[name.endswith("y")] = int(amount)
    return F.affine(image, 0.0, shift, 1.0, shear, BILINEAR)


GEOMETRIC = {"shear_x": 0.99, "shear_y": 0.99, "translate_x": 32, "translate_y": 32, "rotate": 135}
ENHANCING: dict[str, Operation] = {
    "brightness": F.adjust_brightness,
    "color": F.adjust_saturation,
    "contrast": F.adjust_contrast,
    "sharpness": F.adjust_sharpness,
}
OPERATIONS = ("identity", *GEOMETRIC, *ENHANCING, "posterize", "solarize", "autocontrast", "equalize")
