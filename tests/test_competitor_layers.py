"""NormalizedConv2d, LocalContextNorm and PositionalNorm against their definitions, written out position by position."""

from __future__ import annotations

import copy
import pickle

import opacus.grad_sample
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import knport
from knport.errors import KNPortError

EPS = 1e-5
DOUBLE = {"dtype": torch.float64}

LAYERS = {
    "normalized": lambda **made: knport.NormalizedConv2d(4, 6, 3, **made),
    "normalized, standardized": lambda **made: knport.NormalizedConv2d(4, 6, 3, weight_standardization=True, **made),
    "local context": lambda **made: knport.LocalContextNorm(4, window_size=3, **made),
    "positional": lambda **made: knport.PositionalNorm(4, **made),
}


@pytest.fixture(params=LAYERS, ids=str)
def make(request):
    return LAYERS[request.param]


def randomize(layer: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer


def unfolded(x, layer: knport.NormalizedConv2d) -> torch.Tensor:
    """Standardized columns of im2col times the filters, as the paper's code; any groups, gain and bias after."""
    columns = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # (N, C k_h k_w, L)
    columns = (columns - columns.mean(1, keepdim=True)) / (columns.var(1, correction=0, keepdim=True) + EPS).sqrt()
    weight = layer.weight
    if layer.weight_standardization:
        rows = weight.flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / (rows.var(1, correction=0, keepdim=True) + EPS).sqrt()
        weight = (rows / rows.shape[1] ** 0.5).view_as(weight)
    grouped = columns.unflatten(1, (layer.groups, -1))  # (N, G, C / G k_h k_w, L)
    y = torch.einsum("goi,ngil->ngol", weight.unflatten(0, (layer.groups, -1)).flatten(2), grouped).flatten(1, 2)
    y = y if layer.gain is None else y * layer.gain[:, None]
    y = y if layer.bias is None else y + layer.bias[:, None]
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip(
            x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, layer.stride, strict=True
        )
    ]
    return y.unflatten(2, size)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 1},
        {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0)},
        {"kernel_size": 3, "padding": 1, "groups": 2},
        {"kernel_size": 2, "dilation": 2, "bias": False, "gain": False},
        {"kernel_size": 3, "padding": 1, "weight_standardization": True},
        {"kernel_size": 2, "groups": 4, "weight_standardization": True},
    ],
    ids=str,
)
def test_normalized_convolution_is_the_definition(options):
    layer = randomize(knport.NormalizedConv2d(4, 8, **options, **DOUBLE))
    x = torch.randn(2, 4, 7, 5, requires_grad=True, **DOUBLE)
    compare(layer(x), unfolded(x, layer), (x, *layer.parameters()))


