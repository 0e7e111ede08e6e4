"""KN-ViT-Ti/S/B after Dosovitskiy et al. (ICLR 2021) and Touvron et al. (2021).

A ViT block is x + attention(norm(x)), x + MLP(norm(x)): each norm has one reader, the linear layer behind it (queries,
keys and values; the first of the MLP). Kernel normalization takes the place of both, as KNConv does in the papers:
`KNLinear` with units of ``window`` x ``window`` neighbouring tokens over all channels. The class token is a unit of its
own, and nothing else mixes tokens that the original does not mix. Window 1 is LayerNorm without gain and bias; larger
windows keep the differences of size between neighbouring tokens, which LayerNorm takes away. A KernelNorm stands where
the last LayerNorm does.

The patches become tokens by a KNConv. Were a patch its unit, as the papers' layers have it, its brightness and contrast
would be gone, and no later layer sees them. So the statistics are those of 7 x 7 patches around each, which leave the
differences between neighbours; `patch_window` chooses, and 0 is the original's plain convolution (trials:
docs/architectures.md). The positions are added behind the embedding, where no norm can divide them by the contrast of
the patch.

Published code that calls itself a kernel normalized ViT takes tokens for channels, so that a unit spans all tokens and
2 x 2 embedding entries; nothing of it is used here. The parameters are those of the ViTs less the gains and biases of
their norms (0.2 % and less), and the multiply-accumulates are theirs.

Legend: N images, C channels, H x W the grid of patches, L = 1 + H W tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from architectures.head import ClassifierHead
from architectures.registry import register
from knport import KernelNorm1d, KNConv2d, KNLinear, KNPortError


class Attention(nn.Module):
    """Multi-head self-attention on kernel normalized tokens."""

    def __init__(self, channels: int, heads: int, **kn):
        super().__init__()
        self.heads = heads
        self.qkv = KNLinear(channels, 3 * channels, **kn)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        qkv = self.qkv(x, grid_size=grid_size).unflatten(2, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (N, L, 3, heads, C / heads) -> 3 of (N, heads, L, C / heads)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # -> (N, L, C)


class Mlp(nn.Module):
    """KNLinear, GELU, linear."""

    def __init__(self, channels: int, hidden: int, **kn):
        super().__init__()
        self.fc1, self.act, self.fc2 = KNLinear(channels, hidden, **kn), nn.GELU(), nn.Linear(hidden, channels)

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        return self.fc2(self.act(self.fc1(x, grid_size=grid_size)))


class Block(nn.Module):
    """A transformer block whose norms are those of the linear layers behind them.

    Args:
        channels: C.
        heads: of the attention.
        mlp_ratio: hidden channels of the MLP by C.
        drop_path: probability with which an image skips each branch in training.
        kn: keywords of `knport.KNLinear`.

    Shape:
        Input and output (N, L, C), and the grid's (H, W).
    """

    def __init__(self, channels: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0, **kn):
        super().__init__()
        self.attn = Attention(channels, heads, **kn)
        self.mlp = Mlp(channels, int(channels * mlp_ratio), **kn)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid_size: tuple[int, int]) -> Tensor:
        x = x + self.drop_path(self.attn(x, grid_size))
        return x + self.drop_path(self.mlp(x, grid_size))


class Tokens(nn.Module):
    """A map of patches as tokens behind a class token, with learned positions, resized to grids of other sizes.

    The parameters stand in a module of their own so that per-sample gradients do not run whole networks twice.

    Shape:
        Input (N, C, H, W); output (N, 1 + H W, C).
    """

    def __init__(self, channels: int, grid_size: tuple[int, int]):
        super().__init__()
        self.grid_size = grid_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + grid_size[0] * grid_size[1], channels))
        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        own, grid = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if tuple(x.shape[2:]) != self.grid_size:
            grid = grid.transpose(1, 2).unflatten(2, self.grid_size)  # (1, H W, C) -> (1, C, H, W)
            grid = F.interpolate(grid, tuple(x.shape[2:]), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
        tokens = x.flatten(2).transpose(1, 2) + grid  # (N, C, H, W) -> (N, H W, C)
        return torch.cat([(self.cls_token + own).expand(x.shape[0], -1, -1), tokens], 1)


class TokenNorm(KernelNorm1d):
    """Every token normalized by itself: (N, L, C)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class KNVisionTransformer(ClassifierHead, nn.Module):
    """A kernel normalized ViT.

    Args:
        channels: C.
        depth: blocks.
        heads: of each attention.
        mlp_ratio: hidden channels of the MLPs by C.
        window: tokens per side of the units of every KNLinear; 1 is LayerNorm.
        patch_window: patches per side of the blocks that the embedding takes its statistics of; 0 for a plain
            convolution.
        patch_size: pixels per side; None for 16, or 4 with `low_resolution`.
        img_size: pixels (an int or height and width) for which positions are learned; None for 224, or 32.
        num_classes: size of the last layer; 0 for the class token's features.
        in_chans: channels of the images.
        low_resolution: for images of about 32 x 32.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.
        dropout: p of every KNConv and KNLinear; the last KernelNorm has min(5 p, 0.25).

    Shape:
        Input (N, in_chans, H, W), both multiples of `patch_size`; output (N, num_classes).
    """

    classifier_path = "head"

    def __init__(
        self,
        channels: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        *,
        window: int = 3,
        patch_window: int = 7,
        patch_size: int | None = None,
        img_size: int | tuple[int, int] | None = None,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.num_features, self.num_classes = channels, num_classes
        self.patch_size, img_size = patch_and_image(patch_size, img_size, low_resolution)
        self.patch_embed = patch_embedding(in_chans, channels, self.patch_size, patch_window, dropout)
        self.tokens = Tokens(channels, self._grid_of(img_size))
        kn = {"norm_window": window, "prefix_tokens": 1, "dropout": dropout}
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(channels, heads, mlp_ratio, rate, **kn) for rate in rates)
        self.norm = TokenNorm(dropout=min(5 * dropout, 0.25))
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)
        self.head = self.new_classifier(num_classes)

    def new_classifier(self, num_classes: int) -> nn.Module:
        return init_linear(nn.Linear(self.num_features, num_classes)) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, L, C), normalized."""
        grid_size = self._grid_of(x.shape[2:])
        x = self.tokens(self.patch_embed(x))
        for block in self.blocks:
            x = block(x, grid_size)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return x[:, 0] if pre_logits else self.head(x[:, 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def _grid_of(self, size) -> tuple[int, int]:
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise KNPortError(
                f"images of {height} x {width} are no grid of patches of {self.patch_size} x {self.patch_size}; resize "
                "or pad them to multiples of the patch"
            )
        return height // self.patch_size, width // self.patch_size


def patch_embedding(in_chans: int, channels: int, size: int, window: int, dropout: float) -> nn.Conv2d:
    """A KNConv over patches, with statistics of `window` patches around each; a plain convolution for window 0."""
    if not window:
        return nn.Conv2d(in_chans, channels, size, stride=size)
    wide = window * size if window > 1 else None
    return KNConv2d(in_chans, channels, size, stride=size, norm_window=wide, dropout=dropout)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Normal weights of SD 0.02, cut off at two, and zero biases, as the original."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)
    return linear


def patch_and_image(patch_size, img_size, low_resolution: bool) -> tuple[int, tuple[int, int]]:
    img_size = img_size or (32 if low_resolution else 224)
    return patch_size or (4 if low_resolution else 16), (img_size, img_size) if isinstance(img_size, int) else img_size


@register(original="baseline_vit_test")
def knvit_test(**kwargs) -> KNVisionTransformer:
    """KN-ViT in timm's test size, for tests and small machines: 0.38 M parameters, 0.09 G MACs at 224 x 224."""
    return KNVisionTransformer(64, 6, 2, 3.0, **kwargs)


@register(original="baseline_vit_tiny")
def knvit_tiny(**kwargs) -> KNVisionTransformer:
    """KN-ViT-Ti: 5.71 M parameters, 1.25 G MACs at 224 x 224."""
    return KNVisionTransformer(192, 12, 3, **kwargs)


@register(original="baseline_vit_small")
def knvit_small(**kwargs) -> KNVisionTransformer:
    """KN-ViT-S: 22.03 M parameters, 4.60 G MACs at 224 x 224."""
    return KNVisionTransformer(384, 12, 6, **kwargs)


@register(original="baseline_vit_base")
def knvit_base(**kwargs) -> KNVisionTransformer:
    """KN-ViT-B: 86.53 M parameters, 17.56 G MACs at 224 x 224."""
    return KNVisionTransformer(768, 12, 12, **kwargs)
