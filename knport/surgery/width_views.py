"""Axes through reshapes: which old dimensions become which new ones, and what that asks of the widths in them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from knport.surgery.widths import Axis, Widths

_LONGEST = 1 << 14  # parts of one axis; more come from flattening large maps, which is no width to search


def reshape(widths: Widths, axes: Sequence[Axis], shape: Sequence[int], new_shape: Sequence[int]) -> list[Axis]:
    """Axes of a tensor of `new_shape` that holds a tensor of `shape` in the same order (view, flatten, squeeze).

    A dimension that is split, (N, C, ...) -> (N, g, C/g, ...), keeps its number of blocks: the last factor is taken to
    be the one that follows the width. Where the code has that factor as a literal number, running the resized network
    shows it.
    """
    found: list[Axis | None] = [None if size != 1 else widths.fixed(1) for size in new_shape]
    old = [(axis, size) for axis, size in zip(axes, shape, strict=True) if size != 1]
    new = [(i, size) for i, size in enumerate(new_shape) if size != 1]
    while old:
        block, places = [old.pop(0)], [new.pop(0)]
        while (have := math.prod(s for _, s in block)) != (want := math.prod(s for _, s in places)):
            if have < want:
                block.append(old.pop(0))
            else:
                places.append(new.pop(0))
        parts = _block(widths, [axis for axis, _ in block], [size for _, size in places])
        for (i, _), part in zip(places, parts, strict=True):
            found[i] = part
    return found


def _block(widths: Widths, axes: list[Axis], sizes: list[int]) -> list[Axis]:
    if len(axes) == len(sizes) == 1:
        return axes
    if all(widths.is_fixed(axis) for axis in axes):
        return [widths.fixed(size) for size in sizes]
    if len(sizes) == 1:
        return [merge(widths, axes)]
    if len(axes) == 1:
        return split(widths, axes[0], sizes)
    for axis in axes:
        widths.freeze(axis, "a reshape across several dimensions")
    return [widths.fixed(size) for size in sizes]


def merge(widths: Widths, axes: Sequence[Axis]) -> Axis:
    """One dimension out of several: each part of the one that may change, as often as the others say."""
    merged, count = (), 1
    for axis in axes:
        axis, size = widths.resolve(axis), widths.total(axis)
        if widths.is_fixed(axis):
            merged, count = tuple(w for w in merged for _ in range(size)), count * (1 if merged else size)
        elif not merged and count * len(axis) <= _LONGEST:
            merged = axis * count
        else:
            return _give_up(widths, axes)
        if len(merged) > _LONGEST:
            return _give_up(widths, axes)
    return merged


def _give_up(widths: Widths, axes: Sequence[Axis]) -> Axis:
    for axis in axes:
        widths.freeze(axis, "flattened together with another width or a large map")
    return widths.fixed(math.prod(widths.total(axis) for axis in axes))


def split(widths: Widths, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """Several dimensions out of one. What was merged before comes apart again; else blocks of a common width."""
    axis = widths.resolve(axis)
    for place, size in enumerate(sizes):
        outer, inner = math.prod(sizes[:place]), math.prod(sizes[place + 1 :])
        if len(axis) % (outer * inner) == 0:
            core = axis[: len(axis) // outer : inner]
            if widths.total(core) == size and tuple(w for w in core for _ in range(inner)) * outer == axis:
                return [core if i == place else widths.fixed(s) for i, s in enumerate(sizes)]
    core = (widths.new(sizes[-1]),)
    widths.equate(axis, core * math.prod(sizes[:-1]))
    return [*(widths.fixed(s) for s in sizes[:-1]), widths.resolve(core)]
