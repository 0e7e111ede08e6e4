"""KN-ConvNeXt: as published (Nasirigerdeh et al., TMLR 2024, section 4; the authors' released code) and fully ported.

`KNConvNeXt` is the published one: torchvision's ConvNeXt in which only the three downsampling steps between the stages
are kernel normalized: LayerNorm and a 2 x 2 stride-2 convolution become a ReLU and a KNConv of the same kernel. Stem,
blocks and head keep their LayerNorms, and names are torchvision's, so a trained ConvNeXt loads with ``strict=False``:
only the LayerNorms of the steps are left over. The paper reports 81.25 % against 80.87 % on ImageNet for tiny.

`FullKNConvNeXt` has no LayerNorm at all; no paper gives it. In the block LayerNorm stands between the depthwise 7 x 7
and the expanding pointwise convolution. KNConv 1x1 with units of 3 x 3 (`norm_window`) takes the place of LayerNorm and
pointwise convolution, with the parameters and MACs of the original; units of one pixel would be LayerNorm again. The
stem's convolution becomes a KNConv of the same 4 x 4 patches with the statistics of 3 x 3 of them (those of one would
take its brightness and contrast away for good), the downsampling is the published one, and the LayerNorm
before the classifier a KernelNorm before the pool.

Legend: N images, C channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import convnext
from torchvision.ops import StochasticDepth

from architectures.head import ClassifierHead
from architectures.initialization import lecun_init
from architectures.registry import register
from knport import KernelNorm2d, KNConv2d

WINDOW = 3
ATTO, FEMTO, PICO = (((c, 2 * c, 4 * c, 8 * c), (2, 2, 6, 2)) for c in (40, 48, 64))
NANO = (80, 160, 320, 640), (2, 2, 8, 2)
TINY = (96, 192, 384, 768), (3, 3, 9, 3)
SMALL, BASE, LARGE = (((c, 2 * c, 4 * c, 8 * c), (3, 3, 27, 3)) for c in (96, 128, 192))
CIFAR = (32, 64, 128), (2, 2, 2)


class ConvNeXt(ClassifierHead, convnext.ConvNeXt):
    """torchvision's ConvNeXt for other images and small ones.

    Args:
        widths: C of each stage.
        depths: blocks in each stage.
        num_classes: size of the last layer; 0 for pooled and normalized features.
        in_chans: channels of the images.
        low_resolution: a stem of 2 x 2 patches in place of 4 x 4 (our choice; the papers have none).
        stochastic_depth_prob: probability with which the last block is left out in training; less for those before.
        layer_scale: initial gain of the blocks.

    Shape:
        Input (N, in_chans, H, W) from 32 x 32 (16 x 16); output (N, num_classes).
    """

    classifier_path = "classifier.2"

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        stochastic_depth_prob: float = 0.0,
        layer_scale: float = 1e-6,
    ):
        stages = zip(widths, (*widths[1:], None), depths, strict=True)
        setting = [convnext.CNBlockConfig(*stage) for stage in stages]
        super().__init__(setting, stochastic_depth_prob, layer_scale, num_classes or 1)
        self.num_classes, self.num_features = num_classes, widths[-1]
        if low_resolution or in_chans != 3:
            patch = 2 if low_resolution else 4
            self.features[0][0] = nn.Conv2d(in_chans, widths[0], patch, patch)
            init(self.features[0][0])
        if not num_classes:
            self.classifier[2] = nn.Identity()


class KNConvNeXt(ConvNeXt):
    """The published KN-ConvNeXt: kernel normalized downsampling. Arguments and shapes as `ConvNeXt`, and

    Args:
        dropout: p of the KNConvs.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], *, dropout: float = 0.1, **kwargs):
        super().__init__(widths, depths, **kwargs)
        for i in range(1, len(widths)):  # stem, stage, step, stage, ...
            self.features[2 * i] = downsampling(widths[i - 1], widths[i], dropout)
            init(self.features[2 * i])


def downsampling(in_channels: int, channels: int, dropout: float) -> nn.Sequential:
    """ReLU, KNConv 2x2 stride 2: (N, C, H, W) -> (N, C', H / 2, W / 2)."""
    return nn.Sequential(nn.ReLU(), KNConv2d(in_channels, channels, 2, 2, dropout=dropout))


