"""Layers as steps of their own: how the axes of what they read, hold and make go together, and what states them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from knport.surgery.kinds import kind
from knport.surgery.width_basics import fixed_like, spatial
from knport.surgery.widths import Axis

if TYPE_CHECKING:
    from knport.surgery.channel_groups import Flow


def is_layer(module: nn.Module) -> bool:
    """Whether `layer_axes` knows the module: convolutions, linear layers, torch's norms and knport's layers."""
    known = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(module, known) or kind(module) == "kn_norm"


def layer_axes(flow: Flow, path: str, module: nn.Module, x: Tensor, out: Tensor) -> list[Axis]:
    """Axes of what the layer at `path` makes of `x`; its parameters and attributes are tied to them."""
    if isinstance(module, _ConvTransposeNd):
        for axis in (flow.axes(x)[1], *flow.axes(module.weight)):
            flow.widths.freeze(axis, f"transposed convolution {path}")
        return fixed_like(flow, out)[0]
    if isinstance(module, _ConvNd):
        return _conv(flow, path, module, x, out)
    if isinstance(module, nn.Linear):
        return _linear(flow, path, module, x, out)
    return _norm(flow, path, module, x)


def _linear(flow: Flow, path: str, module: nn.Linear, x: Tensor, out: Tensor) -> list[Axis]:
    after, before = flow.axes(module.weight)
    flow.kernels.add(id(module.weight))
    flow.widths.equate(flow.axes(x)[-1], before)
    _vectors(flow, module, after)
    flow.state(path, in_features=before, out_features=after)
    flow.count(math.prod(out.shape[:-1]), before, after)
    flow.layers[path] = after
    return [*flow.axes(x)[:-1], after]


def _conv(flow: Flow, path: str, module: _ConvNd, x: Tensor, out: Tensor) -> list[Axis]:
    axes, batched = flow.axes(x), x.dim() == module.weight.dim()
    channel = 1 if batched else 0
    before, (after, inner, *kernel) = axes[channel], flow.axes(module.weight)
    for axis in kernel:
        flow.widths.freeze(axis, "")
    flow.kernels.add(id(module.weight))
    groups = _grouped(flow, module, before, after, inner)
    _vectors(flow, module, after)
    flow.state(path, in_channels=before, out_channels=after, **({"groups": groups} if groups else {}))
    batch = x.shape[0] if batched else 1
    positions = batch * math.prod(out.shape[channel + 1 :]) * math.prod(module.kernel_size)
    flow.count(positions, inner, after)
    flow.layers[path] = after
    rest = spatial(flow, axes[channel + 1 :], x.shape[channel + 1 :], out.shape[channel + 1 :])
    return [*axes[:channel], after, *rest]


def _grouped(flow: Flow, module: _ConvNd, before: Axis, after: Axis, inner: Axis) -> Axis | None:
    """Tie the channels of a convolution; the axis that its `groups` states where that may change."""
    groups, many = module.groups, module.out_channels // module.groups
    if module.weight.shape[1] == 1 and groups > 1:  # depthwise: a group is a channel
        flow.widths.equate(after, tuple(w for w in flow.widths.resolve(before) for _ in range(many)))
        return before
    if groups == 1 or flow.keep_groups:
        flow.widths.equate(before, inner * groups)
        if groups > 1:
            flow.widths.equate(after, (flow.widths.new(many),) * groups)
        return None
    flow.widths.freeze(inner, "")
    number = (flow.widths.new(groups),)
    flow.widths.equate(before, number * module.weight.shape[1])
    flow.widths.equate(after, number * many)
    return number


def _norm(flow: Flow, path: str, module: nn.Module, x: Tensor) -> list[Axis]:
    axes = flow.axes(x)
    if kind(module) == "kn_norm":
        return list(axes)
    last = isinstance(module, nn.LayerNorm | nn.RMSNorm) and "2d" not in type(module).__name__
    channels = axes[-1] if last else axes[1]
    if isinstance(module, nn.GroupNorm):
        size = module.num_channels // module.num_groups
        flow.widths.equate(channels, (flow.widths.new(size),) * module.num_groups)
        flow.state(path, num_channels=channels)
    elif isinstance(module, _NormBase):
        flow.state(path, num_features=channels)
    elif len(module.normalized_shape) == 1:
        flow.state(path, normalized_shape=channels)
    else:
        for axis in axes[-len(module.normalized_shape) :]:
            flow.widths.freeze(axis, f"{path} normalizes several dimensions")
        return list(axes)
    _vectors(flow, module, channels)
    return list(axes)


def _vectors(flow: Flow, module: nn.Module, axis: Axis) -> None:
    """Biases, gains and running statistics: vectors of the layer's own channels."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor is not module.weight or tensor.dim() == 1:
            if tensor.dim() == 1 and tensor.shape[0] == flow.widths.total(axis):
                flow.widths.equate(flow.axes(tensor)[0], axis)
            elif tensor.numel() > 1:
                flow.widths.freeze(axis, f"a parameter of {type(module).__name__} of another shape")


def keeps_groups(model: nn.Module) -> bool:
    """Whether grouped convolutions keep their number of groups, or else the width of a group: what the network itself
    holds constant (ResNeXt: 32 groups everywhere; RegNet: groups of 8 channels everywhere)."""
    grouped = [m for m in model.modules() if isinstance(m, _ConvNd) and m.groups > 1 and m.weight.shape[1] > 1]
    numbers, sizes = Counter(m.groups for m in grouped), Counter(m.weight.shape[1] for m in grouped)
    return len(numbers) <= 1 or len(sizes) > 1
