"""Sets whose images stay in their files until they are needed: photographs would not fit into memory.

Letters: N images, C channels, H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from experiments.data.images import Labelled
from knport.errors import KNPortError

# of ImageNet's training images, as its networks are given them
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IGNORE = 255  # the label of pixels that neither train nor count
SUFFIXES = frozenset({".jpeg", ".jpg", ".png"})


@dataclass(frozen=True, kw_only=True, eq=False)
class FileSet(Labelled):
    """One label for each image file."""

    files: tuple[Path, ...]
    """N images of any size."""
    labels: Tensor
    """int64 (N,), 0 <= label < num_classes."""
    num_classes: int
    """Number of classes, whether or not all occur."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, of pixel / 255."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per channel, likewise."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know."""

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> FileSet:
        """Itself: files are decoded on the CPU, and batches go to the device."""
        return self

    def load(self, row: int) -> tuple[Image.Image, int]:
        """The decoded RGB image and its label. Raises `KNPortError` for a damaged file."""
        return read_rgb(self.files[row]), int(self.labels[row])

    def take(self, rows: Tensor) -> FileSet:
        """The images at these rows, or where a mask is true."""
        return replace(self, files=_take(self.files, rows), labels=self.labels[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentationSet:
    """A file of labels, one for each pixel, beside each image file."""

    files: tuple[Path, ...]
    """N images."""
    annotations: tuple[Path, ...]
    """N images of one channel: a value for each pixel."""
    lookup: tuple[int, ...]
    """For each of the values 0 to 255 its class, 0 to K-1, `IGNORE`, or -1 for a value that no annotation may hold."""
    classes: tuple[str, ...]
    """Names of the K classes."""
    weights: tuple[float, ...] | None = None
    """Of the K classes in the loss, where they have been published."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, of pixel / 255."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per channel, likewise."""
    notes: tuple[str, ...] = ()
    """What a reader of the results should know."""

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device) -> SegmentationSet:
        """Itself: files are decoded on the CPU, and batches go to the device."""
        return self

    def load(self, row: int) -> tuple[Image.Image, Image.Image]:
        """The decoded RGB image, and its classes as an image of mode L (`IGNORE` where there is none).

        Raises `KNPortError` for a damaged file, or one that does not fit the other.
        """
        image, path = read_rgb(self.files[row]), self.annotations[row]
        values = _decode(path)
        if values.mode not in ("L", "P"):
            raise KNPortError(f"{path}: an image of mode {values.mode}, expected one value per pixel (mode L or P)")
        if values.size != image.size:
            raise KNPortError(
                f"{path}: {values.width} x {values.height} pixels, but {self.files[row]} has"
                f" {image.width} x {image.height}; unpack both again"
            )
        values = Image.frombytes("L", values.size, values.tobytes())  # of mode P: its indices, not its colours
        strange = [value for _, value in values.getcolors() if self.lookup[value] < 0]
        if strange:
            raise KNPortError(
                f"{path}: holds the value {strange[0]}, which is no label of this data set: the file is damaged, or"
                " it is the picture of the labels in colours"
            )
        return image, values.point([max(0, value) for value in self.lookup])

    def select(self, classes: int | None = None, count: int | None = None) -> SegmentationSet:
        """The first `count` images; classes cannot be left out, since every image holds several."""
        if classes is not None:
            raise KNPortError(f"classes is {classes}, but images to segment hold several classes: leave --classes out")
        if count is not None and count > len(self):
            raise KNPortError(f"{count} images were asked for, but there are {len(self)}: ask for at most that many")
        return self if count is None else self.take(torch.arange(count))

    def take(self, rows: Tensor) -> SegmentationSet:
        """The images at these rows, or where a mask is true."""
        return replace(self, files=_take(self.files, rows), annotations=_take(self.annotations, rows))


def read_rgb(path: Path) -> Image.Image:
    """The decoded image in RGB, whatever it is stored in. Raises `KNPortError` for a missing or damaged file."""
    return _decode(path).convert("RGB")


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder, by name. Raises `KNPortError` if there is no such folder."""
    if not folder.is_dir():
        raise KNPortError(f"{folder}: no such folder; unpack the archive again")
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def official_size(found: int, expected: int, what: str) -> tuple[str, ...]:
    """A note, if the number of images is not the official one."""
    return () if found == expected else (f"{what}: {found:,} images, where the official set has {expected:,}",)


def _decode(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError as error:
        raise KNPortError(f"{path}: no such file; unpack the archive again") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        raise KNPortError(f"{path}: no whole image ({error}); the file is damaged: unpack the archive again") from error
    return image


def _take(paths: Iterable[Path], rows: Tensor) -> tuple[Path, ...]:
    paths = tuple(paths)
    rows = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
    return tuple(paths[row] for row in rows.tolist())
