"""The trials of placements, and the section of the docs on what the small networks learn."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import torch
from torch import nn

from architectures import registry
from experiments import learned, placements
from experiments.models import build
from experiments.results import Results, Row, write
from experiments.tried import OwnChannel
from knport import KNConv2d
from knport.errors import UnknownName

RESULT = {"steps": 312, "top1": 31.25, "train_loss": 2.5, "test_loss": 2.25, "seconds": 60.2}


@pytest.fixture(autouse=True)
def registry_as_it_was(monkeypatch):
    monkeypatch.setattr(registry, "_CONSTRUCTORS", dict(registry._CONSTRUCTORS))


@pytest.mark.parametrize("name", placements.TRIALS)
def test_every_trial_is_a_network_of_its_kind(name, tmp_path):
    run = placements.run_of(name, 0, "data", tmp_path)
    model = build(run.model, run.norm, num_classes=4, image_size=32)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 4)
    ours = name.startswith("KN") or "converted" in name
    standard = not ours or "plain stem" in name or "standardized images" in name
    assert run.scaling == ("standard" if standard else "unit")
    batch_norm = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert batch_norm == (not ours and "LayerNorm" not in name)


def test_trials_differ_in_what_they_say():
    def built(name):
        torch.manual_seed(0)
        return placements.constructor(placements.TRIALS[name])(num_classes=4)

    one, double = built("KN-DenseNet, initial weights x 1.41"), built("KN-DenseNet, initial weights x 2")
    torch.testing.assert_close(one.stem[0].weight / 1.41, double.stem[0].weight / 2)
    assert one.stem[0].bias.any() and not built("KN-DenseNet, biases of zero").stem[0].bias.any()
    x = torch.rand(2, 3, 32, 32)
    pre, residual = (built(f"KN-ConvMixer, pre-activation{more}").eval() for more in ("", ", pointwise residual"))
    residual.load_state_dict(pre.state_dict())
    assert not torch.equal(pre(x), residual(x))
    for block in pre.blocks:
        nn.init.zeros_(block.depthwise.weight)
        nn.init.zeros_(block.depthwise.bias)
    y = pre.stem[0](x)
    for block in pre.blocks:
        y = block.pointwise(nn.functional.gelu(y))
    torch.testing.assert_close(pre.forward_features(x), nn.functional.gelu(pre.norm(y)))
    assert type(built("KN-ConvMixer, plain stem").stem[0]) is nn.Conv2d


def test_units_of_one_channel_are_those_of_a_layer_with_one_channel():
    wide = KNConv2d(3, 3, 5, padding="same", groups=3, dropout=0.0).double()
    x, ours = torch.randn(2, 3, 8, 7, dtype=torch.float64), OwnChannel.of(wide).double()
    for i in range(3):
        one = KNConv2d(1, 1, 5, padding="same", dropout=0.0).double()
        one.load_state_dict({name: values[i : i + 1] for name, values in wide.state_dict().items()})
        torch.testing.assert_close(ours(x)[:, i : i + 1], one(x[:, i : i + 1]))


def test_what_has_finished_is_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(placements, "train", lambda run, quiet: trained.append(run) or RESULT)
    options = {"out": tmp_path / "trials.csv", "runs": tmp_path}
    placements.placements(("ConvMixer",), **options)
    placements.placements(("ConvMixer", "KNResNet"), seeds=(0, 1), **options)
    assert [(run.model, run.seed) for run in trained] == [
        ("cifar_convmixer", 0),
        ("kncifar_resnet8x2", 0),
        ("cifar_convmixer", 1),
        ("kncifar_resnet8x2", 1),
    ]
    assert len({run.run_dir for run in trained}) == 4
    rows = list(placements.read(tmp_path / "trials.csv"))
    assert [row["lr"] for row in rows] == ["0.002", "0.05", "0.002", "0.05"]
    assert "31.25 %" in capsys.readouterr().out
    with pytest.raises(UnknownName, match="did you mean 'ConvMixer'"):
        placements.placements(("ConvMixr",), **options)


def test_section(tmp_path):
    assert learned.section(tmp_path) == ""
    budget = {"recipe": "cifar100", "norm": "original", "status": "finished", "classes": 20, "command": "compare"}
    budget |= {"train_images": 10_000, "test_images": 2_000, "epochs": 1}
    scores = {("cifar_resnet8x2", 2): [20.0], ("cifar_resnet8x2", 32): [30.0, 32.0], ("kncifar_resnet8x2", 32): [34.0]}
    rows = [
        Row(model=model, batch_size=size, seed=seed, steps=size * 100, lr=0.1, top1=top1, **budget)
        for (model, size), values in scores.items()
        for seed, top1 in enumerate(values)
    ]
    rows.append(replace(rows[1], norm="group", top1=28.0))
    write(tmp_path, Results(tuple(rows), ()))
    text = learned.section(tmp_path)
    assert "| cifar_resnet8x2 | 32 | 3,200 | 0.1 | 31.0 ± 1.4 | 28.0 |  | 34.0 | +3.0 |" in text
    assert "- batch size 32: ahead in kncifar_resnet8x2 (+3.0)" in text
    flat = " ".join(text.split())
    assert "10,000 training and 2,000 test images of 20 classes" in flat and "seeds 0, 1" in flat
    assert "Trials" not in text
    with (tmp_path / "trials.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(placements.COLUMNS)
        writer.writerows(("KN-X", 32, 312, "sgd", 0.05, seed, top1, 2, 2, 60) for seed, top1 in enumerate((10, 12)))
    assert "| KN-X | 32 | 312 | sgd, 0.05 | 11.0 ± 1.4 |" in learned.section(tmp_path)
