"""What the Triton kernels share: where units lie, how pixels are tiled, and how a kernel is launched.

Every kernel sees a map as (N, C, Z, Y, X) with any strides; one and two spatial dimensions have Z = 1 (and Y = 1).
Sums, statistics and the arithmetic between load and store are in float32 at least, in float64 for float64 inputs.

Legend: a pixel is one (n, z, y, x), a unit one (n, o_z, o_y, o_x); rows are stacked one-channel maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knport.geometry import Box, output_size

# How much of the GPU one launch should fill before its tiles grow: programs, about two for each processor of an H200.
_ENOUGH_PROGRAMS = 256
_TILE = 4096


def direct(kernel):
    """The launch outside of `torch.library.triton_op`: of the kernel itself."""
    return kernel


class Box3(NamedTuple):
    """Where the units lie, as `knport.geometry.Box`, always in three spatial dimensions, and how many."""

    size: tuple[int, int, int]
    kernel_size: tuple[int, int, int]
    stride: tuple[int, int, int]
    padding: tuple[int, int, int]
    """Before the input; what comes after it shows in `units`. Negative where windows crop."""
    dilation: tuple[int, int, int]
    units: tuple[int, int, int]

    @classmethod
    def of(cls, size: Sequence[int], box: Box) -> Box3:
        kernel_size, stride, pairs, dilation = box
        units = output_size(size, *box)
        before = [pair[0] for pair in pairs]
        fill = [1] * (3 - len(size))
        zeros = [0] * (3 - len(size))
        three = [(*fill, *values) for values in (size, kernel_size, stride)]
        return cls(*three, (*zeros, *before), (*fill, *dilation), (*fill, *units))

    @property
    def places(self) -> int:
        return math.prod(self.kernel_size)

    def flat(self) -> list[int]:
        """As a list of integers, which is what operators take; `Box3.unflat` is its inverse."""
        return [value for triple in self for value in triple]

    @classmethod
    def unflat(cls, values: Sequence[int]) -> Box3:
        return cls(*(tuple(values[i : i + 3]) for i in range(0, 18, 3)))


def strides5(x: Tensor) -> tuple[int, int, int, int, int]:
    """The strides of (N, C, spatial...) seen as (N, C, Z, Y, X)."""
    batch, channel, *spatial = x.stride()
    return (batch, channel, *[0] * (3 - len(spatial)), *spatial)


def spatial3(x: Tensor) -> tuple[int, int, int]:
    return (*[1] * (5 - x.dim()), *x.shape[2:])


def is_flat(*tensors: Tensor) -> bool:
    """Whether one stride leads through the pixels of each tensor, so that no kernel must take them apart."""
    for x in tensors:
        *_, z, y, step = strides5(x)
        depth, height, width = spatial3(x)
        if (height > 1 and y != width * step) or (depth > 1 and z != height * width * step):
            return False
    return True


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def power_of_two(n: int, most: int) -> int:
    """The smallest power of two that is at least n, but at most `most`."""
    power = 1
    while power < n and power < most:
        power *= 2
    return power


def tile(pixels: int, x: Tensor) -> tuple[int, int]:
    """Pixels and channels that one program holds at a time, the dimension that is contiguous in memory first served.

    Programs walk all the channels of their pixels, so it is the pixels that fill the GPU: few of them, small tiles.
    """
    channels = x.shape[1]
    block_c = power_of_two(channels, 128 if x.stride(1) == 1 else 32)
    block_p = power_of_two(pixels, max(_TILE // block_c, 16))
    while block_p > 16 and pixels < block_p * _ENOUGH_PROGRAMS:
        block_p //= 2
    return block_p, block_c


def draw_seed(x: Tensor) -> Tensor:
    """A seed for the Philox generators in the kernels, drawn on x's device from torch's generator there.

    So `torch.manual_seed`, activation checkpointing and graph capture hold for the kernels too, and no value has to
    travel to the CPU.
    """
    return torch.randint(0, 2**62, (1,), device=x.device, dtype=torch.int64)
