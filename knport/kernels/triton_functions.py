"""The Triton kernels as differentiable functions outside of `torch.compile`; `triton_ops` are those inside of it.

`channel_moments` hands its input on, and the convolution reads the one that was handed on: so the convolution's
gradient for x comes back through here, and the moments' is added in the pass that reads x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function

from knport.kernels import eager, triton_epilogue, triton_filters, triton_moments, triton_norm, triton_plain
from knport.kernels import triton_units as units
from knport.kernels.triton_support import Box3


def channel_moments(x: Tensor, higher: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`x` for the convolution to read, and what `knport.kernels.triton_moments.channel_moments` gives for it."""
    return _ChannelMoments.apply(x, higher)


class _ChannelMoments(Function):
    @staticmethod
    def forward(ctx, x, higher):
        ctx.set_materialize_grads(False)
        maps, more = triton_moments.channel_moments(x, higher)
        ctx.mark_non_differentiable(more)
        ctx.save_for_backward(x, maps)
        return x.view_as(x), maps, more

    @staticmethod
    def backward(ctx, grad_x, grad_maps, _):
        x, maps = ctx.saved_tensors
        if grad_maps is None:
            return grad_x, None
        if torch.is_grad_enabled():
            (grad,) = triton_plain.gradients(eager.channel_moments, [x], [grad_maps])
            return grad if grad_x is None else grad + grad_x, None
        return triton_moments.channel_moments_backward(x, maps, grad_maps.contiguous(), grad_x), None


