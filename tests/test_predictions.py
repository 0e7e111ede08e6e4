"""What is looked at inside trained networks: predictions as pictures, activations by stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from picture_files import write_camvid
from PIL import Image
from test_segmentation import TinyNet

from experiments import activations, predictions
from experiments.compare import compare
from experiments.comparison import find
from experiments.data.streets import CAMVID, CITYSCAPES
from experiments.models import build
from experiments.results import read
from experiments.run import resolve
from experiments.saved_run import open_run
from experiments.train import train
from knport.errors import KNPortError

SMALL = {"crop_height": 16, "crop_width": 20, "epochs": 2}


def tiny_model(model, norm, *, num_classes, **options):
    """In the place of a network that takes seconds to build."""
    return TinyNet(num_classes, 0.0 if norm == "none" else 0.2)


def tiny(run, network):
    return tiny_model(run.model, run.norm, **network)


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A comparison on a tree in CamVid's format, as the command makes it."""
    folder = tmp_path_factory.mktemp("camvid")
    write_camvid(folder / "data")

    with pytest.MonkeyPatch.context() as patch:
        for module in ("train", "saved_run"):
            patch.setattr(f"experiments.{module}.build_for", tiny)
        patch.setattr("experiments.compare.build_model", tiny_model)
        override = tuple(f"{name}={value}" for name, value in SMALL.items())
        where = {"data_dir": str(folder / "data"), "out": str(folder / "out"), "override": override}
        lists = {"models": ("fcn_resnet18",), "norms": ("original", "none"), "batch_sizes": (2,), "seeds": (0, 1)}
        return compare("camvid", **lists, **where, cost_seconds=0.1, quiet=True).parent


@pytest.fixture
def saved(compared, monkeypatch):
    """One of its runs, opened again."""
    monkeypatch.setattr("experiments.saved_run.build_for", tiny)
    return open_run(compared / "fcn_resnet18-original-b2-s0")


def test_a_comparison_of_segmentation_end_to_end(compared):
    rows = read(compared).rows
    assert len(rows) == 4 and all(row.finished and row.score == "miou" and row.value == row.miou for row in rows)
    assert all(0 <= row.pixel_accuracy <= 100 and row.best_miou >= row.miou and row.top1 is None for row in rows)
    assert all(row.ms_per_step > 0 and row.macs and row.peak_mib for row in rows)
    text = (compared / "report.html").read_text()
    assert "Mean IoU at batch size 2" in text and "mean IoU [%]" in text and "top-1 accuracy" not in text
    assert "pixel accuracy" in (compared / "report.md").read_text()


def test_predictions_are_drawn_of_the_first_seed(compared):
    runs = {path.parent.parent.name for path in compared.glob(f"*/{predictions.FOLDER}/*.png")}
    assert runs == {"fcn_resnet18-original-b2-s0", "fcn_resnet18-none-b2-s0"}
    drawn = find(compared).comparisons[0].predictions
    files = {one.file for one in drawn}
    assert len(drawn) == 2 * len(files) and all(one.predicted.startswith("data:image/png;base64,") for one in drawn)
    page = (compared / "report.html").read_text()
    assert page.count("<img") == len(files) * (2 + 2)
    assert all(f"{name}</span>" in page for name in CAMVID) and "background:rgb(128, 64, 128)" in page


def test_a_picture_is_image_truth_and_prediction(saved):
    (path, *_) = predictions.write(saved, 1)
    image, truth = saved.test.load(0)
    whole = np.asarray(Image.open(path))
    width = image.width
    assert whole.shape == (image.height, 3 * width, 3)
    assert np.array_equal(whole[:, :width], np.asarray(image))
    colours = predictions.palette("camvid", len(CAMVID))
    assert np.array_equal(whole[:, width : 2 * width], colours[np.asarray(truth)])
    counted = np.asarray(truth) != 255
    found = predictions.predict(saved.trained(), image, saved)
    assert np.array_equal(whole[:, 2 * width :][counted], colours[found[counted]])
    assert (whole[:, 2 * width :][~counted] == 0).all() and (~counted).any()


