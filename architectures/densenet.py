"""KN-DenseNet-121/169/201 after Huang et al. (CVPR 2017, Table 1), and torchvision's DenseNets as their originals.

A DenseNet layer is norm, ReLU, conv 1 x 1 to four times the growth rate, norm, ReLU, conv 3 x 3; it reads all features
before it and adds its own. Kernel normalization takes the place of each norm *and* the convolution behind it, so the
order is activation, KNConv: units are taken of the activated concatenation, and every reader normalizes it anew. What
is concatenated is never activated in place, since all later layers read it too. A KernelNorm and a ReLU come before the
average pool, as in the KNResNets (TMLR 2024, Figure 5). No paper gives these networks; there are two forms:

    pair     KNConv 2x2 pad 1, KNConv 2x2: the kernels of the KNResNets' blocks. The width between the two is the one
             at which the layer has the parameters of the original's. MACs are a few percent more, because the map
             between them is larger by one.
    window   KNConv 1x1 whose units are 3 x 3 (`norm_window`), KNConv 3x3: the kernels of the original, hence its
             MACs, and its parameters but for the norms' gains. The networks whose names end in ``_macs``.

Transitions keep their 1 x 1 kernel in both, with units of 3 x 3, and their average pool: 2 x 2
kernels there would cost a quarter of the network's parameters.

Legend: N images, C channels, H x W the map, k the growth rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models import densenet

from architectures.head import ClassifierHead
from architectures.initialization import lecun_init
from architectures.norms import with_norm
from architectures.registry import register
from knport import KernelNorm2d, KNConv2d

BOTTLENECK = 4  # width between the original's two convolutions, in growth rates
WINDOW = 3


class DenseLayer(nn.Module):
    """x, and the k channels that act, KNConv, act, KNConv make of it, concatenated."""

    def __init__(self, in_channels: int, growth: int, form: str, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.act1, self.act2 = activation(), activation()
        if form == "pair":
            inner = matched_width(in_channels, growth)
            self.conv1 = KNConv2d(in_channels, inner, 2, padding=1, dropout=dropout)
            self.conv2 = KNConv2d(inner, growth, 2, dropout=dropout)
        else:
            inner = BOTTLENECK * growth
            self.conv1 = KNConv2d(in_channels, inner, 1, norm_window=WINDOW, dropout=dropout)
            self.conv2 = KNConv2d(inner, growth, 3, padding=1, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act2(self.conv1(self.act1(x))))
        return torch.cat((x, y), 1)  # (N, C, H, W), (N, k, H, W) -> (N, C + k, H, W)


def matched_width(in_channels: int, growth: int) -> int:
    """The width I at which KNConv 2x2 C -> I -> k has the parameters of norm, conv 1x1 to 4 k, norm, conv 3x3 to k."""
    middle = BOTTLENECK * growth
    parameters = middle * (in_channels + 9 * growth) + 2 * (in_channels + middle)
    return max(1, round((parameters - growth) / (4 * (in_channels + growth) + 1)))


class KNDenseNet(ClassifierHead, nn.Module):
    """A kernel normalized DenseNet.

    Args:
        growth: k, the channels that each layer adds.
        depths: layers in each dense block.
        initial: channels of the stem.
        form: of the layers, "pair" or "window"; see the module's docstring.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: KNConv 3x3 as the stem in place of KNConv 7x7 stride 2 and a max pool.
        activation: the class of every activation.
        dropout: p of every KNConv; the KernelNorm before the pool has min(5 p, 0.25).

    Shape:
        Input (N, in_chans, H, W): every transition halves the map, from 4 x 4 on with three blocks and
        ``low_resolution``, from 32 x 32 on with four blocks without. Output (N, num_classes).
    """

    classifier_path = "fc"

    def __init__(
        self,
        growth: int,
        depths: Sequence[int],
        initial: int,
        *,
        form: str = "pair",
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        activation: type[nn.Module] = nn.ReLU,
        dropout: float = 0.05,
    ):
        super().__init__()
        self.num_classes, channels = num_classes, initial
        self.stem = self._stem(in_chans, initial, low_resolution, activation, dropout)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for i, depth in enumerate(depths):
            if i:
                conv = KNConv2d(channels, channels // 2, 1, norm_window=WINDOW, dropout=dropout)
                self.transitions.append(nn.Sequential(activation(), conv, nn.AvgPool2d(2)))
                channels //= 2
            layers = [DenseLayer(channels + j * growth, growth, form, activation, dropout) for j in range(depth)]
            self.blocks.append(nn.Sequential(*layers))
            channels += depth * growth
        self.num_features = channels
        self.norm, self.act = KernelNorm2d(dropout=min(5 * dropout, 0.25)), activation()
        self.fc = self.new_classifier(num_classes)
        lecun_init(self)

    @staticmethod
    def _stem(in_chans, channels, low_resolution, activation, dropout) -> nn.Sequential:
        if low_resolution:
            return nn.Sequential(KNConv2d(in_chans, channels, 3, padding=1, dropout=dropout))
        conv = KNConv2d(in_chans, channels, 7, stride=2, padding=3, dropout=dropout)
        return nn.Sequential(conv, activation(), nn.MaxPool2d(3, stride=2, padding=1))

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H', W'), normalized and activated."""
        x = self.stem(x)
        for i, block in enumerate(self.blocks):
            x = block(self.transitions[i - 1](x) if i else x)
        return self.act(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.forward_features(x).mean((2, 3)))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


