"""KN-ConvMixer after Trockman & Kolter (TMLR 2023, Figure 2), and the original with BatchNorm.

ConvMixer normalizes what its next convolution reads: convolution, GELU, BatchNorm, over and over. Kernel normalization
takes the place of each BatchNorm *and* the convolution behind it: the depthwise KNConv normalizes units of k x k pixels
over all channels (a filter sees one channel, the statistics see all), the pointwise one the sum of branch and identity,
and the last BatchNorm becomes a KernelNorm before the pool. The patch embedding (KNConv p x p, stride p) takes its
statistics of 7 x 7 patches, since those of one would take each patch's brightness and contrast away for good. Other
placements learned less in short trials (docs/architectures.md), and the original's BatchNorm more at batch size 32. No
paper gives these networks; the pointwise convolution, whose unit would be one pixel, has two forms:

    window   KNConv 1x1 with units of 3 x 3 (`norm_window`): the parameters and MACs of the original.
    2x2      KNConv 2x2, padded on alternating sides from block to block, in a narrower network with the parameters of
             the original. The networks whose names end in ``_2x2``.

Legend: N images, C channels, H x W the image, p the patch size, k the depthwise kernel.
"""

from __future__ import annotations

from collections.abc import Callable

from timm.models.convmixer import ConvMixer as TimmConvMixer
from torch import Tensor, nn

from architectures.head import ClassifierHead
from architectures.initialization import lecun_init
from architectures.knresnet import BOTTOM_RIGHT, TOP_LEFT
from architectures.norms import with_norm
from architectures.registry import register
from knport import KernelNorm2d, KNConv2d

WINDOW, PATCHES = 3, 7  # pixels per side of the pointwise units, and patches per side of the embedding's


class Mixer(nn.Module):
    """x plus act(depthwise KNConv), then act(pointwise KNConv)."""

    def __init__(self, dim: int, kernel_size: int, pointwise: nn.Module, activation: Callable, dropout: float):
        super().__init__()
        self.depthwise = KNConv2d(dim, dim, kernel_size, padding="same", groups=dim, dropout=dropout)
        self.act1, self.pointwise, self.act2 = activation(), pointwise, activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act2(self.pointwise(x + self.act1(self.depthwise(x))))


