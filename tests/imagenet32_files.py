"""Writes a tiny ImageNet32 folder in the official formats, for the reader to read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

TRAIN = tuple(f"train_data_batch_{number}" for number in range(1, 11))


def write_imagenet32(folder: Path, layout: str = "pickle", count: int = 4, seed: int = 0) -> dict[str, tuple]:
    """Write `count` images per file; returns part -> (pixels (N, 3072), labels from 1), in file order."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for part, files in (("train", TRAIN), ("test", ("val_data",))):
        columns = []
        for file in files:
            pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = random.integers(1, 1001, count).tolist()
            columns.append((pixels, np.asarray(labels)))
            mean = {"mean": pixels.astype(np.float64).mean(0)} if part == "train" else {}
            content = {"data": pixels, "labels": labels} | mean
            if layout == "npz":
                np.savez(folder / f"{file}.npz", **content)
            else:
                (folder / file).write_bytes(as_numpy_1(content))
        written[part] = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    return written


def as_numpy_1(content: dict) -> bytes:
    """A protocol-3 pickle of Python 3 that names numpy's modules as the official files do."""
    return pickle.dumps(content, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
