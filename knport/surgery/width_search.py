"""Find sizes for the widths of a model that give it a wanted count: one multiplier for all, then a few repairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knport.surgery.width_form import Form

ROUNDINGS = (8, 4, 2, 1)  # multiples of channels that wide groups are rounded to, the first that meets the target
_CLOSE = 0.1  # of the tolerance: no repair is worth a less uniform network from there on
_ROUNDS = 400


def search(form: Form, sizes: Tensor, blocks: Tensor, target: int, tolerance: float) -> tuple[Tensor, float]:
    """Sizes whose count is within `tolerance` of the target, or the nearest that were found, and their multiplier.

    Args:
        form: the count.
        sizes: of the widths now.
        blocks: how many channels a width stands for (a width of 3 in 32 groups: 32), for rounding.
        target: the wanted count.
        tolerance: relative, e.g. 0.005.
    """
    best = None
    for rounding in ROUNDINGS:
        steps = _steps(sizes, blocks, rounding)
        factor = _multiplier(form, sizes, steps, target)
        found = _repair(form, _scaled(sizes, steps, factor), steps, target, tolerance)
        gap = abs(form(found) - target)
        if best is None or gap < best[0]:
            best = gap, found, factor
        if gap <= tolerance * target:
            break
    return best[1], best[2]


def _steps(sizes: Tensor, blocks: Tensor, rounding: int) -> Tensor:
    """Per width the step that makes its channels multiples of `rounding`, or of less where that would be coarse."""
    steps = torch.ones_like(sizes)
    for i, (size, many) in enumerate(zip(sizes.tolist(), blocks.tolist(), strict=True)):
        for channels in (r for r in ROUNDINGS if r <= rounding):
            step = channels // math.gcd(channels, int(many))
            if size >= 8 * step or step == 1:
                steps[i] = step
                break
    return steps


def _scaled(sizes: Tensor, steps: Tensor, factor: float) -> Tensor:
    return torch.maximum((sizes * factor / steps).round() * steps, torch.ones_like(sizes))


def _multiplier(form: Form, sizes: Tensor, steps: Tensor, target: int) -> float:
    """The one factor whose rounded widths come nearest, by bisection: the count never falls as it grows."""
    low, high = 0.0, 1.0
    while form(_scaled(sizes, steps, high)) < target and high < 1024:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if form(_scaled(sizes, steps, middle)) < target else (low, middle)
    return min((low, high), key=lambda factor: abs(form(_scaled(sizes, steps, factor)) - target))


def _repair(form: Form, x: Tensor, steps: Tensor, target: int, tolerance: float) -> Tensor:
    """Move one width by one step, the one that closes most of the gap; where none does, two at once."""
    n = len(x)
    places = torch.arange(n).repeat(2)
    moves = torch.cat([steps, -steps])
    for _ in range(_ROUNDS):
        gap = target - form(x)
        if abs(gap) <= _CLOSE * tolerance * target:
            break
        legal = x[places] + moves >= 1
        one = (form.moves(x, places, moves) - gap).abs().masked_fill(~legal, math.inf)
        if one.numel() and one.min() < abs(gap):
            chosen = [int(one.argmin())]
        elif abs(gap) > tolerance * target and one.numel():
            two = (form.pairs(x, places, moves) - gap).abs()
            two = two.masked_fill(~(legal[:, None] & legal[None, :]), math.inf)
            two = two.masked_fill(places[:, None] == places[None, :], math.inf)
            if not two.min() < abs(gap):
                break
            chosen = [int(i) for i in divmod(int(two.argmin()), 2 * n)]
        else:
            break
        x = x.clone()
        for i in chosen:
            x[places[i]] += moves[i]
    return x
