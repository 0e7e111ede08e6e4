"""KNConv as one differentiable operation: four passes over full-size tensors beside the convolution's own.

    forward     x -> moments of every pixel;    y = (c - delta sum(W)) rstd + b
    backward    dy, c -> dc, d rstd, d delta, db;    dx += constant + slope x

with c the convolution and all between on one-channel maps, in float64 where sums cancel (Nasirigerdeh et al., TMLR
2024, Eq. 5). Kept for the backward pass: x, c and one-channel maps.

Every form of dropout that runs here has statistics mu' = mu + shift sqrt(m_2) and var' = scale m_2 - mu'^2 with
constants shift and scale: (0, 1) without dropout, (0, (1 - p / n) / (1 - p)) for the expected ones, else a `Draw`.

Legend: N images, C channels, H x W the input's map, O x P the units, n = C k_h k_w entries of a unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from knport.functional.geometry import Box, pad
from knport.kernels import cpu
from knport.kernels.eager import Draw, draw, reciprocal_sd


class UnitConv(NamedTuple):
    """What there is to know of a KNConv beside its tensors."""

    kernel: Box
    window: Box
    """The units that the statistics are taken of: the kernel's own, or another block about the same centre."""
    groups: int
    eps: float
    dropout: float
    dropout_form: str
    padding_mode: str


class _Statistics(NamedTuple):
    """Of every unit, (N, 1, O, P) each."""

    mean: Tensor
    """mu'"""
    rstd: Tensor
    offset: Tensor | None
    """What times the sum of each filter is to be subtracted; None for nothing."""
    scale: Tensor | float
    drawn: _Drawn | None


class _Drawn(NamedTuple):
    """What dropout did to every unit, (N, 1, O, P) each."""

    shift: Tensor
    moved: Tensor
    """mu' - mu"""
    ratio: Tensor
    """The derivative of `moved` by m_2."""
    bounded: Tensor
    """Whether var' is (mu' - mu)^2."""


def fused_kn_conv(x: Tensor, weight: Tensor, bias: Tensor | None, how: UnitConv, formula: Callable) -> Tensor:
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
        return _FusedKNConv.apply(x, weight, bias, how, formula)
    statistics = _statistics(x, how)
    convolved = _convolve(x, weight, how)
    vectors = _filter_sums(weight, statistics)
    return cpu.scale_and_shift(convolved, statistics.rstd, statistics.offset, vectors, bias, inplace=True)


