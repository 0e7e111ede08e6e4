"""The parts of a KN-Conformer: bottleneck, coupling units and ends, each norm in front of the layer that it serves.

Legend: N images, C channels of a stage, I inner channels, E of a token, H x W a map, h x w the grid of patches.
"""

from __future__ import annotations

import math

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from architectures.initialization import lecun_init
from architectures.knresnet import BOTTOM_RIGHT, TOP_LEFT, knconv_stem
from architectures.vit import Block, TokenNorm, init_linear
from knport import KernelNorm2d, KNConv2d, KNLinear, KNPortError

WINDOW = 3
EXPANSION = 4  # C by I in the original's bottlenecks


class KNBottleneck(nn.Module):
    """Pre-activation bottleneck; ``coupled``, a map of I channels, joins in front of the 3 x 3 convolution.

    Shape:
        Input (N, C_in, H, W); output (N, C, H', W'), and the activated inner map (N, I, H', W').
    """

    def __init__(self, in_channels: int, inner: int, channels: int, stride: int, form: str, dropout, drop_path):
        super().__init__()
        outer = {"kernel_size": 1, "norm_window": WINDOW, "dropout": dropout}
        first, last = outer, outer
        if form == "pair":
            first = {"kernel_size": 2, "padding": TOP_LEFT, "dropout": dropout}
            last = {"kernel_size": 2, "padding": BOTTOM_RIGHT, "dropout": dropout}
        self.act = nn.ReLU()
        self.conv1 = KNConv2d(in_channels, inner, **first)
        self.conv2 = KNConv2d(inner, inner, 3, stride, padding=1, dropout=dropout)
        self.conv3 = KNConv2d(inner, channels, **last)
        self.shortcut = None
        if stride > 1 or in_channels != channels:
            self.shortcut = KNConv2d(in_channels, channels, stride=stride, **outer)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, coupled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.act(x)
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.act(self.conv1(y))
        inner = self.act(self.conv2(y if coupled is None else y + coupled))
        return skip + self.drop_path(self.conv3(inner)), inner


class KNDown(nn.Module):
    """The map as tokens: (N, I, H, W) added to the grid of (N, 1 + h w, E)."""

    def __init__(self, inner: int, embed: int, stride: int, dropout: float):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.proj, self.act = KNLinear(inner, embed, norm_window=WINDOW, dropout=dropout), nn.GELU()

    def forward(self, inner: Tensor, tokens: Tensor) -> Tensor:
        y = self.act(self.proj(self.pool(inner).permute(0, 2, 3, 1)))  # (N, I, h, w) -> (N, h, w, E)
        return torch.cat([tokens[:, :1], tokens[:, 1:] + y.flatten(1, 2)], 1)


class KNUp(nn.Module):
    """The tokens as a map: the grid of (N, 1 + h w, E) -> (N, I, H, W)."""

    def __init__(self, embed: int, inner: int, stride: int, dropout: float):
        super().__init__()
        self.proj, self.act = KNLinear(embed, inner, norm_window=WINDOW, dropout=dropout), nn.ReLU()
        self.enlarge = nn.Upsample(scale_factor=stride) if stride > 1 else nn.Identity()

    def forward(self, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
        y = self.act(self.proj(tokens[:, 1:], grid_size=grid_size))
        return self.enlarge(y.transpose(1, 2).unflatten(2, grid_size))  # (N, h w, I) -> (N, I, h, w) -> (N, I, H, W)


class KNParts:
    """What a kernel normalized Conformer is made of.

    Args:
        form: of the bottlenecks, "window" or "pair".
        dropout: p of every KNConv and KNLinear.
    """

    def __init__(self, form: str, dropout: float):
        if form not in ("pair", "window"):
            raise KNPortError(f"form={form!r}; expected 'window' (1 x 1 kernels) or 'pair' (2 x 2 kernels)")
        self.form, self.dropout = form, dropout

    def inner(self, in_channels: int, channels: int, embed: int) -> int:
        """I at which a bottleneck and its coupling unit (``embed`` 0 for none) have the original's weights."""
        inner = channels // EXPANSION
        if self.form == "window":
            return inner
        weights = inner * (in_channels + channels + embed) + 9 * inner**2
        linear = 4 * (in_channels + channels) + embed  # weights = 9 I^2 + linear I
        return max(1, round((math.sqrt(linear**2 + 36 * weights) - linear) / 18))

    def stem(self, in_chans: int, channels: int, low_resolution: bool) -> nn.Module:
        return knconv_stem(in_chans, channels, low_resolution, self.dropout)

    def bottleneck(self, in_channels, channels, embed, stride=1, drop_path=0.0) -> nn.Module:
        inner = self.inner(in_channels, channels, embed)
        return KNBottleneck(in_channels, inner, channels, stride, self.form, self.dropout, drop_path)

    def patches(self, channels: int, embed: int) -> nn.Module:
        return nn.Sequential(nn.ReLU(), KNConv2d(channels, embed, 4, 4, dropout=self.dropout))

    def transformer(self, embed: int, heads: int, mlp_ratio: float, drop_path: float) -> nn.Module:
        kn = {"norm_window": WINDOW, "prefix_tokens": 1, "dropout": self.dropout}
        return Block(embed, heads, mlp_ratio, drop_path, **kn)

    def down(self, inner: int, embed: int, stride: int) -> nn.Module:
        return KNDown(inner, embed, stride, self.dropout)

    def up(self, embed: int, inner: int, stride: int) -> nn.Module:
        return KNUp(embed, inner, stride, self.dropout)

    def ends(self, channels: int, embed: int) -> tuple[nn.Module, nn.Module]:
        dropout = min(5 * self.dropout, 0.25)
        return nn.Sequential(KernelNorm2d(dropout=dropout), nn.ReLU()), TokenNorm(dropout=dropout)

    def init(self, model: nn.Module) -> None:
        """Layers on normalized units keep the variance of their input; what is added to a stream, a quarter of it."""
        for path, module in model.named_modules():
            if isinstance(module, nn.Conv2d):
                lecun_init(module, gain=0.5 if path.endswith("conv3") else 1.0)
            elif isinstance(module, nn.Linear):
                init_linear(module)
                if path.endswith(("down.proj", "up.proj")):
                    nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.in_features))
