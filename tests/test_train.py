"""Training runs from beginning to end, in this process."""

from __future__ import annotations

import csv
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from cifar_files import write_cifar
from safetensors.torch import load_file
from torch import nn

import knport
from experiments import data, models
from experiments.data.images import ImageSet
from experiments.evaluate import evaluate
from experiments.meter import NonFiniteLoss
from experiments.randomness import fold
from experiments.run import resolve
from experiments.state import State
from experiments.train import start_accelerator, train
from knport.errors import KNPortError


@pytest.fixture(autouse=True)
def one_thread():
    """Networks this small only lose by sharing out their work, badly so on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(tmp_path, name="run", **settings):
    """Twelve steps on 64 digits."""
    settings = {"batch_size": 16, "epochs": 3, "train_images": 64, "test_images": 50, **settings}
    return resolve("digits", run_dir=str(tmp_path / name), **settings)


class TinyKN(nn.Module):
    """A network of kernel normalization alone, without dropout: batch-independent."""

    def __init__(self, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.conv1 = knport.KNConv2d(1, 6, 3, padding=1, dropout=dropout)
        self.conv2 = knport.KNConv2d(6, 8, 3, stride=2, padding=1, dropout=dropout)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(self.conv2(self.conv1(x).relu()).relu().mean((2, 3)))


@pytest.fixture
def kn_net(monkeypatch):
    monkeypatch.setattr("experiments.train.build_for", lambda run, network: TinyKN(network["num_classes"]))


def rows(folder: Path, name: str = "log.csv") -> list[dict[str, float]]:
    with (folder / name).open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def weights(folder: Path, name: str = "last/model") -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in load_file(folder / f"{name}.safetensors").values()])


def test_the_run_folder(tmp_path):
    run = tiny(tmp_path)
    result = train(run, quiet=True)
    folder = tmp_path / "run"
    stored = json.loads((folder / "run.json").read_text())
    assert stored["result"] == result
    assert (stored["status"], stored["classes"], stored["train_images"], stored["test_images"]) == (
        "finished",
        10,
        64,
        50,
    )
    assert stored["parameters"] == 77754
    assert stored["environment"]["torch"] == torch.__version__.split("+")[0]
    log = rows(folder)
    assert [row["step"] for row in log] == [4, 8, 12]
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert result["top1"] == log[-1]["top1"]
    assert result["best_top1"] == max(row["top1"] for row in log)
    assert (result["steps"], result["epochs"]) == (12, 3)
    losses = rows(folder, "losses.csv")
    assert [row["step"] for row in losses] == list(range(1, 13))
    assert sum(row["loss"] for row in losses[8:]) / 4 == pytest.approx(log[-1]["train_loss"], rel=1e-5)


def test_saved_weights_give_the_stored_accuracy(tmp_path):
    run = tiny(tmp_path, epochs=8, ema=0.5)
    result = train(run, quiet=True)
    net = models.build(run.model, num_classes=10, in_chans=1, image_size=8)
    net.load_state_dict(load_file(tmp_path / "run" / "last" / "model.safetensors"))
    _, test = data.load(run)
    again = evaluate(net, test, start_accelerator(run), scaling=run.scaling)
    assert again["top1"] == result["top1"]
    assert again["test_loss"] == pytest.approx(result["test_loss"])


def test_a_finished_run_is_returned_not_repeated(tmp_path, monkeypatch, capsys):
    run = tiny(tmp_path)
    result = train(run, quiet=True)
    monkeypatch.setattr("experiments.train._train", None)
    assert train(run) == result
    assert "has finished" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"epochs": 4}, {"lr": 0.01}, {"steps": 3}, {"dropout": 0.1}])
def test_another_configuration_is_refused(tmp_path, change):
    train(tiny(tmp_path, steps=1), quiet=True)
    ((name, value),) = change.items()
    with pytest.raises(KNPortError, match=f"another configuration: {name} is .* there and {value} now.*--run-dir"):
        train(tiny(tmp_path, **{"steps": 1, **change}), quiet=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_run_json_is_named(tmp_path, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(text)
    with pytest.raises(KNPortError, match=r"run\.json is damaged"):
        train(tiny(tmp_path), quiet=True)


def test_the_seed_decides(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        torch.manual_seed(hash(name) % 1000)  # what happened before must not matter
        train(tiny(tmp_path, name, seed=seed), quiet=True)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("parts", [2, 4])
def test_accumulation_equals_the_full_batch(tmp_path, kn_net, parts):
    train(tiny(tmp_path, "whole", label_smoothing=0.1), quiet=True)
    train(tiny(tmp_path, "parts", label_smoothing=0.1, accumulate=parts), quiet=True)
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"), atol=2e-6, rtol=1e-5)
    for one, other in zip(*(rows(tmp_path / name, "losses.csv") for name in ("whole", "parts")), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_weight_average(tmp_path):
    train(tiny(tmp_path, "raw"), quiet=True)
    train(tiny(tmp_path, "ema", ema=0.9, eval_every=0.25), quiet=True)
    assert torch.equal(weights(tmp_path / "ema", "last/in_training"), weights(tmp_path / "raw"))  # it only watches
    assert not torch.equal(weights(tmp_path / "ema"), weights(tmp_path / "raw"))


def test_weight_average_follows_its_formula(tmp_path, kn_net, monkeypatch):
    run = tiny(tmp_path, ema=0.2, steps=3)
    torch.manual_seed(fold(run.seed, "init"))
    expected, followed = list(TinyKN(10).parameters()), State.update_average

    def follow(state):
        decay = min(0.2, (1 + state.step) / (10 + state.step))  # 0.1, 0.1818, 0.2
        expected[:] = [decay * old + (1 - decay) * new for old, new in zip(expected, state.parameters, strict=True)]
        followed(state)

    monkeypatch.setattr(State, "update_average", follow)
    train(run, quiet=True)
    found = load_file(tmp_path / "run" / "last" / "model.safetensors")
    for (name, _), value in zip(TinyKN(10).named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], value.detach())


@pytest.mark.parametrize(
    "settings",
    [{"mixed_precision": "bf16"}, {"channels_last": True}, {"warmup": 4}, {"classes": 3, "train_images": 48}],
)
def test_settings_train(tmp_path, settings):
    result = train(tiny(tmp_path, steps=8, **{"test_images": 30, **settings}), quiet=True)
    assert result["steps"] == 8
    assert 0 < result["train_loss"] < 4


def test_autocast_reaches_the_model_and_ends_with_the_run(tmp_path, monkeypatch):
    seen = []

    class Spy(TinyKN):
        def forward(self, x):
            seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x)

    monkeypatch.setattr("experiments.train.build_for", lambda run, network: Spy(network["num_classes"]))
    train(tiny(tmp_path, "bf16", steps=1, mixed_precision="bf16"), quiet=True)
    assert all(seen)
    seen.clear()
    train(tiny(tmp_path, "no", steps=1), quiet=True)
    assert seen
    assert not any(seen)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="fp16 is allowed here")
def test_fp16_on_the_cpu_is_refused(tmp_path):
    with pytest.raises(KNPortError, match="fp16 needs a GPU"):
        train(tiny(tmp_path, mixed_precision="fp16"), quiet=True)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    train(tiny(tmp_path, steps=2, track="tensorboard"), quiet=True)
    assert list((tmp_path / "run" / "track").rglob("events.out.tfevents.*"))


@pytest.mark.parametrize("tracker", ["wandb", "trackio", "mlflow"])
def test_a_tracker_that_is_not_installed(tmp_path, tracker):
    if importlib.util.find_spec(tracker) is not None:
        pytest.skip(f"{tracker} is installed")
    with pytest.raises(KNPortError, match=f"pip install {tracker}"):
        train(tiny(tmp_path, track=tracker), quiet=True)


def test_compile(tmp_path, kn_net, monkeypatch):
    """Traced, and run by torch's own operators in place of compiled ones, which take long to make."""
    original, compiled = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda net: compiled.append(net) or original(net, backend="eager"))
    train(tiny(tmp_path, "compiled", compile=True), quiet=True)
    assert len(compiled) == 1
    train(tiny(tmp_path, "plain"), quiet=True)
    assert len(compiled) == 1
    saved = load_file(tmp_path / "compiled" / "last" / "model.safetensors")
    assert saved.keys() == TinyKN(10).state_dict().keys()
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), atol=1e-6, rtol=1e-5)