class _FusedKNConv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, how, formula):
        statistics = _statistics(x, how)
        convolved = _convolve(x, weight, how)
        mean, rstd, offset, scale, drawn = statistics
        ctx.how, ctx.formula = how, formula
        ctx.scale, scale = (None, scale) if drawn else (scale, None)
        ctx.save_for_backward(x, weight, bias, convolved, mean, rstd, offset, scale, *(drawn or ()))
        return cpu.scale_and_shift(convolved, rstd, offset, _filter_sums(weight, statistics), bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight, bias, convolved, mean, rstd, offset, scale, *drawn = ctx.saved_tensors
        how, wanted = ctx.how, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = ctx.formula(x, weight, bias, how, drawn=Draw(drawn[0], scale) if drawn else None)
            return *_differentiable(y, (x, weight, bias), grad, wanted), None, None
        statistics = _Statistics(mean, rstd, offset, scale if drawn else ctx.scale, _Drawn(*drawn) if drawn else None)
        grads = cpu.scale_and_shift_backward(
            grad, convolved, rstd, offset, _filter_sums(weight, statistics), bias is not None
        )
        grad_convolved, grad_rstd, grad_offset, grad_sums, grad_bias = grads
        grad_x, grad_weight = _convolve_backward(grad_convolved, x, weight, how, wanted)
        if grad_sums is not None and grad_weight is not None:
            grad_weight += grad_sums.view(-1, *(1,) * (weight.dim() - 1))
        if wanted[0]:
            constant, slope = _statistics_backward(x, statistics, grad_rstd, grad_offset, how)
            grad_x = cpu.add_input_gradient(grad_x, x, constant, slope)
        return grad_x, grad_weight, grad_bias, None, None


def _statistics(x: Tensor, how: UnitConv) -> _Statistics:
    p, n = how.dropout, x.shape[1] * how.window.places
    drawing = p > 0 and how.dropout_form == "moments"
    maps = cpu.pixel_moments(x, 4 if drawing else 2)
    wide = maps[:, :2].double()
    first, square = wide.split(1, 1)
    square.addcmul_(first, first)  # E[x^2] = var + mean^2
    mean, second = how.window.mean(wide).split(1, 1)
    own_mean = mean if how.kernel == how.window else how.kernel.mean(first)
    if not drawing:
        scale = (1 - p / n) / (1 - p)
        var = torch.addcmul(scale * second if p else second, mean, mean, value=-1).clamp_min_(0)
        return _Statistics(mean.float(), _rstd(own_mean, var, how), _offset(mean, own_mean, how), scale, None)
    third, fourth = how.window.mean(maps[:, 2:]).split(1, 1)
    shift, scale = draw(second.float(), third, fourth, p, n)
    root = second.sqrt()
    moved = root * shift
    ratio = (0.5 * shift / root.clamp_min_(torch.finfo(torch.float32).tiny)).float()
    mean = mean + moved
    var, floor = torch.addcmul(second * scale, mean, mean, value=-1), moved.square()
    bounded = var <= floor
    rstd = _rstd(own_mean, torch.maximum(var, floor), how)
    offset, moved = _offset(mean, own_mean, how), moved.float()
    return _Statistics(mean.float(), rstd, offset, scale, _Drawn(shift, moved, ratio, bounded))


def _rstd(own_mean: Tensor, var: Tensor, how: UnitConv) -> Tensor:
    return reciprocal_sd(own_mean.float(), var.float(), how.eps)


def _offset(mean: Tensor, own_mean: Tensor, how: UnitConv) -> Tensor | None:
    if how.groups > 1:  # a group's filters cannot be centred on the unit's mean
        return mean.float()
    return None if mean is own_mean else (mean - own_mean).float()


def _filter_sums(weight: Tensor, statistics: _Statistics) -> Tensor | None:
    return None if statistics.offset is None else weight.sum(tuple(range(1, weight.dim())))[None]  # (1, C_out)


def _centred(weight: Tensor, how: UnitConv) -> Tensor:
    return weight if how.groups > 1 else weight - weight.mean(tuple(range(1, weight.dim())), keepdim=True)


def _convolve(x: Tensor, weight: Tensor, how: UnitConv) -> Tensor:
    x, padding = _padded(x, how)
    _, stride, _, dilation = how.kernel
    where = (stride, padding, dilation, False, [0] * len(padding), how.groups)
    return torch.ops.aten.convolution(x, _centred(weight, how), None, *where)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, how: UnitConv, wanted) -> tuple[Tensor, Tensor]:
    padded, padding = _padded(x, how)
    _, stride, pairs, dilation = how.kernel
    where = (stride, padding, dilation, False, [0] * len(padding), how.groups)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, padded, _centred(weight, how), None, *where, [wanted[0], wanted[1], False]
    )
    if grad_x is not None and padded is not x:
        grad_x = pad(grad_x, tuple((-before, -after) for before, after in pairs))
    if grad_weight is not None:
        grad_weight = _centred(grad_weight, how)
    return grad_x, grad_weight


def _padded(x: Tensor, how: UnitConv) -> tuple[Tensor, list[int]]:
    """`x` and the padding that is left to the convolution, which knows no asymmetric one.

    The padded copy is made again for the backward pass: kept, it would be one more full-size tensor.
    """
    pairs = how.kernel.padding
    if all(before == after for before, after in pairs):
        return x, [before for before, _ in pairs]
    return pad(x, pairs), [0] * len(pairs)


def _statistics_backward(x, statistics: _Statistics, grad_rstd, grad_offset, how: UnitConv):
    """dL/dx by way of the statistics is constant + slope x; both (N, 1, H, W)."""
    mean, rstd, _, scale, drawn = statistics
    grad_var = grad_rstd.mul_(rstd).mul_(rstd).mul_(rstd).mul_(-0.5)
    free = grad_var.masked_fill(drawn.bounded, 0) if drawn else grad_var
    grad_mean = -2 * mean * free
    if grad_offset is not None:
        grad_mean += grad_offset
    grad_second = scale * free
    if drawn:
        grad_moved = grad_mean.addcmul(drawn.moved, grad_var - free, value=2)
        grad_second.addcmul_(grad_moved, drawn.ratio)
    centred, size = grad_offset is not None and how.groups == 1, x.shape[2:]
    if centred and how.kernel == how.window:
        grad_mean = grad_mean - grad_offset
    maps = torch.cat([grad_mean, grad_second.mul_(2)], 1).div_(x.shape[1])
    constant, slope = how.window.mean_backward(maps, size).split(1, 1)
    if centred and how.kernel != how.window:
        constant = constant - how.kernel.mean_backward(grad_offset / x.shape[1], size)
    return constant, slope


def _differentiable(y: Tensor, tensors, grad: Tensor, wanted) -> list[Tensor | None]:
    """The gradients of y as functions of `tensors` and `grad`."""
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]
