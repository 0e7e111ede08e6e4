"""What follows the convolution: scale, shift, bias, residual and activation in one pass, and one pass back.

    z = (c - own * used_sum - (mean - own) * exact_sum) * rstd + bias + residual        y = activation(z)

with c the convolution of centred filters, own the mean of the unit under the kernel, mean and var the statistics to
normalize by. The second term is the rounding of the filters in half precision (flag `ROUNDED`), the third what dropout
or a window other than the kernel moves the mean by (`SHIFTED`). rstd is that of `knport.kernels.eager.reciprocal_sd`:
0 for units that are constant up to rounding.

Legend: see `knport.kernels.triton_support`; (rows, N, 1, O, P) maps are contiguous, sums are (2, C).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knport.kernels.triton_moments import pixel_offset
from knport.kernels.triton_support import direct, is_flat, power_of_two, spatial3, strides5, tile

ACTIVATIONS = ("none", "relu", "gelu", "silu", "mish")


@triton.jit
def reciprocal_sd(mean, var, EPS: tl.constexpr, PRECISION: tl.constexpr):
    rounding = (2 * (8 * PRECISION) * (8 * PRECISION)) * (1 + mean * mean)
    return var / (var + rounding) / tl.sqrt(var + EPS)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        y = tl.where(z <= 0, 0.0, z)  # and NaN stays NaN
    elif ACTIVATION == 2:
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 3:
        y = z / (1 + tl.exp(-z))
    elif ACTIVATION == 4:
        e = tl.exp(tl.minimum(z, 20.0))
        y = z * (e * (e + 2) / (e * (e + 2) + 2))
    else:
        y = z
    return y


@triton.jit
def _activation_slope(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        slope = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == 2:
        slope = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == 3:
        gate = 1 / (1 + tl.exp(-z))
        slope = gate * (1 + z * (1 - gate))
    elif ACTIVATION == 4:
        e = tl.exp(tl.minimum(z, 20.0))
        gate = e * (e + 2) / (e * (e + 2) + 2)
        slope = gate + z * (1 - gate * gate) * (e / (1 + e))
    else:
        slope = z
    return slope


@triton.jit
def _shift_and_scale(
    c, own, shift, rstd, sums_ptr, bias_ptr, channel, channels,
    ROUNDED: tl.constexpr, SHIFTED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    """c -> z, tiles of (channels, pixels)."""
    known = channel < channels
    if ROUNDED:
        c -= tl.load(sums_ptr + channel, mask=known, other=0.0)[:, None] * own[None, :]
    if SHIFTED:
        c -= tl.load(sums_ptr + channels + channel, mask=known, other=0.0)[:, None] * shift[None, :]
    c = c * rstd[None, :]
    if BIASED:
        c += tl.load(bias_ptr + channel, mask=known, other=0.0).to(c.dtype)[:, None]
    return c


@triton.jit
def _epilogue_kernel(
    c_ptr, mean_ptr, var_ptr, own_ptr, sums_ptr, bias_ptr, residual_ptr, y_ptr, total, pixels, channels, height, width,
    c_n, c_c, c_z, c_y, c_x, residual_n, residual_c, residual_z, residual_y, residual_x, y_n, y_c, y_z, y_y, y_x,
    EPS: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, ROUNDED: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, RESIDUAL: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = q < total
    mask = (channel < channels)[:, None] & inside[None, :]
    n = (q // pixels).to(tl.int64)
    p = q % pixels
    wide = channel.to(tl.int64)[:, None]
    mean = tl.load(mean_ptr + q, mask=inside, other=0.0)
    own = tl.load(own_ptr + q, mask=inside, other=0.0)
    rstd = reciprocal_sd(own, tl.load(var_ptr + q, mask=inside, other=0.0), EPS, PRECISION)
    at = n * c_n + pixel_offset(p, height, width, c_z, c_y, c_x, FLAT)
    z = tl.load(c_ptr + at[None, :] + wide * c_c, mask=mask, other=0.0).to(mean.dtype)
    z = _shift_and_scale(z, own, mean - own, rstd, sums_ptr, bias_ptr, channel, channels, ROUNDED, SHIFTED, BIASED)
    if RESIDUAL:
        at = n * residual_n + pixel_offset(p, height, width, residual_z, residual_y, residual_x, FLAT)
        z += tl.load(residual_ptr + at[None, :] + wide * residual_c, mask=mask, other=0.0).to(z.dtype)
    y = _activate(z, ACTIVATION)
    at = n * y_n + pixel_offset(p, height, width, y_z, y_y, y_x, FLAT)
    tl.store(y_ptr + at[None, :] + wide * y_c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _epilogue_backward_kernel(
    grad_ptr, c_ptr, mean_ptr, var_ptr, own_ptr, sums_ptr, bias_ptr, residual_ptr,
    grad_c_ptr, grad_z_ptr, rows_ptr, partial_ptr, total, pixels, channels, height, width,
    g_n, g_c, g_z, g_y, g_x, c_n, c_c, c_z, c_y, c_x, residual_n, residual_c, residual_z, residual_y, residual_x,
    gc_n, gc_c, gc_z, gc_y, gc_x, gz_n, gz_c, gz_z, gz_y, gz_x,
    EPS: tl.constexpr, PRECISION: tl.constexpr, ACTIVATION: tl.constexpr, ROUNDED: tl.constexpr,
    SHIFTED: tl.constexpr, BIASED: tl.constexpr, RESIDUAL: tl.constexpr, FLAT: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dz * rstd for the convolution; per unit t = sum_o dz_o c_o and what the means get; per block db and d exact_sum.

    Rows: the gradients of (mean, var, own). Partial sums: (blocks, 2, C) for bias and exact_sum.
    """
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = q < total
    n = (q // pixels).to(tl.int64)
    p = q % pixels
    mean = tl.load(mean_ptr + q, mask=inside, other=0.0)
    own = tl.load(own_ptr + q, mask=inside, other=0.0)
    shift = mean - own
    rstd = reciprocal_sd(own, tl.load(var_ptr + q, mask=inside, other=0.0), EPS, PRECISION)
    grad_at = grad_ptr + n * g_n + pixel_offset(p, height, width, g_z, g_y, g_x, FLAT)
    c_at = c_ptr + n * c_n + pixel_offset(p, height, width, c_z, c_y, c_x, FLAT)
    grad_c_at = grad_c_ptr + n * gc_n + pixel_offset(p, height, width, gc_z, gc_y, gc_x, FLAT)
    grad_z_at = grad_z_ptr + n * gz_n + pixel_offset(p, height, width, gz_z, gz_y, gz_x, FLAT)
    residual_at = residual_ptr + n * residual_n
    residual_at += pixel_offset(p, height, width, residual_z, residual_y, residual_x, FLAT)
    t = tl.zeros([BLOCK_P], mean.dtype)
    along_used = tl.zeros([BLOCK_P], mean.dtype)
    along_exact = tl.zeros([BLOCK_P], mean.dtype)
    for start in range(0, channels, BLOCK_C):
        channel = start + tl.arange(0, BLOCK_C)
        known = channel < channels
        mask = known[:, None] & inside[None, :]
        wide = channel.to(tl.int64)[:, None]
        grad = tl.load(grad_at[None, :] + wide * g_c, mask=mask, other=0.0).to(mean.dtype)
        c = tl.load(c_at[None, :] + wide * c_c, mask=mask, other=0.0).to(mean.dtype)
        if ACTIVATION:
            z = _shift_and_scale(c, own, shift, rstd, sums_ptr, bias_ptr, channel, channels, ROUNDED, SHIFTED, BIASED)
            if RESIDUAL:
                z += tl.load(residual_at[None, :] + wide * residual_c, mask=mask, other=0.0).to(z.dtype)
            grad = grad * _activation_slope(z, ACTIVATION)
            if RESIDUAL:
                tl.store(grad_z_at[None, :] + wide * gz_c, grad.to(grad_z_ptr.dtype.element_ty), mask=mask)
        grad_c = grad * rstd[None, :]
        tl.store(grad_c_at[None, :] + wide * gc_c, grad_c.to(grad_c_ptr.dtype.element_ty), mask=mask)
        t += tl.sum(grad * c, 0)
        partial = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + channel
        if ROUNDED:
            along_used += tl.sum(grad * tl.load(sums_ptr + channel, mask=known, other=0.0)[:, None], 0)
        if SHIFTED:
            along_exact += tl.sum(grad * tl.load(sums_ptr + channels + channel, mask=known, other=0.0)[:, None], 0)
            tl.store(partial + channels, -tl.sum(grad_c * shift[None, :], 1), mask=known)
        if BIASED:
            tl.store(partial, tl.sum(grad, 1), mask=known)
    t -= own * along_used + shift * along_exact
    tl.store(rows_ptr + q, -rstd * along_exact, mask=inside)
    tl.store(rows_ptr + total + q, -0.5 * t * rstd * rstd * rstd, mask=inside)
    tl.store(rows_ptr + 2 * total + q, rstd * (along_exact - along_used), mask=inside)


def _flags(maps: Tensor, bias, residual, activation: int, eps: float, rounded: bool, shifted: bool) -> dict:
    return {
        "EPS": eps, "PRECISION": torch.finfo(maps.dtype).eps, "ACTIVATION": activation, "ROUNDED": rounded,
        "SHIFTED": shifted, "BIASED": bias is not None, "RESIDUAL": residual is not None,
    }  # fmt: skip


def normalize_units(
    c: Tensor,
    mean: Tensor,
    var: Tensor,
    own: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    activation: int,
    rounded: bool,
    shifted: bool,
    wrap_triton=direct,
) -> Tensor:
    """The module's formula.

    Args:
        c: (N, C, O, P), the convolution of centred filters.
        mean, var, own: (N, 1, O, P), contiguous; own is mean itself where nothing moves it.
        sums: (2, C), of the filters as the convolution used them and as they were given.
        bias: (C,) or None.
        residual: (N, C, O, P) or None.
        eps: added to the variance.
        dtype: of the result.
        activation: index in `ACTIVATIONS`.
        rounded, shifted: whether the terms of the two sums are there.
    """
    y = torch.empty_like(c, dtype=dtype)
    channels, total = c.shape[1], mean.numel()
    block_p, block_c = tile(total, c)
    _, height, width = spatial3(c)
    added = c if residual is None else residual
    wrap_triton(_epilogue_kernel)[(triton.cdiv(total, block_p), triton.cdiv(channels, block_c))](
        c, mean, var, own, sums, sums if bias is None else bias, added, y, total, total // c.shape[0], channels,
        height, width, *strides5(c), *strides5(added), *strides5(y), FLAT=is_flat(c, added, y), BLOCK_P=block_p,
        BLOCK_C=block_c, **_flags(mean, bias, residual, activation, eps, rounded, shifted),
    )  # fmt: skip
    return y


def normalize_units_backward(
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
    wrap_triton=direct,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of c, of (mean, var, own) as (3, N, 1, O, P), of (bias, exact_sum) as (2, C), and of the residual.

    A vector that there is none of (no bias, not shifted) is undefined; the residual's gradient is empty where it is
    `grad` itself (no activation) or where there is no residual.
    """
    channels, total = c.shape[1], mean.numel()
    grad_c = torch.empty_like(c)
    apart = residual is not None and activation > 0
    grad_residual = torch.empty_like(residual) if apart else grad.new_empty(0)
    rows = torch.empty((3, *mean.shape), device=c.device, dtype=mean.dtype)
    block_p, block_c = tile(total, c)
    # half the tile of the forward pass: two of them are held at a time
    block_c = power_of_two(channels, max(block_c // 2, 16))
    blocks = triton.cdiv(total, block_p)
    partial = torch.empty((blocks, 2, channels), device=c.device, dtype=mean.dtype)
    _, height, width = spatial3(c)
    added = c if residual is None else residual
    out = grad_residual if apart else grad_c
    wrap_triton(_epilogue_backward_kernel)[(blocks,)](
        grad, c, mean, var, own, sums, sums if bias is None else bias, added, grad_c, out, rows, partial, total,
        total // c.shape[0], channels, height, width,
        *strides5(grad), *strides5(c), *strides5(added), *strides5(grad_c), *strides5(out),
        FLAT=is_flat(grad, c, added, grad_c, out), BLOCK_P=block_p, BLOCK_C=block_c,
        **_flags(mean, bias, residual, activation, eps, rounded, shifted),
    )  # fmt: skip
    return grad_c, rows, partial.sum(0), grad_residual
