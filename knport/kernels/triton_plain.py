"""The functions of the Triton kernels in plain operators: what derivatives of derivatives are taken through.

A kernel's backward pass is a kernel as well, which autograd cannot differentiate. `torch.autograd.grad` with
`create_graph=True` is answered by these forms in its place, with the same random numbers.

Legend: N images, C channels, H x W the input's map, O x P the units.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.kernels import eager
from knport.kernels.triton_support import Box3, accumulator
from knport.kernels.triton_units import EXPECTED, MOMENTS

_ACTIVATE = {0: lambda z: z, 1: F.relu, 2: F.gelu, 3: F.silu, 4: F.mish}


def gradients(plain: Callable, inputs: Sequence, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients for `inputs` of `plain(*inputs)`, differentiable once more; None for what needs none."""
    with torch.enable_grad():
        # aliases: an input may be made from another one, and its part must not be counted twice
        aliases = [t.view_as(t) if isinstance(t, Tensor) and t.requires_grad else t for t in inputs]
        outputs = plain(*aliases)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        wanted = [i for i, t in enumerate(aliases) if t is not inputs[i]]
        found = torch.autograd.grad(
            [y for y, _ in pairs], [aliases[i] for i in wanted], [g for _, g in pairs],
            create_graph=True, allow_unused=True,
        )  # fmt: skip
    result: list[Tensor | None] = [None] * len(aliases)
    for i, grad in zip(wanted, found, strict=True):
        result[i] = grad
    return result


def unit_statistics(maps: Tensor, drawn: eager.Draw, box: Box3, form: int, p: float, n: int) -> tuple[Tensor, ...]:
    """(mu', var', mu) of all units, each (N, 1, O, P); `drawn` is read for `MOMENTS` only."""
    entries = torch.stack(list(_places(maps, box)))  # (K, N, 2, O, P)
    mean = entries[:, :, :1].mean(0)
    var = entries[:, :, 1:].mean(0) + (entries[:, :, :1] - mean).square().mean(0)
    if form == EXPECTED:
        var = (var * (1 - p / n) + mean.square() * (p * (1 - 1 / n))) / (1 - p)
    if form != MOMENTS:
        return mean, var, mean
    return *eager.drawn_statistics(mean, var, drawn), mean


def _places(maps: Tensor, box: Box3):
    """For each place in the kernel, the pixels of all units at that place, 0 outside of the input."""
    spatial = maps.dim() - 2
    size, kernel, stride, before, dilation, units = (values[3 - spatial :] for values in box)
    reach = [d * (k - 1) + s * (o - 1) + 1 for d, k, s, o in zip(dilation, kernel, stride, units, strict=True)]
    after = [r - length - b for r, length, b in zip(reach, size, before, strict=True)]
    flat = [v for pair in zip(reversed(before), reversed(after), strict=True) for v in pair]
    padded = F.pad(maps, flat)
    for offset in itertools.product(*map(range, kernel)):
        steps = zip(offset, dilation, stride, units, strict=True)
        where = [slice(i * d, i * d + s * (o - 1) + 1, s) for i, d, s, o in steps]
        yield padded[(slice(None), slice(None), *where)]


def centre_filters(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The centred filters in `dtype`, and the sum of each as given."""
    exact = weight.to(accumulator(weight.dtype))
    dims = tuple(range(1, weight.dim()))
    return (exact - exact.mean(dims, keepdim=True)).to(dtype), exact.sum(dims)


def normalize_units(
    c, mean, var, own, exact_sum, used_sum, bias, residual, eps, dtype, activation: int, rounded: bool, shifted: bool
) -> Tensor:
    """As `knport.kernels.triton_epilogue.normalize_units`, the two sums apart."""
    across = (slice(None), *(None,) * (c.dim() - 2))
    z = c.to(var.dtype)
    if rounded:
        z = z - own * used_sum[across]
    if shifted:
        z = z - (mean - own) * exact_sum[across]
    z = z * eager.reciprocal_sd(own, var, eps)
    if bias is not None:
        z = z + bias[across]
    if residual is not None:
        z = z + residual
    return _ACTIVATE[activation](z).to(dtype)


def kernel_norm(x: Tensor, drawn: eager.Draw, box: Box3, form: int, p: float, n: int, eps: float) -> Tensor:
    """As `knport.functional.kernel_norm`."""
    maps = eager.channel_moments(x)
    mean, var, own = unit_statistics(maps, drawn, box, form, p, n)
    rstd = eager.reciprocal_sd(own, var, eps)
    spatial = x.dim() - 2
    values = torch.stack([(place - mean) * rstd for place in _places(x.to(maps.dtype), box)], -1)  # (N, C, O, P, K)
    values = values.unflatten(-1, box.kernel_size[3 - spatial :])
    # (N, C, O, P, k_h, k_w) -> (N, C, O, k_h, P, k_w) -> (N, C, O k_h, P k_w)
    order = [axis for dim in range(spatial) for axis in (2 + dim, 2 + spatial + dim)]
    units, kernel = box.units[3 - spatial :], box.kernel_size[3 - spatial :]
    size = [o * k for o, k in zip(units, kernel, strict=True)]
    return values.permute(0, 1, *order).reshape(*x.shape[:2], *size).to(x.dtype)
