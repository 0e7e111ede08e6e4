"""LocalContextNorm (Ortiz et al., CVPR 2020): a competitor of kernel normalization in segmentation that torch lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from knport.errors import KNPortError
from knport.functional.statistics import full_precision
from knport.geometry import ntuple


class LocalContextNorm(nn.Module):
    """Normalize each position by the window of pixels around it, over a group of channels.

    .. math:: y = \\frac{x - \\mu}{\\sqrt{\\sigma^2 + \\epsilon}} \\gamma + \\beta

    mu and the biased sigma^2 are those of the window around the position over the channels of its group. Windows lie
    inside the map; near a border a position takes the nearest one. A window that covers the map makes it GroupNorm.
    (The authors' code does not differentiate through the statistics, and takes the whole map as soon as one of its
    sides is no longer than the window; here gradients are exact and each side is cut by itself.)

    Args:
        num_channels: C.
        channels_per_group: channels that share statistics; divides C.
        window_size: height and width of the window in pixels, an int or two.
        eps: added to the variance.
        affine: whether there are a gain and a bias per channel.

    Shape:
        Input (N, C, H, W); output the same.

    Raises:
        KNPortError: C is no multiple of `channels_per_group`, or input of another shape.

    Example:
        >>> knport.LocalContextNorm(8, window_size=9)(torch.randn(2, 8, 32, 32)).shape
        torch.Size([2, 8, 32, 32])
    """

    def __init__(
        self,
        num_channels: int,
        channels_per_group: int = 2,
        window_size: int | tuple[int, int] = 227,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if channels_per_group < 1 or num_channels % channels_per_group:
            raise KNPortError(
                f"LocalContextNorm: {num_channels} channels in groups of {channels_per_group}; expected a divisor"
            )
        self.num_channels, self.channels_per_group = num_channels, channels_per_group
        self.window_size, self.eps, self.affine = ntuple(window_size, 2, "window_size"), eps, affine
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(num_channels, **made)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels, **made)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or x.shape[1] != self.num_channels:
            raise KNPortError(
                f"LocalContextNorm: input of shape {tuple(x.shape)}; expected (N, {self.num_channels}, H, W)"
            )
        with full_precision(x):
            wide = x.to(torch.promote_types(x.dtype, torch.float32))
            groups = wide.unflatten(1, (-1, self.channels_per_group))  # (N, C, H, W) -> (N, G, C / G, H, W)
            mean, var = self._statistics(groups)
            y = ((groups - mean) * (var + self.eps).rsqrt()).flatten(1, 2)
            if self.affine:
                y = y * self.weight[:, None, None] + self.bias[:, None, None]
        return y.to(x.dtype)

    def _statistics(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance around every position, each (N, G, 1, H, W): within the pixels plus between them."""
        between = groups.mean(2)  # (N, G, H, W)
        within = (groups - between.unsqueeze(2)).square().mean(2)
        shift = between.detach().mean((2, 3), keepdim=True)  # E[u^2] - E[u]^2 about a point near the mean
        shifted = between - shift
        maps = torch.cat([shifted, shifted.square(), within], 1)
        shifted, square, within = self._around(maps).unsqueeze(2).chunk(3, 1)
        return shifted + shift.unsqueeze(2), within + (square - shifted.square()).clamp_min(0)

    def _around(self, maps: Tensor) -> Tensor:
        """The mean of every window inside the map, one side after the other, repeated to the borders."""
        size = maps.shape[2:]
        height, width = (min(window, side) for window, side in zip(self.window_size, size, strict=True))
        maps = F.avg_pool2d(F.avg_pool2d(maps, (height, 1), 1), (1, width), 1)
        top, left = (height - 1) // 2, (width - 1) // 2
        return F.pad(maps, (left, width - 1 - left, top, height - 1 - top), mode="replicate")

    def extra_repr(self) -> str:
        text = f"{self.num_channels}, channels_per_group={self.channels_per_group}, window_size={self.window_size}"
        return f"{text}, eps={self.eps}, affine={self.affine}"
