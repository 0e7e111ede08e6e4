"""Measuring saved models again."""

from __future__ import annotations

import json

import pytest
import torch
from cifar_files import write_cifar
from test_resume import damage

import knport
from experiments.__main__ import main
from experiments.data.digits import digits
from experiments.models import build
from experiments.run import resolve
from experiments.train import train
from experiments.validate import validate
from knport.errors import KNPortError


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A trained ResNet of digits with a weight average, whose best step is not its last."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"train_images": 320, "test_images": 80, "ema": 0.5, "batch_size": 16, "eval_every": 0.5}
    train(resolve("digits", norm="kernel", epochs=2, run_dir=str(folder), **settings), quiet=True)
    return folder


def stored(folder) -> dict:
    return json.loads((folder / "run.json").read_text())["result"]


def test_a_run_is_what_training_logged(run_folder, capsys):
    found = validate(run_folder)
    assert {name: found[name] for name in ("top1", "top5")} == {
        name: stored(run_folder)[name] for name in ("top1", "top5")
    }
    assert found["test_loss"] == pytest.approx(stored(run_folder)["test_loss"], rel=1e-6)
    said = capsys.readouterr().out
    assert f"last: test_loss {found['test_loss']:.4f}, top1 {found['top1']:.4f}" in said
    assert "logged" not in said
    assert validate(run_folder, weights="best", quiet=True)["top1"] == stored(run_folder)["best_top1"]
    averaged = validate(run_folder, weights="in_training", quiet=True)
    assert averaged["test_loss"] != found["test_loss"]


def test_what_was_measured_is_not_measured_again(run_folder, monkeypatch, capsys):
    first = validate(run_folder, again=True, quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr("experiments.validate._measure", None)
        assert validate(run_folder) == first
        assert "measured before; --again" in capsys.readouterr().out
        with pytest.raises(TypeError):
            validate(run_folder, override=["test_images=40"])
    assert validate(run_folder, override=["test_images=40"], quiet=True)["top1"] <= 100
    record = json.loads((run_folder / "validate.json").read_text())
    assert record["last"]["key"]["test_images"] == 40
    assert "torch" in record["last"]["environment"]


def test_another_result_than_logged_is_said(run_folder, tmp_path, capsys):
    path = run_folder / "run.json"
    text = path.read_text()
    try:
        path.write_text(text.replace(f'"top1": {stored(run_folder)["top1"]}', '"top1": 12.5'))
        validate(run_folder)
    finally:
        path.write_text(text)
    assert "training logged top1 12.5000: another device, precision" in capsys.readouterr().out


def test_a_folder_of_knport_save(tmp_path, capsys):
    torch.manual_seed(0)
    net = knport.convert(build("cifar_resnet8", num_classes=10, in_chans=1, image_size=8).eval())
    base = {"num_classes": 10, "in_chans": 1, "low_resolution": True}
    knport.save(net, tmp_path / "saved", base="architectures/cifar_resnet8", base_kwargs=base)
    found = validate(tmp_path / "saved", recipe="digits", override=["test_images=60", "scaling=unit"], quiet=True)
    test = digits()[1].select(None, 60)
    with torch.no_grad():
        right = net.eval()(test.scale(test.images, "unit")).argmax(1) == test.labels
    assert found["top1"] == pytest.approx(100 * right.double().mean().item())
    assert main(["validate", str(tmp_path / "saved")]) == 2
    assert "says nothing of its data: give --recipe" in capsys.readouterr().err
    write_cifar(tmp_path, "cifar10", "binary", count=20)
    with pytest.raises(KNPortError, match="has 3 channels; expected 1"):
        validate(tmp_path / "saved", recipe="cifar10", data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("prepare", "options", "match"),
    [
        (lambda folder: None, {}, "does not exist; expected the folder of a run"),
        (lambda folder: folder.mkdir(), {}, "has neither run.json nor knport.json"),
        (lambda folder: (folder.mkdir(), (folder / "run.json").write_text("{")), {}, r"run\.json is damaged"),
    ],
)
def test_mistakes(tmp_path, prepare, options, match):
    prepare(tmp_path / "run")
    with pytest.raises(KNPortError, match=match):
        validate(tmp_path / "run", **options)


def test_damaged_weights_are_named(tmp_path, run_folder):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "run.json").write_text((run_folder / "run.json").read_text())
    with pytest.raises(KNPortError, match=r"model\.safetensors is missing: nothing has been saved yet"):
        validate(copy)
    (copy / "last").mkdir()
    for path in (run_folder / "last").iterdir():
        (copy / "last" / path.name).write_bytes(path.read_bytes())
    damage(copy / "last" / "model.safetensors", "cut")
    with pytest.raises(KNPortError, match=r"model\.safetensors: its SHA-256 is not .* damaged"):
        validate(copy)
    (copy / "last" / "in_training.safetensors").unlink()
    with pytest.raises(KNPortError, match="the run has no weight average"):
        validate(copy, weights="in_training")


def test_a_folder_that_cannot_be_written_is_still_measured(run_folder, monkeypatch, capsys):
    def refuse(path, text):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("experiments.validate.write_text", refuse)
    assert validate(run_folder, again=True)["top1"] == stored(run_folder)["top1"]
    assert "not kept: [Errno 30] Read-only file system" in capsys.readouterr().out
