"""KNConv as one differentiable operation: four passes over full-size tensors beside the convolution's own.

    forward     x -> moments of every pixel;    y = (c - delta sum(W)) rstd + b
    backward    dy, c -> dc, d rstd, d delta, db;    dx += constant + slope x

with c the convolution and all between on one-channel maps (Nasirigerdeh et al., TMLR 2024, Eq. 5). Kept for the
backward pass: x, c - delta sum(W), whose memory that pass uses again for dc, and one-channel maps. A stem, whose x is
images and needs no gradient, keeps x and maps only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import Function

from knport.geometry import Box, Pairs, pad
from knport.kernels import cpu
from knport.kernels.cpu_units import (
    Statistics,
    Units,
    differentiable,
    draw_of,
    keep,
    kept,
    statistics,
    statistics_backward,
)


def kn_conv(x: Tensor, weight: Tensor, bias: Tensor | None, how: Units, formula: Callable) -> Tensor:
    """Convolve kernel normalized units.

    Args:
        x: (N, C, H, W), float32 on a CPU, as all tensors here.
        weight: (C_out, C / groups, k_h, k_w).
        bias: (C_out,) or None.
        how: geometry, eps and dropout; the dropout form is "moments" or "expected".
        formula: (x, weight, bias, how, drawn=) -> y, the same by differentiable operators, for the second derivative.
    """
    requires_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    if requires_grad and torch.is_grad_enabled():
        return _KNConv.apply(x, weight, bias, how, formula)
    with cpu.without_autograd():
        of_units, _, shifted = _forward(x, weight, how)
        return cpu.scale_and_shift(shifted, of_units.rstd, bias, inplace=True)


def _forward(x: Tensor, weight: Tensor, how: Units) -> tuple[Statistics, Tensor, Tensor]:
    """The statistics, the sums of the filters (C_out, 1, 1, 1), and c - delta sum(W)."""
    of_units = statistics(x, how, weight.numel() if how.groups == 1 else None)
    sums = filter_sums(weight)
    convolved = _convolve(x, _centred(weight, sums) if of_units.centred else weight, how)
    if of_units.offset is None:
        return of_units, sums, convolved
    return of_units, sums, cpu.subtract_outer(convolved, of_units.offset, sums.view(-1), inplace=True)


class _KNConv(Function):
    @staticmethod
    def forward(ctx, x, weight, bias, how, formula):
        with cpu.without_autograd():
            of_units, sums, shifted = _forward(x, weight, how)
            ctx.how, ctx.formula = how, formula
            of_x = ctx.needs_input_grad[0]  # only the gradient of the statistics asks for the convolution again
            keep(ctx, of_units, x, weight, bias, shifted if of_x else None, sums)
            return cpu.scale_and_shift(shifted, of_units.rstd, bias, inplace=not of_x)

    @staticmethod
    def backward(ctx, grad):
        of_units, (x, weight, bias, shifted, sums) = kept(ctx)
        how, wanted = ctx.how, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            y = ctx.formula(x, weight, bias, how, drawn=draw_of(of_units))
            return *differentiable(y, (x, weight, bias), grad, wanted), None, None
        with cpu.without_autograd():
            filters = _centred(weight, sums) if of_units.centred else weight
            if shifted is None:
                grads = None, *_backward_of_images(grad, of_units, x, filters, bias, sums, how, wanted)
            else:
                grads = _backward(grad, of_units, x, filters, bias, shifted, sums, how, wanted)
            return *grads, None, None


def _backward(grad, of_units: Statistics, x, filters, bias, shifted, sums, how: Units, wanted):
    """The gradients of x, weight and bias; the memory of `shifted` is used again where nobody will ask for it."""
    grad_convolved, grad_rstd, grad_offset, along_offset, grad_bias = cpu.scale_and_shift_backward(
        grad, shifted, of_units.rstd, of_units.offset, sums.view(-1), bias is not None, inplace=not _graph_is_kept()
    )
    grad_x, grad_weight = _convolve_backward(grad_convolved, x, filters, how, wanted)
    constant, slope, times = statistics_backward(x, of_units, grad_rstd, grad_offset, how)
    grad_x = cpu.add_input_gradient(grad_x, x, constant, slope, times)
    return grad_x, _of_filters(grad_weight, along_offset, of_units.centred) if wanted[1] else None, grad_bias


def _backward_of_images(grad, of_units: Statistics, x, filters, bias, sums, how: Units, wanted):
    """The gradients of weight and bias where x needs none: in parts, so that nothing as large as the output is made."""
    found: tuple[Tensor | None, ...] | None = None
    for part, scratch, images, rstd, offset in cpu.parts(grad, x, of_units.rstd, of_units.offset):
        grad_convolved, _, _, along_offset, grad_bias = cpu.scale_and_shift_backward(
            part, None, rstd, offset, sums.view(-1), bias is not None, out=scratch
        )
        grad_weight = _convolve_backward(grad_convolved, images, filters, how, wanted)[1]
        of_part = grad_weight, along_offset, grad_bias
        found = of_part if found is None else tuple(map(_plus, found, of_part))
    grad_weight, along_offset, grad_bias = found
    return _of_filters(grad_weight, along_offset, of_units.centred) if wanted[1] else None, grad_bias


def _plus(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if total is None else total.add_(more)


def _graph_is_kept() -> bool:
    """Whether the backward pass that runs may run again (`retain_graph=True`), and what was saved is to stay.

    It is what PyTorch asks before compiled code uses the memory of saved tensors again.
    """
    return torch._C._autograd._get_current_graph_task_keep_graph()


def filter_sums(weight: Tensor) -> Tensor:
    """The sum of every filter, (C_out, 1, 1, 1). Flattened first, filters in channels-last order would be copied."""
    return weight.sum(tuple(range(1, weight.dim())), keepdim=True)


def _centred(weight: Tensor, sums: Tensor) -> Tensor:
    return torch.sub(weight, sums, alpha=sums.shape[0] / weight.numel())


def _of_filters(grad: Tensor, along_offset: Tensor | None, centred: bool) -> Tensor:
    """The gradient of the filters as given, from that of the filters used, which is overwritten, and that of minus
    their sums, (C_out,)."""
    if centred:
        grad = grad.sub_(filter_sums(grad), alpha=grad.shape[0] / grad.numel())
    return grad if along_offset is None else grad.sub_(along_offset.view(-1, *(1,) * (grad.dim() - 1)))


def _convolve(x: Tensor, weight: Tensor, how: Units) -> Tensor:
    where, pairs = _where(how.kernel, how.groups)
    return torch.convolution(x if pairs is None else cpu.zero_padded(x, pairs), weight, None, *where)


def _convolve_backward(grad: Tensor, x: Tensor, weight: Tensor, how: Units, wanted) -> tuple[Tensor, Tensor]:
    where, pairs = _where(how.kernel, how.groups)
    padded = x if pairs is None else cpu.zero_padded(x, pairs)
    grad_x, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, padded, weight, None, *where, [wanted[0], wanted[1], False]
    )
    if grad_x is not None and pairs is not None:
        grad_x = pad(grad_x, tuple((-before, -after) for before, after in pairs))
    return grad_x, grad_weight


@functools.lru_cache(maxsize=1024)
def _where(kernel: Box, groups: int) -> tuple[tuple, Pairs | None]:
    """What `torch.convolution` takes after the bias, and what is to be padded before it, which knows no asymmetric
    padding; None for nothing.

    The padded copy is made again for the backward pass: kept, it would be one more full-size tensor.
    """
    _, stride, pairs, dilation = kernel
    none = [0] * len(pairs)
    if all(before == after for before, after in pairs):
        return (stride, [before for before, _ in pairs], dilation, False, none, groups), None
    return (stride, none, dilation, False, none, groups), pairs
