"""KernelNorm's two passes: normalize the input unit by unit, and bring the gradient back.

For units that do not overlap (stride at least the kernel, no dilation): every pixel is in one unit at most. Pixel
(o k + i) of the output is the i-th one of unit o.

Legend: see `knport.kernels.triton_support`; statistics are rows of `knport.kernels.triton_units`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knport.kernels.triton_epilogue import reciprocal_sd
from knport.kernels.triton_support import Box3, direct, strides5, tile


@triton.jit
def _norm_kernel(
    x_ptr, rows_ptr, y_ptr, total, units, channels, depth, height, width, units_z, units_y, units_x,
    x_n, x_c, x_z, x_y, x_x, y_n, y_c, y_z, y_y, y_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, OWN: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = q < total
    channel = (c < channels)[:, None]
    # from the output's pixel to its unit and its place there, and from these to the input's pixel
    long = units_x * KX
    high = units_y * KY
    out_x = q % long
    out_y = q // long % high
    out_z = q // (long * high) % (units_z * KZ)
    n = (q // (long * high * units_z * KZ)).to(tl.int64)
    u = ((n * units_z + out_z // KZ) * units_y + out_y // KY) * units_x + out_x // KX
    z = out_z // KZ * SZ + out_z % KZ - PZ
    y = out_y // KY * SY + out_y % KY - PY
    x = out_x // KX * SX + out_x % KX - PX
    here = inside & (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    mean = tl.load(rows_ptr + u, mask=inside, other=0.0)
    var = tl.load(rows_ptr + units + u, mask=inside, other=0.0)
    own = tl.load(rows_ptr + OWN * units + u, mask=inside, other=0.0)
    rstd = reciprocal_sd(own, var, EPS, PRECISION)
    wide = c.to(tl.int64)[:, None]
    at = n * x_n + z.to(tl.int64) * x_z + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x
    value = tl.load(x_ptr + at[None, :] + wide * x_c, mask=channel & here[None, :], other=0.0).to(mean.dtype)
    value = (value - mean[None, :]) * rstd[None, :]
    at = n * y_n + out_z.to(tl.int64) * y_z + out_y.to(tl.int64) * y_y + out_x.to(tl.int64) * y_x
    tl.store(y_ptr + at[None, :] + wide * y_c, value.to(y_ptr.dtype.element_ty), mask=channel & inside[None, :])


@triton.jit
def _norm_sums_kernel(
    grad_ptr, x_ptr, rows_ptr, out_ptr, units, channels, depth, height, width, units_z, units_y, units_x,
    g_n, g_c, g_z, g_y, g_x, x_n, x_c, x_z, x_y, x_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, OWN: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The gradients of a unit's (mean, var): sums over its places and channels."""
    u = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = u < units
    unit_x = u % units_x
    unit_y = u // units_x % units_y
    unit_z = u // (units_x * units_y) % units_z
    n = (u // (units_x * units_y * units_z)).to(tl.int64)
    mean = tl.load(rows_ptr + u, mask=inside, other=0.0)
    var = tl.load(rows_ptr + units + u, mask=inside, other=0.0)
    own = tl.load(rows_ptr + OWN * units + u, mask=inside, other=0.0)
    rstd = reciprocal_sd(own, var, EPS, PRECISION)
    along = tl.zeros([BLOCK_P], mean.dtype)
    plain = tl.zeros([BLOCK_P], mean.dtype)
    for place in range(KZ * KY * KX):
        i = place // (KY * KX)
        j = place // KX % KY
        k = place % KX
        z = unit_z * SZ + i - PZ
        y = unit_y * SY + j - PY
        x = unit_x * SX + k - PX
        here = inside & (z >= 0) & (z < depth) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
        x_at = n * x_n + z.to(tl.int64) * x_z + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x
        g_at = n * g_n + (unit_z * KZ + i).to(tl.int64) * g_z + (unit_y * KY + j).to(tl.int64) * g_y
        g_at += (unit_x * KX + k).to(tl.int64) * g_x
        for start in range(0, channels, BLOCK_C):
            c = start + tl.arange(0, BLOCK_C)
            wide = c.to(tl.int64)[:, None]
            known = (c < channels)[:, None]
            grad = tl.load(grad_ptr + g_at[None, :] + wide * g_c, mask=known & inside[None, :], other=0.0)
            grad = grad.to(mean.dtype)
            value = tl.load(x_ptr + x_at[None, :] + wide * x_c, mask=known & here[None, :], other=0.0).to(mean.dtype)
            plain += tl.sum(grad, 0)
            along += tl.sum(grad * (value - mean[None, :]), 0)
    tl.store(out_ptr + u, -rstd * plain, mask=inside)
    tl.store(out_ptr + units + u, -0.5 * along * rstd * rstd * rstd, mask=inside)


@triton.jit
def _norm_backward_kernel(
    grad_ptr, x_ptr, maps_ptr, grad_maps_ptr, rows_ptr, out_ptr, total, units, channels, depth, height, width,
    units_z, units_y, units_x, g_n, g_c, g_z, g_y, g_x, x_n, x_c, x_z, x_y, x_x, o_n, o_c, o_z, o_y, o_x,
    KZ: tl.constexpr, KY: tl.constexpr, KX: tl.constexpr, SZ: tl.constexpr, SY: tl.constexpr, SX: tl.constexpr,
    PZ: tl.constexpr, PY: tl.constexpr, PX: tl.constexpr, OWN: tl.constexpr, EPS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx: the unit's dy * rstd, and the moments' gradient as in `knport.kernels.triton_moments`."""
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = q < total
    channel = (c < channels)[:, None]
    wide = c.to(tl.int64)[:, None]
    pixels = depth * height * width
    p = q % pixels
    n = (q // pixels).to(tl.int64)
    z = p // (height * width)
    y = p // width % height
    x = p % width
    i = (z + PZ) % SZ
    j = (y + PY) % SY
    k = (x + PX) % SX
    unit_z = (z + PZ) // SZ
    unit_y = (y + PY) // SY
    unit_x = (x + PX) // SX
    unit = inside & (i < KZ) & (j < KY) & (k < KX) & (unit_z < units_z) & (unit_y < units_y) & (unit_x < units_x)
    u = ((n * units_z + unit_z) * units_y + unit_y) * units_x + unit_x
    var = tl.load(rows_ptr + units + u, mask=unit, other=0.0)
    rstd = reciprocal_sd(tl.load(rows_ptr + OWN * units + u, mask=unit, other=0.0), var, EPS, PRECISION)
    g_at = n * g_n + (unit_z * KZ + i).to(tl.int64) * g_z + (unit_y * KY + j).to(tl.int64) * g_y
    g_at += (unit_x * KX + k).to(tl.int64) * g_x
    grad = tl.load(grad_ptr + g_at[None, :] + wide * g_c, mask=channel & unit[None, :], other=0.0).to(rstd.dtype)
    map_at = n * (2 * pixels) + p
    mean = tl.load(maps_ptr + map_at, mask=inside, other=0.0)
    first = tl.load(grad_maps_ptr + map_at, mask=inside, other=0.0) / channels
    second = tl.load(grad_maps_ptr + map_at + pixels, mask=inside, other=0.0) * 2 / channels
    x_at = n * x_n + z.to(tl.int64) * x_z + y.to(tl.int64) * x_y + x.to(tl.int64) * x_x
    mask = channel & inside[None, :]
    value = tl.load(x_ptr + x_at[None, :] + wide * x_c, mask=mask, other=0.0).to(rstd.dtype)
    grad = grad * rstd[None, :] + first[None, :] + second[None, :] * (value - mean[None, :])
    at = n * o_n + z.to(tl.int64) * o_z + y.to(tl.int64) * o_y + x.to(tl.int64) * o_x
    tl.store(out_ptr + at[None, :] + wide * o_c, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _place(box: Box3, rows: Tensor, own: int, eps: float) -> dict:
    names = ("KZ", "KY", "KX", "SZ", "SY", "SX", "PZ", "PY", "PX")
    values = (*box.kernel_size, *box.stride, *box.padding)
    precision = torch.finfo(rows.dtype).eps
    return dict(zip(names, values, strict=True)) | {"OWN": own, "EPS": eps, "PRECISION": precision}


def empty_result(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """(N, C, *size) in the memory format of x."""
    y = x.new_empty((*x.shape[:2], *size))
    if x.stride(1) == 1 and x.shape[1] > 1 and x.dim() in (4, 5):
        return torch.empty_like(y, memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return y


def normalize(
    x: Tensor, rows: Tensor, box: Box3, own: int, eps: float, out: tuple[int, ...], wrap_triton=direct
) -> Tensor:
    """(x - mu') / sqrt(var' + eps) for every unit.

    Args:
        x: (N, C, H, W).
        rows: the units' statistics, (rows, N, 1, O, P).
        box: where the units lie.
        own: the row of the mean of all entries.
        eps: added to the variance.
        out: the result's spatial size, (O k_h, P k_w).
    """
    y = empty_result(x, out)
    total = y.numel() // x.shape[1]
    block_p, block_c = tile(total, x)
    wrap_triton(_norm_kernel)[(triton.cdiv(total, block_p), triton.cdiv(x.shape[1], block_c))](
        x, rows, y, total, rows.numel() // rows.shape[0], x.shape[1], *box.size, *box.units, *strides5(x),
        *strides5(y), BLOCK_P=block_p, BLOCK_C=block_c, **_place(box, rows, own, eps),
    )  # fmt: skip
    return y


def normalize_sums(
    grad: Tensor, x: Tensor, rows: Tensor, box: Box3, own: int, eps: float, wrap_triton=direct
) -> Tensor:
    """The gradients of the units' (mu', var'), (2, N, 1, O, P)."""
    out = torch.empty((2, *rows.shape[1:]), device=rows.device, dtype=rows.dtype)
    units = rows.numel() // rows.shape[0]
    block_p, block_c = tile(units, x)
    wrap_triton(_norm_sums_kernel)[(triton.cdiv(units, block_p),)](
        grad, x, rows, out, units, x.shape[1], *box.size, *box.units, *strides5(grad), *strides5(x),
        BLOCK_P=block_p, BLOCK_C=block_c, **_place(box, rows, own, eps),
    )  # fmt: skip
    return out


def normalize_backward(
    grad: Tensor,
    x: Tensor,
    maps: Tensor,
    grad_maps: Tensor,
    rows: Tensor,
    box: Box3,
    own: int,
    eps: float,
    wrap_triton=direct,
) -> Tensor:
    """The gradient of x, from that of the result and that of the channel moments."""
    out = torch.empty_like(x)
    total = out.numel() // x.shape[1]
    block_p, block_c = tile(total, x)
    wrap_triton(_norm_backward_kernel)[(triton.cdiv(total, block_p), triton.cdiv(x.shape[1], block_c))](
        grad, x, maps, grad_maps, rows, out, total, rows.numel() // rows.shape[0], x.shape[1], *box.size, *box.units,
        *strides5(grad), *strides5(x), *strides5(out), BLOCK_P=block_p, BLOCK_C=block_c,
        **_place(box, rows, own, eps),
    )  # fmt: skip
    return out
