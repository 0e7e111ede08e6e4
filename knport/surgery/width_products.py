"""What functions with weights do to axes: convolutions, linear layers, matrix products, attention, norms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor

from knport.surgery.width_basics import Rule, argument, common, spatial, tensors
from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow


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
    batch = [common(flow, (a, b), out, dim) for dim in range(-out.dim(), -2)]
    return [[*batch, *_product(flow, math.prod(out.shape[:-2]), rows, columns, inner)]]


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


PRODUCTS: dict[str, Rule] = {
    "linear": _linear,
    "conv1d conv2d conv3d": _conv,
    "matmul bmm rmatmul": _matmul,
    "scaled_dot_product_attention": _attention,
    "batch_norm instance_norm": _channel_norm,
    "group_norm": _group_norm,
    "layer_norm rms_norm": _last_norm,
    "prelu": _prelu,
}
