"""Mean and variance of every unit without unfolding (Nasirigerdeh et al., TMLR 2024, Eq. 1-4).

A unit is the C x k_1 x .. x k_d block under one kernel position of the padded input, n = C k_1 .. k_d its size.
The moments of all units are box filters of one-channel maps, so their cost does not grow with the kernel.

Dropout enters through the unit that the statistics are taken of, never through the unit that is normalized. With u the
unit, b the kept entries and u' = u b / (1 - p), the layer needs mu' = mean(u') and var' = var(u'):

    "shared"    one mask on the padded input, shared by overlapping units (the published KNConv)
    "unit"      an independent mask for every unit (Eq. 1, the published KernelNorm)
    "moments"   (mu', var') drawn from the Gaussian that has the moments of "unit"; needs one-channel noise only
    "expected"  E[mu'] and E[var'], deterministic: evaluation on the scale of training

Legend: N images, C channels, H, W any number of spatial dimensions, O, P the output's; maps are (N, 1, H, W).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.errors import UnknownName
from knport.geometry import Pairs, output_size, pad
from knport.kernels import (
    SMALLEST_GAUSSIAN_UNIT,
    Draw,
    channel_moments,
    draw,
    drawn_statistics,
    higher_moments,
)

DROPOUT_FORMS = ("shared", "unit", "moments", "expected")

_AVERAGE_POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def full_precision(x: Tensor):
    """The context in which autocast lets the arithmetic on `x` be."""
    # The meta device has no autocast to switch off.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


class UnitStatistics(NamedTuple):
    """The statistics of every unit, each (N, 1, O, P) in float32 or better."""

    mean: Tensor
    """mu': after dropout."""
    var: Tensor
    """var': after dropout, biased."""
    full_mean: Tensor
    """mu: of all the entries; the same object as `mean` where dropout does not move it."""


def unit_statistics(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Pairs,
    dilation: Sequence[int],
    *,
    dropout: float = 0.0,
    dropout_form: str = "moments",
    padding_mode: str = "zeros",
    drawn: Draw | None = None,
) -> UnitStatistics:
    """Mean and biased variance of every unit.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        kernel_size, stride, dilation: one int per spatial dimension.
        padding: one (before, after) pair per spatial dimension; zeros that it adds belong to the units.
        dropout: probability p with which an entry is left out of the statistics.
        dropout_form: how, see the module's docstring. Units of fewer than 64 entries draw masks for "moments" too.
        padding_mode: as in `torch.nn.Conv2d`.
        drawn: what "moments" drew before, to use it again.
    """
    if dropout_form not in DROPOUT_FORMS:
        raise UnknownName("dropout_form", dropout_form, DROPOUT_FORMS)
    box = _Box(x.shape[2:], kernel_size, stride, padding, dilation, padding_mode)
    n = x.shape[1] * math.prod(kernel_size)
    if dropout_form == "moments" and n < SMALLEST_GAUSSIAN_UNIT:
        dropout_form = "shared"
    gaussian = dropout > 0 and dropout_form == "moments"
    with full_precision(x):
        mean, var = _combine(channel_moments(x), box)
        if not dropout:
            return UnitStatistics(mean, var, mean)
        if dropout_form == "expected":
            var = (var * (1 - dropout / n) + mean.square() * (dropout * (1 - 1 / n))) / (1 - dropout)
            return UnitStatistics(mean, var, mean)
        if gaussian:
            if drawn is None:
                third, fourth = box(box.pad(higher_moments(x))).split(1, 1)
                drawn = draw(torch.addcmul(var, mean, mean), third, fourth, dropout, n)
            return UnitStatistics(*drawn_statistics(mean, var, drawn), mean)
        if dropout_form == "shared":
            dropped, dropped_var = _combine(channel_moments(F.dropout(x, dropout)), box)
        else:
            dropped, dropped_var = _unit_masks(x, box, dropout)
        # Dropout may leave a flat unit untouched but for its scale: var' = 0 beside a shifted mean, a quotient in the
        # hundreds (one flat RGB unit in four at p = 0.05). The shift that dropout causes is at most one SD.
        return UnitStatistics(dropped, torch.maximum(dropped_var, (dropped - mean).square()), mean)


