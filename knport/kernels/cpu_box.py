"""Means over boxes of one-channel maps on CPUs: all maps at once, in a handful of calls, whatever the kernel.

On maps it is the calls that cost, and short rows. So the maps are laid one after the other in one stretch of memory,
with zeros between rows and between maps in which no box can see a neighbour. There a sum along a dimension is a sum of
shifted copies of the whole stretch: one call on an overlapping view, in long vectors. Where a map is small, a product
with the matrix of all its pixels takes fewer calls.

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

# Pixels times units of a map, from where on the zeros of the matrix cost more than the calls saved.
LARGEST_MATRIX = 2**12


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
    lead = shape[: -len(size)]
    if not exact and math.prod(line.pixels * line.units for line in lines) <= LARGEST_MATRIX:
        return _Product.of(lead, lines, channels * box.places)
    return _Shifts.of(lead, lines, channels * box.places)


class _Line(NamedTuple):
    """One dimension, seen as padded with zeros: pixel i lies at `first + i step`, unit o begins at `o stride` and has k
    places `dilation` apart. The transpose is another such line: pixels and units change places."""

    pixels: int
    first: int
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
    def end(self) -> int:
        """Where the padded line ends."""
        return (self.units - 1) * self.stride + self.dilation * (self.k - 1) + 1

    @property
    def seen(self) -> range:
        """The pixels that lie on it; negative padding crops."""
        return range(max(0, -(self.first // self.step)), min(self.pixels, (self.end - 1 - self.first) // self.step + 1))

    @property
    def begin(self) -> int:
        """Where the first pixel seen lies."""
        return self.first + self.seen.start * self.step

    @property
    def pitch(self) -> int:
        """The distance to the next line at which no unit sees its pixels, nor it this one's. They share zeros."""
        return max(self.end - self.begin, self.begin + (len(self.seen) - 1) * self.step + 1)

    def matrix(self) -> Tensor:
        """(pixels, units): 1 where a unit has a pixel, 0 elsewhere."""
        place = self.first + torch.arange(self.pixels)[:, None] * self.step - torch.arange(self.units) * self.stride
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
    def of(cls, lead: Sequence[int], lines: Sequence[_Line], entries: int) -> _Product:
        with torch.inference_mode(False), torch.device("cpu"):
            matrix = functools.reduce(torch.kron, [line.matrix() for line in lines]).div_(entries)
        return cls(matrix, (math.prod(lead), len(matrix)), (*lead, *(line.units for line in lines)))


class _Shifts(NamedTuple):
    """Sums of shifted copies of one stretch of memory."""

    length: int
    """Of the stretch."""
    crop: tuple[slice, ...] | None
    """The part of the maps that units see; None for all."""
    places: tuple[tuple[int, ...], tuple[int, ...], int]
    """Size, strides and offset of that part in the stretch."""
    shifts: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    """For each dimension, size and strides of its shifted copies, (k, length)."""
    result: tuple[tuple[int, ...], tuple[int, ...]]
    """Size and strides of (..., O, P) in the last sum."""
    entries: int
    """Of a unit, to divide by."""

    def __call__(self, maps: Tensor) -> Tensor:
        stretch = maps.new_zeros(self.length)
        stretch.as_strided(*self.places).copy_(maps if self.crop is None else maps[self.crop])
        for copies in self.shifts:
            stretch = stretch.as_strided(*copies).sum(0)
        return torch.div(stretch.as_strided(*self.result), self.entries)

    @classmethod
    def of(cls, lead: Sequence[int], lines: Sequence[_Line], entries: int) -> _Shifts:
        # how far apart pixels of the padded maps are in the stretch, dimension by dimension, the leading ones too
        pitches = [*lead[1:], *(line.pitch for line in lines), 1]
        apart = [math.prod(pitches[i:]) for i in range(len(lead) + len(lines))]
        of_maps, of_pixels = apart[: len(lead)], apart[len(lead) :]

        def last(sizes, strides) -> int:
            return sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))

        seen = (*lead, *(len(line.seen) for line in lines))
        of_seen = (*of_maps, *(line.step * d for line, d in zip(lines, of_pixels, strict=True)))
        begin = sum(line.begin * d for line, d in zip(lines, of_pixels, strict=True))
        units = (*lead, *(line.units for line in lines))
        of_units = (*of_maps, *(line.stride * d for line, d in zip(lines, of_pixels, strict=True)))

        length = last(units, of_units) + 1
        shifts = []
        for line, distance in zip(lines, of_pixels, strict=True):
            if line.k > 1:
                shifts.append(((line.k, length), (line.dilation * distance, 1)))
                length += line.dilation * distance * (line.k - 1)
        whole = all(len(line.seen) == line.pixels for line in lines)
        crop = None if whole else (..., *(slice(line.seen.start, line.seen.stop) for line in lines))
        length = max(length, begin + last(seen, of_seen) + 1)
        # the last dimension first: the stretch shrinks from sum to sum
        return cls(length, crop, (seen, of_seen, begin), tuple(reversed(shifts)), (units, of_units), entries)
