"""Where the units lie: kernel sizes, strides and paddings of one to three spatial dimensions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from knport.errors import KNPortError

Pairs = tuple[tuple[int, int], ...]


def ntuple(value: int | Sequence[int], ndim: int, name: str, *, minimum: int = 1) -> tuple[int, ...]:
    """`value` as one int per spatial dimension, or an error that names the argument."""
    values = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(values) != ndim or not all(isinstance(v, int) and v >= minimum for v in values):
        raise KNPortError(
            f"{name}={value!r}; expected an int >= {minimum}, or {ndim} of them (one per spatial dimension)"
        )
    return values


def padding_pairs(padding, kernel_size: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """Any padding that `torch.nn.ConvNd` takes, or pairs, as one (before, after) pair per spatial dimension.

    ``padding=((top, bottom), (left, right))`` is the asymmetric form in two dimensions. The published layers order
    theirs (left, right, top, bottom) and read a 2-tuple as (width, height): swap when loading their settings.
    """
    ndim = len(kernel_size)
    if padding == "valid":
        return ((0, 0),) * ndim
    if padding == "same":
        if any(s != 1 for s in stride):
            raise KNPortError(f"padding='same' with stride={tuple(stride)}; it is defined for stride 1 only")
        total = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    if isinstance(padding, int):
        padding = (padding,) * ndim
    if isinstance(padding, str) or len(padding) != ndim:
        raise _bad_padding(padding, ndim)
    pairs = tuple((p, p) if isinstance(p, int) else tuple(p) for p in padding)
    if any(len(pair) != 2 or not all(isinstance(p, int) and p >= 0 for p in pair) for pair in pairs):
        raise _bad_padding(padding, ndim)
    return pairs


def _bad_padding(padding, ndim: int) -> KNPortError:
    pairs = "((top, bottom), (left, right))" if ndim == 2 else f"{ndim} pairs (before, after)"
    return KNPortError(
        f"padding={padding!r}; expected a non-negative int, {ndim} of them (one per spatial dimension), "
        f"{pairs}, 'same' or 'valid'"
    )


def window_pairs(pairs: Pairs, kernel_size, dilation, window) -> Pairs:
    """The padding under which windows of size `window` share their centres with the dilated kernel's positions.

    Entries are negative where the window is smaller than the kernel; `pad` then crops.
    """
    moved = []
    for (before, after), k, d, w in zip(pairs, kernel_size, dilation, window, strict=True):
        extra = w - (d * (k - 1) + 1)
        moved.append((before + extra // 2, after + extra - extra // 2))
    return tuple(moved)


def pad(x: Tensor, pairs: Pairs, mode: str = "zeros") -> Tensor:
    """Pad (or, for negative entries, crop) the trailing spatial dimensions of `x`."""
    if all(pair == (0, 0) for pair in pairs):
        return x
    flat = [p for pair in reversed(pairs) for p in pair]  # F.pad starts at the last dimension
    return F.pad(x, flat) if mode == "zeros" else F.pad(x, flat, mode=mode)


def output_size(size: Sequence[int], kernel_size, stride, pairs: Pairs, dilation) -> tuple[int, ...]:
    """Kernel positions per spatial dimension; an error when the kernel does not fit into the padded input."""
    sizes = []
    for length, k, s, (before, after), d in zip(size, kernel_size, stride, pairs, dilation, strict=True):
        sizes.append((length + before + after - d * (k - 1) - 1) // s + 1)
    if any(n < 1 for n in sizes):
        raise KNPortError(
            f"spatial size {tuple(size)} with padding {pairs} is smaller than the kernel {tuple(kernel_size)} "
            f"(dilation {tuple(dilation)}); use a larger input, more padding or a smaller kernel"
        )
    return tuple(sizes)


class Box(NamedTuple):
    """Where units lie, one entry per spatial dimension, and the mean over the spatial part of each."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: Pairs
    dilation: tuple[int, ...]

    @property
    def places(self) -> int:
        """Pixels of a unit."""
        return math.prod(self.kernel_size)

    def mean(self, maps: Tensor) -> Tensor:
        """(N, R, H, W) -> (N, R, O, P), one dimension after the other: (k_h - 1) + (k_w - 1) sums of maps."""
        maps = pad(maps, self.padding)
        for dim, (k, s, d) in enumerate(zip(self.kernel_size, self.stride, self.dilation, strict=True), 2):
            # Rows are left out before the sum, pixels of a row after it: sums of every other pixel are no faster.
            first, then = (1, s) if dim == maps.dim() - 1 else (s, 1)
            reach = maps.shape[dim] - d * (k - 1)
            total = _every(maps, dim, 0, reach, first)
            for i in range(1, k):
                total = total + _every(maps, dim, i * d, reach, first)
            maps = _every(total, dim, 0, total.shape[dim], then)
        return maps / self.places

    def mean_backward(self, grad: Tensor, size: Sequence[int]) -> Tensor:
        """(N, R, O, P) -> (N, R, H, W), the transpose of `mean`. size: (H, W)."""
        grad = grad / self.places
        for dim in range(grad.dim() - 1, 1, -1):
            k, s, d = self.kernel_size[dim - 2], self.stride[dim - 2], self.dilation[dim - 2]
            shape = list(grad.shape)
            shape[dim] = size[dim - 2] + sum(self.padding[dim - 2])
            spread = grad.new_zeros(shape)
            for i in range(k):
                _every(spread, dim, i * d, (grad.shape[dim] - 1) * s + 1, s).add_(grad)
            grad = spread
        return pad(grad, tuple((-before, -after) for before, after in self.padding))


def _every(maps: Tensor, dim: int, start: int, length: int, step: int) -> Tensor:
    if step == 1:
        return maps.narrow(dim, start, length)
    return maps[(slice(None),) * dim + (slice(start, start + length, step),)]
