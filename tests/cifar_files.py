"""Writes tiny CIFAR folders in the official formats, for the readers to read."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np

PARTS = {
    "cifar10": (tuple(f"data_batch_{number}" for number in range(1, 6)), ("test_batch",)),
    "cifar100": (("train",), ("test",)),
}
FOLDERS = {
    ("cifar10", "binary"): "cifar-10-batches-bin",
    ("cifar10", "python"): "cifar-10-batches-py",
    ("cifar100", "binary"): "cifar-100-binary",
    ("cifar100", "python"): "cifar-100-python",
}


def write_cifar(root: Path, name: str, layout: str, count: int = 20, seed: int = 0) -> dict[str, tuple]:
    """Write `count` images per file under `root`; returns part -> (pixels (N, 3072), labels), in file order."""
    random = np.random.default_rng(seed)
    folder = root / FOLDERS[name, layout]
    folder.mkdir(parents=True)
    classes = 10 if name == "cifar10" else 100
    written = {}
    for part, files in zip(("train", "test"), PARTS[name], strict=True):
        columns = []
        for file in files:
            labels = random.permutation(np.arange(count) % classes).astype(np.uint8)
            pixels = random.integers(0, 256, (count, 3072), dtype=np.uint8)
            columns.append((pixels, labels))
            if layout == "binary":
                coarse = [labels[:, None] // 5] if name == "cifar100" else []
                records = np.concatenate([*coarse, labels[:, None], pixels], axis=1)
                (folder / f"{file}.bin").write_bytes(records.tobytes())
            else:
                key = b"labels" if name == "cifar10" else b"fine_labels"
                content = {b"batch_label": b"a batch", key: labels.tolist(), b"data": pixels}
                (folder / file).write_bytes(as_python_2(content))
        written[part] = tuple(np.concatenate(column) for column in zip(*columns, strict=True))
    return written


def as_python_2(content: dict) -> bytes:
    """A protocol-2 pickle that names numpy's modules as the official files, made with Python 2, do."""
    return pickle.dumps(content, protocol=2).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
