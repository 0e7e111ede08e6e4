"""ImageNet (ILSVRC2012) as it is usually kept, and Tiny ImageNet as its archive unpacks.

Source of the formats: https://image-net.org/download-images and http://cs231n.stanford.edu/tiny-imagenet-200.zip.

    ImageNet                                Tiny ImageNet
    train/n01440764/n01440764_18.JPEG       train/n01443537/images/n01443537_0.JPEG    64 x 64
    val/n01440764/ILSVRC2012_val_...JPEG    val/images/val_0.JPEG, val/val_annotations.txt, wnids.txt

A class is a WordNet ID; its index is its place among the sorted IDs.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from experiments.data.checksums import archive
from experiments.data.files import FileSet, images_in, official_size, read_rgb
from experiments.data.images import ImageSet
from knport.errors import KNPortError

TINY = "tiny-imagenet-200"
TINY_SIZE, TINY_CLASSES = 64, 200
THREADS = 8  # decoding waits for the disk as much as it computes


def imagenet(data_dir: str) -> tuple[FileSet, FileSet]:
    """Officially 1,281,167 training and 50,000 test (validation) images of any size, 1000 classes; read when needed.

    `data_dir` holds `train` and `val`, each with one folder per class, or is the parent of a folder imagenet that does.
    Fewer classes, as in the usual subsets, are taken as they are and noted. Raises `KNPortError` for what is missing.
    """
    root = Path(data_dir)
    root = root / "imagenet" if (root / "imagenet" / "train").is_dir() else root
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise KNPortError(
                f"imagenet: {root / part} does not exist. Registered users get {archive('ILSVRC2012_img_train.tar')}"
                f" and {archive('ILSVRC2012_img_val.tar')} from https://image-net.org/download-images; unpack them into"
                " train/CLASS/ and val/CLASS/, and give the parent of both with --data-dir"
            )
    classes = _classes(root / "train")
    sets = []
    for part, official in (("train", 1_281_167), ("val", 50_000)):
        found = _classes(root / part)
        if found != classes:
            name = sorted(set(found) ^ set(classes))[0]
            holder, lacking = ("train", "val") if name in classes else ("val", "train")
            raise KNPortError(f"{root / lacking / name}: missing, though {root / holder / name} is there; unpack again")
        sets.append(_read_classes(root / part, classes, official))
    return tuple(sets)


def tiny_imagenet(data_dir: str) -> tuple[ImageSet, ImageSet]:
    """Officially 100,000 training and 10,000 test (validation) images (3, 64, 64), 200 classes; 1.4 GB of memory.

    `data_dir` is the folder tiny-imagenet-200, or its parent. All images are decoded at once, the grey ones to RGB.
    Raises `KNPortError` for a missing or damaged file.
    """
    root = _tiny_root(Path(data_dir))
    ids = sorted(_text(root / "wnids.txt").split())
    files, labels = [], []
    for label, wnid in enumerate(ids):
        found = images_in(root / "train" / wnid / "images")
        if not found:
            raise KNPortError(f"{root / 'train' / wnid / 'images'}: holds no image; unpack {TINY}.zip again")
        files += found
        labels += [label] * len(found)
    train = _decoded(root / "train", files, labels, len(ids), 100_000)
    return train, _decoded(root / "val", *_tiny_val(root / "val", ids), len(ids), 10_000)


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not names:
        sort = " Sort its images into one folder per class" if images_in(folder) else " Unpack the archive again"
        raise KNPortError(f"{folder}: holds no class folders such as n01440764.{sort}")
    return names


def _read_classes(folder: Path, classes: list[str], official: int) -> FileSet:
    files, sizes = [], []
    for name in classes:
        found = images_in(folder / name)
        if not found:
            raise KNPortError(f"{folder / name}: holds no image; unpack the archive again, or remove the class")
        files += found
        sizes.append(len(found))
    notes = () if len(classes) == 1000 else (f"{folder}: {len(classes):,} classes, where the official set has 1,000",)
    return FileSet(
        files=tuple(files),
        labels=torch.repeat_interleave(torch.arange(len(classes)), torch.tensor(sizes)),
        num_classes=len(classes),
        notes=(*notes, *official_size(len(files), official, str(folder))),
    )


def _tiny_root(data_dir: Path) -> Path:
    for root in (data_dir / TINY, data_dir):
        if (root / "wnids.txt").is_file():
            return root
    state = "holds no" if data_dir.is_dir() else "does not exist; it should hold"
    raise KNPortError(
        f"tiny_imagenet: {data_dir} {state} {TINY}/wnids.txt. Get {archive(TINY + '.zip')} from"
        " http://cs231n.stanford.edu, unpack it, and give the folder with --data-dir"
    )


def _tiny_val(folder: Path, ids: list[str]) -> tuple[list[Path], list[int]]:
    """Files and labels by the lines of val_annotations.txt: file name, WordNet ID and a box, between tabs."""
    path, index = folder / "val_annotations.txt", {wnid: label for label, wnid in enumerate(ids)}
    files, labels = [], []
    for number, line in enumerate(_text(path).splitlines(), 1):
        name, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if wnid not in index:
            raise KNPortError(f"{path}, line {number}: expected FILE, a WordNet ID of wnids.txt, ..., not {line!r}")
        files.append(folder / "images" / name)
        labels.append(index[wnid])
    return files, labels


def _decoded(folder: Path, files: list[Path], labels: list[int], classes: int, official: int) -> ImageSet:
    images = np.empty((len(files), 3, TINY_SIZE, TINY_SIZE), np.uint8)

    def decode(row: int) -> None:
        image = read_rgb(files[row])
        if image.size != (TINY_SIZE, TINY_SIZE):
            size = f"{image.width} x {image.height}"
            raise KNPortError(
                f"{files[row]}: {size} pixels, expected {TINY_SIZE} x {TINY_SIZE}; unpack {TINY}.zip again"
            )
        images[row] = np.asarray(image).transpose(2, 0, 1)

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(decode, range(len(files))):
            pass  # raises what a thread raised
    return ImageSet(
        images=torch.from_numpy(images),
        labels=torch.tensor(labels),
        num_classes=classes,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        notes=official_size(len(files), official, str(folder)),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise KNPortError(f"{path}: missing or damaged ({error}); unpack {TINY}.zip again") from error
