"""Find sizes for the widths of a model that give it a wanted count: one multiplier for all, then a few repairs."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from knport.surgery.width_form import Form

ROUNDINGS = (8, 4, 2, 1)  # multiples of channels that wide groups are rounded to, the first that meets the target
_CLOSE = 0.1  # of the tolerance: no repair is worth a less uniform network from there on
_ROUNDS = 400
_REACH = 3  # steps that a width may move at once when two move together


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
    """Move one width by one step, the one that closes most of the gap; where none does, two widths by a few."""
    one, more = _moves(steps, 1), _moves(steps, _REACH)
    for _ in range(_ROUNDS):
        gap = target - form(x)
        if abs(gap) <= _CLOSE * tolerance * target:
            break
        chosen = _best_move(form, x, *one, gap)
        if chosen is None and abs(gap) > tolerance * target:
            chosen = _best_pair(form, x, *more, gap)
        if chosen is None:
            break
        x = chosen
    return x


def _moves(steps: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """(place, change) of every move by up to `reach` steps up or down."""
    sizes = [sign * n * steps for n in range(1, reach + 1) for sign in (1, -1)]
    return torch.arange(len(steps)).repeat(len(sizes)), torch.cat(sizes)


def _best_move(form: Form, x: Tensor, places: Tensor, moves: Tensor, gap: int) -> Tensor | None:
    left = (form.moves(x, places, moves) - gap).abs().masked_fill(x[places] + moves < 1, math.inf)
    if not left.numel() or left.min() >= abs(gap):
        return None
    best = left.argmin()
    return x.index_add(0, places[best, None], moves[best, None])


def _best_pair(form: Form, x: Tensor, places: Tensor, moves: Tensor, gap: int) -> Tensor | None:
    illegal = x[places] + moves < 1
    wrong = illegal[:, None] | illegal[None, :] | (places[:, None] == places[None, :])
    left = (form.pairs(x, places, moves) - gap).abs().masked_fill(wrong, math.inf)
    if not left.numel() or left.min() >= abs(gap):
        return None
    best = torch.stack(torch.unravel_index(left.argmin(), left.shape))
    return x.index_add(0, places[best], moves[best])
