"""The statistics of every unit on CPUs, forward and backward, on one-channel maps.

E[u^2] - mu^2 in float32 is as good as any other way while the mean is not large beside the spread. That is looked up:
a batch with a unit of |mu| > 8 SD (or a constant one) is gone through again, centred and in float64.

Every form of dropout that runs here has statistics mu' = mu + shift sqrt(m_2) and var' = scale m_2 - mu'^2 with
constants shift and scale: (0, 1) without dropout, (0, (1 - p / n) / (1 - p)) for the expected ones, else a `Draw`.

Legend: N images, C channels, H x W the input's map, O x P the units, n = C k_h k_w entries of a unit.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from knport.geometry import Box
from knport.kernels import cpu
from knport.kernels.cpu_box import box_mean, box_mean_backward
from knport.kernels.eager import Draw, reciprocal_sd


class Units(NamedTuple):
    """What there is to know of a KNConv or a KernelNorm beside its tensors."""

    kernel: Box
    window: Box
    """The units that the statistics are taken of: the kernel's own, or another block about the same centre."""
    eps: float
    dropout: float
    dropout_form: str
    padding_mode: str = "zeros"
    groups: int = 1


# The square of the mean above this share of E[u^2] means |mu| > 8 SD.
TAME = 64 / 65
# Where it stays below that by at least this much, no unit is flat up to rounding, and `reciprocal_sd` is no more than
# 1 / sqrt(var + eps), to the last digit of float32.
PLAIN = 2e-5
# Of a variance that is the difference of others: more than rounding takes away, and nothing beside the whole.
SPARED = 1e-5


class Statistics(NamedTuple):
    """Of every unit, (N, 1, O, P) each."""

    mean: Tensor
    """mu'"""
    rstd: Tensor
    offset: Tensor | None
    """What times the sum of each filter is to be subtracted: mu', or what it is moved by if filters are centred, or
    None for nothing."""
    centred: bool
    """Whether filters of mean 0 are to be used."""
    scale: Tensor | float
    drawn: Drawn | None


class Drawn(NamedTuple):
    """What dropout did to every unit, (N, 1, O, P) each."""

    shift: Tensor
    moved: Tensor | None
    """mu' - mu, where any unit is bounded"""
    ratio: Tensor
    """Twice the derivative of mu' - mu by m_2."""
    bounded: Tensor | None
    """Whether var' is (mu' - mu)^2; None where that is nowhere so."""


def keep(ctx, of_units: Statistics, *tensors: Tensor | None) -> None:
    """Save both for the backward pass of a `Function`."""
    mean, rstd, offset, ctx.centred, scale, drawn = of_units
    ctx.scale = None if drawn else scale
    ctx.save_for_backward(*tensors, mean, rstd, offset, *((scale, *drawn) if drawn else ()))
    ctx.n_tensors = len(tensors)


def kept(ctx) -> tuple[Statistics, tuple[Tensor | None, ...]]:
    """What `keep` saved."""
    tensors, (mean, rstd, offset, *drawn) = ctx.saved_tensors[: ctx.n_tensors], ctx.saved_tensors[ctx.n_tensors :]
    if not drawn:
        return Statistics(mean, rstd, offset, ctx.centred, ctx.scale, None), tensors
    return Statistics(mean, rstd, offset, ctx.centred, drawn[0], Drawn(*drawn[1:])), tensors


def draw_of(of_units: Statistics) -> Draw | None:
    """What dropout drew, for the formula to use again."""
    return None if of_units.drawn is None else Draw(of_units.drawn.shift, of_units.scale)


def statistics(x: Tensor, how: Units, n_weights: int | None = None) -> Statistics:
    """Of every unit of x (N, C, H, W).

    n_weights: of the filters, for a convolution of one group. Centring them costs passes over them, subtracting mu
    times their sums one over the output: whichever is less, where the mean is small enough for both.
    """
    p, channels = how.dropout, x.shape[1]
    drawing = p > 0 and how.dropout_form == "moments"
    order = 4 if drawing else 2
    pixels, window = _seen(x, how)
    maps = cpu.channel_sums(pixels, order)
    mean, second, *higher = box_mean(window, maps, channels).unbind()
    left = torch.addcmul(second, mean, mean, value=-1 / TAME).min().item()
    divisor = channels
    if left < 0:
        maps, divisor = cpu.careful_means(pixels, order), 1
        mean, second, *higher = box_mean(window, maps, divisor).unbind()
    own_mean = mean if how.kernel == how.window else box_mean(how.kernel, maps[0], divisor)
    few = n_weights is not None and n_weights < x.numel() and not drawing
    centred = n_weights is not None and (few or left < 0)
    plain = left > PLAIN and own_mean is mean  # what is flat is told by the kernel's own mean
    if drawing:
        return _dropped(mean, own_mean, second, higher, channels * how.window.places, plain, centred, how)
    scale = (1 - p / (channels * how.window.places)) / (1 - p)
    var = torch.addcmul(second, mean, mean, value=-1)
    if left < 0:
        var.clamp_min_(0)
    if p:
        var = var.add_(second, alpha=scale - 1)  # scale m_2 - mu^2
    if plain:  # m_2 is of no more use, and shares its memory with the mean, which is kept
        rstd = torch.rsqrt(var.add_(cpu.number(how.eps, var.dtype)), out=second)
    else:
        rstd = reciprocal_sd(own_mean.float(), var.float().clamp_min_(0), how.eps)
    offset = mean if not centred else None if own_mean is mean else mean - own_mean
    if mean.dtype != torch.float32:
        mean, offset = mean.float(), None if offset is None else offset.float()
    return Statistics(mean, rstd, offset, centred, scale, None)


