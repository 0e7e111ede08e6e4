"""Means over boxes of one-channel maps on CPUs: products with banded matrices, whatever the kernel.

On maps it is the calls that cost, and sums of shifted maps are `k_h + k_w` calls, each on a view of its own. Two
products, down and across, take their place; where a map is small, one with the matrix of all its pixels.

Legend: C channels that the maps are sums over, H x W the maps' size, O x P the units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    ndim = len(box.kernel_size)
    product = _product(box, sums.shape, sums.shape[-ndim:], channels, False) if sums.dtype == torch.float32 else None
    if product is not None:
        return product(sums)
    return _by_images(sums / channels, ndim, box.mean)


def box_mean_backward(box: Box, grad: Tensor, size: Sequence[int], channels: int) -> Tensor:
    """The transpose of `box_mean`: (..., O, P) -> (..., H, W). size: (H, W)."""
    product = _product(box, grad.shape, size, channels, True) if grad.dtype == torch.float32 else None
    if product is not None:
        return product(grad)
    return _by_images(grad / channels, len(size), lambda maps: box.mean_backward(maps, size))


class _Product(NamedTuple):
    """left M right for every map M of a shape: what a call takes is looked up, not made."""

    left: Tensor | None
    """(R, O, H) for R maps; None where `right` is the matrix of whole maps, (H W, O P)."""
    right: Tensor
    """(W, P)"""
    between: tuple[int, ...]
    """The shape of M right, (R, H, P), or where `left` is None of the maps as rows, (R, H W)."""
    result: tuple[int, ...]
    """(..., O, P)"""

    def __call__(self, maps: Tensor) -> Tensor:
        if self.left is None:
            return torch.matmul(maps.reshape(self.between), self.right).view(self.result)
        return torch.bmm(self.left, torch.matmul(maps, self.right).view(self.between)).view(self.result)

    @classmethod
    def of(cls, shape: Sequence[int], left: Tensor, right: Tensor, whole: Tensor | None) -> _Product:
        """shape: (..., H, W); left: (O, H); right: (W, P); whole: (H W, O P) or None."""
        *maps, height, _ = shape
        units, width = len(left), right.shape[1]
        count, result = math.prod(maps), (*maps, units, width)
        if whole is not None:
            return cls(None, whole, (count, len(whole)), result)
        return cls(left.expand(count, -1, -1), right, (count, height, width), result)


def _by_images(maps: Tensor, ndim: int, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of (N, 1, H, W) on (..., H, W)."""
    result = function(maps.reshape(-1, 1, *maps.shape[-ndim:]))
    return result.view(*maps.shape[:-ndim], *result.shape[2:])


@functools.lru_cache(maxsize=2048)
def _product(
    box: Box, shape: tuple[int, ...], size: tuple[int, ...], channels: int, transposed: bool
) -> _Product | None:
    """`box_mean`, or if `transposed` its transpose, of tensors of this shape; None where sums of shifted maps serve
    better. size: (H, W), of the maps that means are taken of."""
    if not _suits(size):
        return None
    with torch.inference_mode(False), torch.device("cpu"):
        down, across = _bands(box, size, channels)
        if transposed:
            down, across = down.t(), across.t()
        return _Product.of(shape, down, across.t(), _whole(down, across))


def _suits(size: Sequence[int]) -> bool:
    return len(size) == 2 and max(size) <= LARGEST_BAND


def _bands(box: Box, size: Sequence[int], channels: int) -> tuple[Tensor, Tensor]:
    """(O, H), divided by the channels too, and (P, W)."""
    down, across = zip(*box, strict=True)
    return _band(size[0], *down, channels), _band(size[1], *across, 1)


@functools.lru_cache(maxsize=512)
def _band(length: int, k: int, stride: int, pair: tuple[int, int], dilation: int, divisor: int) -> Tensor:
    """(units, length): 1 / (k divisor) where a unit of this dimension has a pixel, 0 elsewhere."""
    before, after = pair
    units = (length + before + after - dilation * (k - 1) - 1) // stride + 1
    first = torch.arange(units)[:, None] * stride - before
    place = torch.arange(length) - first  # of each pixel within each unit
    inside = (place >= 0) & (place % dilation == 0) & (place // dilation < k)
    return inside.float() / (k * divisor)


def _whole(down: Tensor, across: Tensor) -> Tensor | None:
    """(H W, O P) from (O, H) and (P, W), where maps are small enough."""
    if down.numel() * across.numel() > LARGEST_WHOLE:
        return None
    return torch.kron(down, across).t().contiguous()
