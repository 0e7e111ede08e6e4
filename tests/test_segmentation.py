"""Segmentation: its crops, its numbers, and whole trainings on trees in the true formats."""

from __future__ import annotations

import json
import random
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from picture_files import write_camvid, write_cityscapes, write_tiny_imagenet
from PIL import Image
from processes import Processes, needs_fork, run_two
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, jaccard_score
from test_resume import at_step, contents, crash, wait_for_step
from torch import nn

import knport
from experiments import data
from experiments.confusion import confusion, scores
from experiments.data import crops
from experiments.data.streets import CITYSCAPES_WEIGHTS, camvid
from experiments.models import build, synchronize_batchnorm
from experiments.run import resolve
from experiments.schedule import learning_rate
from experiments.segmentation import Segmentation, upsample
from experiments.tasks import task_of
from experiments.train import start_accelerator, train
from knport.errors import KNPortError


class TinyNet(nn.Module):
    """A map of scores at half the size, from everything that keeps or draws something."""

    def __init__(self, num_classes: int, dropout: float = 0.2):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8) if dropout else nn.Identity()
        self.kn = knport.KNConv2d(8, 12, 3, padding=1, dropout=dropout)
        self.classifier = nn.Conv2d(12, num_classes, 1)

    def forward(self, x):
        return self.classifier(self.kn(self.norm(self.conv(x)).relu()).relu())


@pytest.fixture
def tiny_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyNet(network["num_classes"]))


@pytest.fixture
def plain_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyNet(network["num_classes"], 0.0))


def tiny(tmp_path, name="run", recipe="camvid", **settings):
    """Twelve steps on six images of 24 x 16."""
    sizes = {"crop_height": 16, "crop_width": 20, "batch_size": 2, "epochs": 4, "checkpoint_every": 2}
    folders = {"data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / name)}
    return resolve(recipe, **folders, **{**sizes, **settings})


# The numbers


@pytest.mark.parametrize("classes", [2, 5, 11])
def test_scores_against_sklearn(classes):
    random = torch.Generator().manual_seed(classes)
    labels = torch.randint(0, classes, (3, 7, 5), generator=random, dtype=torch.uint8)
    predicted = torch.randint(0, classes, (3, 7, 5), generator=random)
    labels[torch.rand(3, 7, 5, generator=random) < 0.2] = 255
    true, guess = labels[labels != 255].numpy(), predicted[labels != 255].numpy()
    matrix = confusion(predicted, labels, classes)
    assert np.array_equal(matrix.numpy(), confusion_matrix(true, guess, labels=range(classes)))
    found = scores(matrix)
    assert found["pixel_accuracy"] == pytest.approx(100 * (true == guess).mean())
    assert found["mean_accuracy"] == pytest.approx(100 * balanced_accuracy_score(true, guess))
    assert found["miou"] == pytest.approx(100 * jaccard_score(true, guess, average="macro"))


def test_classes_that_do_not_occur_are_left_out():
    matrix = torch.zeros(4, 4, dtype=torch.int64)
    matrix[0, 0], matrix[0, 1], matrix[2, 2] = 6, 2, 4  # class 1 is only predicted, class 3 is nowhere
    found = scores(matrix)
    assert found["miou"] == pytest.approx(100 * (6 / 8 + 0 / 2 + 4 / 4) / 3)
    assert found["mean_accuracy"] == pytest.approx(100 * (6 / 8 + 4 / 4) / 2)


@pytest.mark.parametrize("size", [(5, 7), (20, 35), (9, 31), (3, 4)])
def test_upsample_is_torchs(size):
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    expected = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    found = upsample(maps, size)
    assert torch.allclose(found, expected, atol=1e-12)
    weight = torch.randn_like(found)
    gradients = [torch.autograd.grad((x * weight).sum(), maps)[0] for x in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-12)


def task(run, images):
    return Segmentation(run, images, start_accelerator(run))


def test_loss_is_the_weighted_mean_over_pixels(tmp_path):
    write_cityscapes(tmp_path / "data")
    run = tiny(tmp_path, recipe="cityscapes", label_smoothing=0.0)
    train_set, _ = data.load(run)
    own = task(run, train_set)
    labels = torch.randint(0, 19, (3, 16, 20))
    labels[0, :9], labels[1] = 255, 255
    logits = torch.randn(3, 19, 4, 5, requires_grad=True)
    up = F.interpolate(logits, (16, 20), mode="bilinear")
    expected = F.cross_entropy(up, labels, torch.tensor(CITYSCAPES_WEIGHTS), ignore_index=255)
    total = own.total(labels)
    whole = own.loss(logits, labels, total)
    assert whole.item() == pytest.approx(expected.item(), rel=1e-5)
    parts = sum(own.loss(logits[i : i + 1], labels[i : i + 1], total) for i in range(3))
    assert parts.item() == pytest.approx(expected.item(), rel=1e-5)
    nothing = torch.full((1, 16, 20), 255)
    assert own.loss(logits[:1], nothing, own.total(nothing)).item() == 0


def test_poly():
    run = resolve("cityscapes", model="fcn_knresnet18")
    rates = [learning_rate(run, step, 10, 100) for step in (0, 50, 99)]
    assert rates == pytest.approx([0.01, 0.01 * 0.5**0.9, 0.01 * 0.01**0.9])


def test_step30():
    run = resolve("tiny_imagenet", lr=0.01)
    rates = [learning_rate(run, step, 10, 500) for step in (0, 299, 300, 499)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])


