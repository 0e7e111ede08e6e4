"""Kernel normalization in front of a linear layer: a unit is k x k neighbouring tokens over all their features.

    y = (x W^T - mu' sum(W)) / sqrt(var' + eps) + b

It is Eq. 5 of Nasirigerdeh et al. (TMLR 2024) for a 1 x 1 convolution with statistics of a k x k window, on tokens as
transformers hold them. With a window of one token it is LayerNorm, without gain and bias, and the linear layer behind
it. The statistics are read through a channels-last view, so that nothing is transposed and nothing is unfolded.

Legend: N images, L = P + H W tokens, of which P stand before the grid (class and register tokens), C features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.errors import KNPortError
from knport.functional.efficient import kn_conv, kn_conv_statistics
from knport.functional.statistics import UnitStatistics
from knport.geometry import ntuple
from knport.kernels import normalize_units
from knport.kernels.cpu import takes


def kn_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_window=1,
    prefix_tokens: int = 0,
    grid_size: Sequence[int] | None = None,
    dropout: float = 0.0,
    eps: float = 1e-5,
    dropout_form: str = "moments",
    statistics: UnitStatistics | None = None,
) -> Tensor:
    """Normalize every token by the statistics of its neighbourhood, then apply a linear layer.

    Args:
        x: (..., C) for a window of one token; for a larger one a map (N, H, W, C), a sequence (N, P + H W, C), or one
            image's (P + H W, C).
        weight: (C_out, C).
        bias: (C_out,), added after normalization.
        norm_window: tokens per side of the block that the statistics are taken of (an int, or height and width),
            centred on the token; zeros around the grid belong to the units of the border, as in a padded convolution.
        prefix_tokens: P, each a unit of its own.
        grid_size: (H, W) of a sequence; None for a square.
        dropout, dropout_form: as `unit_statistics`.
        eps: added to the variance.
        statistics: what `kn_linear_statistics` gave for this x and these arguments; None to take them here.

    Returns:
        (..., C_out), in the dtype that the linear layer has here (autocast included).

    Raises:
        KNPortError: the tokens are no grid of this size.

    Example:
        >>> x = torch.randn(2, 1 + 14 * 14, 192)
        >>> kn_linear(x, torch.randn(576, 192), norm_window=3, prefix_tokens=1).shape
        torch.Size([2, 197, 576])
    """
    if statistics is None:
        where = {"norm_window": norm_window, "prefix_tokens": prefix_tokens, "grid_size": grid_size}
        how = {"dropout": dropout, "dropout_form": dropout_form}
        if takes(x, weight, bias):
            return _convolved(x, weight, bias, **where, eps=eps, **how)
        statistics = kn_linear_statistics(x, **where, **how)
    mean, var, own_mean = statistics
    # As in `kn_conv`: centred weights, so that nothing large is subtracted from anything large.
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    used = (exact - exact.mean(1, keepdim=True)).to(x.dtype)
    product = F.linear(x, used)  # autocast may round `used` once more
    parts = []
    if product.dtype != exact.dtype:
        parts.append((own_mean, used.to(product.dtype).to(exact.dtype).sum(1)))
    if mean is not own_mean:
        parts.append((mean - own_mean, exact.sum(1)))
    offset = torch.cat([part[0] for part in parts], 1) if parts else None
    vectors = torch.stack([part[1] for part in parts]) if parts else None
    y = normalize_units(as_map(product), own_mean, var, offset, vectors, bias, eps, product.dtype)
    return y.permute(0, 2, 3, 1).reshape(product.shape)  # (N, C_out, A, B) -> (..., C_out), a view


def _convolved(x, weight, bias, norm_window, prefix_tokens, grid_size, **how) -> Tensor:
    """`kn_linear` as 1 x 1 convolutions, each one operation on CPUs: of the grid, and of the tokens before it."""

    def convolve(tokens: Tensor, window) -> Tensor:
        y = kn_conv(as_map(tokens), weight[:, :, None, None], bias, norm_window=window, **how)
        return y.permute(0, 2, 3, 1).reshape(*tokens.shape[:-1], len(weight))  # (N, C_out, A, B) -> (..., C_out)

    window = ntuple(norm_window, 2, "norm_window")
    if max(window) == 1:
        return convolve(x, None)
    if x.dim() == 4 and not prefix_tokens:
        return convolve(x, window)
    prefix, grid = _prefix_and_grid(x, prefix_tokens, grid_size)
    y = convolve(grid, window).flatten(1, 2)
    if prefix_tokens:
        y = torch.cat([convolve(prefix, None), y], 1)
    return y.squeeze(0) if x.dim() == 2 else y


def kn_linear_statistics(
    x: Tensor,
    *,
    norm_window=1,
    prefix_tokens: int = 0,
    grid_size: Sequence[int] | None = None,
    dropout: float = 0.0,
    dropout_form: str = "moments",
) -> UnitStatistics:
    """The statistics that `kn_linear` normalizes by, dropout drawn; `full_mean` is each token's own mean.

    Arguments as `kn_linear`. Each (N, 1, A, B), where `as_map` gives (N, C, A, B).
    """
    window = ntuple(norm_window, 2, "norm_window")
    how = {"dropout": dropout, "dropout_form": dropout_form}
    if max(window) == 1:
        return kn_conv_statistics(as_map(x), 1, **how)
    how["norm_window"] = window
    if x.dim() == 4 and not prefix_tokens:
        return kn_conv_statistics(as_map(x), 1, **how)
    prefix, grid = _prefix_and_grid(x, prefix_tokens, grid_size)
    units = kn_conv_statistics(as_map(grid), 1, **how)
    units = UnitStatistics(*(maps.flatten(2).unsqueeze(2) for maps in units))  # (N, 1, H, W) -> (N, 1, 1, H W)
    if prefix_tokens:
        alone = kn_conv_statistics(as_map(prefix), 1, **{**how, "norm_window": None})
        units = UnitStatistics(*(torch.cat(pair, 3) for pair in zip(alone, units, strict=True)))
    return units if x.dim() == 3 else UnitStatistics(*(maps.transpose(2, 3).transpose(0, 2) for maps in units))


def as_map(x: Tensor) -> Tensor:
    """(..., C) as a channels-last map (N, C, A, B), a view where memory permits: (N, L, C) is (N, C, 1, L)."""
    if x.dim() > 4:
        x = x.flatten(1, -3)
    while x.dim() < 4:  # (C,) -> (1, 1, 1, C), (N, C) -> (N, 1, 1, C), (N, L, C) -> (N, 1, L, C)
        x = x.unsqueeze(min(1, x.dim() - 1))
    return x.permute(0, 3, 1, 2)


def _prefix_and_grid(x: Tensor, prefix_tokens: int, grid_size: Sequence[int] | None) -> tuple[Tensor, Tensor]:
    """The tokens before the grid, (N, P, C), and the grid, (N, H, W, C); of one image (P + H W, C) N is 1."""
    batched = x.unsqueeze(0) if x.dim() == 2 else x
    size = grid_of(batched, prefix_tokens, grid_size)
    prefix, grid = batched.split([prefix_tokens, size[0] * size[1]], 1)
    return prefix, grid.unflatten(1, size)


def grid_of(x: Tensor, prefix_tokens: int, grid_size: Sequence[int] | None) -> tuple[int, int]:
    """(H, W) of the tokens (N, P + H W, C), or an error that says what does not fit."""
    if x.dim() != 3:
        raise KNPortError(
            f"input of shape {tuple(x.shape)} with {prefix_tokens} prefix tokens; a window of several tokens needs a "
            "sequence (N, prefix + H W, C) or, without prefix tokens, a map (N, H, W, C)"
        )
    tokens = x.shape[1] - prefix_tokens
    if grid_size is None:
        side = math.isqrt(max(tokens, 0))
        grid_size = (side, side)
    height, width = ntuple(grid_size, 2, "grid_size", minimum=0)
    if tokens <= 0 or height * width != tokens:
        raise KNPortError(
            f"{x.shape[1]} tokens, {prefix_tokens} of them before the grid, are no grid of {height} x {width}; give "
            "grid_size=(H, W) of the tokens and their prefix_tokens"
        )
    return height, width