def unit_statistics(
    maps: Tensor, higher: Tensor, seed: Tensor, box: Box3, form: int, dropout: float, n: int, out: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """(mu', var', mu) of all units, each (N, 1, O, P); the last is the first but for `MOMENTS`."""
    statistics = _UnitStatistics.apply(maps, higher, seed, (box, form, dropout, n), out)
    return statistics if form == units.MOMENTS else (*statistics, statistics[0])


class _UnitStatistics(Function):
    @staticmethod
    def forward(ctx, maps, higher, seed, settings, out):
        ctx.set_materialize_grads(False)
        ctx.settings = settings
        rows = units.unit_statistics(maps, higher, seed, *settings, out)
        ctx.save_for_backward(maps, rows)
        return tuple(rows[:3]) if settings[1] == units.MOMENTS else tuple(rows)

    @staticmethod
    def backward(ctx, grad_mean, grad_var, grad_own=None):
        maps, rows = ctx.saved_tensors
        grads = [grad_mean, grad_var, grad_own]
        if torch.is_grad_enabled():
            drawn = eager.Draw(*rows[-2:])
            (grad,) = triton_plain.gradients(
                lambda maps: triton_plain.unit_statistics(maps, drawn, *ctx.settings), [maps], grads
            )
        else:
            grads = [None if g is None else g.contiguous() for g in grads]
            grads[1] = torch.zeros_like(rows[0]) if grads[1] is None else grads[1]
            grad = units.unit_statistics_backward(maps, rows, *grads, *ctx.settings)
        return grad, None, None, None, None


def centre_filters(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The centred filters in `dtype`; (2, F), the sums of these and of the filters as given; the latter's graph."""
    used, exact_sum, sums = _CentreFilters.apply(weight, dtype)
    return used, sums, exact_sum


class _CentreFilters(Function):
    @staticmethod
    def forward(ctx, weight, dtype):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight)
        ctx.dtype = dtype
        used, sums = triton_filters.centre_filters(weight, dtype)
        ctx.mark_non_differentiable(sums)
        return used, sums[1].clone(), sums

    @staticmethod
    def backward(ctx, grad, grad_sum, _):
        (weight,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = triton_plain.gradients(
                lambda weight: triton_plain.centre_filters(weight, ctx.dtype), [weight], [grad, grad_sum]
            )
            return plain[0], None
        grad = torch.zeros_like(weight) if grad is None else grad
        return triton_filters.centre_filters_backward(grad, grad_sum, weight.dtype), None


def normalize_units(
    c: Tensor,
    mean: Tensor,
    var: Tensor,
    own: Tensor,
    exact_sum: Tensor,
    sums: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    activation: int,
    rounded: bool,
    shifted: bool,
) -> Tensor:
    """As `knport.kernels.triton_epilogue.normalize_units`; exact_sum is the second of sums."""
    settings = (eps, dtype, activation, rounded, shifted)
    return _NormalizeUnits.apply(c, mean, var, own, exact_sum, sums, bias, residual, settings)


class _NormalizeUnits(Function):
    @staticmethod
    def forward(ctx, c, mean, var, own, exact_sum, sums, bias, residual, settings):
        ctx.save_for_backward(c, mean, var, own, exact_sum, sums, bias, residual)
        ctx.settings = settings
        return triton_epilogue.normalize_units(c, mean, var, own, sums, bias, residual, *settings)

    @staticmethod
    def backward(ctx, grad):
        c, mean, var, own, _, sums, bias, residual = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _NormalizeUnits.twice(ctx.settings, ctx.saved_tensors, grad)
        eps, _, activation, rounded, shifted = ctx.settings
        grad_c, rows, vectors, grad_residual = triton_epilogue.normalize_units_backward(
            grad, c, mean, var, own, sums, bias, residual, eps, activation, rounded, shifted
        )
        if residual is not None and not activation:
            grad_residual = grad.to(residual.dtype)
        return (
            grad_c,
            rows[0] if shifted else None,
            rows[1],
            rows[2] if shifted or rounded else None,
            vectors[1] if shifted else None,
            None,
            None if bias is None else vectors[0].to(bias.dtype),
            None if residual is None else grad_residual,
            None,
        )

    @staticmethod
    def twice(settings, saved, grad):
        c, mean, var, own, exact_sum, sums, bias, residual = saved

        def plain(c, mean, var, own, exact_sum, bias, residual):
            return triton_plain.normalize_units(c, mean, var, own, exact_sum, sums[0], bias, residual, *settings)

        grads = triton_plain.gradients(plain, [c, mean, var, own, exact_sum, bias, residual], [grad])
        return (*grads[:5], None, *grads[5:], None)


def kernel_norm(x: Tensor, seed: Tensor, box: Box3, form: int, dropout: float, n: int, eps: float, out, size) -> Tensor:
    """As `knport.functional.kernel_norm`, for units that do not overlap.

    Args:
        x: (N, C, H, W).
        seed, box, form, dropout, n, out: as `unit_statistics`.
        eps: added to the variance.
        size: of the result, (O k_h, P k_w).
    """
    return _KernelNorm.apply(x, seed, (box, form, dropout, n), eps, out, size)


class _KernelNorm(Function):
    @staticmethod
    def forward(ctx, x, seed, settings, eps, out, size):
        maps, higher = triton_moments.channel_moments(x, settings[1] == units.MOMENTS)
        rows = units.unit_statistics(maps, higher, seed, *settings, out)
        ctx.save_for_backward(x, maps, rows)
        ctx.settings, ctx.eps = settings, eps
        return triton_norm.normalize(x, rows, settings[0], units.own_row(settings[1]), eps, size)

    @staticmethod
    def backward(ctx, grad):
        x, maps, rows = ctx.saved_tensors
        box, form, *_ = ctx.settings
        if torch.is_grad_enabled():
            drawn = eager.Draw(*rows[-2:])
            (grad,) = triton_plain.gradients(
                lambda x: triton_plain.kernel_norm(x, drawn, *ctx.settings, ctx.eps), [x], [grad]
            )
            return grad, None, None, None, None, None
        own = units.own_row(form)
        sums = triton_norm.normalize_sums(grad, x, rows, box, own, ctx.eps)
        grad_maps = units.unit_statistics_backward(maps, rows, sums[0], sums[1], None, *ctx.settings)
        grad = triton_norm.normalize_backward(grad, x, maps, grad_maps, rows, box, own, ctx.eps)
        return grad, None, None, None, None, None
