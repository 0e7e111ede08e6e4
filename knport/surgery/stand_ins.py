"""Layers of knport that only make the right shape: to run a converted network for its shapes alone."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from knport.errors import KNPortError
from knport.geometry import output_size, padding_pairs
from knport.surgery.kinds import kind


def stand_in(model: nn.Module) -> nn.Module:
    """`model`, a copy that no one else uses, with the forwards of its KNConv, KNLinear and KernelNorm replaced."""
    for module in model.modules():
        if kind(module).startswith("kn_"):
            forward = _convolve if isinstance(module, _ConvNd) else _project if hasattr(module, "weight") else _same
            module.forward = functools.partial(forward, module)
    return model


def _convolve(module: _ConvNd, x: Tensor) -> Tensor:
    (out, inner), ndim = module.weight.shape[:2], len(module.kernel_size)
    if inner * module.groups != x.shape[-ndim - 1]:
        raise KNPortError(f"{x.shape[-ndim - 1]} channels into a convolution of {inner * module.groups}")
    pairs = padding_pairs(module.padding, module.kernel_size, module.stride, module.dilation)
    size = output_size(x.shape[-ndim:], module.kernel_size, module.stride, pairs, module.dilation)
    return x.new_empty(*x.shape[: -ndim - 1], out, *size)


def _project(module: nn.Linear, x: Tensor) -> Tensor:
    if module.weight.shape[1] != x.shape[-1]:
        raise KNPortError(f"{x.shape[-1]} features into a linear layer of {module.weight.shape[1]}")
    return x.new_empty(*x.shape[:-1], module.weight.shape[0])


def _same(module: nn.Module, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)