def init(model: nn.Module) -> None:
    """ConvNeXt's: truncated normal weights of SD 0.02, zero biases."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)


class LayerScale(nn.Module):
    """A gain per channel, small at first (Touvron et al., 2021)."""

    def __init__(self, channels: int, value: float):
        super().__init__()
        self.weight = nn.Parameter(torch.full((channels, 1, 1), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Block(nn.Module):
    """Depthwise conv 7x7, KNConv 1x1 to four times as many channels, GELU, conv 1x1, layer scale; plus identity."""

    def __init__(self, channels: int, window: int, dropout: float, layer_scale: float, skip: float):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.expand = KNConv2d(channels, 4 * channels, 1, norm_window=window, dropout=dropout)
        self.act = nn.GELU()
        self.project = nn.Conv2d(4 * channels, channels, 1)
        self.scale = LayerScale(channels, layer_scale)
        self.skip = StochasticDepth(skip, "row")

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.act(self.expand(self.depthwise(x))))
        return x + self.skip(self.scale(y))


class FullKNConvNeXt(ClassifierHead, nn.Module):
    """A ConvNeXt with kernel normalization in stem, blocks and downsampling. Arguments and shapes as `ConvNeXt`, and

    Args:
        window: pixels per side of the units of the blocks' KNConvs.
        dropout: p of every KNConv; the KernelNorm before the pool has min(5 p, 0.25).
    """

    def __init__(
        self,
        widths: Sequence[int],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        stochastic_depth_prob: float = 0.0,
        layer_scale: float = 1e-6,
        window: int = WINDOW,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[-1]
        patch = 2 if low_resolution else 4
        self.stem = KNConv2d(in_chans, widths[0], patch, patch, norm_window=WINDOW * patch, dropout=dropout)
        skips = iter(torch.linspace(0, stochastic_depth_prob, sum(depths), device="cpu").tolist())
        self.stages = nn.Sequential()
        for i, (channels, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [Block(channels, window, dropout, layer_scale, next(skips)) for _ in range(depth)]
            step = [downsampling(widths[i - 1], channels, dropout)] if i else []
            self.stages.append(nn.Sequential(*step, *blocks))
        self.norm = KernelNorm2d(dropout=min(5 * dropout, 0.25))
        self.fc = self.new_classifier(num_classes)
        init(self)
        for conv in (self.stem, *(stage[0] for stage in self.stages[1:])):  # what sets the scale of the residual stream
            lecun_init(conv)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H / 32, W / 32), normalized."""
        return self.norm(self.stages(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


@register(original="baseline_convnext_tiny")
def knconvnext_tiny(*, stochastic_depth_prob: float = 0.1, **kwargs) -> KNConvNeXt:
    """KN-ConvNeXt-T as published: 28.59 M parameters, 4.46 G MACs at 224 x 224."""
    return KNConvNeXt(*TINY, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_small")
def knconvnext_small(*, stochastic_depth_prob: float = 0.4, **kwargs) -> KNConvNeXt:
    """KN-ConvNeXt-S as published: 50.22 M parameters, 8.68 G MACs at 224 x 224."""
    return KNConvNeXt(*SMALL, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_base")
def knconvnext_base(*, stochastic_depth_prob: float = 0.5, **kwargs) -> KNConvNeXt:
    """KN-ConvNeXt-B as published: 88.59 M parameters, 15.35 G MACs at 224 x 224."""
    return KNConvNeXt(*BASE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_large")
def knconvnext_large(*, stochastic_depth_prob: float = 0.5, **kwargs) -> KNConvNeXt:
    """KN-ConvNeXt-L as published: 197.8 M parameters, 34.36 G MACs at 224 x 224."""
    return KNConvNeXt(*LARGE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_atto")
def knconvnext_full_atto(**kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-A, fully ported: 3.69 M parameters, 547 M MACs at 224 x 224."""
    return FullKNConvNeXt(*ATTO, **kwargs)


@register(original="baseline_convnext_femto")
def knconvnext_full_femto(**kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-F, fully ported: 5.21 M parameters, 780 M MACs at 224 x 224."""
    return FullKNConvNeXt(*FEMTO, **kwargs)


@register(original="baseline_convnext_pico")
def knconvnext_full_pico(**kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-P, fully ported: 9.04 M parameters, 1.37 G MACs at 224 x 224."""
    return FullKNConvNeXt(*PICO, **kwargs)


@register(original="baseline_convnext_nano")
def knconvnext_full_nano(**kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-N, fully ported: 15.58 M parameters, 2.45 G MACs at 224 x 224."""
    return FullKNConvNeXt(*NANO, **kwargs)


@register(original="baseline_convnext_tiny")
def knconvnext_full_tiny(*, stochastic_depth_prob: float = 0.1, **kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-T, fully ported: 28.57 M parameters, 4.46 G MACs at 224 x 224."""
    return FullKNConvNeXt(*TINY, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_small")
def knconvnext_full_small(*, stochastic_depth_prob: float = 0.4, **kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-S, fully ported: 50.19 M parameters, 8.68 G MACs at 224 x 224."""
    return FullKNConvNeXt(*SMALL, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_base")
def knconvnext_full_base(*, stochastic_depth_prob: float = 0.5, **kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-B, fully ported: 88.55 M parameters, 15.35 G MACs at 224 x 224."""
    return FullKNConvNeXt(*BASE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="baseline_convnext_large")
def knconvnext_full_large(*, stochastic_depth_prob: float = 0.5, **kwargs) -> FullKNConvNeXt:
    """KN-ConvNeXt-L, fully ported: 197.7 M parameters, 34.36 G MACs at 224 x 224."""
    return FullKNConvNeXt(*LARGE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)
