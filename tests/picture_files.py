"""Writes tiny ImageNet, Tiny ImageNet, CamVid and CityScapes trees in the true formats, for the readers to read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

WORDNET = ("n01440764", "n01443537", "n02102040")
CITIES = {"train": ("aachen", "bochum"), "val": ("frankfurt",)}
FILES = {"train": 6, "val": 3, "test": 4}  # of CamVid


def picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """A smooth coloured picture, which survives JPEG."""
    corners = random.integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "JPEG" if path.suffix == ".JPEG" else None)


def blocks(random: np.random.Generator, width: int, height: int, values: tuple[int, ...]) -> np.ndarray:
    """Annotation of mode L: blocks of 4 x 4 pixels of one value; every value occurs if there is room."""
    coarse = random.permutation(np.resize(np.asarray(values, np.uint8), (height // 4) * (width // 4)))
    return coarse.reshape(height // 4, width // 4).repeat(4, 0).repeat(4, 1)


def write_camvid(root: Path, width: int = 24, height: int = 16, suffix: str = ".jpg") -> dict[str, list[np.ndarray]]:
    """Returns part -> annotations (H, W) by file name; the images take their colours from the annotation."""
    random, written = np.random.default_rng(0), {}
    palette = random.integers(0, 256, (12, 3), dtype=np.uint8)
    for part, count in FILES.items():
        written[part] = []
        for number in range(count):
            values = blocks(random, width, height, tuple(range(12)))
            save(Image.fromarray(palette[values]), root / part / f"0001TP_{number:06}{suffix}")
            save(Image.fromarray(values), root / f"{part}annot" / f"0001TP_{number:06}.png")
            written[part].append(values)
    return written


def write_cityscapes(root: Path, width: int = 32, height: int = 16) -> dict[str, list[np.ndarray]]:
    """Returns part -> label IDs (H, W), cities and files in order; beside them lie the other files of the archives."""
    random, written = np.random.default_rng(1), {}
    for part, cities in CITIES.items():
        written[part] = []
        for city in cities:
            for frame in (19, 23):
                stem = f"{city}_000000_{frame:06}"
                ids = blocks(random, width, height, tuple(range(34)))
                save(picture(random, width, height), root / "leftImg8bit" / part / city / f"{stem}_leftImg8bit.png")
                fine = root / "gtFine" / part / city
                save(Image.fromarray(ids), fine / f"{stem}_gtFine_labelIds.png")
                save(Image.fromarray(ids.astype(np.uint16) * 1000), fine / f"{stem}_gtFine_instanceIds.png")
                save(picture(random, width, height).convert("RGBA"), fine / f"{stem}_gtFine_color.png")
                (fine / f"{stem}_gtFine_polygons.json").write_text("{}")
                written[part].append(ids)
    return written


def write_imagenet(root: Path, train: int = 4, val: int = 2) -> None:
    """`train` and `val` images of three classes, of different sizes; one is grey and one CMYK, as some are."""
    random = np.random.default_rng(2)
    for part, count in (("train", train), ("val", val)):
        for wnid in WORDNET:
            for number in range(count):
                name = f"{wnid}_{number}.JPEG" if part == "train" else f"ILSVRC2012_val_{number:08}.JPEG"
                image = picture(random, 20 + 7 * number, 30 - 5 * (number % 5))
                mode = {0: "L", 1: "CMYK"}.get(number, "RGB") if part == "train" else "RGB"
                save(image.convert(mode), root / part / wnid / name)


def write_tiny_imagenet(root: Path, train: int = 3, val: int = 4) -> list[str]:
    """Returns the WordNet ID of each validation image; wnids.txt is not sorted, as in the archive."""
    random, folder = np.random.default_rng(3), root / "tiny-imagenet-200"
    for wnid in WORDNET:
        for number in range(train):
            image = picture(random, 64, 64).convert("L" if number == 1 else "RGB")
            save(image, folder / "train" / wnid / "images" / f"{wnid}_{number}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t63\t63\n")
    (folder / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in reversed(WORDNET)))
    labels = [WORDNET[number % 2 * 2] for number in range(val)]
    for number in range(val):
        save(picture(random, 64, 64), folder / "val" / "images" / f"val_{number}.JPEG")
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t32\t44\t62\n" for number, wnid in enumerate(labels)]
    (folder / "val" / "val_annotations.txt").write_text("".join(lines))
    return labels
