"""The Triton kernels as PyTorch operators (`torch.ops.knport`), which `torch.compile` traces without a graph break.

`torch.library.triton_op` shows the compiler the kernels themselves. Each operator has its derivative registered; what
is a plain formula on x (the moments' gradient, centring the filters) is left to plain operators, since the compiler
fuses them with their neighbours. In Triton's interpreter there is no kernel to show: the operators are opaque there.

Legend: see `knport.kernels.triton_units`.
"""

from collections.abc import Sequence

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from knport.kernels import triton_epilogue, triton_filters, triton_moments, triton_norm, triton_plain
from knport.kernels import triton_units as units
from knport.kernels.triton_support import Box3, accumulator

# No `from __future__ import annotations` here: the operators' schemas are read from the annotations.

_COMPILED = isinstance(triton_filters._centre_kernel, triton.JITFunction)


def _operator(name: str, fake):
    """Register a function as `knport::name`; `fake` gives the results' shapes where the kernels are interpreted."""

    def register(function):
        if _COMPILED:
            return triton_op(f"knport::{name}", function, mutates_args=())
        operator = custom_op(f"knport::{name}", function, mutates_args=())
        operator.register_fake(fake)
        return operator

    return register


_wrap = wrap_triton if _COMPILED else triton_moments.direct


def _empty(like: Tensor, *shape, dtype=None) -> Tensor:
    return like.new_empty(shape, dtype=dtype or like.dtype)


# Channel moments


def _moments_fake(x, higher):
    maps = _empty(x, x.shape[0], 2, *x.shape[2:], dtype=accumulator(x.dtype))
    return maps, torch.empty_like(maps) if higher else _empty(maps, 0)


@_operator("channel_moments", _moments_fake)
def _channel_moments(x: Tensor, higher: bool) -> tuple[Tensor, Tensor]:
    return triton_moments.channel_moments(x, higher, _wrap)


def _moments_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _moments_backward(ctx, grad, _):
    x, maps = ctx.saved_tensors
    wide = x.to(maps.dtype)
    grad_mean, grad_var = (grad / x.shape[1]).split(1, 1)
    return (grad_mean + 2 * grad_var * (wide - maps[:, :1])).to(x.dtype), None


_channel_moments.register_autograd(_moments_backward, setup_context=_moments_setup)


