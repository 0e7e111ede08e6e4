"""1x1 convolutions: enlarged kernels compute what the 1x1 convolution computed, and maps keep their size."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from knport import functional
from knport.geometry import pad, padding_pairs
from knport.surgery import KNConfig, convert, plan

X = torch.zeros(2, 4, 16, 16)
_CONV = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}


def chain(**options) -> nn.Module:
    """Three 1x1 convolutions, each with its norm."""
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(4, 4, 1, **options), nn.BatchNorm2d(4))]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("enlarge", ["2x2", "3x3"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5,), (4, 5, 6)])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"padding": 1, "bias": False}])
def test_embedded_weights_convolve_as_the_1x1_did(enlarge, stride, size, options):
    conv, norm = getattr(nn, f"Conv{len(size)}d"), functools.partial(nn.GroupNorm, 2)  # which takes no bias away
    model = nn.Sequential(*(m for _ in range(2) for m in (conv(4, 4, 1, stride=stride, **options), norm(4)))).double()
    new = convert(model, KNConfig(enlarge=enlarge))
    x = torch.randn(2, 4, *size, dtype=torch.float64)
    for old, ours in ((model[0], new[0]), (model[2], new[2])):
        assert ours.kernel_size == (int(enlarge[0]),) * len(size)
        pairs = padding_pairs(ours.padding, ours.kernel_size, ours.stride, ours.dilation)
        bias = None if old.bias is None else ours.bias  # a new one is no part of what the old one did
        plain = _CONV[len(size)](pad(x, pairs), ours.weight, bias, ours.stride, 0, 1, ours.groups)
        torch.testing.assert_close(plain, old(x))
        assert ours(x).shape == old(x).shape


def test_an_enlarged_kernel_keeps_its_memory_format():
    for form in (torch.contiguous_format, torch.channels_last):
        new = convert(chain().to(memory_format=form), example_inputs=X)
        assert new[0].weight.is_contiguous(memory_format=form) and new[0].kernel_size == (2, 2)


def test_the_side_of_the_padding_alternates_along_a_chain():
    new = convert(chain(), example_inputs=X)
    sides = [new[i].padding for i in (0, 2, 4)]
    assert sides == [((1, 0), (1, 0)), ((0, 1), (0, 1)), ((1, 0), (1, 0))]


def test_none_window_and_fresh():
    torch.manual_seed(0)
    old = chain()
    none = convert(old, KNConfig(enlarge="none"), example_inputs=X)[0]
    assert none.kernel_size == (1, 1) and none.norm_window is None and torch.equal(none.weight, old[0].weight)
    window = convert(old, KNConfig(enlarge="window"), example_inputs=X)[0]
    assert window.kernel_size == (1, 1) and window.norm_window == (3, 3) and torch.equal(window.weight, old[0].weight)
    fresh = convert(old, KNConfig(init="fresh"), example_inputs=X)[0]
    assert fresh.kernel_size == (2, 2) and bool((fresh.weight != 0).all()) and not torch.equal(fresh.bias, old[0].bias)


def test_norm_window_is_that_of_every_convolution():
    model = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    new = convert(model, KNConfig(enlarge="window", norm_window=5), example_inputs=X)
    assert new[0].norm_window == new[2].norm_window == (5, 5)
    assert new(torch.randn(2, 4, 16, 16)).shape == (2, 4, 16, 16)


def test_a_1x1_map_is_not_enlarged():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    new = convert(model, example_inputs=torch.zeros(2, 4, 2, 2))
    assert new[2].kernel_size == (1, 1) and type(new[2]).__name__ == "KNConv2d"
    assert convert(model, example_inputs=torch.zeros(2, 4, 3, 3))[2].kernel_size == (2, 2)


def test_a_dilated_1x1_becomes_an_undilated_kernel():
    new = convert(chain(dilation=3), example_inputs=X)
    assert new[0].dilation == (1, 1) and new(torch.randn(2, 4, 9, 9)).shape == (2, 4, 9, 9)


def test_the_plan_counts_and_says_it():
    made = plan(chain(), example_inputs=X)
    assert "3 enlarged to 2x2" in str(made)
    assert made.parameters == (3 * (16 + 4 + 8), 3 * (4 * 16 + 4))


def test_a_converted_chain_is_the_definition():
    """The KNConv of a 1x1 convolution, against the naive definition on the padded input."""
    new = convert(chain(), KNConfig(dropout=0.0), example_inputs=X).double().eval()
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    ours = new[0]
    naive = functional.naive.kn_conv(pad(x, ours.padding), ours.weight, ours.bias)
    torch.testing.assert_close(ours(x), naive)