# Crops


def test_what_is_drawn():
    drawn = crops.draw("scale-crop-flip", 3, 1, 4000)
    assert torch.equal(drawn, crops.draw("scale-crop-flip", 3, 1, 4000))
    assert not torch.equal(drawn, crops.draw("scale-crop-flip", 3, 2, 4000))
    scale, down, right, flip = drawn.unbind(1)
    assert sorted(set(scale.mul(10).round().int().tolist())) == list(range(5, 22))
    assert 0 <= down.min() < 0.01 and 0.99 < right.max() < 1
    assert flip.mean() == pytest.approx(0.5, abs=0.03)
    assert torch.equal(crops.draw("none", 3, 1, 2), torch.tensor([[1, 0, 0, 0]] * 2, dtype=torch.float64))
    crop_flip = crops.draw("crop-flip", 3, 1, 4000)
    assert torch.equal(crop_flip[:, 1:], drawn[:, 1:]) and crop_flip[:, 0].eq(1).all()


def numbered(height: int, width: int) -> tuple[Image.Image, Image.Image]:
    values = np.arange(height * width, dtype=np.uint8).reshape(height, width)
    return Image.fromarray(np.stack([values] * 3, 2)), Image.fromarray(values)


def test_crop_and_flip_move_image_and_labels_alike():
    image, labels = numbered(10, 20)
    for flip in (0.0, 1.0):
        pixels, classes = crops.scale_crop_flip(image, labels, (4, 6), [1.0, 0.5, 0.999, flip])
        expected = np.asarray(labels)[3:7, 14:20]
        assert np.array_equal(classes, expected[:, ::-1] if flip else expected)
        assert np.array_equal(pixels, np.stack([classes] * 3, 2))


def test_a_small_image_is_padded_and_ignored():
    pixels, classes = crops.scale_crop_flip(*numbered(10, 20), (8, 24), [1.0, 0.0, 0.9, 0.0])
    assert (classes[:, 20:] == 255).all() and (pixels[:, 20:] == 0).all()
    assert np.array_equal(classes[:, :20], np.asarray(numbered(10, 20)[1])[:8])


@pytest.mark.parametrize("scale", [0.5, 0.7, 1.3, 2.0])
def test_the_scaled_crop_is_a_crop_of_the_scaled_image(scale):
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((48, 36), Image.Resampling.BICUBIC)
    labels = Image.fromarray(random.integers(0, 11, (36, 48), dtype=np.uint8))
    width, height = round(48 * scale), round(36 * scale)
    top, left = int(0.6 * (height - 12 + 1)), int(0.3 * (width - 16 + 1))
    window = np.s_[top : top + 12, left : left + 16]
    pixels, classes = crops.scale_crop_flip(image, labels, (12, 16), [scale, 0.6, 0.3, 0.0])
    whole = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))[window]
    inner = np.s_[2:-2, 2:-2]  # at its border the crop does not see beyond
    assert np.abs(pixels.astype(int) - whole)[inner].max() <= 2
    nearest = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))[window]
    assert (classes == nearest).mean() > (0.8 if scale in (0.7, 1.3) else 0.999)  # a tie may be rounded either way


