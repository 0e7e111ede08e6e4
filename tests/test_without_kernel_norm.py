"""The ablation: kernel normalized networks without kernel normalization."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.models import build
from experiments.without_kernel_norm import without_kernel_norm
from knport import KernelNorm2d, KNConv1d, KNConv2d, KNLinear
from knport.errors import KNPortError


@pytest.mark.parametrize(
    ("options", "pad"),
    [
        ({}, (0, 0, 0, 0)),
        ({"padding": 1, "stride": 2, "groups": 2}, (1, 1, 1, 1)),
        ({"padding": ((1, 0), (2, 1)), "bias": False}, (2, 1, 1, 0)),
        ({"padding": "same", "dilation": 2}, (1, 1, 1, 1)),
    ],
)
def test_a_layer_is_the_convolution_with_its_weights(options, pad):
    layer = KNConv2d(4, 6, 2, **options)
    net, x = nn.Sequential(layer, nn.ReLU(), KernelNorm2d()), torch.randn(3, 4, 9, 7)
    shape = net.eval()(x).shape
    without_kernel_norm(net)
    how = layer.stride, 0, layer.dilation, layer.groups
    torch.testing.assert_close(net(x), F.conv2d(F.pad(x, pad), layer.weight, layer.bias, *how).relu())
    assert net(x).shape == shape
    assert {id(p) for p in net.parameters()} == {id(p) for p in layer.parameters()}


def test_one_dimension():
    layer = KNConv1d(3, 5, 4, padding=((2, 1),))
    net, x = nn.Sequential(layer), torch.randn(2, 3, 11)
    expected = F.conv1d(F.pad(x, (2, 1)), layer.weight, layer.bias)
    torch.testing.assert_close(without_kernel_norm(net)(x), expected)


@pytest.mark.parametrize(
    ("layer", "match"),
    [(KernelNorm2d(2, 2), "also changes the size of its map"), (KNLinear(3, 4), "not of KNLinear")],
)
def test_what_cannot_be_left_out(layer, match):
    with pytest.raises(KNPortError, match=f"^0: .*{match}"):
        without_kernel_norm(nn.Sequential(layer))


def test_by_name():
    net = build("dp_knresnet8", "none", num_classes=10, image_size=32)
    assert not any(isinstance(module, KNConv2d | KernelNorm2d) for module in net.modules())
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    plain = build("cifar_resnet8", "none", num_classes=10, image_size=32)
    assert not any("Norm" in type(module).__name__ for module in plain.modules())
