"""The readers, the image set, the augmentation and the feed."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from cifar_files import FOLDERS, write_cifar

from experiments import data
from experiments.data.augment import crop_flip, draw
from experiments.data.checksums import ARCHIVES, FILES, md5
from experiments.data.images import ImageSet, balanced_rows
from experiments.feed import Feed
from experiments.run import resolve
from knport.errors import KNPortError


def ramp(count: int, size: int = 8, classes: int = 4) -> ImageSet:
    """Images whose pixels tell which image they are of."""
    labels = torch.arange(count) % classes
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).repeat(1, 1, size, size)
    return ImageSet(images=images, labels=labels, num_classes=classes, mean=(0.5,), std=(0.25,))


@pytest.mark.parametrize(("name", "layout"), FOLDERS)
@pytest.mark.parametrize("parent", [True, False])
def test_cifar_is_read_as_written(tmp_path, name, layout, parent):
    written = write_cifar(tmp_path, name, layout)
    folder = tmp_path if parent else tmp_path / FOLDERS[name, layout]
    for part, found in zip(("train", "test"), data.READERS[name](str(folder)), strict=True):
        pixels, labels = written[part]
        assert found.images.dtype == torch.uint8
        assert torch.equal(found.images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        assert torch.equal(found.labels, torch.from_numpy(labels.astype(np.int64)))
        assert "official" in found.notes[0]


@pytest.mark.parametrize("folder", ["", "nowhere"])
def test_missing_folder_says_what_was_expected(tmp_path, folder):
    with pytest.raises(KNPortError, match=r"cifar-100-binary.*cifar-100-python.*--data-dir"):
        data.READERS["cifar100"](str(tmp_path / folder))


@pytest.mark.parametrize(("name", "layout"), FOLDERS)
def test_missing_file_is_named(tmp_path, name, layout):
    write_cifar(tmp_path, name, layout)
    victim = sorted((tmp_path / FOLDERS[name, layout]).iterdir())[0]
    victim.unlink()
    with pytest.raises(KNPortError, match=f"{victim.name}: missing"):
        data.READERS[name](str(tmp_path))


@pytest.mark.parametrize(("name", "layout"), FOLDERS)
@pytest.mark.parametrize("length", [0, 1000, -1])
def test_cut_file_is_named(tmp_path, name, layout, length):
    write_cifar(tmp_path, name, layout)
    victim = sorted((tmp_path / FOLDERS[name, layout]).iterdir())[-1]
    victim.write_bytes(victim.read_bytes()[:length])
    with pytest.raises(KNPortError, match=f"{victim.name}.*unpack the archive again"):
        data.READERS[name](str(tmp_path))


def test_label_out_of_range_is_refused(tmp_path):
    folder = tmp_path / "cifar-100-binary"
    write_cifar(tmp_path, "cifar100", "binary")
    folder.joinpath("test.bin").write_bytes(bytes([0, 100]) + bytes(3072))
    with pytest.raises(KNPortError, match=r"test\.bin: label 100 where 0\.\.99"):
        data.READERS["cifar100"](str(tmp_path))


def test_pickle_cannot_run_code(tmp_path):
    write_cifar(tmp_path, "cifar100", "python")
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps({b"data": print}))
    with pytest.raises(KNPortError, match=r"builtins\.print"):
        data.READERS["cifar100"](str(tmp_path))


def test_digits():
    train, test = data.load(resolve("digits"))
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.images.max() == 255
    assert test.labels.bincount().min() >= 34  # class-balanced
    scaled = train.scale(train.images, "standard")
    assert abs(scaled.mean()) < 1e-5
    assert abs(scaled.std() - 1) < 1e-3


def test_select_is_balanced_and_keeps_file_order():
    labels = torch.tensor([0, 0, 0, 0, 1, 2, 1, 2, 0, 1])
    assert balanced_rows(labels, 5).tolist() == [0, 1, 4, 5, 6]
    assert balanced_rows(labels, 10).tolist() == list(range(10))
    some = ramp(40).select(classes=3, count=10)
    assert some.num_classes == 3
    assert some.labels.bincount().tolist() == [4, 3, 3]
    assert some.images[:, 0, 0, 0].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10, 12]


@pytest.mark.parametrize("arguments", [{"classes": 5}, {"count": 41}])
def test_select_more_than_there_is(arguments):
    with pytest.raises(KNPortError, match="at most"):
        ramp(40).select(**arguments)


def test_crop_flip_is_pad_shift_mirror():
    images = torch.randint(0, 256, (50, 3, 7, 7), dtype=torch.uint8)
    draws = draw("crop-flip", seed=1, epoch=2, count=50, padding=2)
    assert draws.amin(0).tolist() == [0, 0, 0]
    assert draws.amax(0).tolist() == [4, 4, 1]
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for image, (down, right, flip), found in zip(padded, draws.tolist(), crop_flip(images, draws, 2), strict=True):
        expected = image[:, down : down + 7, right : right + 7]
        assert torch.equal(found, expected.flip(2) if flip else expected)


def test_crop_never_flips():
    assert draw("crop", seed=0, epoch=0, count=100, padding=1)[:, 2].max() == 0
    assert draw("none", seed=0, epoch=0, count=100, padding=1) is None


def feed(count: int = 50, rank: int = 0, world: int = 1, **settings) -> Feed:
    settings = {"batch_size": 8, "scaling": "unit", **settings}
    return Feed(ramp(count), resolve("digits", **settings), rank, world)


def test_an_epoch_is_a_permutation_without_the_incomplete_batch():
    batches = feed(augment="none")
    assert batches.steps_per_epoch == 6
    seen = [torch.cat([batches.batch(6 * e + s)[0][:, 0, 0, 0] for s in range(6)]).mul(255).round() for e in range(2)]
    assert all(len(epoch.unique()) == 48 for epoch in seen)
    assert not torch.equal(*seen)


@pytest.mark.parametrize("chunk_images", [1, 16, 512])
def test_a_batch_depends_on_its_step_alone(monkeypatch, chunk_images):
    in_order = feed()
    expected = [in_order.batch(step) for step in range(14)]
    monkeypatch.setattr("experiments.feed.CHUNK_IMAGES", chunk_images)
    for step in (13, 0, 7, 6):
        for found, wanted in zip(feed().batch(step), expected[step], strict=True):
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_the_batch_of_one(world):
    for step in (0, 5, 6):
        whole = feed().batch(step)
        for rank in range(world):
            for found, expected in zip(feed(rank=rank, world=world).batch(step), whole, strict=True):
                assert torch.equal(found, expected[rank::world])


def test_batch_larger_than_the_set():
    with pytest.raises(KNPortError, match="batch size 64 is more than the 50"):
        feed(batch_size=64)


@pytest.mark.parametrize(("name", "layout"), FOLDERS)
def test_official_sets_are_checked_byte_by_byte(tmp_path, monkeypatch, name, layout):
    written = write_cifar(tmp_path, name, layout)
    monkeypatch.setattr("experiments.data.cifar.OFFICIAL", {part: len(rows[1]) for part, rows in written.items()})
    folder = FOLDERS[name, layout]
    paths = {path.name: path for path in (tmp_path / folder).iterdir()}
    assert set(paths) == set(FILES[folder])
    if layout == "python":
        train, test = data.READERS[name](str(tmp_path))
        assert "where the official file has" in train.notes[0] and len(train.notes + test.notes) == len(paths)
    else:
        with pytest.raises(KNPortError, match=r"MD5 .* the file is damaged; unpack cifar.*tar.gz \(MD5 .*\) again"):
            data.READERS[name](str(tmp_path))
    monkeypatch.setitem(FILES, folder, {path.name: md5(path) for path in paths.values()})
    assert all(images.notes == () for images in data.READERS[name](str(tmp_path)))


def test_sums_are_torchvisions():
    from torchvision.datasets import CIFAR10, CIFAR100

    for theirs in (CIFAR10, CIFAR100):
        assert ARCHIVES[theirs.filename] == theirs.tgz_md5
        assert FILES[theirs.base_folder] == dict(theirs.train_list + theirs.test_list)


def test_enlarged_digits_are_the_same_digits():
    for large, small in zip(data.load(resolve("digits32")), data.load(resolve("digits")), strict=True):
        assert large.images.shape[1:] == (1, 32, 32) and torch.equal(large.labels, small.labels)
        blurred = torch.nn.functional.avg_pool2d(large.images.float(), 4)
        distances = torch.cdist(blurred[:300].flatten(1), small.images[:300].float().flatten(1))
        assert torch.equal(distances.argmin(1), torch.arange(300)), "each is nearest to the image it was made of"
