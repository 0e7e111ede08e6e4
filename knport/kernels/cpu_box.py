"""Means over boxes of one-channel maps on CPUs: all maps at once, in a handful of calls, whatever the kernel.

On maps it is the calls that cost, and short rows. So the memory of all maps, padded, is seen as one long vector. There
a sum along a dimension is a sum of shifted copies of the whole: one call on an overlapping view. What reaches from one
row into the next is no unit's, and left out at the end. Where a map is small, a product with the matrix of all its
pixels takes fewer calls.

Legend: C channels that the maps are sums over, H x W the maps' size (any number of dimensions), O x P the units.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from knport.geometry import Box
from knport.kernels import cpu

# Pixels times units of a map, from where on the zeros of the matrix cost more than the calls saved.
LARGEST_MATRIX = 2**15


def box_mean(box: Box, sums: Tensor, channels: int) -> Tensor:
    """The mean over every unit of what was summed over channels: (..., H, W) -> (..., O, P).

    In float64 that of a constant is the constant, to the last digit.
    """
    exact = sums.dtype == torch.float64
    return _mean(box, sums.shape, sums.shape[-len(box.kernel_size) :], channels, False, exact)(sums)


def box_mean_backward(box: Box, grad: Tensor, size: Sequence[int], channels: int) -> Tensor:
    """The transpose of `box_mean`: (..., O, P) -> (..., H, W). size: (H, W)."""
    return _mean(box, grad.shape, size, channels, True, grad.dtype == torch.float64)(grad)


@functools.lru_cache(maxsize=2048)
def _mean(
    box: Box, shape: tuple[int, ...], size: tuple[int, ...], channels: int, transposed: bool, exact: bool
) -> _Product | _Shifts:
    """`box_mean`, or if `transposed` its transpose, of tensors of this shape: what a call takes is looked up, not made.
    size: (H, W), of the maps that means are taken of."""
    lines = [_Line.of(*line, transposed) for line in zip(size, *box, strict=True)]
    lead = tuple(shape[: -len(size)])
    if not exact and math.prod(line.pixels * line.units for line in lines) <= LARGEST_MATRIX:
        return _Product.of(lead, lines, channels * box.places)
    return _Shifts.of(lead, lines, channels * box.places)


class _Line(NamedTuple):
    """One dimension, padded with zeros: pixel i lies at `before + i step`, unit o begins at `o stride` and has k places
    `dilation` apart. The transpose is another such line: pixels and units change places."""

    pixels: int
    before: int
    step: int
    units: int
    stride: int
    k: int
    dilation: int

    @classmethod
    def of(cls, length: int, k: int, stride: int, pair: tuple[int, int], dilation: int, transposed: bool) -> _Line:
        before, after = pair
        reach = dilation * (k - 1)
        units = (length + before + after - reach - 1) // stride + 1
        if transposed:
            return cls(units, reach - before, stride, length, 1, k, dilation)
        return cls(length, before, 1, units, stride, k, dilation)

    @property
    def spread(self) -> int:
        """From the first pixel to the last."""
        return (self.pixels - 1) * self.step + 1

    @property
    def padded(self) -> int:
        """To where the last unit ends."""
        return (self.units - 1) * self.stride + self.dilation * (self.k - 1) + 1

    def matrix(self) -> Tensor:
        """(pixels, units): 1 where a unit has a pixel, 0 elsewhere."""
        place = self.before + torch.arange(self.pixels)[:, None] * self.step - torch.arange(self.units) * self.stride
        return ((place >= 0) & (place % self.dilation == 0) & (place // self.dilation < self.k)).float()


class _Product(NamedTuple):
    """Maps as rows, times one matrix."""

    matrix: Tensor
    """(H W, O P)"""
    rows: tuple[int, int]
    """The shape of the maps as rows, (R, H W)."""
    result: tuple[int, ...]
    """(..., O, P)"""

    def __call__(self, maps: Tensor) -> Tensor:
        return torch.matmul(maps.reshape(self.rows), self.matrix).view(self.result)

    @classmethod
    def of(cls, lead: tuple[int, ...], lines: Sequence[_Line], entries: int) -> _Product:
        with torch.inference_mode(False), torch.device("cpu"):
            matrix = functools.reduce(torch.kron, [line.matrix() for line in lines]).div_(entries)
        return cls(matrix, (math.prod(lead), len(matrix)), (*lead, *(line.units for line in lines)))


class _Shifts(NamedTuple):
    """Sums of shifted copies of one stretch of memory, that of all padded maps."""

    between: tuple[tuple[int, ...], tuple[slice, ...]] | None
    """The size of maps (..., H, W) with zeros between their pixels, and where the pixels are; None without."""
    pairs: tuple[int, ...]
    """The padding, as `F.pad` takes it; negative numbers crop."""
    shifts: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """For each dimension, size and strides of its shifted copies, (k, length) or (k, ..., O, W)."""
    result: tuple[tuple[int, ...], tuple[int, ...]]
    """Size and strides of (..., O, P) in the last sum."""
    entries: int
    """Of a unit, to divide by."""

    def __call__(self, maps: Tensor) -> Tensor:
        if self.between is not None:
            size, pixels = self.between
            spread = maps.new_zeros(size)
            spread[pixels] = maps
            maps = spread
        sums = torch.constant_pad_nd(maps, self.pairs)
        for copies in self.shifts:
            sums = sums.as_strided(*copies).sum(0)
        return torch.div(sums.as_strided(*self.result), cpu.number(self.entries, sums.dtype))

    @classmethod
    def of(cls, lead: tuple[int, ...], lines: Sequence[_Line], entries: int) -> _Shifts:
        sizes = [*lead, *(line.padded for line in lines)]
        numbered = list(enumerate(lines, len(lead)))
        shifts = []
        for dim, line in numbered[:-1]:
            if line.stride > 1:  # rows that no unit begins with are left out at once
                distance = math.prod(sizes[dim + 1 :])
                copies = (line.k, math.prod(sizes[:dim]), line.units, distance)
                apart = (line.dilation * distance, sizes[dim] * distance, line.stride * distance, 1)
                shifts.append((copies, apart))
                sizes[dim] = line.units
        strides, length = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))], math.prod(sizes)
        for dim, line in reversed(numbered):
            if sizes[dim] == line.padded:
                distance = line.dilation * strides[dim]
                length -= distance * (line.k - 1)
                strides[dim] *= line.stride
                if line.k > 1:
                    shifts.append(((line.k, length), (distance, 1)))
        between = None
        if max(line.step for line in lines) > 1:
            pixels = (..., *(slice(None, None, line.step) for line in lines))
            between = (*lead, *(line.spread for line in lines)), pixels
        # F.pad starts at the last dimension
        pairs = [p for line in reversed(lines) for p in (line.before, line.padded - line.before - line.spread)]
        result = (*lead, *(line.units for line in lines)), tuple(strides)
        return cls(between, tuple(pairs), tuple(shifts), result, entries)