def test_what_is_drawn_is_what_was_counted(saved):
    """The pixel accuracy of the drawn classes, over all test images, is the one that training logged."""
    net, right, counted = saved.trained(), 0, 0
    for image, truth in (saved.test.load(i) for i in range(len(saved.test))):
        labels = np.asarray(truth)
        found = predictions.predict(net, image, saved)
        right += (found == labels)[labels != 255].sum()
        counted += (labels != 255).sum()
    logged = json.loads((saved.folder / "run.json").read_text())["result"]["pixel_accuracy"]
    assert 100 * right / counted == pytest.approx(logged, abs=1e-4)


def test_palettes_have_a_colour_for_each_class():
    for recipe, classes in (("camvid", CAMVID), ("cityscapes", CITYSCAPES)):
        table = predictions.palette(recipe, len(classes))
        assert len({tuple(colour) for colour in table[: len(classes)]}) == len(classes)
        assert not table[len(classes) :].any()
    with pytest.raises(KNPortError, match="0 colours for 3 classes"):
        predictions.palette("digits", 3)


# Activations, on a classification run too


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("digits") / "run"
    settings = {"steps": 3, "train_images": 40, "test_images": 30, "batch_size": 8}
    train(resolve("digits", norm="original", run_dir=str(run_dir), **settings), quiet=True)
    return run_dir


def test_networks_before_and_after_training(digits):
    saved = open_run(digits)
    torch.manual_seed(123)  # which must not matter
    first = saved.initial().state_dict()
    assert all(torch.equal(value, first[name]) for name, value in saved.initial().state_dict().items())
    assert any(not torch.equal(value, first[name]) for name, value in saved.trained().state_dict().items())
    assert saved.images(7).shape == (7, 1, 8, 8)


def test_activations_are_standard_deviations_of_stages(digits):
    saved = open_run(digits)
    found = activations.measure(saved)
    assert [stage.number for stage in found] == list(range(len(found))) and found[0].stage == "conv"
    images = saved.images(activations.IMAGES)
    with torch.no_grad():
        net = saved.trained()
        assert found[0].trained_sd == pytest.approx(net.conv(images).std().item(), rel=1e-5)
        assert found[0].initial_sd == pytest.approx(saved.initial().conv(images).std().item(), rel=1e-5)
    norm = next(stage for stage in found if stage.stage == "norm")
    assert norm.initial_sd == pytest.approx(1, abs=0.02)  # BatchNorm by the statistics of these images
    activations.write(digits / activations.FILE, found)
    again = activations.read(digits / activations.FILE)
    assert [stage[:6] for stage in again] == [stage[:6] for stage in found]


def test_torchvision_s_networks_have_stages_too(tmp_path):
    from experiments.signal_propagation import propagate

    net = build("torchvision/resnet18", "kernel", num_classes=10, image_size=32)
    names = [stage.name for stage in propagate(net, torch.randn(2, 3, 32, 32))]
    assert "layer4.1" in names and not any(name.startswith("fc") for name in names)


@pytest.mark.parametrize("command", [activations.activations, predictions.predictions])
def test_folders_that_are_no_runs(command, tmp_path, digits):
    with pytest.raises(KNPortError, match="name at least one run folder"):
        command(())
    with pytest.raises(KNPortError, match=r"run\.json does not exist; give the folder of a run"):
        command((tmp_path,))
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(KNPortError, match="is damaged"):
        command((tmp_path,))
    if command is predictions.predictions:
        with pytest.raises(KNPortError, match="classifies whole images"):
            command((digits,))


def test_a_run_without_weights(digits, tmp_path):
    (tmp_path / "run.json").write_bytes((Path(digits) / "run.json").read_bytes())
    with pytest.raises(KNPortError, match="nothing has been saved yet"):
        activations.activations((tmp_path,))
