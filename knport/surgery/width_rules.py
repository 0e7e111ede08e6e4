"""What each torch function does to the axes of the tensors it is given; a function that is not here fixes them.

A rule takes the `Flow` (the axes of every tensor so far), the function's arguments and its result, and gives one list
of axes per tensor of the result. Letters: N images, C channels, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils import _pytree as pytree

from knport.surgery.width_views import merge, reshape
from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow

Rule = Callable[["Flow", tuple, dict, Any], list[list[Axis]]]
SUMS = frozenset({"add", "iadd", "radd", "sub", "isub", "rsub"})
_ELEMENTWISE = (
    "add iadd radd sub isub rsub subtract mul imul rmul multiply div truediv itruediv rtruediv true_divide divide "
    "floordiv floor_divide remainder mod pow ipow rpow neg abs absolute sqrt rsqrt square exp expm1 log log1p log2 "
    "reciprocal sign round floor ceil sin cos tan erf sigmoid tanh relu relu6 gelu silu hardswish hardtanh hardsigmoid "
    "leaky_relu elu celu selu mish softplus swish hard_swish hard_sigmoid hard_mish logsigmoid log_sigmoid softsign "
    "softmax log_softmax clamp clip clamp_min clamp_max threshold addcmul addcdiv lerp where masked_fill maximum "
    "minimum eq ne lt le gt ge logical_and logical_or logical_not isnan nan_to_num dropout dropout1d dropout2d "
    "dropout3d alpha_dropout feature_dropout drop_path stochastic_depth bernoulli contiguous clone to float half "
    "bfloat16 double type type_as detach requires_grad roll flip cumsum normalize zeros_like ones_like rand_like "
    "randn_like empty_like full_like data fill zero copy hypot rrelu"
)
_VIEWS = "view reshape flatten unflatten squeeze unsqueeze view_as reshape_as ravel"
_REDUCTIONS = "mean sum amax amin max min var std var_mean std_mean prod logsumexp argmax argmin norm any all"
_POOLS = (
    "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d lp_pool1d lp_pool2d interpolate "
    "upsample"
)


def rule_of(name: str) -> Rule | None:
    """The rule of a function by its name without the marks of methods and in-place forms."""
    return _RULES.get(name)


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
    return [[_common(flow, given, tensor, dim) for dim in range(-tensor.dim(), 0)] for tensor in tensors(out)]


def _common(flow: Flow, given: Sequence[Tensor], out: Tensor, dim: int) -> Axis:
    size = out.shape[dim]
    axes = [flow.axes(t)[dim] for t in given if t.dim() >= -dim and t.shape[dim] == size]
    if not axes:
        return flow.widths.fixed(size)
    for axis in axes[1:]:
        flow.widths.equate(axes[0], axis)
    return axes[0]


def _view(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    return [reshape(flow.widths, flow.axes(args[0]), args[0].shape, out.shape)]


def _reduce(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    if len(tensors(args)) > 1:
        return elementwise(flow, args, kwargs, out)
    axes, x = flow.axes(args[0]), args[0]
    place = 2 if flow.name in ("norm",) else 1
    dims = argument(args, kwargs, place, "dim", "axis")
    gone = {d % x.dim() for d in ((dims,) if isinstance(dims, int) else dims or range(x.dim()))}
    results = []
    for tensor in tensors(out):
        kept = tensor.dim() == x.dim()
        one = [flow.widths.fixed(1) if i in gone else axis for i, axis in enumerate(axes)]
        results.append(one if kept else [axis for i, axis in enumerate(axes) if i not in gone])
    return results


def _pool(flow: Flow, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
    x = argument(args, kwargs, 0, "input")
    return [spatial(flow, flow.axes(x), x.shape, tensor.shape) for tensor in tensors(out)]


def spatial(flow: Flow, axes: Sequence[Axis], shape: Sequence[int], new_shape: Sequence[int]) -> list[Axis]:
    """Dimensions that keep their size keep their axis; others are new and fixed."""
    found = []
    for axis, size, new in zip(axes, shape, new_shape, strict=True):
        if size != new:
            flow.widths.freeze(axis, "a width along which something is pooled or convolved")
        found.append(axis if size == new else flow.widths.fixed(new))
    return found


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
    axes = [_common(flow, given, out, d - out.dim()) if d != dim else () for d in range(out.dim())]
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


def _linear(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    bias = argument(args, kwargs, 2, "bias")
    after, before = flow.axes(weight)
    flow.kernels.add(id(weight))
    flow.widths.equate(flow.axes(x)[-1], before)
    if bias is not None:
        flow.widths.equate(flow.axes(bias)[0], after)
    flow.count(math.prod(out.shape[:-1]), before, after)
    return [[*flow.axes(x)[:-1], after]]


def _conv(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x, weight = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "weight")
    bias, groups = argument(args, kwargs, 2, "bias"), argument(args, kwargs, 6, "groups", default=1)
    after, before = flow.axes(weight)[:2]
    channels = flow.axes(x)[1]
    flow.kernels.add(id(weight))
    if groups > 1 and weight.shape[1] == 1 and groups == x.shape[1]:  # depthwise
        flow.widths.equate(after, channels * (weight.shape[0] // groups))
    else:
        flow.widths.equate(channels, before * groups)
        if groups > 1:
            flow.widths.equate(after, (flow.widths.new(weight.shape[0] // groups),) * groups)
    for kernel in flow.axes(weight)[2:]:
        flow.widths.freeze(kernel, "")
    if bias is not None:
        flow.widths.equate(flow.axes(bias)[0], after)
    flow.count(out.shape[0] * math.prod(out.shape[2:]) * math.prod(weight.shape[2:]), before, after)
    rest = spatial(flow, flow.axes(x)[2:], x.shape[2:], out.shape[2:])
    return [[flow.axes(x)[0], after, *rest]]


def _matmul(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    a, b = args[0], argument(args, kwargs, 1, "other", "mat2")
    if a.dim() < 2 or b.dim() < 2:
        return flow.unknown(args, kwargs, out)
    (*_, rows, inner), (*_, inner_b, columns) = flow.axes(a), flow.axes(b)
    flow.widths.equate(inner, inner_b)
    batch = [_common_batch(flow, (a, b), out, dim) for dim in range(-out.dim(), -2)]
    return [[*batch, *_product(flow, math.prod(out.shape[:-2]), rows, columns, inner)]]


def _common_batch(flow: Flow, given: Sequence[Tensor], out: Tensor, dim: int) -> Axis:
    return _common(flow, [t for t in given if t.dim() >= -dim], out, dim)


def _product(flow: Flow, count: int, rows: Axis, columns: Axis, inner: Axis) -> list[Axis]:
    """MACs of a matrix product of activations; where three widths would multiply, one is fixed."""
    axes = [rows, columns, inner]
    loose = [axis for axis in axes if not flow.widths.is_fixed(axis)]
    if len(loose) > 2:
        flow.widths.freeze(loose.pop(), "a product of three widths")
    solid = [axis for axis in axes if flow.widths.is_fixed(axis)]
    flow.count(count * math.prod(flow.widths.total(axis) for axis in solid), *loose)
    return [rows, columns]


def _attention(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    q, k, v = args[:3]
    for tensor in (q, k, v):
        flow.widths.freeze(flow.axes(tensor)[-1], "attention heads")
    positions = math.prod(q.shape[:-1]) * k.shape[-2]
    flow.count(positions * (q.shape[-1] + v.shape[-1]))
    return [[*flow.axes(q)[:-1], flow.axes(v)[-1]]]


def _channel_norm(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x = argument(args, kwargs, 0, "input")
    return _affine(flow, x, 1, args, kwargs)


def _group_norm(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    x, groups = argument(args, kwargs, 0, "input"), argument(args, kwargs, 1, "num_groups")
    flow.widths.equate(flow.axes(x)[1], (flow.widths.new(x.shape[1] // groups),) * groups)
    return _affine(flow, x, 1, args, kwargs)


def _last_norm(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    return _affine(flow, argument(args, kwargs, 0, "input"), -1, args, kwargs)


def _affine(flow: Flow, x: Tensor, dim: int, args: tuple, kwargs: dict) -> list[list[Axis]]:
    axes = flow.axes(x)
    for tensor in tensors((args, kwargs)):
        if tensor is not x and tensor.dim() == 1 and tensor.numel() == x.shape[dim]:
            flow.widths.equate(flow.axes(tensor)[0], axes[dim])
        elif tensor is not x:
            flow.widths.freeze(axes[dim], "a norm over several dimensions")
    return [list(axes)]


def _prelu(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    if args[1].numel() > 1:
        flow.widths.equate(flow.axes(args[0])[1], flow.axes(args[1])[0])
    return [list(flow.axes(args[0]))]


def _pixel_shuffle(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes, factor = list(flow.axes(args[0])), (args[0].shape[-3] // out.shape[-3])
    common = (flow.widths.new(out.shape[-3]),)
    flow.widths.equate(axes[-3], tuple(w for w in common for _ in range(factor)))
    return [[*axes[:-3], common, *(flow.widths.fixed(s) for s in out.shape[-2:])]]


def _pixel_unshuffle(flow: Flow, args: tuple, kwargs: dict, out: Tensor) -> list[list[Axis]]:
    axes, factor = list(flow.axes(args[0])), (out.shape[-3] // args[0].shape[-3])
    many = tuple(w for w in flow.widths.resolve(axes[-3]) for _ in range(factor))
    return [[*axes[:-3], many, *(flow.widths.fixed(s) for s in out.shape[-2:])]]


_FAMILIES: dict[str, Rule] = {
    _ELEMENTWISE: elementwise,
    _VIEWS: _view,
    _REDUCTIONS: _reduce,
    _POOLS: _pool,
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
    "linear": _linear,
    "conv1d conv2d conv3d": _conv,
    "matmul bmm rmatmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "batch_norm instance_norm": _channel_norm,
    "group_norm": _group_norm,
    "layer_norm rms_norm": _last_norm,
    "prelu": _prelu,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
}
_RULES: dict[str, Rule] = {name: rule for names, rule in _FAMILIES.items() for name in names.split()}
