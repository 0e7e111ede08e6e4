"""CIFAR-10 and CIFAR-100 in both official layouts: the binary version and the python version (pickles).

Source of the formats: https://www.cs.toronto.edu/~kriz/cifar.html. A record of the binary version is the label bytes
(one for CIFAR-10; coarse, then fine, for CIFAR-100) and 3,072 pixel bytes: the R, G and B planes of 32 x 32.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.data.checksums import FILES, archive, md5
from experiments.data.images import ImageSet
from knport.errors import KNPortError

PIXELS = 3 * 32 * 32
Records = tuple[np.ndarray, np.ndarray]  # pixels uint8 (N, 3072), labels (N,)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where one official archive keeps its parts once unpacked."""

    folder: str
    """Folder that the archive makes."""
    archive: str
    """File name of the archive on the official page."""
    train: tuple[str, ...]
    """Files of the training images, in order."""
    test: tuple[str, ...]
    """Files of the test images."""
    read: Callable[[Path], Records]
    """Reader of one file."""


def cifar10(data_dir: str) -> tuple[ImageSet, ImageSet]:
    """CIFAR-10: officially 50,000 training and 10,000 test images (3, 32, 32), 10 classes.

    `data_dir` is the unpacked folder or its parent, of the binary or of the python version.
    """
    mean, std = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    return _load("cifar10", CIFAR10, data_dir, 10, mean, std)


def cifar100(data_dir: str) -> tuple[ImageSet, ImageSet]:
    """CIFAR-100 with fine labels: officially 50,000 training and 10,000 test images (3, 32, 32), 100 classes.

    `data_dir` is the unpacked folder or its parent, of the binary or of the python version.
    """
    mean, std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)  # the authors' values
    return _load("cifar100", CIFAR100, data_dir, 100, mean, std)


def read_binary(path: Path, label_bytes: int) -> Records:
    """One file of the binary version. Raises `KNPortError` unless it is a whole number of records."""
    record = label_bytes + PIXELS
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    if len(raw) == 0 or len(raw) % record:
        raise KNPortError(
            f"{path}: {len(raw)} bytes are not a whole number of {record}-byte records ({label_bytes} label + {PIXELS}"
            " pixel bytes): the file is damaged or of another data set; unpack the archive again"
        )
    rows = raw.reshape(-1, record)
    return rows[:, label_bytes:], rows[:, label_bytes - 1]  # the last label byte is the (fine) label


def read_pickle(path: Path, label_key: bytes) -> Records:
    """One file of the python version, read without running any code that it may contain."""
    try:
        with path.open("rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        pixels, labels = content[b"data"], np.asarray(content[label_key])
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise KNPortError(
            f"{path}: not a pickle of the python version with the keys b'data' and {label_key!r}"
            f" ({type(error).__name__}: {error}): the file is damaged or of another data set; unpack the archive again"
        ) from error
    if getattr(pixels, "dtype", None) != np.uint8 or pixels.shape != (len(labels), PIXELS) or len(labels) == 0:
        raise KNPortError(f"{path}: b'data' is not uint8 ({len(labels)}, {PIXELS}); unpack the archive again")
    return pixels, labels


class ArrayUnpickler(pickle.Unpickler):
    """Builds numpy arrays and plain containers, and nothing else: a pickle from the net may hold any call."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "scalar"})

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED or module.split(".")[0] not in ("numpy", "_codecs"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not part of an array")
        module = module.replace("numpy.core.", "numpy._core.")  # where numpy 2 keeps what numpy 1 pickled
        return super().find_class(module, name)


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR10 = (
    Layout(
        folder="cifar-10-batches-bin",
        archive="cifar-10-binary.tar.gz",
        train=tuple(f"{name}.bin" for name in BATCHES),
        test=("test_batch.bin",),
        read=lambda path: read_binary(path, 1),
    ),
    Layout(
        folder="cifar-10-batches-py",
        archive="cifar-10-python.tar.gz",
        train=BATCHES,
        test=("test_batch",),
        read=lambda path: read_pickle(path, b"labels"),
    ),
)
CIFAR100 = (
    Layout(
        folder="cifar-100-binary",
        archive="cifar-100-binary.tar.gz",
        train=("train.bin",),
        test=("test.bin",),
        read=lambda path: read_binary(path, 2),
    ),
    Layout(
        folder="cifar-100-python",
        archive="cifar-100-python.tar.gz",
        train=("train",),
        test=("test",),
        read=lambda path: read_pickle(path, b"fine_labels"),
    ),
)
OFFICIAL = {"train": 50_000, "test": 10_000}


def _load(
    name: str, layouts: tuple[Layout, ...], data_dir: str, num_classes: int, mean, std
) -> tuple[ImageSet, ImageSet]:
    layout, folder = _find(name, layouts, Path(data_dir))
    sets = []
    for part, files in (("train", layout.train), ("test", layout.test)):
        records = [_read_file(layout, folder / file, num_classes) for file in files]
        pixels, labels = (np.concatenate(column) for column in zip(*records, strict=True))
        official = OFFICIAL[part]
        if len(labels) == official:
            notes = [note for file in files for note in _check_sum(layout, folder / file)]
        else:
            notes = [f"{folder}: {len(labels):,} {part} images, where the official set has {official:,}"]
        sets.append(
            ImageSet(
                images=torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy()),
                labels=torch.from_numpy(labels.astype(np.int64)),
                num_classes=num_classes,
                mean=mean,
                std=std,
                notes=tuple(notes),
            )
        )
    return sets[0], sets[1]


def _find(name: str, layouts: tuple[Layout, ...], data_dir: Path) -> tuple[Layout, Path]:
    """The first layout with any of its files under `data_dir/FOLDER` or in `data_dir` itself."""
    for layout in layouts:
        for folder in (data_dir / layout.folder, data_dir):
            if any((folder / file).is_file() for file in layout.train + layout.test):
                return layout, folder
    folders = " or ".join(f"{layout.folder}/ from {archive(layout.archive)}" for layout in layouts)
    state = "holds no" if data_dir.is_dir() else "does not exist; it should hold"
    raise KNPortError(
        f"{name}: {data_dir} {state} {folders}. Get an archive from https://www.cs.toronto.edu/~kriz/cifar.html,"
        " unpack it, and give the folder with --data-dir"
    )


def _check_sum(layout: Layout, path: Path) -> list[str]:
    """A note if a pickle is not the official one, byte by byte: it may have been written anew with the same images.

    Raises `KNPortError` if a file of the binary version is not: there, any other byte is another pixel or label.
    """
    found, official = md5(path), FILES[layout.folder][path.name]
    if found == official:
        return []
    differs = f"{path}: MD5 {found}, where the official file has {official}"
    if layout.folder.endswith("-py") or layout.folder.endswith("-python"):
        return [f"{differs}: written anew, or damaged"]
    raise KNPortError(f"{differs}: the file is damaged; unpack {archive(layout.archive)} again")


def _read_file(layout: Layout, path: Path, num_classes: int) -> Records:
    if not path.is_file():
        raise KNPortError(
            f"{path}: missing, though other files of {layout.folder} are there; unpack {layout.archive} again"
        )
    pixels, labels = layout.read(path)
    if labels.min() < 0 or labels.max() >= num_classes:
        raise KNPortError(
            f"{path}: label {int(labels.max())} where 0..{num_classes - 1} was expected: the file is damaged or of"
            f" another data set; unpack {layout.archive} again"
        )
    return pixels, labels
