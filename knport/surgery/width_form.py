"""Numbers of parameters and of multiply-accumulates as quadratic forms in the widths of a model."""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from knport.surgery.widths import Axis, Widths

Terms = list[tuple[int, tuple[Axis, ...]]]  # a number times the channels of each axis


class Form:
    """count(x) = x' Q x + b' x + c for the sizes x of the widths that may change.

    Built once from the terms of a model; evaluating it takes a few matrix products, exact in float64 below 2^53.

    Args:
        widths: the solved widths.
        free: those that may change, in the order of x.
        terms: products of at most two axes that may change, times a number.
    """

    def __init__(self, widths: Widths, free: list[int], terms: Terms):
        self.free, self._place = free, {width: i for i, width in enumerate(free)}
        n = len(free)
        self.q, self.b = (torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64))
        self.c = 0.0
        for times, axes in terms:
            self._add(times, [self._linear(widths, axis) for axis in axes])
        self.q = (self.q + self.q.T) / 2

    def _linear(self, widths: Widths, axis: Axis) -> tuple[Tensor | None, int]:
        """An axis as (how often each free width stands in it, or None; its fixed part)."""
        counted, fixed = Counter(widths.resolve(axis)), 0
        vector = torch.zeros(len(self.free), dtype=torch.float64)
        for width, times in counted.items():
            if width in self._place:
                vector[self._place[width]] = times
            else:
                fixed += times * widths.size[width]
        return (vector if vector.any() else None), fixed

    def _add(self, times: int, factors: list[tuple[Tensor | None, int]]) -> None:
        """times * prod(v_i . x + k_i): the factors without v are numbers, and at most two have one."""
        number = times * math.prod(k for v, k in factors if v is None)
        loose = [(v, k) for v, k in factors if v is not None]
        if not loose:
            self.c += number
        elif len(loose) == 1:
            self.b += number * loose[0][0]
            self.c += number * loose[0][1]
        else:
            (v, k), (w, m) = loose
            self.q += number * torch.outer(v, w)
            self.b += number * (m * v + k * w)
            self.c += number * k * m

    def __call__(self, x: Tensor) -> int:
        """The count at the sizes `x`."""
        return round(float(x @ self.q @ x + self.b @ x + self.c))

    def moves(self, x: Tensor, places: Tensor, steps: Tensor) -> Tensor:
        """What the count changes by when ``x[places[i]] += steps[i]``, one move at a time."""
        slope = 2 * self.q @ x + self.b
        return steps * slope[places] + steps**2 * self.q.diagonal()[places]

    def pairs(self, x: Tensor, places: Tensor, steps: Tensor) -> Tensor:
        """Likewise for every two moves made together."""
        one = self.moves(x, places, steps)
        both = 2 * self.q[places][:, places] * torch.outer(steps, steps)
        return one[:, None] + one[None, :] + both


def count(widths: Widths, terms: Terms, sizes: dict[int, int] | None = None) -> int:
    """The sum of the terms at the widths' present sizes, or with the `sizes` of some changed."""
    return sum(times * math.prod(widths.total(axis, sizes) for axis in axes) for times, axes in terms)
