"""The kernels in plain PyTorch operators, for every device. Differentiable twice, and under `torch.func.vmap`.

Legend: N images, C channels, H x W the input's map, O x P the units, R rank of the offset.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from knport.kernels import cpu

# A Gaussian is no model of the mean of a few dozen Bernoulli terms (an RGB stem has n = 27): smaller units draw a mask.
SMALLEST_GAUSSIAN_UNIT = 64


class Draw(NamedTuple):
    """What dropout does to the units' statistics, each (N, 1, O, P): mu' = mu + shift sqrt(m_2), m_2' = scale m_2.

    Both are free of units of measurement, so that scaling the input scales the drawn statistics alike, and both are
    constants to the backward pass: the gradient reaches mu' and m_2' through mu and m_2.
    """

    shift: Tensor
    scale: Tensor


def channel_moments(x: Tensor) -> Tensor:
    """Mean and variance over the channels of every pixel.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.

    Returns:
        (N, 2, H, W) in float32 or better.
    """
    return _ChannelMoments.apply(x)


def higher_moments(x: Tensor) -> Tensor:
    """Third and fourth raw moments over the channels of every pixel, (N, 2, H, W); no gradient."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    square = x * x
    return torch.cat([(square * x).mean(1, keepdim=True), square.square().mean(1, keepdim=True)], 1)


