"""Every row of the papers' tables has a command that trains.

A dry run is two steps and one evaluation on a data set in its true format, by the row's own recipe, norm and settings;
only the network is a small stand-in. Rows that differ in nothing but depth and batch size share one. The row's own
network is built and passed two images on the meta device.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from pathlib import Path

import pytest
from cifar_files import write_cifar
from imagenet32_files import write_imagenet32
from picture_files import write_cityscapes, write_imagenet, write_tiny_imagenet
from torch import nn
from torchvision.models.resnet import BasicBlock

from experiments import __main__, models
from experiments.data import data_set
from experiments.listing import listing
from experiments.models import build
from experiments.paper_runs import paper_runs
from experiments.paper_tables import TABLES, TIMES
from experiments.recipe import norm_kind
from experiments.recipes import RECIPES
from experiments.run import resolve
from experiments.train import train
from knport import KernelNorm2d, KNConv2d

ROWS = paper_runs()
PIXELS = {"imagenet": 224, "tiny_imagenet": 64, "cityscapes": 512}
CLASSES = {"cifar10": 10, "cifar100": 100, "tiny_imagenet": 200, "imagenet": 1000, "imagenet32": 1000, "cityscapes": 19}
SMALL_PICTURES = {"image_size": 16, "test_resize": 20, "test_size": 16}
# What a dry run changes besides steps and folders: batches that the fixtures can fill, pictures that compute quickly.
SMALLER = {
    "imagenet": SMALL_PICTURES | {"batch_size": 8},
    "cityscapes": {"batch_size": 2, "crop_height": 16, "crop_width": 24},
    "imagenet32": {"batch_size": 8},
}
PARAMETERS = {  # in millions, as the papers' tables say
    ("cifar100", "knresnet18"): 11.216, ("cifar100", "knresnet34"): 21.323, ("cifar100", "knresnet50"): 23.682,
    ("cifar100_v1", "knresnet34_v1"): 21.305, ("cifar100_v1", "knresnet50_v1"): 24.600,
    ("imagenet", "knresnet18"): 11.685, ("imagenet", "knresnet34"): 21.793, ("imagenet", "knresnet50"): 25.556,
    ("imagenet_v1", "knresnet18_v1"): 11.699, ("imagenet_v1", "knresnet50_v1"): 25.553,
    ("cityscapes", "fcn_knresnet18"): 13.525, ("cityscapes", "fcn_knresnet34"): 23.399,
    ("cityscapes", "fcn_knresnet50"): 32.874, ("cityscapes", "fcn_resnet18"): 13.547,
    ("imagenet32_private", "dp_knresnet18"): 11.678,
}  # fmt: skip


def distinct(key) -> list:
    """One row for each value of `key`, with how many rows it stands for in its name."""
    groups = defaultdict(list)
    for row in ROWS:
        groups[key(row.settings)].append(row)
    return [pytest.param(rows[0], id=f"{name}-{len(rows)}-rows") for name, rows in groups.items()]


def dry(settings) -> str:
    kind = norm_kind(settings["model"], settings["norm"])
    words = [settings["recipe"], kind if settings["norm"] == "original" else settings["norm"]]
    return "-".join(words + ["dropout"] * ("dropout" in settings))


def network(settings) -> str:
    return f"{data_set(settings['recipe'])}-{settings['model']}-{settings['norm']}"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("cifar10", "cifar100"):
        write_cifar(folder / name, name, "binary", count=160)
    write_imagenet(folder / "imagenet")
    write_imagenet32(folder / "imagenet32")
    write_tiny_imagenet(folder / "tiny_imagenet")
    write_cityscapes(folder / "cityscapes")
    return folder


@pytest.fixture
def small_networks(monkeypatch):
    """In the place of any network: one of its kind of norm."""

    def create(name: str, num_classes: int, in_chans: int, image_size: int, **options) -> nn.Module:
        if norm_kind(name, "original") == "kernel":
            dropout = options.get("dropout", 0.05)
            layers = [KNConv2d(in_chans, 8, 3, 2, 1, dropout=dropout), nn.ReLU(), KernelNorm2d(dropout=dropout)]
        else:
            layers = [nn.Conv2d(in_chans, 64, 3, 2, 1, bias=False), BasicBlock(64, 64)]
        width = layers[0].out_channels
        if name.startswith("fcn_"):
            return nn.Sequential(*layers, nn.Conv2d(width, num_classes, 1))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))

    monkeypatch.setattr(models, "_create", create)
    monkeypatch.setattr("experiments.run_folder._commit", lambda: None)  # git, twice a run


@pytest.mark.parametrize("row", distinct(dry))
def test_dry_run(tmp_path, data_dir, small_networks, row):
    name = data_set(row.settings["recipe"])
    smaller = {"steps": 2, "data_dir": str(data_dir / name), "run_dir": str(tmp_path), **SMALLER.get(name, {})}
    private = (
        {"physical_batch_size": 4, "noise_multiplier": 1.0, "epsilon": None} if "private" in dry(row.settings) else {}
    )
    result = train(resolve(**row.settings | smaller | private), quiet=True)
    assert result["steps"] == 2
    assert 0 <= result.get("top1", result.get("miou")) <= 100


@pytest.mark.parametrize("row", distinct(network))
def test_the_network_of_a_row(row):
    name = data_set(row.settings["recipe"])
    options = {"num_classes": CLASSES[name], "image_size": PIXELS.get(name, 32), "dense": name == "cityscapes"}
    run = resolve(**row.settings)
    net = build(run.model, run.norm, **options, dropout=run.dropout, activation=run.activation, device="meta")
    millions = PARAMETERS.get((run.recipe, run.model))
    if millions:
        count = sum(parameter.numel() for parameter in net.parameters())
        assert count / 1e6 == pytest.approx(millions, abs=6e-4)
    batch = any(isinstance(module, nn.BatchNorm2d) for module in net.modules())
    assert batch == (norm_kind(run.model, run.norm) == "batch" and "convnext" not in run.model)


def test_every_cell_of_the_tables_is_there():
    cells = {(r.table, v, *(r.settings.get(n) for n in ("model", "batch_size"))) for r in ROWS for v in r.versions}
    for table in TABLES:
        for line in table.lines:
            for version, values in line.values.items():
                for column, value in zip(table.columns, values, strict=True):
                    assert value is None or (table.name, version, line.model, column.batch_size) in cells
    assert sum(row.table == "Table 6" for row in ROWS) == 2 * len(TIMES)
    assert {f"Table {number}" for number in (1, 2, 3, 4, 6)} <= {row.table for row in ROWS}


def test_every_row_has_a_folder_of_its_own():
    folders = [resolve(**row.settings).run_dir for row in ROWS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("row", distinct(lambda settings: settings["recipe"]))
def test_the_command_says_the_same(monkeypatch, row):
    asked = []
    monkeypatch.setattr("experiments.train.train", asked.append)
    words = shlex.split(row.command)
    assert words[:5] == ["accelerate", "launch", "-m", "experiments", "train"]
    __main__._train(words[5:])
    assert asked == [resolve(**row.settings, data_dir="DIR")]


def test_what_is_listed():
    text = listing(["tables"])
    assert all(row.command in text for row in ROWS)
    assert "models" not in text
    assert "accelerate launch -m experiments train cityscapes --model fcn_resnet50 --norm local_context" in listing(
        ["Table 3", "local", "50"]
    )


def test_recipes_say_what_they_need():
    for name, recipe in RECIPES.items():
        text = recipe.__doc__
        for word in ("Command: ``", f" {name} ", "Hardware:"):
            assert word in text, f"{name}: {word}"
        assert "Expected" in text or "not published" in text, name


def test_the_page_names_every_recipe():
    page = (Path(__file__).parents[1] / "docs" / "experiments.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"`([a-z0-9_]+)`", page.split("## Recipes")[1].split("## Data on disk")[0]))
    assert set(RECIPES) <= listed