def channel_moments(x: Tensor, higher: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_functions.channel_moments`; the compiler itself merges the two gradients of x."""
    return x, *_channel_moments(x, higher)


# Unit statistics


def _rows_fake(maps, higher, seed, box, form, dropout, n, out):
    return _empty(maps, units._ROWS[form], maps.shape[0], 1, *out)


@_operator("unit_statistics", _rows_fake)
def _unit_statistics(
    maps: Tensor,
    higher: Tensor,
    seed: Tensor,
    box: Sequence[int],
    form: int,
    dropout: float,
    n: int,
    out: Sequence[int],
) -> Tensor:
    return units.unit_statistics(maps, higher, seed, Box3.unflat(box), form, dropout, n, tuple(out), _wrap)


@_operator("unit_statistics_backward", lambda maps, *_: torch.empty_like(maps))
def _unit_statistics_backward(
    maps: Tensor, rows: Tensor, grad: Tensor, box: Sequence[int], form: int, dropout: float, n: int
) -> Tensor:
    own = grad[2] if form == units.MOMENTS else None
    where = (Box3.unflat(box), form, dropout, n)
    return units.unit_statistics_backward(maps, rows, grad[0], grad[1], own, *where, _wrap)


def _statistics_setup(ctx, inputs, output):
    maps, _, _, *ctx.settings, _ = inputs
    ctx.save_for_backward(maps, output)


def _statistics_backward(ctx, grad):
    grad = _unit_statistics_backward(*ctx.saved_tensors, grad.contiguous(), *ctx.settings)
    return grad, *[None] * 7


_unit_statistics.register_autograd(_statistics_backward, setup_context=_statistics_setup)


def unit_statistics(maps: Tensor, higher: Tensor, seed: Tensor, box: Box3, form: int, dropout: float, n: int, out):
    """As `triton_functions.unit_statistics`."""
    rows = _unit_statistics(maps, higher, seed, box.flat(), form, dropout, n, out)
    mean = rows[0]
    return mean, rows[1], rows[2] if form == units.MOMENTS else mean


# Filters


def centre_filters(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """As `triton_functions.centre_filters`, in plain operators."""
    used, exact_sum = triton_plain.centre_filters(weight, dtype)
    rounding = used.detach().to(exact_sum.dtype).sum(tuple(range(1, used.dim())))
    return used, torch.stack([rounding, exact_sum.detach()]), exact_sum


# Epilogue


def _epilogue_fake(c, mean, var, own, exact_sum, sums, bias, residual, eps, dtype, *_):
    return torch.empty_like(c, dtype=dtype)


@_operator("normalize_units", _epilogue_fake)
def _normalize_units(
    c: Tensor,
    mean: Tensor,
    var: Tensor,
    own: Tensor,
    exact_sum: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    activation: int,
    rounded: bool,
    shifted: bool,
) -> Tensor:
    how = (eps, dtype, activation, rounded, shifted)
    return triton_epilogue.normalize_units(c, mean, var, own, sums, bias, residual, *how, _wrap)


def _epilogue_backward_fake(grad, c, mean, var, own, sums, bias, residual, eps, activation, *_):
    apart = residual is not None and activation > 0
    vectors = _empty(mean, 2, c.shape[1])
    rows = _empty(mean, 3, *mean.shape)
    return torch.empty_like(c), rows, vectors, torch.empty_like(residual) if apart else _empty(grad, 0)


@_operator("normalize_units_backward", _epilogue_backward_fake)
def _normalize_units_backward(
    grad: Tensor,
    c: Tensor,
    mean: Tensor,
    var: Tensor,
    own: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: int,
    rounded: bool,
    shifted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    how = (eps, activation, rounded, shifted)
    return triton_epilogue.normalize_units_backward(grad, c, mean, var, own, sums, bias, residual, *how, _wrap)


def _epilogue_setup(ctx, inputs, output):
    c, mean, var, own, _, sums, bias, residual, *ctx.settings = inputs
    ctx.save_for_backward(c, mean, var, own, sums, bias, residual)


def _epilogue_backward(ctx, grad):
    *_, bias, residual = saved = ctx.saved_tensors
    eps, _, activation, rounded, shifted = ctx.settings
    grad_c, rows, vectors, apart = _normalize_units_backward(grad, *saved, eps, activation, rounded, shifted)
    grad_bias = None if bias is None else vectors[0].to(bias.dtype)
    grad_residual = None if residual is None else apart if activation else grad.to(residual.dtype)
    means = rows[0] if shifted else None, rows[1], rows[2] if shifted or rounded else None
    return grad_c, *means, vectors[1] if shifted else None, None, grad_bias, grad_residual, *[None] * 5


_normalize_units.register_autograd(_epilogue_backward, setup_context=_epilogue_setup)
normalize_units = _normalize_units


# KernelNorm


def _norm_fake(x, seed, box, form, dropout, n, eps, out, size):
    maps, higher = _moments_fake(x, False)
    return triton_norm.empty_result(x, size), maps, _rows_fake(maps, higher, seed, box, form, dropout, n, out)


@_operator("kernel_norm", _norm_fake)
def _kernel_norm(
    x: Tensor,
    seed: Tensor,
    box: Sequence[int],
    form: int,
    dropout: float,
    n: int,
    eps: float,
    out: Sequence[int],
    size: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    place = Box3.unflat(box)
    maps, higher = triton_moments.channel_moments(x, form == units.MOMENTS, _wrap)
    rows = units.unit_statistics(maps, higher, seed, place, form, dropout, n, tuple(out), _wrap)
    return triton_norm.normalize(x, rows, place, units.own_row(form), eps, tuple(size), _wrap), maps, rows


@_operator("kernel_norm_backward", lambda grad, x, *_: torch.empty_like(x))
def _kernel_norm_backward(
    grad: Tensor,
    x: Tensor,
    maps: Tensor,
    rows: Tensor,
    box: Sequence[int],
    form: int,
    dropout: float,
    n: int,
    eps: float,
) -> Tensor:
    place, own = Box3.unflat(box), units.own_row(form)
    sums = triton_norm.normalize_sums(grad, x, rows, place, own, eps, _wrap)
    how = (place, form, dropout, n)
    grad_maps = units.unit_statistics_backward(maps, rows, sums[0], sums[1], None, *how, _wrap)
    return triton_norm.normalize_backward(grad, x, maps, grad_maps, rows, place, own, eps, _wrap)


def _norm_setup(ctx, inputs, output):
    x, _, *ctx.settings, _, _ = inputs
    ctx.save_for_backward(x, *output[1:])


def _norm_backward(ctx, grad, *_):
    return _kernel_norm_backward(grad, *ctx.saved_tensors, *ctx.settings), *[None] * 8


_kernel_norm.register_autograd(_norm_backward, setup_context=_norm_setup)


def kernel_norm(x: Tensor, seed: Tensor, box: Box3, form: int, dropout: float, n: int, eps: float, out, size) -> Tensor:
    """As `triton_functions.kernel_norm`."""
    return _kernel_norm(x, seed, box.flat(), form, dropout, n, eps, out, size)[0]