class _ChannelMoments(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = x.mean(1, keepdim=True)
        deviation = x - mean
        return torch.cat([mean, deviation.mul_(deviation).mean(1, keepdim=True)], 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx, grad):
        x, maps = ctx.saved_tensors
        grad = grad / x.shape[1]
        slope = 2 * grad[:, 1:]
        constant = grad[:, :1] - slope * maps[:, :1]
        return (x.to(grad.dtype) * slope + constant).to(x.dtype)


def draw(second: Tensor, third: Tensor, fourth: Tensor, p: float, n: int) -> Draw:
    """Draw the statistics of units under dropout from two standard normal numbers per unit.

    With m_j the unit's j-th raw moment and q = p / ((1 - p) n), the Gaussian has

        E[mu'] = m_1,  E[m_2'] = m_2 / (1 - p),
        Var[mu'] = q m_2,  Var[m_2'] = q m_4 / (1 - p)^2,  Cov[mu', m_2'] = q m_3 / (1 - p)

    Args:
        second, third, fourth: m_2, m_3 and m_4, each (N, 1, O, P).
        p: dropout probability.
        n: entries of a unit.
    """
    second, third, fourth = second.detach(), third.detach(), fourth.detach()
    keep, q = 1 - p, p / ((1 - p) * n)
    # Drawn in float32 whatever the maps are in, so that every form of the layer draws the same from the same seed (but
    # for compiled code).
    shift, other = (noise.to(second.dtype) * math.sqrt(q) for noise in _deviates(second))
    per_root = second.clamp_min(torch.finfo(second.dtype).tiny).rsqrt()
    slope = third * per_root  # of m_2' against mu', times sqrt(m_2)
    rest = torch.addcmul(fourth, slope, slope, value=-1).clamp_min(0).sqrt()
    moved = torch.addcmul(slope * shift, rest, other) * per_root * per_root
    return Draw(shift, moved.add(1).div(keep))


def _deviates(like: Tensor) -> tuple[Tensor, ...]:
    """Two maps of standard normal numbers in float32, of the shape of `like`, independent of each other in every unit.

    Drawing takes longer than using what is drawn: the second map of an image is the first of the next image, so that
    N + 1 maps do for N images.
    """
    compiled = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiled and like.device.type == "cpu":
        # The compiler sets up a generator for every number that it draws, on CPUs one after the other.
        return normal_pair(torch.randint(-(2**63), 2**63 - 1, like.shape, device=like.device))
    noise = torch.randn(like.shape[0] + 1, *like.shape[1:], device=like.device)
    return noise[:-1], noise[1:]


def normal_pair(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normal numbers in float32 from every 64 random bits (Box and Muller, 1958)."""
    uniform = ((bits >> 32) & 0x7FFFFFFF).float().add(1) * 2**-31  # in (0, 1]
    angle = (bits & 0x7FFFFFFF).float() * (2 * math.pi * 2**-31)
    radius = (-2 * uniform.log()).sqrt()
    return radius * angle.cos(), radius * angle.sin()


def drawn_statistics(mean: Tensor, var: Tensor, drawn: Draw) -> tuple[Tensor, Tensor]:
    """mu' and var' = m_2' - mu'^2, but at least (mu' - mu)^2: the shift that dropout causes is at most one SD.

    Args:
        mean, var: of the whole units, (N, 1, O, P).
        drawn: of the same shape.
    """
    second = torch.addcmul(var, mean, mean)
    drawn = Draw(drawn.shift.to(mean.dtype), drawn.scale.to(mean.dtype))
    some = second > torch.finfo(second.dtype).tiny
    shift = torch.where(some, torch.where(some, second, 1.0).sqrt() * drawn.shift, 0.0)
    # m_2' - mu'^2, sorted so that nothing large cancels
    dropped = drawn.scale * var + (drawn.scale - 1) * mean.square() - (2 * mean + shift) * shift
    return mean + shift, torch.maximum(dropped, shift.square())


def normalize_units(
    convolved: Tensor,
    mean: Tensor,
    var: Tensor,
    offset: Tensor | None,
    vectors: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """(convolved - sum_r offset_r vectors_r) / sqrt(var + eps) + bias.

    A unit whose spread is lost in the rounding of its mean is constant. It yields the bias and passes no gradient: the
    formula's derivative there is 1 / sqrt(eps), about 300 in every layer, and an activation that is open for a value
    that is only rounding would let the product of all layers through (flat regions of images do this).

    Args:
        convolved: (N, C_out, O, P).
        mean, var: (N, 1, O, P).
        offset, vectors: (N, R, O, P) and (R, C_out), or None for R = 0.
        bias: (C_out,) or None.
        eps: added to the variance.
        dtype: of the result; the arithmetic is in float32 or better.
    """
    return _NormalizeUnits.apply(convolved, mean.detach(), var, offset, vectors, bias, eps, dtype)


def reciprocal_sd(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """1 / sqrt(var + eps), and 0 for units that are constant up to rounding: of their mean, or of values near 1."""
    mean, known = mean.detach(), var.detach()
    rounding = 2 * (8 * torch.finfo(var.dtype).eps) ** 2  # times 1 + mean^2
    return (var + eps).rsqrt() * (known / torch.addcmul(known + rounding, mean, mean, value=rounding))


def _channels(vector: Tensor, ndim: int) -> Tensor:
    return vector[(..., *(None,) * ndim)]  # (C,) -> (C, 1, 1)


class _NormalizeUnits(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(convolved, mean, var, offset, vectors, bias, eps, dtype):
        rstd = reciprocal_sd(mean, var, eps)
        if dtype == torch.float32 and _suits_cpu(vectors, convolved, rstd, offset, vectors, bias):
            if offset is None:
                return cpu.scale_and_shift(convolved, rstd, bias)
            return cpu.scale_and_shift(cpu.subtract_outer(convolved, offset, vectors[0]), rstd, bias, inplace=True)
        ndim = convolved.dim() - 2
        scaled = convolved.to(var.dtype) * rstd
        for r in range(0 if offset is None else offset.shape[1]):
            scaled = scaled - offset[:, r : r + 1] * rstd * _channels(vectors[r], ndim).to(var.dtype)
        if bias is not None:
            scaled = scaled + _channels(bias, ndim).to(var.dtype)
        # not `.to` where there is nothing to do: compiled by torch 2.11, a returned alias loses all gradients
        return scaled if scaled.dtype == dtype else scaled.to(dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        convolved, mean, var, offset, vectors, bias, ctx.eps, _ = inputs
        ctx.save_for_backward(convolved, mean, var, offset, vectors)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx, grad):
        convolved, mean, var, offset, vectors = ctx.saved_tensors
        rstd = reciprocal_sd(mean, var, ctx.eps)
        given = grad, convolved, rstd, offset, vectors
        by = _normalize_backward_on_cpu if _suits_cpu(vectors, *given) else _normalize_backward
        grads = by(*given, ctx.bias_dtype is not None)
        grad_convolved, grad_rstd, grad_offset, grad_vectors, grad_bias = grads
        if torch.compiler.is_compiling() and not ctx.needs_input_grad[2] and grad.device.type == "cpu":
            # A stem, whose input needs no gradient, would have no use for its convolution here. The compiler then keeps
            # the mask of the ReLU that follows, as booleans, and its code for these is slow on CPUs
            # (docs/benchmarks.md). With the convolution at hand it computes the mask again.
            grad_convolved = grad_convolved + 0 * convolved
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        grad_var = grad_rstd * (-0.5 * rstd.pow(3))
        return grad_convolved, None, grad_var, grad_offset, grad_vectors, grad_bias, None, None


def _suits_cpu(vectors: Tensor | None, *tensors: Tensor | None) -> bool:
    """Whether the passes of `cpu` can be used: with one outer product at most, and without a second derivative."""
    return (vectors is None or len(vectors) == 1) and not torch.is_grad_enabled() and cpu.takes(*tensors)


def _normalize_backward_on_cpu(grad, convolved, rstd, offset, vectors, has_bias: bool):
    if offset is None:
        return cpu.scale_and_shift_backward(grad, convolved, rstd, None, None, has_bias)
    shifted = cpu.subtract_outer(convolved, offset, vectors[0])
    grads = cpu.scale_and_shift_backward(grad, shifted, rstd, offset, vectors[0], has_bias, inplace=True)
    grad_convolved, grad_rstd, grad_offset, minus_grad_vector, grad_bias = grads
    return grad_convolved, grad_rstd, grad_offset, -minus_grad_vector[None], grad_bias


def _normalize_backward(grad, convolved, rstd, offset, vectors, has_bias: bool):
    """The gradients of convolved, rstd, offset, vectors and bias, differentiable."""
    grad = grad.to(rstd.dtype)
    over_units = (0, *range(2, grad.dim()))
    grad_bias = grad.sum(over_units) if has_bias else None
    grad_rstd = (grad * convolved).sum(1, keepdim=True)
    scaled = grad * rstd
    grad_convolved = scaled.to(convolved.dtype)
    if offset is None:
        return grad_convolved, grad_rstd, None, None, grad_bias
    wide = [_channels(vector, grad.dim() - 2) for vector in vectors.to(rstd.dtype)]
    along = torch.cat([(grad * vector).sum(1, keepdim=True) for vector in wide], 1)  # (N, R, O, P)
    each = [-(scaled * offset[:, r : r + 1]).sum(over_units) for r in range(len(wide))]
    grad_rstd = grad_rstd - (offset * along).sum(1, keepdim=True)
    return grad_convolved, grad_rstd, -rstd * along, torch.stack(each).to(vectors.dtype), grad_bias
