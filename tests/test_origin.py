"""Where a network comes from: names, the user's own functions, and what timm's networks say of themselves."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

import architectures
import knport
from knport.origin import Origin, build, given_origin, list_names, named, origin_of, skeleton


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("timm/test_resnet", {"num_classes": 3}),
        ("torchvision/shufflenet_v2_x0_5", {"num_classes": 3}),
        ("architectures/cifar_resnet8", {"num_classes": 3, "in_chans": 1}),
        ("torchvision/lraspp_mobilenet_v3_large", {"num_classes": 3}),  # its backbone must not be downloaded
    ],
)
def test_networks_by_name(name, kwargs):
    state = torch.get_rng_state()
    model = skeleton(Origin(name=name, kwargs=kwargs))
    assert isinstance(model, nn.Module) and all(p.is_meta for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_network_that_looks_at_values_is_built_on_the_cpu():
    assert not next(skeleton(Origin(name="torchvision/regnet_y_400mf")).parameters()).is_meta


def test_every_name_is_there_once():
    names = list_names()
    assert len(names) == len(set(names)) > 1000
    assert {f"architectures/{name}" for name in architectures.list_models()} < set(names)
    assert not {f"timm/{name}" for name in architectures.list_models()} & set(names)
    assert "torchvision/resnet18" in names


@pytest.mark.parametrize("kwargs", [{}, {"num_classes": 7}, {"in_chans": 1}, {"num_classes": 7, "in_chans": 4}])
def test_a_network_of_timm_says_what_it_is(kwargs):
    assert origin_of(timm.create_model("test_resnet", **kwargs)) == Origin(name="timm/test_resnet", kwargs=kwargs)


def test_others_say_nothing():
    assert origin_of(torchvision.models.shufflenet_v2_x0_5()) is None
    assert origin_of(architectures.create_model("cifar_resnet8")) is None


def test_functions_of_the_user():
    origin = given_origin(nn.Linear, {"in_features": 2, "out_features": 3})
    assert origin.own and origin.name == "torch.nn.modules.linear:Linear"
    assert build(origin, nn.Linear).out_features == 3


@pytest.mark.parametrize(
    ("origin", "match"),
    [
        (Origin(name="timm/test_resnt"), "did you mean 'timm/test_resnet'"),
        (Origin(name="torchvision/resnet"), "did you mean 'torchvision/"),
        (Origin(name="architectures/knresnet81"), "did you mean 'architectures/knresnet"),
        (Origin(name="timm/hf-hub:someone/something"), "unknown model"),
        (Origin(name="timm/test_resnet", kwargs={"colour": 1}), r"could not build timm/test_resnet\(colour=1\)"),
        (Origin(name="torchvision/resnet18", kwargs={"weights": "DEFAULT"}), "weights come from the saved file only"),
    ],
)
def test_mistakes(origin, match):
    with pytest.raises(knport.KNPortError, match=match):
        build(origin)


def test_a_function_that_gives_no_module():
    with pytest.raises(knport.KNPortError, match="gave a dict; expected"):
        build(given_origin(dict, {}), dict)


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(knport.KNPortError, match="timm is not installed here; pip install timm"):
        named("timm/resnet18")
    assert not any(name.startswith("timm/") for name in list_names())
