"""KNConv as one differentiable operation: four passes over full-size tensors beside the convolution's own.

    forward     x -> moments of every pixel;    y = (c - delta sum(W)) rstd + b
    backward    dy, c -> dc, d rstd, d delta, db;    dx += constant + slope x

with c the convolution and all between on one-channel maps (Nasirigerdeh et al., TMLR 2024, Eq. 5). Kept for the
backward pass: x, c and one-channel maps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from knport.geometry import pad
from knport.kernels import cpu
from knport.kernels.cpu_units import (
    Statistics,
    Units,
    differentiable,
    draw_of,
    keep,
    kept,
    statistics,
    statistics_backward,
)


def kn_conv(x: Tensor, weight: Tensor, bias: Tensor | None, how: Units, formula: Callable) -> Tensor:
    """Convolve kernel normalized units.

    Args:
        x: (N, C, H, W), float32 on a CPU, as all tensors here.
        weight: (C_out, C / groups, k_h, k_w).
        bias: (C_out,) or None.
        how: geometry, eps and dropout; the dropout form is "moments" or "expected".
        formula: (x, weight, bias, how, drawn=) -> y, the same by differentiable operators, for the second derivative.
    """
    tensors = [t for t in (x, weight, bias) if t is not None]
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return _KNConv.apply(x, weight, bias, how, formula)
    of_units, sums, convolved = _forward(x, weight, how)
    return cpu.scale_and_shift(convolved, of_units.rstd, of_units.offset, sums, bias, inplace=True)


def _forward(x: Tensor, weight: Tensor, how: Units) -> tuple[Statistics, Tensor | None, Tensor]:
    """The statistics, the sums of the filters (1, C_out) where these are needed, and the convolution."""
    of_units = statistics(x, how, weight.numel() if how.groups == 1 else None)
    sums = None if of_units.offset is None else weight.sum(_filter(weight))[None]
    return of_units, sums, _convolve(x, _centred(weight) if of_units.centred else weight, how)


class _KNConv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, how, formula):
        of_units, sums, convolved = _forward(x, weight, how)
        ctx.how, ctx.formula = how, formula
        keep(ctx, of_units, x, weight, bias, convolved, sums)
        return cpu.scale_and_shift(convolved, of_units.rstd, of_units.offset, sums, bias)

    @staticmethod
    def backward(ctx, grad):
        of_units, (x, weight, bias, convolved, sums) = kept(ctx)
        how, wanted = ctx.how, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = ctx.formula(x, weight, bias, how, drawn=draw_of(of_units))
            return *differentiable(y, (x, weight, bias), grad, wanted), None, None
        grads = cpu.scale_and_shift_backward(grad, convolved, of_units.rstd, of_units.offset, sums, bias is not None)
        grad_convolved, grad_rstd, grad_offset, grad_sums, grad_bias = grads
        filters = _centred(weight) if of_units.centred else weight
        grad_x, grad_weight = _convolve_backward(grad_convolved, x, filters, how, wanted)
        if wanted[1]:
            grad_weight = _add_to_filters(grad_weight, grad_sums, of_units.centred)
        if wanted[0]:
            constant, slope = statistics_backward(x, of_units, grad_rstd, grad_offset, how)
            grad_x = cpu.add_input_gradient(grad_x, x, constant, slope)
        return grad_x, grad_weight, grad_bias, None, None


def _filter(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(1, weight.dim()))


def _centred(weight: Tensor) -> Tensor:
    return weight - weight.mean(_filter(weight), keepdim=True)


def _add_to_filters(grad: Tensor, grad_sums: Tensor | None, centred: bool) -> Tensor:
    """The gradient of the filters as given, from that of the filters used and that of their sums, (1, C_out)."""
    if grad_sums is None:
        return _centred(grad)  # without an offset the filters are centred
    change = grad_sums.view(-1, *(1,) * (grad.dim() - 1))
    return grad.add_(change - grad.mean(_filter(grad), keepdim=True) if centred else change)


def _convolve(x: Tensor, weight: Tensor, how: Units) -> Tensor:
    x, padding = _padded(x, how)
    _, stride, _, dilation = how.kernel
    where = (stride, padding, dilation, False, [0] * len(padding), how.groups)
    return torch.convolution(x, weight, None, *where)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, how: Units, wanted) -> tuple[Tensor, Tensor]:
    padded, padding = _padded(x, how)
    _, stride, pairs, dilation = how.kernel
    where = (stride, padding, dilation, False, [0] * len(padding), how.groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, weight, None, *where, [wanted[0], wanted[1], False]
    )
    if grad_x is not None and padded is not x:
        grad_x = pad(grad_x, tuple((-before, -after) for before, after in pairs))
    return grad_x, grad_weight


def _padded(x: Tensor, how: Units) -> tuple[Tensor, list[int]]:
    """`x` and the padding that is left to the convolution, which knows no asymmetric one.

    The padded copy is made again for the backward pass: kept, it would be one more full-size tensor.
    """
    pairs = how.kernel.padding
    if all(before == after for before, after in pairs):
        return x, [before for before, _ in pairs]
    return cpu.zero_padded(x, pairs), [0] * len(pairs)
