"""One pass over the input for the channel moments of every pixel, and the pass that brings their gradient back.

Legend: see `knport.kernels.triton_support`; maps (N, 2, Z, Y, X) are mean and variance, higher (of the same shape) are
third and fourth raw moments. These only scale a random draw, which is a constant to the backward pass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knport.kernels.triton_support import accumulator, direct, is_flat, spatial3, strides5, tile


@triton.jit
def pixel_offset(p, height, width, stride_z, stride_y, stride_x, FLAT: tl.constexpr):
    """Where pixel p of an image lies, in elements from its first one."""
    if FLAT:
        offset = p.to(tl.int64) * stride_x
    else:
        row = p // width
        offset = (row // height).to(tl.int64) * stride_z + (row % height).to(tl.int64) * stride_y
        offset += (p % width).to(tl.int64) * stride_x
    return offset


@triton.jit
def _moments_kernel(
    x_ptr, maps_ptr, higher_ptr, total, pixels, channels, height, width,
    stride_n, stride_c, stride_z, stride_y, stride_x,
    HIGHER: tl.constexpr, FLAT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    kind = maps_ptr.dtype.element_ty
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = q < total
    n = (q // pixels).to(tl.int64)
    p = q % pixels
    pixel = x_ptr + n * stride_n + pixel_offset(p, height, width, stride_z, stride_y, stride_x, FLAT)
    # Deviations from the first channel: a constant pixel's are exactly 0, and a large mean does not cancel.
    first = tl.load(pixel, mask=inside, other=0.0).to(kind)
    mean = tl.zeros([BLOCK_P], kind)
    square = tl.zeros([BLOCK_P], kind)
    third = tl.zeros([BLOCK_P], kind)
    fourth = tl.zeros([BLOCK_P], kind)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (c < channels)[:, None] & inside[None, :]
        x = tl.load(pixel[None, :] + (c.to(tl.int64) * stride_c)[:, None], mask=mask, other=0.0).to(kind)
        count = tl.minimum(channels - start, BLOCK_C)
        deviation = tl.where(mask, x - first[None, :], 0.0)
        block_mean = tl.sum(deviation, 0) / count
        deviation = tl.where(mask, deviation - block_mean[None, :], 0.0)
        # Chan et al.: two sets' squares about their own means, merged
        step = block_mean - mean
        square += tl.sum(deviation * deviation, 0) + step * step * start * count / (start + count)
        mean += step * count / (start + count)
        if HIGHER:
            cube = x * x * x
            third += tl.sum(cube, 0)
            fourth += tl.sum(cube * x, 0)
    at = n * (2 * pixels) + p
    tl.store(maps_ptr + at, first + mean, mask=inside)
    tl.store(maps_ptr + at + pixels, square / channels, mask=inside)
    if HIGHER:
        tl.store(higher_ptr + at, third / channels, mask=inside)
        tl.store(higher_ptr + at + pixels, fourth / channels, mask=inside)


@triton.jit
def _moments_backward_kernel(
    x_ptr, maps_ptr, grad_ptr, base_ptr, out_ptr, total, pixels, channels, height, width,
    x_n, x_c, x_z, x_y, x_x, base_n, base_c, base_z, base_y, base_x, out_n, out_c, out_z, out_y, out_x,
    BASED: tl.constexpr, FLAT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    kind = maps_ptr.dtype.element_ty
    q = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = q < total
    mask = (c < channels)[:, None] & inside[None, :]
    n = (q // pixels).to(tl.int64)
    p = q % pixels
    c = c.to(tl.int64)[:, None]
    map_at = n * (2 * pixels) + p
    mean = tl.load(maps_ptr + map_at, mask=inside, other=0.0)
    grad_mean = tl.load(grad_ptr + map_at, mask=inside, other=0.0) / channels
    grad_var = tl.load(grad_ptr + map_at + pixels, mask=inside, other=0.0) * 2 / channels
    x_at = n * x_n + pixel_offset(p, height, width, x_z, x_y, x_x, FLAT)
    x = tl.load(x_ptr + x_at[None, :] + c * x_c, mask=mask, other=0.0).to(kind)
    grad = grad_mean[None, :] + grad_var[None, :] * (x - mean[None, :])
    if BASED:
        base_at = n * base_n + pixel_offset(p, height, width, base_z, base_y, base_x, FLAT)
        grad += tl.load(base_ptr + base_at[None, :] + c * base_c, mask=mask, other=0.0).to(kind)
    out_at = n * out_n + pixel_offset(p, height, width, out_z, out_y, out_x, FLAT)
    tl.store(out_ptr + out_at[None, :] + c * out_c, grad.to(out_ptr.dtype.element_ty), mask=mask)


def channel_moments(x: Tensor, higher: bool, wrap_triton=direct) -> tuple[Tensor, Tensor]:
    """Mean and variance over the channels of every pixel, and (empty unless wanted) third and fourth raw moments.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        higher: whether the third and fourth are wanted.

    Returns:
        two (N, 2, H, W) in float32 or better.
    """
    maps = torch.empty((x.shape[0], 2, *x.shape[2:]), device=x.device, dtype=accumulator(x.dtype))
    more = torch.empty_like(maps) if higher else maps.new_empty(0)
    total = maps.numel() // 2
    block_p, block_c = tile(total, x)
    _, height, width = spatial3(x)
    wrap_triton(_moments_kernel)[(triton.cdiv(total, block_p),)](
        x, maps, more if higher else maps, total, total // x.shape[0], x.shape[1], height, width, *strides5(x),
        HIGHER=higher, FLAT=is_flat(x), BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return maps, more


def channel_moments_backward(
    x: Tensor, maps: Tensor, grad: Tensor, base: Tensor | None = None, wrap_triton=direct
) -> Tensor:
    """The gradient of `channel_moments` for x, plus `base`, another gradient for x, in the same pass.

    Args:
        x: (N, C, H, W).
        maps: the mean and variance that `channel_moments` gave for it.
        grad: (N, 2, H, W), that of the mean and the variance, contiguous.
        base: (N, C, H, W) or None.
    """
    out = torch.empty_like(x)
    total = maps.numel() // 2
    added = x if base is None else base
    block_p, block_c = tile(total, x)
    _, height, width = spatial3(x)
    wrap_triton(_moments_backward_kernel)[(triton.cdiv(total, block_p), triton.cdiv(x.shape[1], block_c))](
        x, maps, grad, added, out, total, total // x.shape[0], x.shape[1], height, width,
        *strides5(x), *strides5(added), *strides5(out),
        BASED=base is not None, FLAT=is_flat(x, added, out), BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    return out
