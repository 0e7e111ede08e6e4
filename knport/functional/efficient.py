"""Kernel normalization as it runs: box-form statistics, a convolution with centred weights, one affine per unit.

    y = (U * W - mu' sum(W)) / sqrt(var' + eps) + b          (Nasirigerdeh et al., TMLR 2024, Eq. 5)

No unit is ever unfolded. The convolution runs on centred weights W_c = W - mean(W) and

    U * W - mu' sum(W) = U * W_c - mu sum(W_c) + (mu - mu') sum(W)

holds for any weights when mu is the unit's own mean. The second term is rounding, the third what dropout (or a window
other than the kernel) moves the mean by: nothing large is subtracted from anything large, and a constant unit yields
the bias in every precision.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.functional.statistics import (
    UnitStatistics,
    full_precision,
    unit_mean,
    unit_statistics,
)
from knport.geometry import Box, Pairs, ntuple, output_size, pad, padding_pairs, window_pairs
from knport.kernels import Draw, backend, cpu_conv, cpu_norm, normalize_units, reciprocal_sd
from knport.kernels.cpu_units import Units

_CONVOLVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def kernel_norm(
    x: Tensor, kernel_size=1, stride=1, padding=0, *, dropout=0.0, eps=1e-5, dropout_form="moments"
) -> Tensor:
    """Normalize every unit by its own mean and variance (Eq. 1-3); the units stand side by side in the output.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        kernel_size, stride: an int or one per spatial dimension.
        padding: as `knport.KernelNorm2d`.
        dropout, dropout_form: as `unit_statistics`.
        eps: added to the variance.

    Returns:
        (N, C, O k_h, P k_w) for O x P units.

    Example:
        >>> kernel_norm(torch.randn(4, 16, 8, 8), kernel_size=2, stride=2).shape
        torch.Size([4, 16, 8, 8])
    """
    ndim = x.dim() - 2
    kernel_size, stride = ntuple(kernel_size, ndim, "kernel_size"), ntuple(stride, ndim, "stride")
    ones = (1,) * ndim
    box = Box(kernel_size, stride, padding_pairs(padding, kernel_size, stride, ones), ones)
    output_size(x.shape[2:], *box)  # raises where the kernel does not fit
    how = Units(box, box, eps, dropout, dropout_form)
    chosen = backend(x, how, norm=True).name
    if chosen == "triton":
        from knport.functional import gpu  # and Triton with it

        return gpu.kernel_norm(x, how)
    if chosen == "cpu":
        return cpu_norm.kernel_norm(x, how, _norm_formula)
    return _norm_formula(x, how)


def _norm_formula(x: Tensor, how: Units, drawn: Draw | None = None) -> Tensor:
    """`kernel_norm` by operators that any transform and any compiler takes."""
    mean, var, _ = _statistics(x, how, drawn)
    rstd = reciprocal_sd(mean, var, how.eps)
    kernel_size, stride, pairs, _ = how.kernel
    ndim = len(kernel_size)
    units = pad(x, pairs)
    if max(kernel_size) == 1 and max(stride) == 1:
        return ((units - mean) * rstd).to(x.dtype)
    for dim in range(ndim):
        units = units.unfold(2 + dim, kernel_size[dim], stride[dim])  # a view: (N, C, O, P, k_h, k_w)
    normalized = ((units - _per_unit(mean, ndim)) * _per_unit(rstd, ndim)).to(x.dtype)
    # (N, C, O, P, k_h, k_w) -> (N, C, O, k_h, P, k_w) -> (N, C, O k_h, P k_w)
    order = [axis for dim in range(ndim) for axis in (2 + dim, 2 + ndim + dim)]
    size = [o * k for o, k in zip(mean.shape[2:], kernel_size, strict=True)]
    return normalized.permute(0, 1, *order).reshape(*x.shape[:2], *size)


def _per_unit(maps: Tensor, ndim: int) -> Tensor:
    return maps[(..., *(None,) * ndim)]  # (N, 1, O, P) -> (N, 1, O, P, 1, 1)


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    norm_window=None,
    dropout_form: str = "moments",
    padding_mode: str = "zeros",
    statistics: UnitStatistics | None = None,
) -> Tensor:
    """Convolve kernel normalized units (Eq. 5).

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        weight: (C_out, C / groups, k_h, k_w).
        bias: (C_out,), added after normalization.
        stride, padding, dilation, groups, padding_mode: as `torch.nn.Conv2d`; padding also as one
            (before, after) pair per spatial dimension. With groups the statistics still span all channels.
        dropout, dropout_form: as `unit_statistics`.
        eps: added to the variance.
        norm_window: the size of the block that the statistics are taken of, in pixels (an int or one per spatial
            dimension), centred on the kernel; None for the kernel itself.
        statistics: what `kn_conv_statistics` gave for this x and these arguments; None to take them here.

    Returns:
        (N, C_out, O, P), in the dtype that the convolution has here (autocast included).
    """
    where_and_how = stride, padding, dilation, norm_window, eps, dropout, dropout_form, padding_mode, groups
    how = _units(x.shape[2:], weight.shape[2:], *where_and_how)
    chosen = backend(x, how, weight, bias, statistics_given=statistics is not None).name
    if chosen == "triton":
        from knport.functional import gpu  # and Triton with it

        return gpu.kn_conv(x, weight, bias, how)
    if chosen == "cpu":
        return cpu_conv.kn_conv(x, weight, bias, how, _formula)
    return _formula(x, weight, bias, how, statistics)


def kn_conv_statistics(
    x: Tensor,
    kernel_size,
    stride=1,
    padding=0,
    dilation=1,
    *,
    dropout: float = 0.0,
    norm_window=None,
    dropout_form: str = "moments",
    padding_mode: str = "zeros",
) -> UnitStatistics:
    """The statistics that `kn_conv` normalizes by, dropout drawn: those of the window, and the kernel's own mean.

    Arguments as `kn_conv`; `full_mean` is the mean of the unit under the kernel, whatever the window.
    """
    kernel_size = ntuple(kernel_size, x.dim() - 2, "kernel_size")
    where_and_how = stride, padding, dilation, norm_window, 0.0, dropout, dropout_form, padding_mode
    how = _units(x.shape[2:], kernel_size, *where_and_how)
    return _statistics(x, how)


def _units(size, kernel_size, *where_and_how) -> Units:
    """The arguments of `kn_conv` in one place, for an input of this size: looked up where they were seen before, which
    shows on small layers."""
    if not torch.compiler.is_compiling():
        try:
            return _known_units(size, kernel_size, *where_and_how)
        except TypeError:  # lists among the arguments, or the symbols that sizes are while they are traced
            pass
    return _new_units(size, kernel_size, *where_and_how)


def _new_units(size, kernel_size, stride, padding, dilation, norm_window, eps, dropout, form, mode, groups=1) -> Units:
    kernel_size = tuple(kernel_size)
    ndim = len(kernel_size)
    stride, dilation = ntuple(stride, ndim, "stride"), ntuple(dilation, ndim, "dilation")
    kernel = Box(kernel_size, stride, padding_pairs(padding, kernel_size, stride, dilation), dilation)
    output_size(size, *kernel)  # raises where the kernel does not fit
    return Units(kernel, _window(kernel, norm_window), eps, dropout, form, mode, groups)


_known_units = functools.lru_cache(maxsize=4096)(_new_units)


def _window(kernel: Box, norm_window) -> Box:
    """The units that the statistics are taken of."""
    if norm_window is None:
        return kernel
    ndim = len(kernel.kernel_size)
    size = ntuple(norm_window, ndim, "norm_window")
    padding = window_pairs(kernel.padding, kernel.kernel_size, kernel.dilation, size)
    return Box(size, kernel.stride, padding, (1,) * ndim)


def _statistics(x: Tensor, how: Units, drawn: Draw | None = None) -> UnitStatistics:
    dropout = {"dropout": how.dropout, "dropout_form": how.dropout_form, "drawn": drawn}
    statistics = unit_statistics(x, *how.window, padding_mode=how.padding_mode, **dropout)
    if how.window == how.kernel:
        return statistics
    return statistics._replace(full_mean=unit_mean(x, *how.kernel, padding_mode=how.padding_mode))


def _formula(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: Units,
    statistics: UnitStatistics | None = None,
    drawn: Draw | None = None,
) -> Tensor:
    """`kn_conv` by operators that any transform and any compiler takes."""
    mean, var, own_mean = _statistics(x, how, drawn) if statistics is None else statistics
    convolved, used_sum, exact_sum = _convolve(x, weight, how)
    # What there is to subtract, as maps times vectors. Sums of float32 weights centred in float32 are rounding.
    parts = [(own_mean, used_sum)] if used_sum is not None else []
    if mean is not own_mean:
        parts.append((mean - own_mean, exact_sum))
    offset = torch.cat([part[0] for part in parts], 1) if parts else None
    vectors = torch.stack([part[1] for part in parts]) if parts else None
    return normalize_units(convolved, own_mean, var, offset, vectors, bias, how.eps, _compute_dtype(x))


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    autocast = not x.is_meta and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _convolve(x: Tensor, weight: Tensor, how: Units) -> tuple[Tensor, Tensor | None, Tensor]:
    """The plain convolution, the sum of each filter that it used (None where that is 0) and of each filter as given.

    Sums are (C_out,) in float32 or better.
    """
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    of_filters = cpu_conv.filter_sums(exact)
    exact_sum = of_filters.flatten()
    _, stride, pairs, dilation = how.kernel
    where = (stride, pairs, dilation, how.groups, how.padding_mode)
    if how.groups > 1:
        # A group's mean is not the unit's, so its filters cannot be centred: U * W and mu sum(W) may both be large,
        # and only full precision tells them apart.
        with full_precision(x):
            x = x.to(exact.dtype)
            return _padded_convolution(x, exact, *where), exact_sum, exact_sum
    used = (exact - of_filters / math.prod(weight.shape[1:])).to(_compute_dtype(x))
    used_sum = None if used.dtype == exact.dtype else cpu_conv.filter_sums(used.to(exact.dtype)).flatten()
    return _padded_convolution(x, used, *where), used_sum, exact_sum


def _padded_convolution(x, weight, stride, pairs: Pairs, dilation, groups, padding_mode) -> Tensor:
    convolve = _CONVOLVE[x.dim() - 2]
    if padding_mode != "zeros":
        return convolve(pad(x, pairs, padding_mode), weight, None, stride, 0, dilation, groups)
    if any(before != after for before, after in pairs):
        return _asymmetric(x, weight, stride, pairs, dilation, groups)
    return convolve(x, weight, None, stride, [before for before, _ in pairs], dilation, groups)


def _asymmetric(x, weight, stride, pairs: Pairs, dilation, groups) -> Tensor:
    """Pad both sides alike and crop the output where the stride allows it: a padded copy of x would be one more
    full-size tensor, both in the forward pass and saved for the backward pass."""
    convolve = _CONVOLVE[x.dim() - 2]
    widest = [max(pair) for pair in pairs]
    if any((wide - before) % s for wide, (before, _), s in zip(widest, pairs, stride, strict=True)):
        return convolve(pad(x, pairs), weight, None, stride, 0, dilation, groups)
    y = convolve(x, weight, None, stride, widest, dilation, groups)
    for dim, (wide, (before, after), s) in enumerate(zip(widest, pairs, stride, strict=True)):
        reach = dilation[dim] * (weight.shape[2 + dim] - 1) + 1
        size = (x.shape[2 + dim] + before + after - reach) // s + 1
        y = y.narrow(2 + dim, (wide - before) // s, size)
    return y
