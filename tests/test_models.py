"""Models by name: the stem for small images, the norm asked for, dropout, and what cannot be built."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import knport
from experiments.models import KERNEL_NORMS, KN_CONVS, NORMS, build, list_models
from knport.errors import KNPortError, UnknownName


def count(model: nn.Module, kinds) -> int:
    return sum(isinstance(module, kinds) for module in model.modules())


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm(norm):
    model = build("cifar_resnet8", norm, num_classes=7, in_chans=1, image_size=8)
    assert model(torch.randn(2, 1, 8, 8)).shape == (2, 7)
    assert (count(model, nn.BatchNorm2d) > 0) == (norm in ("original", "batch"))
    assert (count(model, KN_CONVS) > 0) == (norm == "kernel")


@pytest.mark.parametrize("name", ["timm/resnet18", "torchvision/resnet18"])
@pytest.mark.parametrize("norm", ["original", "kernel"])
def test_a_resnet_for_small_images_keeps_their_size_in_the_stem(name, norm):
    small = build(name, norm, num_classes=10, in_chans=1, image_size=32)
    assert (small.conv1.kernel_size, small.conv1.stride) == ((3, 3), (1, 1))
    assert small.layer1(small.conv1(torch.zeros(2, 1, 32, 32))).shape[-1] == 32
    assert isinstance(small.maxpool, nn.Identity)
    large = build(name, norm, num_classes=10, image_size=65)
    assert large.conv1.stride == (2, 2)


@pytest.mark.parametrize("name", ["torchvision/squeezenet1_1", "timm/test_resnet"])
def test_other_channels(name):
    assert build(name, num_classes=3, in_chans=5, image_size=64)(torch.randn(2, 5, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize(("dropout", "last"), [(0.02, 0.1), (0.1, 0.25), (0.0, 0.0)])
def test_dropout_of_a_converted_network(dropout, last):
    model = build("cifar_resnet8", "kernel", num_classes=7, in_chans=1, image_size=8, dropout=dropout)
    stem, *others = (module.dropout for module in model.modules() if isinstance(module, KN_CONVS))
    assert stem == 0.0 and set(others) == {dropout}, "a unit of 9 values gets none"
    assert [module.dropout for module in model.modules() if isinstance(module, KERNEL_NORMS)] == [last]


@pytest.mark.parametrize(
    ("name", "dropout", "conv", "last"),
    [
        ("dp_knresnet13", None, 0.1, 0.5),
        ("dp_knresnet13", 0.05, 0.05, 0.25),
        ("dp_knresnet13", 0.2, 0.2, 0.5),
        ("dp_knresnet8", None, 0.1, 0.25),
        ("dp_knresnet8", 0.05, 0.05, 0.125),
        ("kncifar_resnet8x2", None, 0.05, 0.25),
        ("kncifar_resnet8x2", 0.02, 0.02, 0.1),
        ("knvit_test", 0.02, 0.02, 0.1),
    ],
)
def test_the_last_kernel_norm_keeps_its_published_share(name, dropout, conv, last):
    model = build(name, num_classes=4, image_size=32, dropout=dropout)
    kernel = [module for module in model.modules() if isinstance(module, (*KN_CONVS, *KERNEL_NORMS, knport.KNLinear))]
    assert {module.dropout for module in kernel if not isinstance(module, KERNEL_NORMS)} == {conv}
    assert kernel[-1].dropout == pytest.approx(last)


def test_a_dropout_asked_for_leaves_the_initial_weights():
    torch.manual_seed(0)
    as_built = build("kncifar_resnet8x2", num_classes=4, image_size=32)
    torch.manual_seed(0)
    asked = build("kncifar_resnet8x2", num_classes=4, image_size=32, dropout=0.2)
    for a, b in zip(as_built.parameters(), asked.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dropout_zero_is_deterministic():
    model = build("knresnet18", num_classes=4, image_size=32, dropout=0.0).train()
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize(
    ("name", "norm", "error", "match"),
    [
        ("knresnet81", "original", UnknownName, "unknown model 'knresnet81'; did you mean 'knresnet"),
        ("timm/resnet81", "original", UnknownName, "did you mean 'timm/resnet"),
        ("torchvision/resnet81", "original", UnknownName, "did you mean 'torchvision/resnet"),
        ("hub/resnet18", "original", UnknownName, "unknown model 'hub/resnet18'"),
        ("cifar_resnet8", "kernels", UnknownName, "unknown norm 'kernels'; did you mean 'kernel'"),
        ("torchvision/vit_b_16", "original", KNPortError, r"cannot take images \(3, 32, 32\): .*choose a model"),
    ],
)
def test_what_cannot_be_built(name, norm, error, match):
    with pytest.raises(error, match=match):
        build(name, norm, num_classes=10, image_size=32)


def test_a_model_that_gives_no_class_scores():
    with pytest.raises(KNPortError, match=r"gives \(2, 512\) for 2 images; expected class scores \(2, 0\)"):
        build("timm/resnet18", num_classes=0, image_size=32)


def test_auxiliary_heads_are_left_out():
    model = build("torchvision/googlenet", num_classes=5, image_size=64).train()
    assert isinstance(model(torch.randn(2, 3, 64, 64)), torch.Tensor)


def test_names():
    names = list_models()
    assert {"knresnet18", "cifar_resnet8", "timm/resnet18", "torchvision/resnet18"} <= set(names)
    assert len(names) == len(set(names))
    assert knport.KNConv2d in KN_CONVS


def test_a_transformer_is_built_for_the_images_at_hand():
    assert build("timm/test_vit3", num_classes=10, in_chans=1, image_size=32).patch_embed.img_size == (32, 32)
