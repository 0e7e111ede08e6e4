"""`python -m experiments predictions RUN_FOLDER ...`: what a segmentation network sees, as colour images.

For the first test images, one PNG each in RUN_FOLDER/predictions: the image, the true classes and the predicted ones
side by side, in the colours of the data set. Pixels that do not count are black in both.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

from experiments.data import streets
from experiments.data.files import IGNORE, SegmentationSet
from experiments.data.images import scale
from experiments.saved_run import SavedRun, open_run
from experiments.segmentation import upsample
from knport.errors import KNPortError

FOLDER = "predictions"
# of CamVid's and of CityScapes' authors, in the order of `experiments.data.streets`
CAMVID = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
)  # fmt: skip
CITYSCAPES = (
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142), (0, 0, 70),
    (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
)  # fmt: skip
PALETTES = {"camvid": CAMVID, "cityscapes": CITYSCAPES}
NAMES = {"camvid": streets.CAMVID, "cityscapes": tuple(streets.CITYSCAPES.values())}


def predictions(
    folders: tyro.conf.Positional[tuple[Path, ...]], count: int = 3, best: bool = False, data_dir: str | None = None
) -> None:
    """Write the predictions of segmentation runs as colour images.

    Args:
        folders: of runs.
        count: images, the first of the test images.
        best: the weights with the best score in place of the last.
        data_dir: where the data set lies now; none: where it lay.

    Raises:
        KNPortError: no such folder, nothing saved in it, no data, or a run that does not segment.
    """
    if not folders:
        raise KNPortError("name at least one run folder, e.g. python -m experiments predictions runs/camvid/*-s0")
    for folder in folders:
        paths = write(open_run(folder, data_dir), count, best=best)
        print(f"{folder / FOLDER}: {', '.join(path.name for path in paths)}", flush=True)


def write(saved: SavedRun, count: int = 3, *, best: bool = False) -> list[Path]:
    """Write image, truth and prediction of the first `count` test images of a run; returns the paths.

    Raises:
        KNPortError: the run is no segmentation, or has saved nothing.
    """
    test = saved.test
    if not isinstance(test, SegmentationSet):
        raise KNPortError(f"{saved.folder} classifies whole images; predictions are drawn of segmentation, e.g. camvid")
    net = saved.trained("best" if best else "last")
    colours = palette(saved.run.recipe, test.num_classes)
    folder = saved.folder / FOLDER
    folder.mkdir(exist_ok=True)
    paths = []
    for row in range(min(count, len(test))):
        image, truth = test.load(row)
        found = predict(net, image, saved)
        found[np.asarray(truth) == IGNORE] = IGNORE
        paths.append(folder / f"{test.files[row].stem}.png")
        side_by_side([image, colour(np.asarray(truth), colours), colour(found, colours)]).save(paths[-1], optimize=True)
    return paths


@torch.no_grad()
def predict(net: torch.nn.Module, image: Image.Image, saved: SavedRun) -> np.ndarray:
    """The class of every pixel of an RGB image, uint8 (H, W)."""
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).unsqueeze(0)  # (H, W, C) -> (1, C, H, W)
    scaled = scale(pixels, saved.run.scaling, saved.test.mean, saved.test.std)
    layout = torch.channels_last if saved.run.channels_last else torch.contiguous_format
    logits = upsample(net(scaled.contiguous(memory_format=layout)).float(), (image.height, image.width))
    return logits[0].argmax(0).to(torch.uint8).numpy()  # (1, K, H, W) -> (H, W)


def palette(recipe: str, classes: int) -> np.ndarray:
    """uint8 (256, 3): the colour of each class of a recipe, black elsewhere.

    Raises:
        KNPortError: no palette for this recipe, or of another number of classes.
    """
    colours = PALETTES.get(recipe, ())
    if len(colours) != classes:
        raise KNPortError(f"{recipe}: {len(colours)} colours for {classes} classes; add its palette to PALETTES")
    table = np.zeros((256, 3), dtype=np.uint8)
    table[:classes] = colours
    return table


def colour(classes: np.ndarray, colours: np.ndarray) -> Image.Image:
    """Classes (H, W) as an RGB image."""
    return Image.fromarray(colours[classes])


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in one row."""
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for place, image in enumerate(images):
        row.paste(image, (width * place, 0))
    return row


def thirds(path: Path) -> tuple[str, str, str]:
    """Image, truth and prediction of a file of `write` as data URIs, small enough for a page."""
    whole = Image.open(path).convert("RGB")
    width = whole.width // 3
    parts = [whole.crop((width * i, 0, width * (i + 1), whole.height)) for i in range(3)]
    return _uri(parts[0], "JPEG", quality=80), _flat(parts[1]), _flat(parts[2])


def _flat(image: Image.Image) -> str:
    """A picture of few colours, exactly, with one byte per pixel."""
    return _uri(image.quantize(colors=32, dither=Image.Dither.NONE), "PNG", optimize=True)


def _uri(image: Image.Image, kind: str, **options) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
