"""ImageNet's photographs: crops, TrivialAugment and erasing against torchvision's, batches by threads, evaluation."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
import torch
from picture_files import picture, write_imagenet
from processes import needs_fork, run_two
from safetensors.torch import load_file
from test_resume import at_step, contents, crash
from torch import nn
from torchvision import transforms
from torchvision.transforms import autoaugment
from torchvision.transforms import functional as F

from experiments.data import pictures
from experiments.data.imagenet import imagenet
from experiments.pictures import erased_value, picture_feed
from experiments.run import resolve
from experiments.tasks import Classification, Pictures, task_of
from experiments.train import start_accelerator, train
from knport import KNConv2d
from knport.errors import KNPortError

SMALL = {"image_size": 16, "test_resize": 20, "test_size": 16, "batch_size": 4}
THEIRS = {  # ours -> torchvision's name and largest strength
    "shear_x": ("ShearX", 0.99), "shear_y": ("ShearY", 0.99), "translate_x": ("TranslateX", 32.0),
    "translate_y": ("TranslateY", 32.0), "rotate": ("Rotate", 135.0), "brightness": ("Brightness", 0.99),
    "color": ("Color", 0.99), "contrast": ("Contrast", 0.99), "sharpness": ("Sharpness", 0.99),
    "posterize": ("Posterize", None), "solarize": ("Solarize", None), "autocontrast": ("AutoContrast", None),
    "equalize": ("Equalize", None), "identity": ("Identity", None),
}  # fmt: skip


@pytest.fixture
def photograph():
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return picture(np.random.default_rng(1), 64, 48), noise


@pytest.mark.parametrize("name", pictures.OPERATIONS)
@pytest.mark.parametrize(("bin_", "sign"), [(0, 1), (13, 1), (13, -1), (30, -1)])
def test_operations_are_torchvisions(photograph, name, bin_, sign):
    image, _ = photograph
    theirs, largest = THEIRS[name]
    magnitudes, signed = autoaugment.TrivialAugmentWide()._augmentation_space(31)[theirs]
    magnitude = float(magnitudes[bin_]) if magnitudes.ndim else 0.0
    assert signed == (largest is not None)
    assert not signed or magnitude == pytest.approx(largest * bin_ / 30)
    magnitude *= sign if signed else 1
    expected = autoaugment._apply_op(image, theirs, magnitude, transforms.InterpolationMode.BILINEAR, None)
    found = pictures.apply(image, name, bin_ / 30, sign)
    assert np.abs(np.asarray(found, int) - np.asarray(expected, int)).max() <= 1  # strengths in float32 there


def test_every_operation_is_drawn_equally_often(photograph, monkeypatch):
    drawn = []
    monkeypatch.setattr(pictures, "apply", lambda image, *choice: drawn.append(choice))
    random = Random(0)
    for _ in range(14 * 300):
        pictures.trivial_augment(photograph[0], random)
    names, strengths, signs = zip(*drawn, strict=True)
    assert all(230 < names.count(name) < 370 for name in pictures.OPERATIONS)
    assert sorted({round(30 * strength) for strength in strengths}) == list(range(31))
    assert 0.45 < signs.count(1) / len(signs) < 0.55


@pytest.mark.parametrize(("width", "height"), [(500, 375), (31, 200), (1, 1)])
def test_crops_are_drawn_as_torchvision_draws_them(width, height):
    random, image = Random(3), torch.empty(1, height, width)
    ours = [pictures.random_crop(width, height, random) for _ in range(2000)]
    theirs = [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    for left, top, right, bottom in ours:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    areas = [
        np.mean([(right - left) * (bottom - top) for left, top, right, bottom in ours]),
        np.mean([h * w for _, _, h, w in theirs]),
    ]
    ratios = [np.mean([math.log((right - left) / (bottom - top)) for left, top, right, bottom in ours])]
    ratios += [np.mean([math.log(w / h) for _, _, h, w in theirs])]
    assert areas[0] == pytest.approx(areas[1], rel=0.04)
    assert ratios[0] == pytest.approx(ratios[1], abs=0.02)


def test_a_crop_is_cut_resized_and_mirrored(photograph):
    image, _ = photograph
    seen = set()
    for seed in range(12):
        found = np.asarray(pictures.resized_crop(image, 16, Random(seed)))
        left, top, right, bottom = pictures.random_crop(64, 48, Random(seed))
        expected = np.asarray(F.resized_crop(image, top, left, bottom - top, right - left, [16, 16]))
        mirrored = not np.array_equal(found, expected)
        assert np.array_equal(found, expected[:, ::-1]) == mirrored
        seen.add(mirrored)
    assert seen == {False, True}


def test_the_middle(photograph):
    image, _ = photograph
    expected = transforms.Compose([transforms.Resize(20), transforms.CenterCrop(16)])(image)
    assert np.array_equal(np.asarray(pictures.middle(image, 20, 16)), np.asarray(expected))
    assert pictures.middle(image, 8, 16).size == (16, 16)


def test_erasing(photograph):
    _, noise = photograph
    value = np.array([1, 2, 3], np.uint8)
    assert pictures.erase(noise, 0.0, value, Random(0)) is noise
    shares = []
    for seed in range(300):
        found = pictures.erase(noise, 0.5, value, Random(seed))
        changed = (found != noise).any(2)
        if changed.any():
            rows, columns = changed.any(1).nonzero()[0], changed.any(0).nonzero()[0]
            box = found[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (box == value).all()
            shares.append(changed.mean())
    assert 120 < len(shares) < 180
    assert min(shares) > 0.015 and max(shares) < 0.36 and np.mean(shares) == pytest.approx(0.175, abs=0.02)


@pytest.mark.parametrize("scaling", ["unit", "standard"])
def test_erased_pixels_are_scaled_to_nothing(tmp_path, scaling):
    write_imagenet(tmp_path)
    images, run = imagenet(str(tmp_path))[0], resolve("imagenet", scaling=scaling, **SMALL)
    from experiments.pictures import _scaling

    pixels = torch.from_numpy(erased_value(run, images)).view(1, 3, 1, 1)
    assert _scaling(run, images)(pixels).abs().max() < 0.01


def feed(images, rank: int = 0, world: int = 1, **settings):
    run = resolve("imagenet_convnext", **SMALL | {"batch_size": 8} | settings)
    task = Pictures(run, images, start_accelerator(run))
    task._place = lambda: (rank, world)
    return task.feed(images)


@pytest.fixture
def images(tmp_path):
    write_imagenet(tmp_path, train=8)
    return imagenet(str(tmp_path))[0]  # 24


def test_a_batch_depends_on_its_step_alone(images):
    in_order = feed(images)
    expected = [in_order.batch(step) for step in range(7)]
    for step in (6, 0, 3):
        for found, wanted in zip(feed(images).batch(step), expected[step], strict=True):
            assert torch.equal(found, wanted)
    assert not torch.equal(expected[0][0], expected[3][0])  # of the next epoch


def test_two_processes_share_the_batch_of_one(images):
    for step in (0, 4):
        whole = [part.unflatten(0, (-1, 2)) for part in feed(images).batch(step)]
        for rank in (0, 1):
            for found, pairs in zip(feed(images, rank, 2).batch(step), whole, strict=True):
                assert torch.equal(found, pairs[rank::2].flatten(0, 1))


def test_copies_of_an_image_are_augmented_apart(images):
    plain = {"mixup": 0.0, "cutmix": 0.0}
    batches = feed(images, **plain)
    for step in range(3):
        x, labels = batches.batch(step)
        assert labels[:2].tolist() * 4 == labels.tolist()  # 2 images, 4 copies
        copies = x.unflatten(0, (4, 2))
        assert not torch.equal(copies[0], copies[1])
    assert batches.steps_per_epoch == 3


def test_without_augmentation_images_are_their_middle(images):
    run = resolve("imagenet", augment="none", **SMALL)
    x, labels = picture_feed(run, images, torch.device("cpu"), 0, 1).batch(0)
    known = {}
    for row in range(len(images)):
        image, label = images.load(row)
        known[np.asarray(pictures.middle(image, 16, 16)).tobytes()] = label
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (images.mean, images.std))
    pixels = x.mul(std).add(mean).mul(255).round().byte().permute(0, 2, 3, 1)
    assert [known[image.numpy().tobytes()] for image in pixels] == labels.tolist()


def test_every_test_image_counts_once(tmp_path, images, monkeypatch):
    monkeypatch.setattr("experiments.evaluate.BATCH_SIZE", 4)
    run = resolve("imagenet", **SMALL)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 3))
    found = Pictures(run, images, start_accelerator(run)).evaluate(net, images)
    rows = [pictures.middle(images.load(row)[0], 20, 16) for row in range(len(images))]
    x = torch.stack([F.normalize(F.to_tensor(image), images.mean, images.std) for image in rows])
    with torch.no_grad():
        right = (net(x).argmax(1) == images.labels).double().mean() * 100
    assert found["top1"] == pytest.approx(float(right))


def test_a_damaged_photograph_is_named_while_training(tmp_path, images):
    images.files[5].write_bytes(images.files[5].read_bytes()[:200])
    run = resolve("imagenet", model="cifar_resnet8", data_dir=str(tmp_path), run_dir=str(tmp_path / "run"), **SMALL)
    with pytest.raises(KNPortError, match=f"{images.files[5].name}: no whole image"):
        train(run, quiet=True)


@pytest.mark.parametrize(
    ("recipe", "settings", "match"),
    [
        ("imagenet", {"augment": "crop-flip"}, "which is for small images and segmentation: imagenet has no use"),
        ("imagenet", {"crop_height": 20}, "crop_height is 20, which is for segmentation: imagenet has no use"),
        ("imagenet", {"epsilon": 8.0}, "imagenet cannot be trained privately"),
        ("digits", {"erase": 0.1}, "erase is 0.1, which is for photographs read from files: digits has no use"),
        ("digits", {"augment": "resized-crop-flip"}, "which is for photographs read from files: digits has no use"),
        ("camvid", {"cutmix": 1.0}, "cutmix is 1.0, which is for classification: camvid has no use for --cutmix"),
        ("camvid", {"trivial_augment": True}, "which is for photographs read from files: camvid has no use"),
    ],
)
def test_settings_of_other_tasks(recipe, settings, match):
    run = resolve(recipe, **settings)
    with pytest.raises(KNPortError, match=match):
        task_of(run).check(run)


def test_the_task_of_a_recipe():
    tasks = {name: task_of(resolve(name)).__name__ for name in ("imagenet_v1", "imagenet32", "cifar100_v1")}
    assert tasks == {"imagenet_v1": "Pictures", "imagenet32": "Classification", "cifar100_v1": "Classification"}
    assert issubclass(Pictures, Classification)


@pytest.fixture
def small_network(monkeypatch):
    def small(run, network) -> nn.Sequential:
        pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
        conv = KNConv2d(3, 8, 3, 2, dropout=0.05 if run.dropout is None else run.dropout)
        return nn.Sequential(conv, nn.GroupNorm(1, 8), nn.GELU(), *pool, nn.Linear(8, network["num_classes"]))

    monkeypatch.setattr("experiments.train.build_for", small)
    monkeypatch.setattr("experiments.run_folder._commit", lambda: None)  # git


def convnext(tmp_path, name: str, **settings):
    settings = SMALL | {"batch_size": 8, "steps": 9, "checkpoint_every": 4, "data_dir": str(tmp_path)} | settings
    return resolve("imagenet_convnext", run_dir=str(tmp_path / name), **settings)


def test_the_600_epoch_recipe_goes_on_to_the_same_bits(tmp_path, images, small_network, monkeypatch):
    train(convnext(tmp_path, "whole"), quiet=True)
    with monkeypatch.context() as patch:
        at_step(patch, 6, crash)
        with pytest.raises(RuntimeError, match="plug"):
            train(convnext(tmp_path, "crashed"), quiet=True)
    train(convnext(tmp_path, "crashed"), quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


@needs_fork
def test_the_600_epoch_recipe_is_the_same_on_two_processes(tmp_path, images, small_network):
    settings = {"dropout": 0.0, "warmup_epochs": 1}
    train(convnext(tmp_path, "one", **settings), quiet=True)
    two = convnext(tmp_path, "two", processes=2, **settings)
    run_two(lambda: train(two, quiet=True), tmp_path / "processes")
    found, expected = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("two", "one"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
