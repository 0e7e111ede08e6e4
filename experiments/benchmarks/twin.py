"""The twin of a kernel normalized network: convolution and BatchNorm in the place of every KNConv, nothing else moved.

A KNResNet has twice the multiply-accumulates of its ResNet, so that one says what the network costs and the twin what
its normalization costs.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knport import KernelNorm2d, KNConv2d
from knport.errors import NothingToConvert
from knport.geometry import padding_pairs


class PaddedConv2d(nn.Conv2d):
    """A convolution of an input that is first padded by one (before, after) pair per dimension."""

    def __init__(self, *args, pairs, **kwargs):
        super().__init__(*args, **kwargs)
        self.pairs = pairs

    def forward(self, x: Tensor) -> Tensor:
        (top, bottom), (left, right) = self.pairs
        return super().forward(F.pad(x, (left, right, top, bottom)))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pairs={self.pairs}"


def batchnorm_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` with Conv2d (no bias) + BatchNorm2d for every KNConv2d, BatchNorm2d for every KernelNorm2d.

    Geometry, weights and the order of operations stay: the BatchNorm stands behind the convolution. A KernelNorm's
    number of channels is that of the last convolution that ran before it, found by running the copy on a small image.

    Raises:
        NothingToConvert: there is no KNConv2d.
    """
    twin = copy.deepcopy(model)
    places = [(path, module) for path, module in twin.named_modules() if isinstance(module, KNConv2d)]
    if not places:
        raise NothingToConvert(f"{type(model).__name__} has no KNConv2d; there is nothing to make a twin of")
    for path, layer in places:
        pair = nn.Sequential(_convolution(layer), nn.BatchNorm2d(layer.out_channels))
        twin = _put(twin, path, pair.train(layer.training))
    for path, norm in [(path, m) for path, m in twin.named_modules() if isinstance(m, KernelNorm2d)]:
        twin = _put(twin, path, nn.LazyBatchNorm2d().train(norm.training))
    return twin


def materialize(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Let every BatchNorm of unknown width see one input of `shape`, (N, C, H, W), and forget what it saw."""
    training = model.training
    with torch.no_grad():
        model.train()(torch.zeros(shape))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    return model.train(training)


def _convolution(layer: KNConv2d) -> nn.Conv2d:
    where = (layer.kernel_size, layer.stride)
    pairs = padding_pairs(layer.padding, layer.kernel_size, layer.stride, layer.dilation)
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        kind, padding = nn.Conv2d, {"padding": layer.padding, "padding_mode": layer.padding_mode}
    elif all(before == after for before, after in pairs):
        kind, padding = nn.Conv2d, {"padding": tuple(before for before, _ in pairs)}
    else:
        kind, padding = PaddedConv2d, {"pairs": pairs}
    channels = (layer.in_channels, layer.out_channels)
    conv = kind(*channels, *where, dilation=layer.dilation, groups=layer.groups, bias=False, **padding)
    conv.weight = layer.weight
    return conv


def _put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    if not path:
        return module
    model.set_submodule(path, module)
    return model
