"""PositionalNorm (Li et al., NeurIPS 2019): every position normalized over its channels, with gain and bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knport.errors import KNPortError
from knport.functional.statistics import full_precision


class PositionalNorm(nn.Module):
    """Normalize each position by its own channels: a KernelNorm of one pixel without dropout, with gain and bias.

    .. math:: y = \\frac{x - \\mu}{\\sqrt{\\sigma^2 + \\epsilon}} \\gamma + \\beta

    mu and the biased sigma^2 are those of the C channels at one position (section 3). The paper's generative networks
    also inject mu and sigma into a later layer (moment shortcut); as a normalization of classifiers it does not.

    Args:
        num_channels: C.
        eps: added to the variance.
        affine: whether there are a gain and a bias per channel.

    Shape:
        Input (N, C, *); output the same.

    Example:
        >>> knport.PositionalNorm(8)(torch.randn(2, 8, 16, 16)).shape
        torch.Size([2, 8, 16, 16])
    """

    def __init__(self, num_channels: int, eps: float = 1e-5, affine: bool = True, device=None, dtype=None):
        super().__init__()
        self.num_channels, self.eps, self.affine = num_channels, eps, affine
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_channels, **made)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels, **made)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.shape[1] != self.num_channels:
            raise KNPortError(f"PositionalNorm: input of shape {tuple(x.shape)}; expected (N, {self.num_channels}, *)")
        with full_precision(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            deviation = wide - wide.mean(1, keepdim=True)
            y = deviation * (deviation.square().mean(1, keepdim=True) + self.eps).rsqrt()
            if self.affine:
                shape = (-1, *(1,) * (x.dim() - 2))  # (C,) -> (C, 1, 1)
                y = y * self.weight.reshape(shape) + self.bias.reshape(shape)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_channels}, eps={self.eps}, affine={self.affine}"
