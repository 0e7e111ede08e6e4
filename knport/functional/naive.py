"""The definition, written the slowest and clearest way: unfold every unit, drop, normalize, multiply.

This is the oracle of the tests (float64) and what the published layers compute (Nasirigerdeh et al., TMLR 2024,
Eq. 1-4). Its memory grows with the kernel's area; nothing else in knport calls it.

Legend: N images, C channels, O x P kernel positions, k_h x k_w kernel, n = C k_h k_w.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.errors import UnknownName
from knport.geometry import ntuple, pad, padding_pairs, window_pairs


def unfold(x: Tensor, kernel_size, stride, padding, dilation) -> Tensor:
    """Every unit of the padded input: (N, C, H, W) -> (N, O, P, C, k_h, k_w)."""
    ndim = x.dim() - 2
    units = pad(x, padding)
    for dim in range(ndim):
        reach = dilation[dim] * (kernel_size[dim] - 1) + 1
        units = units.unfold(2 + dim, reach, stride[dim])[..., :: dilation[dim]]
    return units.movedim(1, 1 + ndim)


def kernel_norm(x: Tensor, kernel_size=1, stride=1, padding=0, *, dropout=0.0, eps=1e-5, dropout_form="unit") -> Tensor:
    """Eq. 1-3. Shapes and arguments as `knport.functional.kernel_norm`."""
    ndim = x.dim() - 2
    kernel_size, stride = ntuple(kernel_size, ndim, "kernel_size"), ntuple(stride, ndim, "stride")
    ones = (1,) * ndim
    pairs = padding_pairs(padding, kernel_size, stride, ones)
    units = unfold(x, kernel_size, stride, pairs, ones)  # (N, O, P, C, k_h, k_w)
    mean, var = unit_statistics(x, kernel_size, stride, pairs, ones, dropout=dropout, dropout_form=dropout_form)
    shape = mean.shape + (1,) * (ndim + 1)
    normalized = (units - mean.reshape(shape)) / (var.reshape(shape) + eps).sqrt()
    # (N, O, P, C, k_h, k_w) -> (N, C, O, k_h, P, k_w) -> (N, C, O k_h, P k_w)
    order = [axis for dim in range(ndim) for axis in (1 + dim, 2 + ndim + dim)]
    size = [o * k for o, k in zip(units.shape[1 : 1 + ndim], kernel_size, strict=True)]
    return normalized.permute(0, 1 + ndim, *order).reshape(*x.shape[:2], *size)


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
    dropout_form: str = "shared",
    padding_mode: str = "zeros",
) -> Tensor:
    """Normalize every unit, then convolve it (Eq. 4). Shapes and arguments as `knport.functional.kn_conv`."""
    ndim = x.dim() - 2
    kernel_size = tuple(weight.shape[2:])
    stride, dilation = ntuple(stride, ndim, "stride"), ntuple(dilation, ndim, "dilation")
    pairs = padding_pairs(padding, kernel_size, stride, dilation)
    window, window_padding, window_dilation = kernel_size, pairs, dilation
    if norm_window is not None:
        window = ntuple(norm_window, ndim, "norm_window")
        window_padding, window_dilation = window_pairs(pairs, kernel_size, dilation, window), (1,) * ndim
    padded, padded_window = pad(x, pairs, padding_mode), pad(x, window_padding, padding_mode)
    none = ((0, 0),) * ndim
    units = unfold(padded, kernel_size, stride, none, dilation)
    mean, var = unit_statistics(
        padded_window, window, stride, none, window_dilation, dropout=dropout, dropout_form=dropout_form
    )
    shape = mean.shape + (1,) * (ndim + 1)
    normalized = (units - mean.reshape(shape)) / (var.reshape(shape) + eps).sqrt()
    grouped = normalized.unflatten(1 + ndim, (groups, -1)).flatten(2 + ndim)  # (N, O, P, g, n / g)
    filters = weight.unflatten(0, (groups, -1)).flatten(2)  # (g, C_out / g, n / g)
    y = torch.einsum("n...gi,goi->ngo...", grouped, filters).flatten(1, 2)
    return y if bias is None else y + bias.reshape(-1, *(1,) * ndim)


def unit_statistics(x, kernel_size, stride, padding, dilation, *, dropout=0.0, dropout_form="unit"):
    """Mean and biased variance of every unit, each (N, O, P), straight from the unfolded units."""
    ndim = x.dim() - 2
    within = tuple(range(-ndim - 1, 0))
    units = unfold(x, kernel_size, stride, padding, dilation)
    mean, var = units.mean(within), units.var(within, correction=0)
    if not dropout:
        return mean, var
    n = x.shape[1] * math.prod(kernel_size)
    if dropout_form == "expected":
        m2 = units.square().mean(within)
        return mean, m2 / (1 - dropout) - mean**2 - dropout * m2 / ((1 - dropout) * n)
    if dropout_form == "shared":
        kept = unfold(F.dropout(x, dropout), kernel_size, stride, padding, dilation)
    elif dropout_form == "unit":
        kept = F.dropout(units, dropout)
    else:
        raise UnknownName("dropout_form", dropout_form, ("shared", "unit", "expected"))
    dropped = kept.mean(within)
    # the bound of flat units, see knport.functional.statistics
    return dropped, torch.maximum(kept.var(within, correction=0), (dropped - mean) ** 2)
