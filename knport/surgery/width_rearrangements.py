"""What functions that rearrange tensors do to axes: permute, concatenate, cut into pieces, repeat, pad, shuffle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from knport.surgery.width_basics import Rule, argument, common, elementwise, tensors
from knport.surgery.width_views import merge, reshape
from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow


def _view(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    return [reshape(flow.widths, flow.axes(args[0]), args[0].shape, out.shape)]


def _permute(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    order = args[1:] if len(args) > 1 else (kwargs.get("dims"),)
    order = order[0] if len(order) == 1 and not isinstance(order[0], int) else order
    axes = flow.axes(args[0])
    return [[axes[d] for d in order]]


def _transpose(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes = list(flow.axes(args[0]))
    if len(axes) > 1:
        a, b = (
            argument(args, kwargs, 1, "dim0", "axis0", default=-2),
            argument(args, kwargs, 2, "dim1", "axis1", default=-1),
        )
        axes[a], axes[b] = axes[b], axes[a]
    return [axes]


def _movedim(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes = list(flow.axes(args[0]))
    source, target = argument(args, kwargs, 1, "source"), argument(args, kwargs, 2, "destination")
    if not (isinstance(source, int) and isinstance(target, int)):
        return flow.unknown(args, kwargs, out)
    axis = axes.pop(source)
    axes.insert(target % out.dim(), axis)
    return [axes]


def _cat(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    given = [t for t in argument(args, kwargs, 0, "tensors") if t.dim() == out.dim()]
    dim = argument(args, kwargs, 1, "dim", "axis", default=0) % out.dim()
    pieces = [flow.axes(t)[dim] for t in given]
    axes = [common(flow, given, out, d - out.dim()) if d != dim else () for d in range(out.dim())]
    axes[dim] = tuple(w for piece in pieces for w in flow.widths.resolve(piece))
    if len(pieces) > 1:
        flow.widths.mark(axes[dim], "concatenation")
    return [axes]


def _stack(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    given = argument(args, kwargs, 0, "tensors")
    dim = argument(args, kwargs, 1, "dim", default=0) % out.dim()
    axes = elementwise(flow, tuple(given), {}, given[0])[0]
    return [[*axes[:dim], flow.widths.fixed(len(given)), *axes[dim:]]]


def _pieces(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    """chunk, split: pieces of one size share a width (the number of pieces stays); others are widths of their own."""
    dim = argument(args, kwargs, 2, "dim", default=0)
    axes, sizes = flow.axes(args[0]), [t.shape[dim] for t in out]
    dim = dim % len(axes)
    if flow.widths.is_fixed(axes[dim]):
        pieces = [flow.widths.fixed(size) for size in sizes]
    else:
        flow.widths.mark(axes[dim], "concatenation")
        if len(set(sizes)) == 1 and not _aligned(flow, axes[dim], sizes[0]):
            common = (flow.widths.new(sizes[0]),)
            flow.widths.equate(axes[dim], common * len(sizes))
        pieces = flow.widths.cut(axes[dim], sizes)
    return [[*axes[:dim], piece, *axes[dim + 1 :]] for piece in pieces]


def _aligned(flow: Flow, axis: Axis, size: int) -> bool:
    """Whether every boundary of pieces of `size` falls between two parts of the axis."""
    ends, end = set(), 0
    for width in flow.widths.resolve(axis):
        end += flow.widths.size[width]
        ends.add(end)
    return all(boundary in ends for boundary in range(size, end + 1, size))


def _unbind(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    axes = list(flow.axes(args[0]))
    dim = argument(args, kwargs, 1, "dim", default=0) % len(axes)
    flow.widths.freeze(axes[dim], "unbound one by one")
    return [axes[:dim] + axes[dim + 1 :] for _ in out]


def _getitem(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    x, index = args
    if not isinstance(x, Tensor):
        return flow.unknown(args, kwargs, out)
    index = index if isinstance(index, tuple) else (index,)
    if not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in index):
        return flow.unknown(args, kwargs, out)
    given = sum(1 for i in index if isinstance(i, int | slice))
    if Ellipsis not in index:
        index = (*index, Ellipsis)
    at = index.index(Ellipsis)
    index = (*index[:at], *(slice(None),) * (x.dim() - given), *index[at + 1 :])
    axes, sizes, found = iter(flow.axes(x)), iter(x.shape), []
    for i in index:
        if i is None:
            found.append(flow.widths.fixed(1))
        elif isinstance(i, int):
            next(axes), next(sizes)
        else:
            found.append(_slice(flow, next(axes), next(sizes), i))
    return [found]


def _slice(flow: Flow, axis: Axis, size: int, part: slice) -> Axis:
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return axis
    if step != 1 or stop <= start or flow.widths.is_fixed(axis):
        flow.widths.freeze(axis, "taken apart by a slice with steps")
        return flow.widths.fixed(len(range(start, stop, step)))
    flow.widths.mark(axis, "concatenation")
    sizes = [length for length in (start, stop - start, size - stop) if length]
    return flow.widths.cut(axis, sizes)[1 if start else 0]


def _expand(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x = args[0]
    other = [t for t in tensors((args[1:], kwargs)) if t.shape == out.shape]
    axes = []
    for dim in range(-out.dim(), 0):
        if x.dim() >= -dim and x.shape[dim] == out.shape[dim]:
            axes.append(flow.axes(x)[dim])
        else:
            axes.append(flow.axes(other[0])[dim] if other else flow.widths.fixed(out.shape[dim]))
    return [axes]


def _repeat(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x, axes = args[0], []
    for dim in range(-out.dim(), 0):
        if x.dim() < -dim:
            axes.append(flow.widths.fixed(out.shape[dim]))
        else:
            times = flow.widths.fixed(out.shape[dim] // x.shape[dim])
            axes.append(merge(flow.widths, [times, flow.axes(x)[dim]]))
    return [axes]


def _pad(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x, pads = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "pad")
    axes = list(flow.axes(x))
    for i in range(len(pads) // 2):  # from the last dimension on
        axis, before, after = axes[-1 - i], pads[2 * i], pads[2 * i + 1]
        if before or after:
            if flow.widths.is_fixed(axis) or min(before, after) < 0:
                flow.widths.freeze(axis, "cropped by a fixed amount")
                axes[-1 - i] = flow.widths.fixed(out.shape[-1 - i])
                continue
            flow.widths.mark(axis, "concatenation")
            ends = [flow.widths.fixed(n, "zero padding of channels") if n else () for n in (before, after)]
            axes[-1 - i] = (*ends[0], *axis, *ends[1])
    return [axes]


def _pixel_shuffle(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes, factor = list(flow.axes(args[0])), (args[0].shape[-3] // out.shape[-3])
    common = (flow.widths.new(out.shape[-3]),)
    flow.widths.equate(axes[-3], tuple(w for w in common for _ in range(factor)))
    return [[*axes[:-3], common, *(flow.widths.fixed(s) for s in out.shape[-2:])]]


def _pixel_unshuffle(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes, factor = list(flow.axes(args[0])), (out.shape[-3] // args[0].shape[-3])
    many = tuple(w for w in flow.widths.resolve(axes[-3]) for _ in range(factor))
    return [[*axes[:-3], many, *(flow.widths.fixed(s) for s in out.shape[-2:])]]


REARRANGEMENTS: dict[str, Rule] = {
    "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel": _view,
    "permute": _permute,
    "transpose swapaxes swapdims t T mT adjoint": _transpose,
    "movedim moveaxis": _movedim,
    "cat concat concatenate": _cat,
    "stack": _stack,
    "chunk split tensor_split": _pieces,
    "unbind": _unbind,
    "getitem": _getitem,
    "expand expand_as broadcast_to": _expand,
    "repeat tile": _repeat,
    "pad": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