class DenseNet(ClassifierHead, densenet.DenseNet):
    """torchvision's DenseNet with another norm, other images and a stem for small ones.

    Args:
        growth, depths, initial, num_classes, in_chans, low_resolution: as `KNDenseNet`.
        norm: of `knport.replace_norm`.

    Shape:
        As `KNDenseNet`.
    """

    classifier_path = "classifier"

    def __init__(
        self,
        growth: int,
        depths: Sequence[int],
        initial: int,
        *,
        norm: str = "batch",
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
    ):
        super().__init__(growth, tuple(depths), initial, num_classes=num_classes or 1)
        self.num_classes, self.num_features = num_classes, self.classifier.in_features
        if not num_classes:
            self.classifier = nn.Identity()
        if low_resolution:  # Huang et al. on CIFAR: a convolution, and the first block's own norm behind it
            self.features.conv0 = nn.Conv2d(in_chans, initial, 3, padding=1, bias=False)
            for name in ("norm0", "relu0", "pool0"):
                delattr(self.features, name)
        elif in_chans != 3:
            self.features.conv0 = nn.Conv2d(in_chans, initial, 7, stride=2, padding=3, bias=False)
        nn.init.kaiming_normal_(self.features.conv0.weight)
        with_norm(self, norm)


@register(original="baseline_densenet121")
def kndensenet121(**kwargs) -> KNDenseNet:
    """KN-DenseNet-121: 7.98 M parameters, 3.05 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 24, 16), 64, **kwargs)


@register(original="baseline_densenet169")
def kndensenet169(**kwargs) -> KNDenseNet:
    """KN-DenseNet-169: 14.15 M parameters, 3.68 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 32, 32), 64, **kwargs)


@register(original="baseline_densenet201")
def kndensenet201(**kwargs) -> KNDenseNet:
    """KN-DenseNet-201: 20.00 M parameters, 4.74 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 48, 32), 64, **kwargs)


@register(original="baseline_densenet121")
def kndensenet121_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-121 with the original's kernels: 7.91 M parameters, 2.83 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 24, 16), 64, form="window", **kwargs)


@register(original="baseline_densenet169")
def kndensenet169_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-169 with the original's kernels: 14.01 M parameters, 3.36 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 32, 32), 64, form="window", **kwargs)


@register(original="baseline_densenet201")
def kndensenet201_macs(**kwargs) -> KNDenseNet:
    """KN-DenseNet-201 with the original's kernels: 19.80 M parameters, 4.29 G MACs at 224 x 224."""
    return KNDenseNet(32, (6, 12, 48, 32), 64, form="window", **kwargs)


@register
def baseline_densenet121(**kwargs) -> DenseNet:
    """DenseNet-121: 7.98 M parameters, 2.83 G MACs at 224 x 224."""
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


@register
def baseline_densenet169(**kwargs) -> DenseNet:
    """DenseNet-169: 14.15 M parameters, 3.36 G MACs at 224 x 224."""
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


@register
def baseline_densenet201(**kwargs) -> DenseNet:
    """DenseNet-201: 20.01 M parameters, 4.29 G MACs at 224 x 224."""
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)
