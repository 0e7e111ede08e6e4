"""KernelNorm of units side by side (stride = kernel, or 1 x 1) as one differentiable operation on CPUs.

Kept for the backward pass: x and one-channel maps (Nasirigerdeh et al., TMLR 2024, Eq. 1-3).

Legend: N images, C channels, H x W the input's map, O x P the units, k_h x k_w the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from knport.geometry import Box, pad
from knport.kernels import cpu
from knport.kernels.cpu_units import Units, differentiable, draw_of, keep, kept, statistics, statistics_backward


def kernel_norm(x: Tensor, how: Units, formula: Callable) -> Tensor:
    """Normalize every unit.

    Args:
        x: (N, C, H, W), float32 on a CPU.
        how: geometry, eps and dropout; stride = kernel, not centred, the dropout form is "moments" or "expected".
        formula: (x, how, drawn=) -> y, the same by differentiable operators, for the second derivative.

    Returns:
        (N, C, O k_h, P k_w).
    """
    return _KernelNorm.apply(x, how, formula)


class _KernelNorm(Function):
    @staticmethod
    def forward(ctx, x, how, formula):
        of_units = statistics(x, how)
        ctx.how, ctx.formula = how, formula
        keep(ctx, of_units, x)
        return torch.sub(_tiles(x, how), _spread(of_units.mean, how)).mul_(_spread(of_units.rstd, how))

    @staticmethod
    def backward(ctx, grad):
        of_units, (x,) = kept(ctx)
        how = ctx.how
        if torch.is_grad_enabled():
            y = ctx.formula(x, how, drawn=draw_of(of_units))
            return *differentiable(y, (x,), grad, (True,)), None, None
        tiles = _tiles(x, how)
        deviation = tiles - _spread(of_units.mean, how)
        grad_rstd = _gathered(deviation.mul_(grad).sum(1, keepdim=True), how)
        grad_tiles = torch.mul(grad, _spread(of_units.rstd, how), out=deviation)
        grad_mean = _gathered(grad_tiles.sum(1, keepdim=True), how).neg_()
        constant, slope, times = statistics_backward(x, of_units, grad_rstd, grad_mean, how)
        return cpu.add_input_gradient(_untiled(grad_tiles, x, how), x, constant, slope, times), None, None


def _tiles(x: Tensor, how: Units) -> Tensor:
    """The part of the padded x that units lie on, (N, C, O k_h, P k_w)."""
    kernel_size, _, pairs, _ = how.window
    if any(pair != (0, 0) for pair in pairs):
        x = cpu.zero_padded(x, pairs)
    for dim, k in enumerate(kernel_size, 2):
        x = x.narrow(dim, 0, x.shape[dim] // k * k)
    return x


def _untiled(grad: Tensor, x: Tensor, how: Units) -> Tensor:
    """The transpose of `_tiles`."""
    if grad.shape == x.shape:
        return grad
    left = [
        (-before, before + length - tiled)
        for (before, _), length, tiled in zip(how.window.padding, x.shape[2:], grad.shape[2:], strict=True)
    ]
    return pad(grad, tuple(left))


def _spread(maps: Tensor, how: Units) -> Tensor:
    """(N, 1, O, P) -> (N, 1, O k_h, P k_w)"""
    for dim, k in enumerate(how.window.kernel_size, 2):
        maps = maps if k == 1 else maps.repeat_interleave(k, dim)
    return maps


def _gathered(maps: Tensor, how: Units) -> Tensor:
    """(N, 1, O k_h, P k_w) -> (N, 1, O, P), the sums: the transpose of `_spread`."""
    kernel_size = how.window.kernel_size
    if max(kernel_size) == 1:
        return maps
    none = ((0, 0),) * len(kernel_size)
    return Box(kernel_size, kernel_size, none, (1,) * len(kernel_size)).mean(maps) * how.window.places