def unit_mean(x: Tensor, kernel_size, stride, padding: Pairs, dilation, *, padding_mode: str = "zeros") -> Tensor:
    """The mean of every unit, (N, 1, O, P), in float32 or better. Arguments as `unit_statistics`."""
    box = _Box(x.shape[2:], kernel_size, stride, padding, dilation, padding_mode)
    with full_precision(x):
        return box(box.pad(x.mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))))


# Windows of more pixels PyTorch's compiler leaves to the operator, a read for each pixel; one dimension after the other
# they are fused, and 7 x 7 take 14 reads.
LARGEST_FUSED = 25


class _Box:
    """The mean over the spatial part of every unit, for maps of any number of channels."""

    def __init__(self, size, kernel_size, stride, padding, dilation, padding_mode):
        self.kernel_size, self.stride, self.dilation = tuple(kernel_size), tuple(stride), tuple(dilation)
        self.padding, self.padding_mode = padding, padding_mode
        self.size = output_size(size, kernel_size, stride, padding, dilation)

    def pad(self, maps: Tensor) -> Tensor:
        return pad(maps, self.padding, self.padding_mode)

    def __call__(self, maps: Tensor) -> Tensor:
        """(N, K, H, W), already padded -> (N, K, O, P)."""
        ndim = len(self.kernel_size)
        if max(self.dilation) == 1:
            if max(self.kernel_size) == 1 and max(self.stride) == 1:
                return maps
            return self._pooled(maps)
        flat = maps.flatten(0, 1).unsqueeze(1)  # (N, K, H, W) -> (N K, 1, H, W)
        ones = maps.new_full((1, 1, *self.kernel_size), 1 / math.prod(self.kernel_size))
        means = _CONVOLVE[ndim](flat, ones, stride=self.stride, dilation=self.dilation)
        return means.squeeze(1).unflatten(0, maps.shape[:2])

    def _pooled(self, maps: Tensor) -> Tensor:
        """The mean where no pixel of the kernel is left out."""
        ndim = len(self.kernel_size)
        pool = _AVERAGE_POOL[ndim]
        if math.prod(self.kernel_size) <= LARGEST_FUSED:
            return pool(maps, self.kernel_size, self.stride)
        for dim in range(ndim):
            k, s = ([of[dim] if i == dim else 1 for i in range(ndim)] for of in (self.kernel_size, self.stride))
            maps = pool(maps, k, s)
        return maps

    def positions(self, x: Tensor):
        """For each place in the kernel, the entries of all units at that place: (N, C, O, P)."""
        for offset in itertools.product(*map(range, self.kernel_size)):
            where = [
                slice(o * d, o * d + s * (size - 1) + 1, s)
                for o, d, s, size in zip(offset, self.dilation, self.stride, self.size, strict=True)
            ]
            yield x[(slice(None), slice(None), *where)]


def _combine(maps: Tensor, box: _Box) -> tuple[Tensor, Tensor]:
    """Channel means and variances per pixel (N, 2, H, W) -> mean and variance of every unit.

    Two levels, the variance within the pixels plus the variance between them. The second is taken about a point near
    the mean, since E[u^2] - mu^2 would cancel on inputs with a large mean, and is 0 where it is lost in rounding: a
    constant unit has variance 0 (up to rounding of the first level), a unit of zeros has mean 0 as well, exactly.
    """
    # of the input, not of the padding: zeros beside a large mean would move the point away from it
    shift = maps[:, :1].detach().mean(dim=tuple(range(1, maps.dim())), keepdim=True)
    between, within = box.pad(maps).chunk(2, 1)
    shifted = between - shift
    mean, shifted, square, within = box(torch.cat([between, shifted, shifted.square(), within], 1)).chunk(4, 1)
    spread = square - shifted.square()
    return mean, within + torch.where(spread > 8 * torch.finfo(square.dtype).eps * square, spread, 0.0)


def _unit_masks(x: Tensor, box: _Box, p: float) -> tuple[Tensor, Tensor]:
    places = math.prod(box.kernel_size)
    total = total_square = 0.0
    for entries in box.positions(box.pad(x)):
        kept = F.dropout(entries, p).to(torch.promote_types(x.dtype, torch.float32))
        total = total + kept.mean(1, keepdim=True)
        total_square = total_square + kept.square().mean(1, keepdim=True)
    mean = total / places
    return mean, (total_square / places - mean.square()).clamp_min(0)