def test_batches_do_not_depend_on_history_or_processes(tmp_path):
    write_camvid(tmp_path / "data")
    run = tiny(tmp_path)
    images, _ = data.load(run)
    own = task(run, images)
    feed = own.feed(images)
    steps = [feed.batch(step) for step in range(7)]
    assert not torch.equal(steps[0][0], steps[3][0])
    for step in (6, 2, 5):  # in any order, by a feed that has seen nothing else
        again = own.feed(images).batch(step)
        assert all(torch.equal(x, y) for x, y in zip(steps[step], again, strict=True))
    shares = []
    for rank in (0, 1):
        own.accelerator = SimpleNamespace(process_index=rank, num_processes=2)
        shares.append(own.feed(images).batch(4))
    for column, whole in enumerate(steps[4]):
        assert torch.equal(torch.cat([share[column] for share in shares]), whole)


# Whole trainings


def test_camvid_from_beginning_to_end(tmp_path, tiny_net):
    write_camvid(tmp_path / "data")
    result = train(tiny(tmp_path, lr=0.1, epochs=20), quiet=True)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["result"] == result
    assert (stored["classes"], stored["train_images"], stored["test_images"]) == (11, 6, 4)
    assert 0 < result["miou"] <= result["best_miou"] and result["pixel_accuracy"] > 20  # chance is 9
    header = (tmp_path / "run" / "log.csv").read_text().splitlines()[0]
    assert "test_loss,miou,pixel_accuracy,mean_accuracy,images_per_second" in header
    assert json.loads((tmp_path / "run" / "best" / "state.json").read_text())["miou"] == result["best_miou"]
    assert train(tiny(tmp_path, lr=0.1, epochs=20), quiet=True) == result


@pytest.mark.parametrize("settings", [{}, {"ema": 0.9, "accumulate": 2, "eval_every": 0.5}])
def test_the_bits_do_not_depend_on_a_crash(tmp_path, monkeypatch, tiny_net, settings):
    write_camvid(tmp_path / "data")
    train(tiny(tmp_path, "whole", **settings), quiet=True)
    for step in (1, 4, 11):
        with monkeypatch.context() as patch:
            at_step(patch, step, crash)
            with pytest.raises(RuntimeError, match="plug"):
                train(tiny(tmp_path, "crashed", **settings), quiet=True)
    train(tiny(tmp_path, "crashed", **settings), quiet=True)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


@needs_fork
@pytest.mark.parametrize("count", [1, 2])
def test_kill_9_at_a_random_step(tmp_path, tiny_net, count):
    write_camvid(tmp_path / "data")
    step = random.SystemRandom().randrange(2, 60)

    def work(name: str) -> None:
        train(tiny(tmp_path, name, epochs=30), quiet=True)

    with Processes(lambda: work("killed"), tmp_path / "processes", count) as killed:
        wait_for_step(killed, tmp_path / "killed", step)
        killed.kill(signal.SIGKILL)
        assert set(killed.wait()) <= {-signal.SIGKILL, 0}, killed.said()
    for name in ("killed", "whole"):
        with Processes(lambda name=name: work(name), tmp_path / "processes", count) as again:
            assert again.wait() == [0] * count, again.said()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), step


def test_evaluation_counts_every_pixel_once(tmp_path):
    write_camvid(tmp_path / "data")
    run = tiny(tmp_path)
    _, test = data.load(run)
    net = TinyNet(11, dropout=0.0).train()
    found = task(run, test).evaluate(net, test)
    assert net.training
    matrix, losses = np.zeros((11, 11), int), []
    for row in range(len(test)):
        image, labels = (np.asarray(part) for part in test.load(row))
        x = (torch.from_numpy(image / 255).permute(2, 0, 1) - torch.tensor(test.mean).view(3, 1, 1)).float()
        logits = F.interpolate(net((x / torch.tensor(test.std).view(3, 1, 1))[None]), (16, 24), mode="bilinear")[0]
        counted = labels < 255
        matrix += confusion_matrix(labels[counted], logits.argmax(0).numpy()[counted], labels=range(11))
        target = torch.from_numpy(labels.astype(int))[None]
        losses.append(F.cross_entropy(logits[None], target, ignore_index=255, reduction="sum").item())
    assert found["miou"] == pytest.approx(scores(torch.from_numpy(matrix))["miou"])
    assert found["test_loss"] == pytest.approx(sum(losses) / matrix.sum(), rel=1e-5)
    assert task(run, test).evaluate(net, test, stopped=lambda: True) is None


