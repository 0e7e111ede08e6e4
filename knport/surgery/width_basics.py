"""What the rules of `width_rules` share: tensors among the arguments, broadcasting, dimensions that keep their size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow

# (the axes of every tensor so far, arguments, keyword arguments, result) -> the axes of every tensor of the result
Rule = Callable[["Flow", tuple, dict, Any], list[list[Axis]]]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor of a nested value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def argument(args: tuple, kwargs: dict, place: int, *names: str, default: Any = None) -> Any:
    """An argument by position or by any of its names."""
    if len(args) > place:
        return args[place]
    return next((kwargs[name] for name in names if name in kwargs), default)


def fixed_like(flow: Flow, out: Any) -> list[list[Axis]]:
    """Axes that cannot change, of the sizes that were seen."""
    return [[flow.widths.fixed(size) for size in tensor.shape] for tensor in tensors(out)]


def elementwise(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    """Broadcasting: dimensions of the same size are equal."""
    given = tensors((args, kwargs))
    return [[common(flow, given, tensor, dim) for dim in range(-tensor.dim(), 0)] for tensor in tensors(out)]


def common(flow: Flow, given: Sequence[Tensor], out: Tensor, dim: int) -> Axis:
    """The axis of dimension `dim` (from the end) of a result that all tensors of its size there share."""
    size = out.shape[dim]
    axes = [flow.axes(t)[dim] for t in given if t.dim() >= -dim and t.shape[dim] == size]
    if not axes:
        return flow.widths.fixed(size)
    for axis in axes[1:]:
        flow.widths.equate(axes[0], axis)
    return axes[0]


def spatial(flow: Flow, axes: Sequence[Axis], shape: Sequence[int], new_shape: Sequence[int]) -> list[Axis]:
    """Dimensions that keep their size keep their axis; others are new and fixed."""
    found = []
    for axis, size, new in zip(axes, shape, new_shape, strict=True):
        if size != new:
            flow.widths.freeze(axis, "a width along which something is pooled or convolved")
        found.append(axis if size == new else flow.widths.fixed(new))
    return found
