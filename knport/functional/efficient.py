"""Kernel normalization as it runs: box-form statistics, a convolution with centred weights, one affine per unit.

    y = (U * W - mu' sum(W)) / sqrt(var' + eps) + b          (Nasirigerdeh et al., TMLR 2024, Eq. 5)

No unit is ever unfolded. Without groups the filters' means cancel, so the convolution runs on W - mean(W): whatever
mean the unit has, little is left to subtract, and a constant unit yields the bias in every precision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.functional.geometry import Pairs, ntuple, pad, padding_pairs, window_pairs
from knport.functional.statistics import unit_statistics

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
    pairs = padding_pairs(padding, kernel_size, stride, ones)
    mean, var = unit_statistics(x, kernel_size, stride, pairs, ones, dropout=dropout, dropout_form=dropout_form)
    rstd = (var + eps).rsqrt()
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

    Returns:
        (N, C_out, O, P), in the dtype that the convolution has here (autocast included).
    """
    ndim = x.dim() - 2
    kernel_size = tuple(weight.shape[2:])
    stride, dilation = ntuple(stride, ndim, "stride"), ntuple(dilation, ndim, "dilation")
    pairs = padding_pairs(padding, kernel_size, stride, dilation)
    window, window_padding, window_dilation = kernel_size, pairs, dilation
    if norm_window is not None:
        window = ntuple(norm_window, ndim, "norm_window")
        window_padding, window_dilation = window_pairs(pairs, kernel_size, dilation, window), (1,) * ndim
    mean, var = unit_statistics(
        x,
        window,
        stride,
        window_padding,
        window_dilation,
        dropout=dropout,
        dropout_form=dropout_form,
        padding_mode=padding_mode,
    )
    convolved, weight_sum = _convolve(x, weight, stride, pairs, dilation, groups, padding_mode)
    # (C_out, 1, 1) parameters against (N, 1, O, P) statistics
    y = (convolved - mean * _channels(weight_sum, ndim)) * (var + eps).rsqrt()
    if bias is not None:
        y = y + _channels(bias, ndim)
    return y.to(convolved.dtype if groups == 1 else _compute_dtype(x))


def _channels(parameter: Tensor, ndim: int) -> Tensor:
    return parameter[(..., *(None,) * ndim)]


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _convolve(x, weight, stride, pairs, dilation, groups, padding_mode) -> tuple[Tensor, Tensor]:
    """The plain convolution with the weights it used summed per filter, (C_out,) in float32 or better."""
    precise = torch.promote_types(weight.dtype, torch.float32)
    if groups > 1:
        # A group's mean is not the unit's, so its filters cannot be centred: U * W and mu sum(W) may both be large,
        # and only full precision tells them apart.
        with torch.autocast(x.device.type, enabled=False):
            convolved = _padded_convolution(
                x.to(precise), weight.to(precise), stride, pairs, dilation, groups, padding_mode
            )
        return convolved, weight.to(precise).flatten(1).sum(1)
    exact = weight.to(precise)
    centred = exact - exact.mean(dim=tuple(range(1, weight.dim())), keepdim=True)
    centred = centred.to(_compute_dtype(x))
    # Rounded weights do not sum to zero exactly; what is left times the mean is subtracted like any weight sum.
    weight_sum = centred.to(precise).flatten(1).sum(1)
    return _padded_convolution(x, centred, stride, pairs, dilation, groups, padding_mode), weight_sum


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
