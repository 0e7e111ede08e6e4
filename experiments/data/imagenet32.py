"""ImageNet32 (Chrabaszcz et al., 2017): ImageNet's training and validation images at 32 x 32, in pickles.

Source of the format: https://image-net.org/download-images (downsampled images, for registered users), and the scripts
of its authors. The training archive holds `train_data_batch_1` to `train_data_batch_10`, the validation archive
`val_data`; each is a dict with "data", uint8 (N, 3072), the R, G and B planes of each image, "labels", a list of 1 to
1000, and, of training files, "mean". The archives in numpy's format hold the same under the same names in `.npz`.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.data.cifar import PIXELS, ArrayUnpickler
from experiments.data.images import ImageSet
from knport.errors import KNPortError

TRAIN = tuple(f"train_data_batch_{number}" for number in range(1, 11))
TEST = ("val_data",)
CLASSES = 1000
OFFICIAL = {"train": 1_281_167, "test": 50_000}
FOLDERS = ("", "Imagenet32_train", "Imagenet32_val", "imagenet32")  # archives unpacked in place, or into their names
# of ImageNet at full size: public constants, so that scaling spends no privacy
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet32(data_dir: str) -> tuple[ImageSet, ImageSet]:
    """1,281,167 training and 50,000 test (validation) images (3, 32, 32), 1000 classes; 3.9 GB of memory.

    `data_dir` is the folder of the files, or its parent. Raises `KNPortError` for a missing or damaged file.
    """
    return _read(Path(data_dir), "train", TRAIN), _read(Path(data_dir), "test", TEST)


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, 3072) and labels int64 (N,), 0 to 999, of a pickle or an .npz, without running code in it."""
    try:
        content = _npz(path) if path.suffix == ".npz" else _pickle(path)
        pixels, labels = content["data"], np.asarray(content["labels"])
    except (pickle.UnpicklingError, zipfile.BadZipFile, *_UNREADABLE) as error:
        raise KNPortError(
            f"{path}: not a file of ImageNet32 with the keys 'data' and 'labels' ({type(error).__name__}: {error}): it"
            " is damaged or of another data set; unpack the archive again"
        ) from error
    if getattr(pixels, "dtype", None) != np.uint8 or pixels.shape != (len(labels), PIXELS) or not len(labels):
        found = f"{getattr(pixels, 'dtype', type(pixels).__name__)} {getattr(pixels, 'shape', '')}"
        raise KNPortError(f"{path}: 'data' is {found}, expected uint8 ({len(labels)}, {PIXELS}); unpack it again")
    if labels.dtype.kind not in "iu" or labels.min() < 1 or labels.max() > CLASSES:
        raise KNPortError(f"{path}: labels from {labels.min()} to {labels.max()}, expected 1 to {CLASSES}")
    return pixels, labels.astype(np.int64) - 1


_UNREADABLE = (EOFError, KeyError, TypeError, ValueError, IndexError, AttributeError, OSError)


def _pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content = ArrayUnpickler(file, encoding="bytes").load()
    return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def _npz(path: Path) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in ("data", "labels")}


def _read(data_dir: Path, part: str, names: tuple[str, ...]) -> ImageSet:
    parts = [read_file(path) for path in _find(data_dir, names)]
    labels = np.concatenate([labels for _, labels in parts])
    images = torch.empty(len(labels), PIXELS, dtype=torch.uint8)
    for rows in images.split([len(labels) for _, labels in parts]):  # a file at a time: the whole set only fits once
        rows.copy_(torch.from_numpy(parts.pop(0)[0]))
    official = OFFICIAL[part]
    note = f"{data_dir}: {len(labels):,} {part} images of ImageNet32, where the official set has {official:,}"
    return ImageSet(
        images=images.view(-1, 3, 32, 32),
        labels=torch.from_numpy(labels),
        num_classes=CLASSES,
        mean=MEAN,
        std=STD,
        notes=() if len(labels) == official else (note,),
    )


def _find(data_dir: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of that part, all as pickles or all as .npz, in `data_dir` or a folder in it."""
    incomplete = ""
    for folder in FOLDERS:
        for suffix in ("", ".npz"):
            paths = [data_dir / folder / f"{name}{suffix}" for name in names]
            there = [path for path in paths if path.is_file()]
            if len(there) == len(paths):
                return paths
            if there:
                missing = ", ".join(path.name for path in paths if path not in there)
                incomplete = f"{data_dir / folder} lacks {missing}; unpack the archive again"
    state = "holds no" if data_dir.is_dir() else "does not exist; it should hold"
    raise KNPortError(
        f"imagenet32: {incomplete}"
        if incomplete
        else f"imagenet32: {data_dir} {state} {names[0]}. Registered users get Imagenet32_train.zip and"
        " Imagenet32_val.zip from https://image-net.org/download-images; unpack both into one folder, and give it with"
        " --data-dir"
    )
