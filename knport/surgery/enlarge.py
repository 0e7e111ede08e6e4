"""1x1 convolutions: larger kernels under which the map keeps its size and the old tap its place."""

from __future__ import annotations

import torch
from torch import Tensor

from knport.geometry import padding_pairs

_SIZES = {"2x2": 2, "3x3": 3}
Pairs = tuple[tuple[int, int], ...]


def target_size(enlarge: str) -> int | None:
    """Kernel size per side that `KNConfig.enlarge` asks for; None when kernels stay."""
    return _SIZES.get(enlarge)


def side_paddings(size: int, side: int) -> tuple[int, int]:
    """(before, after) per dimension that keeps the map size; an even kernel has its odd zero on one `side`, 0 or 1."""
    low = size // 2 if side == 0 else (size - 1) // 2
    return low, size - 1 - low


def enlarged_padding(conv: torch.nn.Module, size: int, side: int) -> Pairs:
    """Padding of the enlarged convolution: the old one plus what the larger kernel needs, for any stride."""
    before, after = side_paddings(size, side)
    old = padding_pairs(conv.padding, conv.kernel_size, conv.stride, conv.dilation)
    return tuple((b + before, a + after) for b, a in old)


def embed(weight: Tensor, size: int, side: int) -> Tensor:
    """A kernel of `size` per side that is zero but for the old 1x1 tap: the convolution's output stays the same.

    With `enlarged_padding` this holds for every stride, for odd and even maps. A channels-last weight stays one.

    Args:
        weight: (out, in / groups, 1, ...).
        size: of the new kernel.
        side: of `side_paddings`.
    """
    ndim = weight.dim() - 2
    tap, _ = side_paddings(size, side)
    large = weight.new_zeros(*weight.shape[:2], *(size,) * ndim)
    large[(slice(None), slice(None), *(tap,) * ndim)] = weight.reshape(weight.shape[:2])
    last = {2: torch.channels_last, 3: torch.channels_last_3d}.get(ndim)
    if last is not None and weight.stride(-1) == weight.shape[1]:  # all that tells the layouts of 1x1 kernels apart
        return large.contiguous(memory_format=last)
    return large
