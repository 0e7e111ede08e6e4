"""KN-ConvNeXt as published (Nasirigerdeh et al., TMLR 2024, section 4; the authors' released code).

torchvision's ConvNeXt in which only the three downsampling steps between the stages are kernel normalized: LayerNorm
and a 2 x 2 stride-2 convolution become a ReLU and a KNConv of the same kernel. Stem, blocks and head keep their
LayerNorms, and names are torchvision's, so a trained ConvNeXt loads with ``strict=False``: only the LayerNorms of the
steps are left over. The paper reports 81.25 % against 80.87 % on ImageNet for tiny.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn
from torchvision import models
from torchvision.models.convnext import ConvNeXt

from architectures.registry import register
from knport import KNConv2d


def port_downsampling(model: ConvNeXt, dropout: float = 0.1) -> ConvNeXt:
    """Replace, in place, each downsampling step of torchvision's ConvNeXt by ReLU and KNConv 2x2 stride 2.

    Args:
        model: any of torchvision's.
        dropout: p of the KNConvs.
    """
    for i in range(2, len(model.features), 2):  # stem, stage, step, stage, ...
        conv = model.features[i][1]
        new = KNConv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, dropout=dropout)
        _init(new)
        model.features[i] = nn.Sequential(nn.ReLU(), new)
    return model


def _build(
    constructor: Callable[..., ConvNeXt],
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    low_resolution: bool = False,
    dropout: float = 0.1,
    **kwargs,
) -> ConvNeXt:
    """torchvision's ConvNeXt with its downsampling ported, for other images and small ones.

    Args:
        constructor: of torchvision.
        num_classes: size of the last layer; 0 for pooled and normalized features.
        in_chans: channels of the images.
        low_resolution: a stem of 2 x 2 patches in place of 4 x 4 (our choice; the papers have none).
        dropout: p of the KNConvs.
        kwargs: torchvision's ``stochastic_depth_prob`` and ``layer_scale``.

    Shape:
        Input (N, in_chans, H, W) from 32 x 32 (16 x 16); output (N, num_classes).
    """
    model = constructor(num_classes=num_classes or 1, **kwargs)
    stem = model.features[0][0]
    if low_resolution or in_chans != 3:
        patch = 2 if low_resolution else 4
        model.features[0][0] = nn.Conv2d(in_chans, stem.out_channels, patch, patch)
        _init(model.features[0][0])
    if not num_classes:
        model.classifier[2] = nn.Identity()
    return port_downsampling(model, dropout)


def _init(conv: nn.Conv2d) -> None:
    nn.init.trunc_normal_(conv.weight, std=0.02)
    nn.init.zeros_(conv.bias)


@register
def knconvnext_tiny(**kwargs) -> ConvNeXt:
    """KN-ConvNeXt-T: 28.6 M parameters, 4.46 G MACs at 224 x 224."""
    return _build(models.convnext_tiny, **kwargs)


@register
def knconvnext_small(**kwargs) -> ConvNeXt:
    """KN-ConvNeXt-S: 50.2 M parameters, 8.68 G MACs at 224 x 224."""
    return _build(models.convnext_small, **kwargs)


@register
def knconvnext_base(**kwargs) -> ConvNeXt:
    """KN-ConvNeXt-B: 88.6 M parameters, 15.36 G MACs at 224 x 224."""
    return _build(models.convnext_base, **kwargs)


@register
def knconvnext_large(**kwargs) -> ConvNeXt:
    """KN-ConvNeXt-L: 197.8 M parameters, 34.36 G MACs at 224 x 224."""
    return _build(models.convnext_large, **kwargs)