class KNConvMixer(ClassifierHead, nn.Module):
    """A kernel normalized ConvMixer.

    Args:
        dim: C.
        depth: blocks.
        kernel_size: k.
        patch_size: p.
        low_resolution_patch: p in its place with ``low_resolution``.
        form: of the pointwise convolutions, "window" or "2x2"; see the module's docstring.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: smaller patches, for small images.
        activation: the class of every activation.
        dropout: p of every KNConv; the KernelNorm before the pool has min(5 p, 0.25).

    Shape:
        Input (N, in_chans, H, W), at least one patch; output (N, num_classes).
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        *,
        low_resolution_patch: int = 2,
        form: str = "window",
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.num_classes, self.num_features = num_classes, dim
        patch_size = low_resolution_patch if low_resolution else patch_size
        stem = KNConv2d(in_chans, dim, patch_size, patch_size, norm_window=PATCHES * patch_size, dropout=dropout)
        self.stem = nn.Sequential(stem, activation())
        blocks = []
        for i in range(depth):
            if form == "2x2":
                pointwise = KNConv2d(dim, dim, 2, padding=BOTTOM_RIGHT if i % 2 else TOP_LEFT, dropout=dropout)
            else:
                pointwise = KNConv2d(dim, dim, 1, norm_window=WINDOW, dropout=dropout)
            blocks.append(Mixer(dim, kernel_size, pointwise, activation, dropout))
        self.blocks = nn.Sequential(*blocks)
        self.norm = KernelNorm2d(dropout=min(5 * dropout, 0.25))
        self.fc = self.new_classifier(num_classes)
        lecun_init(self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, C, H / p, W / p), normalized."""
        return self.norm(self.blocks(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


class ConvMixer(TimmConvMixer):
    """timm's ConvMixer with another norm and smaller patches for small images. Arguments as `KNConvMixer`.

    ``norm`` is any of `knport.replace_norm`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        kernel_size: int = 9,
        patch_size: int = 7,
        *,
        low_resolution_patch: int = 2,
        norm: str = "batch",
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        activation: Callable[[], nn.Module] = nn.GELU,
    ):
        patch_size = low_resolution_patch if low_resolution else patch_size
        classes = {"num_classes": num_classes, "in_chans": in_chans}
        super().__init__(dim, depth, kernel_size, patch_size, act_layer=activation, **classes)
        with_norm(self, norm)


@register(original="baseline_convmixer_256_8")
def knconvmixer_256_8(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-256/8: 0.99 M parameters, 746 M MACs at 224 x 224."""
    return KNConvMixer(256, 8, low_resolution_patch=1, **kwargs)


@register(original="baseline_convmixer_256_8")
def knconvmixer_256_8_2x2(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-256/8 of width 150 with 2 x 2 kernels: 0.99 M parameters, 906 M MACs at 224 x 224."""
    return KNConvMixer(150, 8, form="2x2", low_resolution_patch=1, **kwargs)


@register
def baseline_convmixer_256_8(**kwargs) -> ConvMixer:
    """ConvMixer-256/8: 1.00 M parameters, 746 M MACs at 224 x 224."""
    return ConvMixer(256, 8, low_resolution_patch=1, **kwargs)


@register(original="baseline_convmixer_512_12")
def knconvmixer_512_12(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-512/12: 4.14 M parameters, 3.73 G MACs at 224 x 224."""
    return KNConvMixer(512, 12, 8, **kwargs)


@register(original="baseline_convmixer_512_12")
def knconvmixer_512_12_2x2(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-512/12 of width 275 with 2 x 2 kernels: 4.16 M parameters, 4.22 G MACs at 224 x 224."""
    return KNConvMixer(275, 12, 8, form="2x2", **kwargs)


@register
def baseline_convmixer_512_12(**kwargs) -> ConvMixer:
    """ConvMixer-512/12: 4.17 M parameters, 3.70 G MACs at 224 x 224."""
    return ConvMixer(512, 12, 8, **kwargs)


@register(original="baseline_convmixer_768_32")
def knconvmixer_768_32(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-768/32: 21.01 M parameters, 20.68 G MACs at 224 x 224."""
    return KNConvMixer(768, 32, 7, activation=nn.ReLU, **kwargs)


@register(original="baseline_convmixer_768_32")
def knconvmixer_768_32_2x2(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-768/32 of width 395 with 2 x 2 kernels: 21.07 M parameters, 22.44 G MACs at 224 x 224."""
    return KNConvMixer(395, 32, 7, form="2x2", activation=nn.ReLU, **kwargs)


@register
def baseline_convmixer_768_32(**kwargs) -> ConvMixer:
    """ConvMixer-768/32: 21.11 M parameters, 20.68 G MACs at 224 x 224."""
    return ConvMixer(768, 32, 7, activation=nn.ReLU, **kwargs)


@register(original="baseline_convmixer_1024_20")
def knconvmixer_1024_20(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-1024/20: 24.30 M parameters, 5.95 G MACs at 224 x 224."""
    return KNConvMixer(1024, 20, 9, 14, **kwargs)


@register(original="baseline_convmixer_1024_20")
def knconvmixer_1024_20_2x2(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-1024/20 of width 532 with 2 x 2 kernels: 24.37 M parameters, 6.84 G MACs at 224 x 224."""
    return KNConvMixer(532, 20, 9, 14, form="2x2", **kwargs)


@register
def baseline_convmixer_1024_20(**kwargs) -> ConvMixer:
    """ConvMixer-1024/20: 24.38 M parameters, 5.95 G MACs at 224 x 224."""
    return ConvMixer(1024, 20, 9, 14, **kwargs)


@register(original="baseline_convmixer_1536_20")
def knconvmixer_1536_20(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-1536/20: 51.50 M parameters, 51.10 G MACs at 224 x 224."""
    return KNConvMixer(1536, 20, **kwargs)


@register(original="baseline_convmixer_1536_20")
def knconvmixer_1536_20_2x2(**kwargs) -> KNConvMixer:
    """KN-ConvMixer-1536/20 of width 784 with 2 x 2 kernels: 51.37 M parameters, 54.97 G MACs at 224 x 224."""
    return KNConvMixer(784, 20, form="2x2", **kwargs)


@register
def baseline_convmixer_1536_20(**kwargs) -> ConvMixer:
    """ConvMixer-1536/20: 51.63 M parameters, 51.10 G MACs at 224 x 224."""
    return ConvMixer(1536, 20, **kwargs)


@register(original="cifar_convmixer")
def kncifar_convmixer(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> KNConvMixer:
    """A KN-ConvMixer for a laptop: 0.08 M parameters, 21 M MACs at 32 x 32."""
    return KNConvMixer(130, 4, 5, num_classes=num_classes, low_resolution=low_resolution, **kwargs)


@register
def cifar_convmixer(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> ConvMixer:
    """ConvMixer-128/4 with 5 x 5 kernels, for a laptop: 0.08 M parameters, 20 M MACs at 32 x 32."""
    return ConvMixer(128, 4, 5, num_classes=num_classes, low_resolution=low_resolution, **kwargs)
