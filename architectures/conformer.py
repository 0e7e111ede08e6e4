"""KN-Conformer-Ti/S/B after Peng et al. (ICCV 2021, Figure 2 and Table 1): a ResNet and a ViT side by side.

After a common stem, local features (a map, in bottlenecks) and global ones (tokens of 16 x 16 pixels and a class token,
in transformer blocks) run in two branches. In every block but the first, two feature coupling units connect them:
down, the map inside the bottleneck is averaged over each patch, projected and added to the tokens; up, the tokens are
projected, enlarged and added to the map inside a second bottleneck. Tokens need no positions, they get them from the
map, so images may have any size. The two branches end in a classifier each.

Kernel normalization stands in front of each layer that the original normalizes behind:

    bottleneck     ReLU, KNConv, ReLU, KNConv 3x3, ReLU, KNConv; plus the shortcut (the order of the KNResNets)
    transformer    as KN-ViT: `KNLinear` on units of 3 x 3 tokens, the class token by itself
    down           average pool, KNLinear on 3 x 3 patches of the map, GELU
    up             KNLinear on 3 x 3 tokens, ReLU, nearest neighbour
    ends           KernelNorm and ReLU before the pool; KernelNorm of the class token

Projection and average commute, so that nothing but the norm tells `down` from the original's order. The outer kernels
of the bottlenecks come in two forms:

    window   1 x 1 and the widths of the original, with units of 3 x 3 (`norm_window`): its parameters less those of its
             norms, and 2 to 3 % fewer MACs, since `down` projects behind the pool.
    pair     2 x 2, as in the KNResNets, padded on opposite sides, with the inner width at which a bottleneck and its
             coupling unit have the original's parameters; MACs are 1 to 6 % more (9 % at 32 x 32). These are the
             networks whose names end in ``_pair``.

The first is the default: inner maps half as wide are a narrow bridge between the branches (11 channels in the first
stage of Ti). Strided shortcuts have 1 x 1 kernels in both. The original adds the class token to itself in every block;
here it passes by the couplings unchanged, since a KernelNorm would have to take back a factor of two thousand.

`forward` gives the mean of the two classifiers' logits, one tensor, as at the original's test time. The original trains
on the sum of their two losses: ``sum(cross_entropy(logits, target) for logits in model.forward_heads(images))``.

Legend: N images, C channels of a stage, I inner channels, E of a token, H x W a map, h x w the grid of patches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from architectures.conformer_parts import KNParts
from architectures.head import ClassifierHead
from architectures.registry import register
from architectures.vit import init_linear
from knport import KNPortError


class CoupledBlock(nn.Module):
    """A bottleneck and a transformer block, a second bottleneck, and the coupling units between them."""

    def __init__(self, parts, in_channels, channels, embed, heads, mlp_ratio, *, stride, pool, drop_path, last):
        super().__init__()
        self.conv = parts.bottleneck(in_channels, channels, embed, stride)
        self.down = parts.down(parts.inner(in_channels, channels, embed), embed, pool)
        self.transformer = parts.transformer(embed, heads, mlp_ratio, drop_path)
        self.up = parts.up(embed, parts.inner(channels, channels, embed), pool)
        self.fusion = parts.bottleneck(channels, channels, embed, 2 if last else 1, drop_path)

    def forward(self, x: Tensor, tokens: Tensor, grid_size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        x, inner = self.conv(x)
        tokens = self.transformer(self.down(inner, tokens), grid_size)
        return self.fusion(x, self.up(tokens, grid_size))[0], tokens


class ClassToken(nn.Module):
    """A learned token in front of the others. In a module of its own for the sake of per-sample gradients."""

    def __init__(self, embed: int):
        super().__init__()
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, embed), std=0.02))

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(tokens.shape[0], -1, -1), tokens], 1)


class TwoHeads(nn.Module):
    """The classifiers of both branches on their features side by side, (N, C + E): the mean of their logits."""

    def __init__(self, channels: int, embed: int, num_classes: int):
        super().__init__()
        self.conv = init_linear(nn.Linear(channels, num_classes))
        self.transformer = init_linear(nn.Linear(embed, num_classes))

    @property
    def weight(self) -> Tensor:
        """(num_classes, C + E): of both side by side, what a single linear layer would have."""
        return torch.cat([self.conv.weight, self.transformer.weight], 1)

    def both(self, features: Tensor) -> tuple[Tensor, Tensor]:
        of_map, of_token = features.split([self.conv.in_features, self.transformer.in_features], 1)
        return self.conv(of_map), self.transformer(of_token)

    def forward(self, features: Tensor) -> Tensor:
        of_map, of_token = self.both(features)
        return (of_map + of_token) / 2


class Conformer(ClassifierHead, nn.Module):
    """A convolutional and a transformer branch, coupled in every block but the first.

    Args:
        parts: what it is made of, `KNParts` or the original's.
        ratio: C of the first stage by the stem's channels; the second has twice, the third four times as many.
        embed: E.
        heads: of each attention.
        depth: blocks, a multiple of three.
        stem: channels of the stem.
        mlp_ratio: hidden channels of the MLPs by E.
        num_classes: size of the two last layers; 0 for the features of both branches, (N, C + E).
        in_chans: channels of the images.
        low_resolution: a 3 x 3 stem without stride, hence patches of 4 x 4 pixels.
        drop_path: stochastic depth of the last block, growing linearly from 0 at the first.

    Shape:
        Input (N, in_chans, H, W), both multiples of 16 (4 with ``low_resolution``); output (N, num_classes).
    """

    classifier_path = "head"

    def __init__(
        self,
        parts,
        ratio: float,
        embed: int,
        heads: int,
        *,
        depth: int = 12,
        stem: int = 64,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        drop_path: float = 0.0,
    ):
        super().__init__()
        self.num_classes, self.embed, self.patch_size = num_classes, embed, 4 if low_resolution else 16
        widths = [int(stem * ratio) * 2**stage for stage in range(3)]
        self.num_features = widths[-1] + embed
        rates = torch.linspace(0, drop_path, depth, device="cpu").tolist()
        self.stem = parts.stem(in_chans, stem, low_resolution)
        self.conv = parts.bottleneck(stem, widths[0], 0)
        self.patches, self.class_token = parts.patches(stem, embed), ClassToken(embed)
        self.transformer = parts.transformer(embed, heads, mlp_ratio, rates[0])
        self.blocks = nn.ModuleList()
        channels = widths[0]
        for i in range(1, depth):
            stage, first = divmod(3 * i, depth)
            how = {"stride": 2 if stage and not first else 1, "pool": 4 // 2**stage, "last": i == depth - 1}
            block = CoupledBlock(parts, channels, widths[stage], embed, heads, mlp_ratio, drop_path=rates[i], **how)
            self.blocks.append(block)
            channels = widths[stage]
        self.norm, self.token_norm = parts.ends(channels, embed)
        parts.init(self)
        self.head = self.new_classifier(num_classes)

    def new_classifier(self, num_classes: int) -> nn.Module:
        return TwoHeads(self.num_features - self.embed, self.embed, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, C + E): the pooled map and the class token, normalized."""
        grid_size = self._grid_of(x.shape[2:])
        x = self.stem(x)
        tokens = self.class_token(self.patches(x).flatten(2).transpose(1, 2))  # (N, E, h, w) -> (N, 1 + h w, E)
        x, tokens = self.conv(x)[0], self.transformer(tokens, grid_size)
        for block in self.blocks:
            x, tokens = block(x, tokens, grid_size)
        return torch.cat([self.norm(x).mean((2, 3)), self.token_norm(tokens)[:, 0]], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.forward_features(x))

    def forward_heads(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of the convolutional and of the transformer branch, each (N, num_classes), for a loss of each."""
        return self.head.both(self.forward_features(x))

    def _grid_of(self, size) -> tuple[int, int]:
        height, width = size
        if height % self.patch_size or width % self.patch_size:
            raise KNPortError(
                f"images of {height} x {width} are no grid of patches of {self.patch_size} x {self.patch_size}; resize "
                "or pad them to multiples of the patch"
            )
        return height // self.patch_size, width // self.patch_size


def _build(ratio: float, embed: int, heads: int, *, form: str = "window", dropout: float = 0.05, **kwargs) -> Conformer:
    return Conformer(KNParts(form, dropout), ratio, embed, heads, **kwargs)


@register(original="baseline_conformer_test")
def knconformer_test(**kwargs) -> Conformer:
    """KN-Conformer of six narrow blocks, for tests and small machines: 0.64 M parameters, 0.17 G MACs at 224 x 224."""
    return _build(2, 64, 2, **{"depth": 6, "stem": 16, **kwargs})


@register(original="baseline_conformer_tiny")
def knconformer_tiny(**kwargs) -> Conformer:
    """KN-Conformer-Ti: 23.49 M parameters, 5.13 G MACs at 224 x 224."""
    return _build(1, 384, 6, **kwargs)


@register(original="baseline_conformer_small")
def knconformer_small(**kwargs) -> Conformer:
    """KN-Conformer-S: 37.62 M parameters, 10.27 G MACs at 224 x 224."""
    return _build(4, 384, 6, **kwargs)


@register(original="baseline_conformer_base")
def knconformer_base(**kwargs) -> Conformer:
    """KN-Conformer-B: 83.21 M parameters, 22.58 G MACs at 224 x 224."""
    return _build(6, 576, 9, **kwargs)


@register(original="baseline_conformer_tiny")
def knconformer_tiny_pair(**kwargs) -> Conformer:
    """KN-Conformer-Ti with enlarged kernels: 23.48 M parameters, 5.24 G MACs at 224 x 224."""
    return _build(1, 384, 6, form="pair", **kwargs)


@register(original="baseline_conformer_small")
def knconformer_small_pair(**kwargs) -> Conformer:
    """KN-Conformer-S with enlarged kernels: 37.62 M parameters, 11.20 G MACs at 224 x 224."""
    return _build(4, 384, 6, form="pair", **kwargs)


@register(original="baseline_conformer_base")
def knconformer_base_pair(**kwargs) -> Conformer:
    """KN-Conformer-B with enlarged kernels: 83.16 M parameters, 24.71 G MACs at 224 x 224."""
    return _build(6, 576, 9, form="pair", **kwargs)