def compare(ours, expected, inputs) -> None:
    """Values and every gradient."""
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn_like(ours)
    found, wanted = (torch.autograd.grad(y, inputs, direction) for y in (ours, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def around(x, group: int, window) -> torch.Tensor:
    """The definition of LocalContextNorm without gain and bias, one position after the other."""
    _, c, h, w = x.shape
    (win_h, win_w), out = (min(k, s) for k, s in zip(window, (h, w), strict=True)), torch.zeros_like(x)
    for i in range(h):
        for j in range(w):
            top = min(max(i - (win_h - 1) // 2, 0), h - win_h)
            left = min(max(j - (win_w - 1) // 2, 0), w - win_w)
            for g in range(0, c, group):
                block = x[:, g : g + group, top : top + win_h, left : left + win_w].flatten(1)
                mean, var = block.mean(1)[:, None], block.var(1, correction=0)[:, None]
                out[:, g : g + group, i, j] = (x[:, g : g + group, i, j] - mean) / (var + EPS).sqrt()
    return out


@pytest.mark.parametrize("window", [(3, 3), (2, 5), (7, 1), (50, 50)], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_local_context_is_the_definition(group, window):
    layer = randomize(knport.LocalContextNorm(4, group, window, **DOUBLE))
    x = torch.randn(2, 4, 7, 5, requires_grad=True, **DOUBLE)
    if group == 1 and window == (7, 1):
        x = (3 + x).detach().requires_grad_()
    expected = around(x, group, window) * layer.weight[:, None, None] + layer.bias[:, None, None]
    compare(layer(x), expected, (x, *layer.parameters()))


def test_a_window_over_the_whole_map_is_group_norm():
    x = torch.randn(2, 6, 5, 4)
    torch.testing.assert_close(knport.LocalContextNorm(6, 3)(x), nn.GroupNorm(2, 6)(x))


@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 7), (3, 4, 7, 5), (2, 4, 3, 2, 5)], ids=str)
def test_positional_is_layer_norm_over_the_channels(shape):
    layer = randomize(knport.PositionalNorm(4, **DOUBLE))
    x = torch.randn(shape, requires_grad=True, **DOUBLE)
    expected = F.layer_norm(x.movedim(1, -1), (4,), layer.weight, layer.bias, EPS).movedim(-1, 1)
    compare(layer(x), expected, (x, *layer.parameters()))


def test_without_affine_there_are_no_parameters():
    for layer in (knport.LocalContextNorm(4, affine=False), knport.PositionalNorm(4, affine=False)):
        assert not list(layer.parameters())
        assert layer(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_a_large_mean_does_not_cancel(make):
    layer = make()
    x = torch.randn(2, 4, 6, 6)
    wide = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x + 1000).double(), wide((x + 1000).double()), rtol=1e-2, atol=2e-3)


def test_images_do_not_see_each_other_and_modes_agree(make):
    layer, x = randomize(make(**DOUBLE)), torch.randn(3, 4, 6, 5, **DOUBLE)
    torch.testing.assert_close(layer(x)[1:2], layer(x[1:2]))
    assert torch.equal(layer.train()(x), layer.eval()(x))
    assert layer(x[:0]).shape[0] == 0


def test_survives_tools(make):
    layer, x = randomize(make()), torch.randn(2, 4, 6, 5)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)
    fresh = make()
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), expected)
    assert make(device="meta")(x.to("meta")).shape == expected.shape
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="eager")(x), expected)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), expected, rtol=0.05, atol=0.1)


def test_what_the_layers_say_of_themselves():
    assert "4, channels_per_group=2, window_size=(3, 3)" in repr(LAYERS["local context"]())
    text = repr(knport.NormalizedConv2d(4, 6, 3, gain=False, weight_standardization=True))
    assert "gain=False, weight_standardization=True" in text and "dropout" not in text


def test_mistakes_are_told():
    with pytest.raises(KNPortError, match="5 channels in groups of 2"):
        knport.LocalContextNorm(5)
    with pytest.raises(KNPortError, match=r"shape \(2, 3, 4, 4\); expected \(N, 4, H, W\)"):
        knport.LocalContextNorm(4)(torch.randn(2, 3, 4, 4))
    with pytest.raises(KNPortError, match=r"expected \(N, 4, \*\)"):
        knport.PositionalNorm(4)(torch.randn(2, 3))
    with pytest.raises(KNPortError, match="3 channels; expected 4"):
        knport.NormalizedConv2d(4, 6, 3)(torch.randn(2, 3, 4, 4))


@pytest.mark.parametrize("mode", ["grad_sample", "_norm_sample"])
@pytest.mark.parametrize("options", [{}, {"gain": False}, {"weight_standardization": True, "groups": 2}], ids=str)
def test_privacy_has_the_gradients_of_every_image(options, mode):
    layer = randomize(knport.NormalizedConv2d(4, 6, 3, padding=1, **options, **DOUBLE))
    x = torch.randn(3, 4, 5, 6, **DOUBLE)
    alone = []
    for image in x:
        layer.zero_grad()
        layer(image[None]).pow(3).sum().backward()
        alone.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    layer.zero_grad()
    ghost = mode == "_norm_sample"
    wrapper = "GradSampleModuleFastGradientClipping" if ghost else "GradSampleModule"
    model = getattr(opacus.grad_sample, wrapper)(knport.privacy.prepare(layer), loss_reduction="sum")
    model(x).pow(3).sum().backward()
    for name, parameter in layer.named_parameters():
        expected = torch.stack([each[name] for each in alone])
        found = getattr(parameter, mode)
        expected = expected.flatten(1).norm(dim=1) if ghost else expected
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_privacy_of_nobody():
    layer = knport.privacy.prepare(knport.NormalizedConv2d(4, 6, 3))
    model = opacus.grad_sample.GradSampleModule(layer)
    model(torch.randn(0, 4, 5, 5)).sum().backward()
    assert layer.weight.grad_sample.shape == (0, 6, 4, 3, 3) and layer.gain.grad_sample.shape == (0, 6)