def test_cifar_from_disk(tmp_path):
    write_cifar(tmp_path, "cifar100", "binary", count=100)
    run = resolve("cifar100", batch_size=10, steps=2, classes=20, data_dir=str(tmp_path), run_dir=str(tmp_path / "run"))
    assert train(run, quiet=True)["epochs"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    run = tiny(tmp_path, lr=1e18, checkpoint_every=1, momentum=0.0)
    with pytest.raises(NonFiniteLoss, match=r"is (nan|inf) at step \d+ .*learning rate .*e\+17.*Try a lower --lr"):
        train(run, quiet=True)
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert stored["status"] == "failed"
    assert stored["result"] is None
    assert "lower --lr" in stored["error"]


def test_no_checkpoint_after_a_bad_loss(tmp_path, monkeypatch):
    class Explodes(TinyKN):
        calls = 0

        def forward(self, x):
            self.calls += self.training
            return super().forward(x) * (float("nan") if self.calls > 6 else 1.0)

    monkeypatch.setattr("experiments.train.build_for", lambda run, network: Explodes(network["num_classes"]))
    with pytest.raises(NonFiniteLoss, match="training loss is nan at step 6 ") as caught:
        train(tiny(tmp_path, checkpoint_every=4), quiet=True)
    assert caught.value.step == 6
    assert json.loads((tmp_path / "run" / "last" / "state.json").read_text())["step"] == 4
    assert weights(tmp_path / "run").isfinite().all()


@pytest.mark.parametrize("count", [1, 7, 300])
def test_evaluation_counts_every_image_once(count):
    images = torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,))
    test = ImageSet(images=images, labels=labels, num_classes=10, mean=(0.5,), std=(0.5,))
    net = TinyKN(10)
    found = evaluate(net, test, start_accelerator(resolve("digits")), scaling="unit")
    logits = net(images / 255)
    assert found["top1"] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert found["test_loss"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    order = logits.argsort(1, descending=True)[:, :5]
    assert found["top5"] == pytest.approx(100 * (order == labels[:, None]).any(1).double().mean().item())
