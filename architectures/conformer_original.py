"""Conformer-Ti/S/B as Peng et al. (ICCV 2021) describe them, with BatchNorm and LayerNorm.

Neither timm nor torchvision has them. The branches and their coupling are those of `architectures.conformer`; here are
the original's parts, with the norms behind the convolutions and in front of the linear layers.

Legend: N images, C channels of a stage, I = C / 4 inner channels, E of a token, H x W a map, h x w the grid of patches.
"""

from __future__ import annotations

import functools

import torch
from timm.layers import DropPath
from timm.models import vision_transformer
from torch import Tensor, nn

from architectures.conformer import Conformer
from architectures.conformer_parts import EXPANSION
from architectures.registry import register
from architectures.vit import init_linear
from knport import replace_norm

LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)
BatchNorm = functools.partial(nn.BatchNorm2d, eps=1e-6)


class Bottleneck(nn.Module):
    """Conv 1x1, norm, ReLU, conv 3x3, norm, ReLU, conv 1x1, norm; plus the shortcut; ReLU. As `KNBottleneck`."""

    def __init__(self, in_channels: int, channels: int, stride: int, drop_path: float):
        super().__init__()
        inner = channels // EXPANSION
        self.conv1, self.norm1 = nn.Conv2d(in_channels, inner, 1, bias=False), BatchNorm(inner)
        self.conv2, self.norm2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False), BatchNorm(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, channels, 1, bias=False), BatchNorm(channels)
        self.shortcut, self.act = None, nn.ReLU()
        if stride > 1 or in_channels != channels:
            conv = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, BatchNorm(channels))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, coupled: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y = self.act(self.norm1(self.conv1(x)))
        inner = self.act(self.norm2(self.conv2(y if coupled is None else y + coupled)))
        y = self.drop_path(self.norm3(self.conv3(inner)))
        return self.act(y + (x if self.shortcut is None else self.shortcut(x))), inner


class Down(nn.Module):
    """Conv 1x1, average pool, norm, GELU, added to the tokens; the class token is added to itself, as published."""

    def __init__(self, inner: int, embed: int, stride: int):
        super().__init__()
        self.proj, self.pool = nn.Conv2d(inner, embed, 1), nn.AvgPool2d(stride)
        self.norm, self.act = LayerNorm(embed), nn.GELU()

    def forward(self, inner: Tensor, tokens: Tensor) -> Tensor:
        y = self.pool(self.proj(inner)).flatten(2).transpose(1, 2)  # (N, I, H, W) -> (N, h w, E)
        return tokens + torch.cat([tokens[:, :1], self.act(self.norm(y))], 1)


class Up(nn.Module):
    """Conv 1x1 of the grid of tokens, norm, ReLU, nearest neighbour."""

    def __init__(self, embed: int, inner: int, stride: int):
        super().__init__()
        self.proj, self.norm, self.act = nn.Conv2d(embed, inner, 1), BatchNorm(inner), nn.ReLU()
        self.enlarge = nn.Upsample(scale_factor=stride) if stride > 1 else nn.Identity()

    def forward(self, tokens: Tensor, grid_size: tuple[int, int]) -> Tensor:
        grid = tokens[:, 1:].transpose(1, 2).unflatten(2, grid_size)  # (N, h w, E) -> (N, E, h, w)
        return self.enlarge(self.act(self.norm(self.proj(grid))))


class Block(vision_transformer.Block):
    """timm's, which needs no grid."""

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return super().forward(x)


class OriginalParts:
    """As `KNParts`."""

    def inner(self, in_channels: int, channels: int, embed: int) -> int:
        return channels // EXPANSION

    def stem(self, in_chans: int, channels: int, low_resolution: bool) -> nn.Module:
        kernel = {"kernel_size": 3, "padding": 1} if low_resolution else {"kernel_size": 7, "stride": 2, "padding": 3}
        pool = nn.Identity() if low_resolution else nn.MaxPool2d(3, stride=2, padding=1)
        conv = nn.Conv2d(in_chans, channels, bias=False, **kernel)
        return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU(), pool)

    def bottleneck(self, in_channels, channels, embed, stride=1, drop_path=0.0) -> nn.Module:
        return Bottleneck(in_channels, channels, stride, drop_path)

    def patches(self, channels: int, embed: int) -> nn.Module:
        return nn.Conv2d(channels, embed, 4, 4)

    def transformer(self, embed: int, heads: int, mlp_ratio: float, drop_path: float) -> nn.Module:
        return Block(embed, heads, mlp_ratio, qkv_bias=True, drop_path=drop_path, norm_layer=LayerNorm)

    def down(self, inner: int, embed: int, stride: int) -> nn.Module:
        return Down(inner, embed, stride)

    def up(self, embed: int, inner: int, stride: int) -> nn.Module:
        return Up(embed, inner, stride)

    def ends(self, channels: int, embed: int) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), LayerNorm(embed)

    def init(self, model: nn.Module) -> None:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                init_linear(module)


def _build(ratio: float, embed: int, heads: int, *, norm: str = "batch", **kwargs) -> Conformer:
    """The original; another ``norm`` of `knport.replace_norm` than "batch" takes the place of all its norms."""
    model = Conformer(OriginalParts(), ratio, embed, heads, **kwargs)
    return model if norm == "batch" else replace_norm(model, norm, inplace=True)


@register
def baseline_conformer_test(**kwargs) -> Conformer:
    """A Conformer of six narrow blocks, for tests and small machines: 0.65 M parameters, 0.17 G MACs at 224 x 224."""
    return _build(2, 64, 2, **{"depth": 6, "stem": 16, **kwargs})


@register
def baseline_conformer_tiny(**kwargs) -> Conformer:
    """Conformer-Ti: 23.52 M parameters, 5.21 G MACs at 224 x 224."""
    return _build(1, 384, 6, **kwargs)


@register
def baseline_conformer_small(**kwargs) -> Conformer:
    """Conformer-S: 37.67 M parameters, 10.60 G MACs at 224 x 224."""
    return _build(4, 384, 6, **kwargs)


@register
def baseline_conformer_base(**kwargs) -> Conformer:
    """Conformer-B: 83.29 M parameters, 23.33 G MACs at 224 x 224."""
    return _build(6, 576, 9, **kwargs)
