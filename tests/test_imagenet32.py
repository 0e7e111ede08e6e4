"""ImageNet32 from its real formats on disk, and its private recipes."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest
import torch
from imagenet32_files import TRAIN, as_numpy_1, write_imagenet32

from experiments import data
from experiments.budget import Budget
from experiments.data.imagenet32 import imagenet32, read_file
from experiments.models import build
from experiments.run import resolve
from knport import privacy
from knport.errors import KNPortError


@pytest.mark.parametrize("layout", ["pickle", "npz"])
@pytest.mark.parametrize("where", ["", "Imagenet32_train"])
def test_every_image_and_label(tmp_path, layout, where):
    written = write_imagenet32(tmp_path / where, layout)
    if where:  # the two archives, unpacked into folders of their own
        (tmp_path / "Imagenet32_val").mkdir()
        name = "val_data" + (".npz" if layout == "npz" else "")
        (tmp_path / where / name).rename(tmp_path / "Imagenet32_val" / name)
    for images, part in zip(imagenet32(str(tmp_path)), ("train", "test"), strict=True):
        pixels, labels = written[part]
        assert images.images.shape == (len(labels), 3, 32, 32)
        assert np.array_equal(images.images.numpy().reshape(-1, 3072), pixels)
        assert np.array_equal(images.labels.numpy(), labels - 1)
        assert images.num_classes == 1000
        assert "where the official set has" in images.notes[0]


def test_a_pixel_is_where_it_belongs(tmp_path):
    pixels = np.arange(2 * 3072, dtype=np.uint32).astype(np.uint8).reshape(2, 3072)
    path = tmp_path / "val_data"
    path.write_bytes(as_numpy_1({"data": pixels, "labels": [1, 1000]}))
    read, labels = read_file(path)
    assert labels.tolist() == [0, 999]
    image = torch.from_numpy(read.copy()).view(2, 3, 32, 32)
    assert image[0, 2, 5, 7] == (2 * 1024 + 5 * 32 + 7) % 256


class Evil:
    def __reduce__(self):
        return os.system, ("echo it ran",)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"no pickle", "not a file of ImageNet32"),
        (as_numpy_1({"data": np.zeros((2, 3072), np.uint8)}), "KeyError: 'labels'"),
        (as_numpy_1({"data": np.zeros((2, 3072)), "labels": [1, 2]}), "'data' is float64"),
        (as_numpy_1({"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2]}), r"expected uint8 \(2, 3072\)"),
        (as_numpy_1({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 2]}), "labels from 0 to 2, expected 1 to"),
        (as_numpy_1({"data": np.zeros((2, 3072), np.uint8), "labels": [1, 2]})[:-9], "not a file of ImageNet32"),
        (pickle.dumps({"data": Evil(), "labels": [1]}), "which is not part of an array"),
    ],
)
def test_damaged_files(tmp_path, capfd, content, match):
    path = tmp_path / "val_data"
    path.write_bytes(content)
    with pytest.raises(KNPortError, match=match):
        read_file(path)
    assert "it ran" not in capfd.readouterr().out


def test_missing_files(tmp_path):
    with pytest.raises(KNPortError, match=r"does not exist.*Imagenet32_train.zip"):
        imagenet32(str(tmp_path / "nowhere"))
    with pytest.raises(KNPortError, match="holds no train_data_batch_1"):
        imagenet32(str(tmp_path))
    write_imagenet32(tmp_path)
    (tmp_path / TRAIN[3]).unlink()
    with pytest.raises(KNPortError, match="lacks train_data_batch_4"):
        imagenet32(str(tmp_path))


def test_the_recipe_reads_it(tmp_path):
    write_imagenet32(tmp_path)
    train, test = data.load(resolve("imagenet32_private", model="dp_knresnet18", data_dir=str(tmp_path)))
    assert (len(train), len(test)) == (40, 4)


@pytest.mark.parametrize(
    ("recipe", "model", "norm", "published"),
    [
        ("imagenet32_private", "dp_knresnet18", "original", (8192, 4.0, 8e-7, "unit", "halve")),
        ("imagenet32_private", "baseline_resnet18", "group", (8192, 4.0, 8e-7, "standard", "halve")),
        ("imagenet32_private", "baseline_resnet18", "layer", (8192, 4.0, 8e-7, "standard", "halve")),
        ("imagenet32_private_v1", "dp_knresnet18", "original", (8192, 3.0, 1e-5, "unit", "decay")),
        ("imagenet32_private_v1", "baseline_resnet18", "group", (4096, 3.0, 1e-5, "standard", "decay")),
    ],
)
def test_published_settings(recipe, model, norm, published):
    run = resolve(recipe, model=model, norm=norm)
    found = (run.batch_size, run.lr, run.privacy.delta, run.scaling, run.optimization.schedule)
    assert found == published
    assert (run.epochs, run.privacy.epsilon, run.privacy.clip, run.activation) == (100, 8.0, 2.0, "mish")
    assert (run.optimization.momentum, run.optimization.weight_decay, run.augmentation.augment) == (0.0, 0.0, "none")


@pytest.mark.parametrize("recipe", ["digits_private", "cifar10_private", "imagenet32_private"])
def test_the_recipes_can_be_paid_for(recipe):
    images = {"digits_private": 1442, "cifar10_private": 50_000, "imagenet32_private": 1_281_167}[recipe]
    run = resolve(recipe, norm="kernel")
    steps = run.epochs * (images // run.batch_size)
    budget = Budget(run, images, steps)
    assert 0.4 < budget.noise_multiplier < 4
    assert budget.affordable() == steps


@pytest.mark.parametrize(
    ("model", "norm"),
    [("dp_knresnet18", "original"), ("dp_knresnet8", "original"), ("baseline_resnet18", "group"),
     ("baseline_resnet18", "layer"), ("cifar_resnet8x2", "kernel")],
)  # fmt: skip
def test_the_networks_of_the_recipes_can_be_trained_privately(model, norm):
    net = build(model, norm, num_classes=10, image_size=32, activation="mish")
    assert privacy.validate(net) == []
    kinds = {type(module) for module in net.modules()}
    assert torch.nn.Mish in kinds
    assert torch.nn.ReLU not in kinds
