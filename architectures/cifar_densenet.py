"""DenseNet-BC for 32 x 32 images (Huang et al., CVPR 2017, Tables 1 and 2), kernel normalized and original.

Three dense blocks of (L - 4) / 6 layers, a stem of twice the growth rate. The kernel normalized form is that of
`architectures.densenet`: 2 x 2 kernels in pairs, or with ``_macs`` the original's kernels and units of 3 x 3.
``densenet40_k12`` is small enough for a laptop; the paper's are L = 100 with k = 12, L = 250 with k = 24 and L = 190
with k = 40.
"""

from __future__ import annotations

from architectures.densenet import DenseNet, KNDenseNet
from architectures.registry import register


def _shape(layers: int, growth: int) -> tuple:
    return growth, ((layers - 4) // 6,) * 3, 2 * growth


def _kernel(layers: int, growth: int, *, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> KNDenseNet:
    return KNDenseNet(*_shape(layers, growth), num_classes=num_classes, low_resolution=low_resolution, **kwargs)


def _original(layers: int, growth: int, *, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> DenseNet:
    return DenseNet(*_shape(layers, growth), num_classes=num_classes, low_resolution=low_resolution, **kwargs)


@register(original="densenet40_k12")
def kndensenet40_k12(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 40, k = 12: 0.18 M parameters, 79 M MACs at 32 x 32."""
    return _kernel(40, 12, **kwargs)


@register(original="densenet40_k12")
def kndensenet40_k12_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 40, k = 12, with the original's kernels: 0.17 M parameters, 72 M MACs at 32 x 32."""
    return _kernel(40, 12, form="window", **kwargs)


@register
def densenet40_k12(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 40, k = 12: 0.18 M parameters, 72 M MACs at 32 x 32."""
    return _original(40, 12, **kwargs)


@register(original="densenet100_k12")
def kndensenet100_k12(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 100, k = 12: 0.77 M parameters, 318 M MACs at 32 x 32."""
    return _kernel(100, 12, **kwargs)


@register(original="densenet100_k12")
def kndensenet100_k12_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 100, k = 12, with the original's kernels: 0.75 M parameters, 288 M MACs at 32 x 32."""
    return _kernel(100, 12, form="window", **kwargs)


@register
def densenet100_k12(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 100, k = 12: 0.77 M parameters, 288 M MACs at 32 x 32."""
    return _original(100, 12, **kwargs)


@register(original="densenet100_k24")
def kndensenet100_k24(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 100, k = 24: 3.02 M parameters, 1.25 G MACs at 32 x 32."""
    return _kernel(100, 24, **kwargs)


@register(original="densenet100_k24")
def kndensenet100_k24_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 100, k = 24, with the original's kernels: 2.98 M parameters, 1.15 G MACs at 32 x 32."""
    return _kernel(100, 24, form="window", **kwargs)


@register
def densenet100_k24(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 100, k = 24: 3.02 M parameters, 1.15 G MACs at 32 x 32."""
    return _original(100, 24, **kwargs)


@register(original="densenet190_k24")
def kndensenet190_k24(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 190, k = 24: 9.29 M parameters, 3.67 G MACs at 32 x 32."""
    return _kernel(190, 24, **kwargs)


@register(original="densenet190_k24")
def kndensenet190_k24_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 190, k = 24, with the original's kernels: 9.15 M parameters, 3.35 G MACs at 32 x 32."""
    return _kernel(190, 24, form="window", **kwargs)


@register
def densenet190_k24(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 190, k = 24: 9.29 M parameters, 3.35 G MACs at 32 x 32."""
    return _original(190, 24, **kwargs)


@register(original="densenet190_k40")
def kndensenet190_k40(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 190, k = 40: 25.61 M parameters, 10.12 G MACs at 32 x 32."""
    return _kernel(190, 40, **kwargs)


@register(original="densenet190_k40")
def kndensenet190_k40_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 190, k = 40, with the original's kernels: 25.39 M parameters, 9.30 G MACs at 32 x 32."""
    return _kernel(190, 40, form="window", **kwargs)


@register
def densenet190_k40(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 190, k = 40: 25.62 M parameters, 9.30 G MACs at 32 x 32."""
    return _original(190, 40, **kwargs)


@register(original="densenet250_k24")
def kndensenet250_k24(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 250, k = 24: 15.32 M parameters, 5.94 G MACs at 32 x 32."""
    return _kernel(250, 24, **kwargs)


@register(original="densenet250_k24")
def kndensenet250_k24_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-BC, L = 250, k = 24, with the original's kernels: 15.08 M parameters, 5.42 G MACs at 32 x 32."""
    return _kernel(250, 24, form="window", **kwargs)


@register
def densenet250_k24(**kwargs) -> DenseNet:
    """DenseNet-BC, L = 250, k = 24: 15.32 M parameters, 5.42 G MACs at 32 x 32."""
    return _original(250, 24, **kwargs)
