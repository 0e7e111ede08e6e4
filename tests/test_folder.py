"""knport.save and knport.load: what comes back is what was saved, and every damaged folder is a clear error."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import nn

import knport
from knport import folder as folder_module
from knport.recipe import _checksum

FEW = (1, 1, 1, 1)
X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def own_network(width: int = 8, classes: int = 4) -> nn.Module:
    """A base that only this module can build."""
    body = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(width, classes))


def small() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture
def saved(tmp_path):
    return knport.save(knport.convert(small()), tmp_path / "model")


def same(first: nn.Module, second: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(first.eval()(X), second.eval()(X))


def rewrite(path, change, *, checksum: bool = True) -> None:
    """Edit the recipe as someone would who also knows its checksum."""
    content = json.loads(path.read_text())
    content.pop("checksum")
    change(content)
    path.write_text(json.dumps({**content, "checksum": _checksum(content) if checksum else "0"}))


def with_options(library: str, name: str, **kwargs) -> dict:
    return {"base": f"{library}/{name}", "base_kwargs": kwargs}


CASES = {
    "timm, nothing said": (small, {}, {}),
    "timm, options": (lambda: timm.create_model("test_resnet", in_chans=3, num_classes=3), {"enlarge": "3x3"}, {}),
    "tokens": (
        lambda: timm.create_model("test_vit", img_size=64),
        {},
        with_options("timm", "test_vit", img_size=64),
    ),
    "torchvision": (
        lambda: torchvision.models.mobilenet_v3_small(num_classes=4),
        {"dropout": 0.1},
        with_options("torchvision", "mobilenet_v3_small", num_classes=4),
    ),
    "a class that asks for the version of its format": (
        lambda: torchvision.models.mnasnet0_5(num_classes=4),
        {},
        with_options("torchvision", "mnasnet0_5", num_classes=4),
    ),
    "own function": (own_network, {}, {"base": own_network}),
    "own function, arguments": (lambda: own_network(12), {}, {"base": own_network, "base_kwargs": {"width": 12}}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_comes_back_is_what_was_saved(case, tmp_path):
    make, config, base = CASES[case]
    model = knport.convert(make(), knport.KNConfig(**config)).eval()
    knport.save(model, tmp_path, **base)
    again = knport.load(tmp_path, base=base["base"] if callable(base.get("base")) else None)
    assert type(again) is type(model) and not again.training
    assert list(again.state_dict()) == list(model.state_dict())
    assert same(model, again)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["knport.json", "model.safetensors"]


def test_a_loaded_model_can_be_saved_again(saved, tmp_path):
    model = knport.load(saved)
    knport.save(model, tmp_path / "again", base="timm/test_resnet", base_kwargs={"num_classes": 5})
    assert same(model, knport.load(tmp_path / "again"))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_know_how_they_were_made(twin, tmp_path):
    model = twin(knport.convert(small()))
    assert same(model, knport.load(knport.save(model, tmp_path)))


def test_plans_in_a_row_and_replace_norm(tmp_path):
    half = knport.convert(small(), exclude=["stages.1", "stages.2"] if hasattr(small(), "stages") else "layer2")
    model = knport.replace_norm(half, "group")
    knport.save(model, tmp_path)
    kinds = [step["kind"] for step in json.loads((tmp_path / "knport.json").read_text())["plans"]]
    assert kinds == ["convert", "replace_norm"]
    assert same(model, knport.load(tmp_path))


def test_a_resized_network(tmp_path):
    model = knport.convert(small(), match_params="model")
    again = knport.load(knport.save(model, tmp_path))
    assert same(model, again) and again.layer4[0].conv1.out_channels < small().layer4[0].conv1.out_channels


def test_dtype_mode_and_frozen_parameters_stay(tmp_path):
    model = knport.convert(small()).bfloat16().train()
    model.fc.float().requires_grad_(False)
    again = knport.load(knport.save(model, tmp_path))
    assert again.training and not again.fc.weight.requires_grad and again.conv1[0].weight.requires_grad
    assert [p.dtype for p in again.parameters()] == [p.dtype for p in model.parameters()]


def tied_network() -> nn.Module:
    first, second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
    second.weight = first.weight
    norms = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    return nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), nn.Conv2d(3, 2, 1))


def test_tied_weights_are_saved_once_and_stay_tied(tmp_path):
    model = knport.convert(tied_network(), example_inputs=X)
    again = knport.load(knport.save(model, tmp_path, base=tied_network), base=tied_network)
    assert again[0].weight is again[3].weight
    assert "3.weight" not in safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert same(model, again)


def test_nothing_random_is_touched(saved):
    state = torch.get_rng_state()
    knport.load(saved)
    assert torch.equal(torch.get_rng_state(), state)


class TestSavingIsRefused:
    def test_when_the_model_was_not_converted(self, tmp_path):
        with pytest.raises(knport.KNPortError, match="was not converted by knport"):
            knport.save(small(), tmp_path / "new")
        assert not (tmp_path / "new").exists()

    def test_when_the_base_is_unknown_and_says_what_to_pass(self, tmp_path):
        model = knport.convert(own_network(), example_inputs=X)
        with pytest.raises(knport.KNPortError, match=r"not known; pass base=.*torchvision/resnet50"):
            knport.save(model, tmp_path)
        with pytest.raises(knport.UnknownName, match="did you mean 'timm/test_resnet'"):
            knport.save(model, tmp_path, base="timm/test_resnt")
        with pytest.raises(knport.KNPortError, match="a function of a module"):
            knport.save(model, tmp_path, base=lambda: own_network())

    def test_when_the_base_is_another(self, tmp_path):
        model = knport.convert(own_network(), example_inputs=X)
        with pytest.raises(knport.KNPortError, match=r"width.*is not what was converted.*base_kwargs"):
            knport.save(model, tmp_path, base=own_network, base_kwargs={"width": 9})

    def test_when_the_model_was_changed_by_hand_with_the_difference(self, tmp_path):
        model = knport.convert(own_network(), example_inputs=X)
        model[5] = nn.Linear(8, 7)
        model[0].dropout = 0.5
        with pytest.raises(knport.KNPortError) as caught:
            knport.save(model, tmp_path / "new", base=own_network)
        text = str(caught.value)
        assert "5: Linear(in_features=8, out_features=4" in text and "out_features=7, bias=True) now" in text
        assert "dropout=0.5" in text and "tensor 5.weight: (4, 8) by the plan, (7, 8) now" in text
        assert not (tmp_path / "new").exists()

    def test_when_arguments_are_no_json(self, tmp_path):
        model = knport.convert(own_network(), example_inputs=X)
        with pytest.raises(knport.KNPortError, match="cannot be written as JSON"):
            knport.save(model, tmp_path, base=own_network, base_kwargs={"width": torch.tensor(8)})
        with pytest.raises(knport.KNPortError, match="weights come from the saved file only"):
            knport.save(knport.convert(small()), tmp_path, base="timm/test_resnet", base_kwargs={"pretrained": True})

    def test_when_there_are_no_values(self, tmp_path):
        with pytest.raises(knport.KNPortError, match="meta device"):
            knport.save(knport.convert(small()).to("meta"), tmp_path)


class TestDamagedFolders:
    def refused(self, folder, match: str, **options) -> None:
        with pytest.raises(knport.KNPortError, match=match):
            knport.load(folder, **options)

    def test_missing(self, saved, tmp_path):
        self.refused(tmp_path / "nowhere", "is no folder; expected one that knport.save wrote")
        (saved / "model.safetensors").unlink()
        self.refused(saved, r"model\.safetensors is missing")
        (saved / "knport.json").unlink()
        self.refused(saved, r"has no knport\.json")

    def test_cut_short(self, saved):
        weights, recipe = saved / "model.safetensors", saved / "knport.json"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.refused(saved, r"model\.safetensors is cut short")
        recipe.write_text(recipe.read_text()[:-100])
        self.refused(saved, r"knport\.json is no JSON or cut short")

    def test_of_a_newer_version(self, saved):
        rewrite(saved / "knport.json", lambda c: c.update(version=2))
        self.refused(saved, "is of version 2, this knport reads up to 1; install knport")

    def test_something_else(self, saved):
        (saved / "knport.json").write_text("[1]")
        self.refused(saved, "is no recipe of knport")
        (saved / "knport.json").write_bytes(b"\xff\xfe")
        self.refused(saved, "cannot be read")

    def test_changed_without_its_checksum(self, saved):
        rewrite(saved / "knport.json", lambda c: c.update(training=False), checksum=False)
        self.refused(saved, "was changed after it was written")

    def test_weights_of_another_model(self, saved):
        data = bytearray((saved / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (saved / "model.safetensors").write_bytes(bytes(data))
        self.refused(saved, r"is not the file that knport\.json belongs to")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c["plans"][0]["plan"]["verdicts"][0].update(enlarge="big"), r"verdicts\[0\]\.enlarge is 'big'"),
            (lambda c: c["plans"][0]["plan"]["verdicts"][0].pop("path"), r"verdicts\[0\]\.path is missing"),
            (lambda c: c["plans"][0]["plan"].update(code="x"), r"plan\.code is unknown"),
            (lambda c: c["plans"][0]["plan"]["config"].update(dropout=2.0), r"KNConfig\.dropout=2\.0"),
            (lambda c: c["plans"][0].update(kind="exec"), "expected convert or replace_norm"),
            (lambda c: c["plans"].append(c["plans"][0]), "was made for another"),
            (lambda c: c["plans"].clear(), "the weights do not fit the model"),
            (lambda c: c.update(more=1), "more is missing or unknown"),
            (lambda c: c.update(frozen="fc"), "expected a list"),
            (lambda c: c["base"].update(name="timm/nothing_like_it"), "unknown model"),
            (lambda c: c["base"].update(name="os/system"), "unknown model 'os/system'"),
            (
                lambda c: c["base"].update(name="os:system", kwargs={"command": "false"}),
                "a function of your own, os:system",
            ),
            (lambda c: c["base"]["kwargs"].update(checkpoint_path="x.pth"), "weights come from the saved file only"),
            (lambda c: c["base"]["kwargs"].update(num_classes=6), "was made for another"),
            (lambda c: c["base"]["kwargs"].update(colour="red"), r"could not build timm/test_resnet\(.*colour"),
            (lambda c: c["weights"]["shared"].update(extra="fc.weight"), "extra is "),
        ],
    )
    def test_changed_with_its_checksum(self, saved, change, match):
        rewrite(saved / "knport.json", change)
        self.refused(saved, match)

    def test_a_pickle_in_the_place_of_the_weights_is_not_opened(self, saved):
        class Bomb:
            def __reduce__(self):
                return pytest.fail, ("unpickled",)

        data = pickle.dumps(Bomb())
        (saved / "model.safetensors").write_bytes(data)
        rewrite(
            saved / "knport.json",
            lambda c: c["weights"].update(size=len(data), sha256=hashlib.sha256(data).hexdigest()),
        )
        self.refused(saved, "is no safetensors file")

    def test_a_function_of_the_users_has_to_be_given_and_to_be_the_same(self, tmp_path):
        knport.save(knport.convert(own_network(), example_inputs=X), tmp_path, base=own_network)
        self.refused(tmp_path, r"pass it as base=")
        self.refused(tmp_path, "the original was built by", base=small)


def test_an_interrupted_save_leaves_the_old_files(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    monkeypatch.setattr(folder_module.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        knport.save(knport.convert(timm.create_model("test_resnet", num_classes=6)), saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_a_save_between_whose_moves_the_machine_stops_is_recognised(saved, tmp_path):
    other = knport.save(knport.convert(small(), knport.KNConfig(enlarge="none")), tmp_path / "other")
    (saved / "model.safetensors").write_bytes((other / "model.safetensors").read_bytes())
    with pytest.raises(knport.KNPortError, match=r"cut short|a save was interrupted"):
        knport.load(saved)