def test_whole_images_of_one_size_without_augmentation(tmp_path, tiny_net):
    write_camvid(tmp_path / "data")
    run = tiny(tmp_path, augment="none", crop_height=None, crop_width=None, steps=1)
    images, _ = data.load(run)
    pixels, labels = task(run, images).feed(images).batch(0)
    assert pixels.shape == (2, 3, 16, 24)
    assert train(run, quiet=True)["steps"] == 1
    assert labels.max() == 255


@pytest.mark.parametrize("model", ["fcn_resnet18", "fcn_knresnet18_macs"])
def test_cityscapes_with_its_networks(tmp_path, model):
    write_cityscapes(tmp_path / "data")
    run = tiny(tmp_path, recipe="cityscapes", model=model, steps=1, crop_width=16)
    assert (run.segmentation.class_weights, run.segmentation.sync_batchnorm) == (True, model == "fcn_resnet18")
    result = train(run, quiet=True)
    assert result["steps"] == 1 and 0 <= result["miou"] <= 100


def test_tiny_imagenet_trains(tmp_path):
    write_tiny_imagenet(tmp_path / "data")
    folders = {"data_dir": str(tmp_path / "data"), "run_dir": str(tmp_path / "run")}
    assert train(resolve("tiny_imagenet", steps=1, **folders), quiet=True)["steps"] == 1


# Mistakes


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"class_weights": True}, "none are published for camvid"),
        ({"epsilon": 8.0}, "camvid cannot be trained privately"),
        ({"model": "cifar_resnet8"}, "gives .* expected a map of class scores .*fcn_knresnet18"),
        ({"classes": 3}, "leave --classes out"),
        ({"crop_height": 0}, "crop_height is 0; expected at least 1"),
    ],
)
def test_mistakes_are_named(tmp_path, settings, match):
    write_camvid(tmp_path / "data")
    with pytest.raises(KNPortError, match=match):
        train(tiny(tmp_path, **settings), quiet=True)


@pytest.mark.parametrize("settings", [{"augment": "scale-crop-flip"}, {"crop_width": 8}, {"class_weights": True}])
def test_classification_has_no_use_for_them(tmp_path, settings):
    run = resolve("digits", run_dir=str(tmp_path), **settings)
    with pytest.raises(KNPortError, match="which is for segmentation: digits has no use for"):
        task_of(run).check(run)


def test_a_batch_of_more_than_there_is(tmp_path, tiny_net):
    write_camvid(tmp_path / "data")
    with pytest.raises(KNPortError, match="batch size 8 is more than the 6"):
        train(tiny(tmp_path, batch_size=8), quiet=True)


def test_a_damaged_file_stops_the_run_and_is_named(tmp_path, tiny_net):
    write_camvid(tmp_path / "data")
    path = camvid(str(tmp_path / "data"))[0].files[3]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(KNPortError, match=f"{path.name}: no whole image"):
        train(tiny(tmp_path), quiet=True)


def test_synchronized_batchnorm():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    assert synchronize_batchnorm(net, torch.device("cpu"), 1) is net
    with pytest.raises(KNPortError, match="sync_batchnorm needs GPUs for several processes"):
        synchronize_batchnorm(net, torch.device("cpu"), 2)
    kinds = [type(module) for module in synchronize_batchnorm(net, torch.device("cuda"), 2)]
    assert kinds == [nn.Conv2d, nn.SyncBatchNorm]
    without = nn.Sequential(nn.GroupNorm(1, 4))
    assert synchronize_batchnorm(without, torch.device("cpu"), 2) is without


@pytest.mark.parametrize("norm", ["kernel", "group"])
def test_fcns_take_other_norms(norm):
    net = build("fcn_resnet18", norm, num_classes=5, image_size=32, dense=True)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@needs_fork
def test_two_processes_train_as_one(tmp_path, plain_net):
    write_camvid(tmp_path / "data")
    run_two(lambda: train(tiny(tmp_path, "two", processes=2), quiet=True), tmp_path / "processes")
    train(tiny(tmp_path, "one"), quiet=True)
    one, two = (np.genfromtxt(tmp_path / name / "log.csv", delimiter=",", names=True) for name in ("one", "two"))
    for column in ("train_loss", "test_loss", "miou", "pixel_accuracy"):
        assert two[column] == pytest.approx(one[column], rel=1e-3)
    assert json.loads((tmp_path / "two" / "run.json").read_text())["environment"]["processes"] == 2
