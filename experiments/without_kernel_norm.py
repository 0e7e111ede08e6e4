"""The ablation of the papers: a kernel normalized network without its kernel normalization."""

from __future__ import annotations

from torch import nn

import knport
from knport.errors import KNPortError

CONVS = {knport.KNConv1d: nn.Conv1d, knport.KNConv2d: nn.Conv2d, knport.KNConv3d: nn.Conv3d}
PADS = {nn.Conv1d: nn.ConstantPad1d, nn.Conv2d: nn.ConstantPad2d, nn.Conv3d: nn.ConstantPad3d}
KERNEL_NORMS = (knport.KernelNorm1d, knport.KernelNorm2d, knport.KernelNorm3d)


def without_kernel_norm(model: nn.Module) -> nn.Module:
    """Every KNConv becomes a convolution with its weights, every KernelNorm of window 1 the identity; in place.

    Raises: `KNPortError` for a KernelNorm that changes the size of its map, or other layers with kernel normalization.
    """
    for path, module in list(model.named_modules()):
        kind = next((conv for kn, conv in CONVS.items() if isinstance(module, kn)), None)
        if kind is not None:
            model.set_submodule(path, _plain(module, kind))
        elif isinstance(module, KERNEL_NORMS):
            if {*module.kernel_size, *module.stride} != {1}:
                raise KNPortError(f"{path}: {module} also changes the size of its map; it cannot just be left out")
            model.set_submodule(path, nn.Identity())
        elif isinstance(module, knport.KNLinear):
            raise KNPortError(f"{path}: norm none is made of networks of KNConv and KernelNorm, not of KNLinear")
    return model


def _plain(layer: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The convolution of a KNConv, which padding that differs from side to side precedes as a layer of its own."""
    pairs = None
    padding = layer.padding
    if isinstance(padding, tuple) and isinstance(padding[0], tuple):
        padding, pairs = 0, padding
    sizes = (layer.kernel_size, layer.stride, padding, layer.dilation, layer.groups)
    bias = layer.bias is not None
    conv = kind(layer.in_channels, layer.out_channels, *sizes, bias=bias, padding_mode=layer.padding_mode)
    conv.weight, conv.bias = layer.weight, layer.bias
    if pairs is None:
        return conv
    sides = [side for pair in reversed(pairs) for side in pair]  # torch pads the last dimension first
    return nn.Sequential(PADS[kind](sides, 0.0), conv)
