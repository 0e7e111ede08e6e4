"""Means over boxes of one-channel maps on CPUs: products with banded matrices, whatever the kernel.

On maps it is the calls that cost, and sums of shifted maps are `k_h + k_w` calls, each on a view of its own. Two
products, down and across, take their place; where a map is small, one with the matrix of all its pixels.

Legend: C channels that the maps are sums over, H x W the maps' size, O x P the units.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from knport.geometry import Box

# From here on the zeros of the matrices cost more than the calls saved: pixels along a side, pixels times units.
LARGEST_BAND = 128
LARGEST_WHOLE = 2**12


def box_mean(box: Box, sums: Tensor, channels: int) -> Tensor:
    """The mean over every unit of what was summed over channels: (..., H, W) -> (..., O, P).

    Exact sums (float64) and large maps are left to `Box.mean`.
    """
    size = sums.shape[-len(box.kernel_size) :]
    if not _suits(sums.dtype, size):
        return _by_images(sums / channels, size, box.mean)
    down, across = _bands(box, size, channels)
    if down.numel() * across.numel() <= LARGEST_WHOLE:
        units = sums.reshape(-1, size[0] * size[1]) @ _whole(box, size, channels)
    else:
        units = _product(down, sums, across.t())
    return units.view(*sums.shape[:-2], len(down), len(across))


def box_mean_backward(box: Box, grad: Tensor, size: Sequence[int], channels: int) -> Tensor:
    """The transpose of `box_mean`: (..., O, P) -> (..., H, W). size: (H, W)."""
    units = grad.shape[-len(size) :]
    if not _suits(grad.dtype, size):
        return _by_images(grad / channels, units, lambda maps: box.mean_backward(maps, size))
    down, across = _bands(box, size, channels)
    if down.numel() * across.numel() <= LARGEST_WHOLE:
        pixels = grad.reshape(-1, units[0] * units[1]) @ _whole(box, size, channels).t()
    else:
        pixels = _product(down.t(), grad, across)
    return pixels.view(*grad.shape[:-2], *size)


def _suits(dtype: torch.dtype, size: Sequence[int]) -> bool:
    return dtype == torch.float32 and len(size) == 2 and max(size) <= LARGEST_BAND


def _by_images(maps: Tensor, size: Sequence[int], function) -> Tensor:
    """`function` of (N, 1, H, W) on (..., H, W)."""
    result = function(maps.reshape(-1, 1, *size))
    return result.view(*maps.shape[: -len(size)], *result.shape[2:])


def _product(down: Tensor, maps: Tensor, across: Tensor) -> Tensor:
    """(O, H), (..., H, W) and (W, P) -> (N, O, P), N all that is in front."""
    height, width = maps.shape[-2:]
    wide = (maps.reshape(-1, width) @ across).view(-1, height, across.shape[1])
    return torch.bmm(down.expand(len(wide), -1, -1), wide)


def _bands(box: Box, size: Sequence[int], channels: int) -> tuple[Tensor, Tensor]:
    """(O, H), divided by the channels too, and (P, W)."""
    down, across = zip(*box, strict=True)
    return _band(size[0], *down, channels), _band(size[1], *across, 1)


@functools.lru_cache(maxsize=512)
def _band(length: int, k: int, stride: int, pair: tuple[int, int], dilation: int, divisor: int) -> Tensor:
    """(units, length): 1 / (k divisor) where a unit of this dimension has a pixel, 0 elsewhere."""
    before, after = pair
    units = (length + before + after - dilation * (k - 1) - 1) // stride + 1
    with torch.inference_mode(False), torch.device("cpu"):
        first = torch.arange(units)[:, None] * stride - before
        place = torch.arange(length) - first  # of each pixel within each unit
        inside = (place >= 0) & (place % dilation == 0) & (place // dilation < k)
        return inside.float() / (k * divisor)


@functools.lru_cache(maxsize=512)
def _whole(box: Box, size: tuple[int, int], channels: int) -> Tensor:
    """(H W, O P)"""
    with torch.inference_mode(False), torch.device("cpu"):
        return torch.kron(*_bands(box, size, channels)).t().contiguous()
