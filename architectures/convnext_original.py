"""The originals of KN-ConvNeXt, torchvision's ConvNeXt with its LayerNorms, atto to large; and sizes for a laptop.

torchvision has no sizes below tiny; those are timm's (``convnext_atto`` to ``convnext_nano``), of the same counts.
"""

from __future__ import annotations

from architectures.convnext import ATTO, BASE, CIFAR, FEMTO, LARGE, NANO, PICO, SMALL, TINY, ConvNeXt, FullKNConvNeXt
from architectures.registry import register


@register
def baseline_convnext_atto(**kwargs) -> ConvNeXt:
    """ConvNeXt-A: 3.70 M parameters, 547 M MACs at 224 x 224."""
    return ConvNeXt(*ATTO, **kwargs)


@register
def baseline_convnext_femto(**kwargs) -> ConvNeXt:
    """ConvNeXt-F: 5.22 M parameters, 780 M MACs at 224 x 224."""
    return ConvNeXt(*FEMTO, **kwargs)


@register
def baseline_convnext_pico(**kwargs) -> ConvNeXt:
    """ConvNeXt-P: 9.05 M parameters, 1.37 G MACs at 224 x 224."""
    return ConvNeXt(*PICO, **kwargs)


@register
def baseline_convnext_nano(**kwargs) -> ConvNeXt:
    """ConvNeXt-N: 15.59 M parameters, 2.45 G MACs at 224 x 224."""
    return ConvNeXt(*NANO, **kwargs)


@register
def baseline_convnext_tiny(*, stochastic_depth_prob: float = 0.1, **kwargs) -> ConvNeXt:
    """ConvNeXt-T: 28.59 M parameters, 4.46 G MACs at 224 x 224."""
    return ConvNeXt(*TINY, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register
def baseline_convnext_small(*, stochastic_depth_prob: float = 0.4, **kwargs) -> ConvNeXt:
    """ConvNeXt-S: 50.22 M parameters, 8.68 G MACs at 224 x 224."""
    return ConvNeXt(*SMALL, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register
def baseline_convnext_base(*, stochastic_depth_prob: float = 0.5, **kwargs) -> ConvNeXt:
    """ConvNeXt-B: 88.59 M parameters, 15.35 G MACs at 224 x 224."""
    return ConvNeXt(*BASE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register
def baseline_convnext_large(*, stochastic_depth_prob: float = 0.5, **kwargs) -> ConvNeXt:
    """ConvNeXt-L: 197.8 M parameters, 34.36 G MACs at 224 x 224."""
    return ConvNeXt(*LARGE, stochastic_depth_prob=stochastic_depth_prob, **kwargs)


@register(original="cifar_convnext")
def kncifar_convnext(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> FullKNConvNeXt:
    """A fully ported KN-ConvNeXt of three stages for 32 x 32 images: 0.41 M parameters, 15 M MACs at 32 x 32."""
    return FullKNConvNeXt(*CIFAR, num_classes=num_classes, low_resolution=low_resolution, layer_scale=1.0, **kwargs)


@register
def cifar_convnext(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> ConvNeXt:
    """A ConvNeXt of three stages for 32 x 32 images: 0.41 M parameters, 15 M MACs at 32 x 32."""
    return ConvNeXt(*CIFAR, num_classes=num_classes, low_resolution=low_resolution, layer_scale=1.0, **kwargs)
