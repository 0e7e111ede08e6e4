"""Means over boxes of one-channel maps on CPUs: two products with banded matrices, whatever the kernel.

On maps it is the calls that cost, and sums of shifted maps are `k_h + k_w` calls, each on a view of its own.

Legend: N images, R maps of each, H x W their size, O x P the units.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from knport.geometry import Box

# From here on the zeros of the matrices cost more than the calls saved.
LARGEST = 128


def box_mean(box: Box, maps: Tensor) -> Tensor:
    """As `Box.mean`: (N, R, H, W) -> (N, R, O, P). Exact sums (float64) and large maps are left to it."""
    if not _suits(maps.dtype, maps.shape[2:]):
        return box.mean(maps)
    down, across = _bands(box, maps.shape[2:])
    return _product(down, maps, across.t())


def box_mean_backward(box: Box, grad: Tensor, size: Sequence[int]) -> Tensor:
    """As `Box.mean_backward`: (N, R, O, P) -> (N, R, H, W). size: (H, W)."""
    if not _suits(grad.dtype, size):
        return box.mean_backward(grad, size)
    down, across = _bands(box, size)
    return _product(down.t(), grad, across)


def _suits(dtype: torch.dtype, size: Sequence[int]) -> bool:
    return dtype == torch.float32 and len(size) == 2 and max(size) <= LARGEST


def _product(down: Tensor, maps: Tensor, across: Tensor) -> Tensor:
    """(O, H), (N, R, H, W) and (W, P) -> (N, R, O, P)."""
    count, rank, height, width = maps.shape
    wide = (maps.reshape(-1, width) @ across).view(count * rank, height, -1)
    return torch.bmm(down.expand(count * rank, -1, -1), wide).view(count, rank, len(down), -1)


def _bands(box: Box, size: Sequence[int]) -> list[Tensor]:
    return [_band(length, *along) for length, *along in zip(size, *box, strict=True)]


@functools.lru_cache(maxsize=1024)
def _band(length: int, k: int, stride: int, pair: tuple[int, int], dilation: int) -> Tensor:
    """(units, length): 1 / k where a unit of this dimension has a pixel, 0 elsewhere."""
    before, after = pair
    units = (length + before + after - dilation * (k - 1) - 1) // stride + 1
    with torch.inference_mode(False), torch.device("cpu"):
        first = torch.arange(units)[:, None] * stride - before
        place = torch.arange(length) - first  # of each pixel within each unit
        inside = (place >= 0) & (place % dilation == 0) & (place // dilation < k)
        return inside.float() / k