def _seen(x: Tensor, how: Units) -> tuple[Tensor, Box]:
    """x without the pixels that no unit has, and where the units lie there: strided 1 x 1 kernels leave out many."""
    box = how.window
    if box.places > 1 or max(box.stride) == 1 or how.kernel != box or any(pair != (0, 0) for pair in box.padding):
        return x, box
    pixels = x[(..., *(slice(None, None, stride) for stride in box.stride))].clone()  # in the order of x
    return pixels, box._replace(stride=(1,) * len(box.stride))


def _dropped(
    mean: Tensor, own_mean: Tensor, second: Tensor, higher: list[Tensor], n: int, plain: bool, centred: bool, how: Units
) -> Statistics:
    """What `eager.draw` and `eager.drawn_statistics` say, in few calls, from the same random numbers.

    higher: m_3 and m_4, which are overwritten. plain: that no unit is flat.
    """
    keep = 1 - how.dropout
    images, *size = second.shape
    noise = torch.normal(0.0, math.sqrt(how.dropout / (keep * n)), (images + 1, *size))
    if second.dtype != torch.float32:
        noise = noise.to(second.dtype)
    shift, other = noise[:-1], noise[1:]
    third, fourth = higher
    positive = second if plain else second.clamp_min(torch.finfo(second.dtype).tiny)
    moved = second.sqrt() * shift
    slope = third / positive  # of m_2' against mu'
    if plain:
        rest = fourth.addcmul_(slope, third, value=SPARED - 1).sqrt_()
    else:
        rest = fourth.addcmul_(slope, third, value=-1).clamp_min_(0).sqrt_()
    drawn_second = torch.addcmul(second, slope, moved).addcmul_(rest, other)
    drawn_second.mul_(cpu.number(1 / keep, second.dtype))  # m_2'
    scale, ratio = drawn_second / positive, moved / positive
    dropped = mean + moved
    var = torch.addcmul(drawn_second, dropped, dropped, value=-1)
    bounded = None
    if torch.addcmul(var, moved, moved, value=-1).min().item() <= 0:
        floor = moved.square()
        bounded = var <= floor
        var = torch.maximum(var, floor)
    if plain:
        rstd = var.add_(cpu.number(how.eps, var.dtype)).rsqrt_()
    else:
        rstd = reciprocal_sd(own_mean.float(), var.float(), how.eps)
    offset = dropped if not centred else moved if own_mean is mean else dropped - own_mean
    if second.dtype != torch.float32:
        dropped, offset, scale, shift, moved, ratio = (m.float() for m in (dropped, offset, scale, shift, moved, ratio))
    drawn = Drawn(shift, None if bounded is None else moved, ratio, bounded)
    return Statistics(dropped, rstd, offset, centred, scale, drawn)


def statistics_backward(
    x: Tensor, of_units: Statistics, grad_rstd: Tensor, grad_offset: Tensor | None, how: Units
) -> tuple[Tensor, Tensor, float]:
    """dL/dx by way of the statistics is constant + times slope x.

    On the way, with d = dL/dvar' where var' is not bounded, and of constant and slope the share of every pixel of a
    unit, without 1 / n: dL/dmu' - 2 mu' d, and 2 dL/dm_2.

    Returns:
        constant and slope, (N, 1, H, W) each, and times.
    """
    mean, rstd, _, centred, scale, drawn = of_units
    maps = mean.new_empty(2, *mean.shape)
    constant, slope = maps.unbind()
    minus_twice = torch.mul(grad_rstd, rstd.pow(3), out=slope)  # -2 dL/dvar', bounded or not
    free = minus_twice.masked_fill(drawn.bounded, 0) if drawn and drawn.bounded is not None else minus_twice
    # Filters of mean 0 take the kernel's own mean away: where that is mu, the offset's share in dL/dmu' cancels.
    cancels = grad_offset is None or (centred and how.kernel == how.window)
    if cancels:
        torch.mul(mean, free, out=constant)
    else:
        torch.addcmul(grad_offset, mean, free, out=constant)
    times = -1.0
    if drawn:
        grad_moved = constant + grad_offset if cancels else constant
        if free is not minus_twice:
            grad_moved = torch.addcmul(grad_moved, drawn.moved, minus_twice - free, value=-1)
        torch.mul(free, scale, out=slope).addcmul_(grad_moved, drawn.ratio, value=-1)
    else:
        times = -scale
    size, channels = x.shape[2:], x.shape[1]
    constant, slope = box_mean_backward(how.window, maps, size, channels).unbind()
    if centred and not cancels:
        constant = constant - box_mean_backward(how.kernel, grad_offset, size, channels)
    return constant, slope, times


def differentiable(y: Tensor, tensors, grad: Tensor, wanted) -> list[Tensor | None]:
    """The gradients of y as functions of `tensors` and `grad`, for the second derivative."""
    inputs = [t for t, want in zip(tensors, wanted, strict=True) if want]
    grads = iter(torch.autograd.grad(y, inputs, grad, create_graph=True))
    return [next(grads) if want else None for want in wanted]
