"""KNResNet-18/34/50 (Nasirigerdeh et al., TMLR 2024, Figure 5, in the widths of the authors' released code).

Pre-activation residual networks of kernel normalized convolutions. Kernels are 2 x 2 where a ResNet's are 3 x 3 or
1 x 1, and the pairs around them pad by one and then by none, so that a block keeps the size of its map. Between the
sets a transition convolution (no residual) and a max pool shrink it. A KernelNorm and an activation come before the
average pool. Parameters match those of the ResNets; multiply-accumulates are 2.0 to 2.6 times theirs.

Legend: N images, C channels of a set, I inner channels of its blocks, H x W the map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from architectures.head import ClassifierHead
from architectures.initialization import lecun_init
from architectures.registry import register
from knport import KernelNorm2d, KNConv2d, KNPortError, UnknownName
from knport.geometry import padding_pairs

TOP_LEFT, BOTTOM_RIGHT = ((1, 0), (1, 0)), ((0, 1), (0, 1))  # alternate, so that the map does not drift


class Basic(nn.Module):
    """ReLU, KNConv 2x2 C -> I (the map grows by one), ReLU, KNConv 2x2 I -> C (and shrinks again); plus identity."""

    def __init__(
        self,
        channels: int,
        inner: int,
        dropout: float,
        kernel_size: int = 2,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        before, after = kernel_size // 2, (kernel_size - 1) // 2  # together they keep the map's size
        self.act = activation()
        self.conv1 = KNConv2d(channels, inner, kernel_size, padding=before, dropout=dropout)
        self.conv2 = KNConv2d(inner, channels, kernel_size, padding=after, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.act(self.conv1(self.act(x))))


class Bottleneck(nn.Module):
    """ReLU, KNConv 2x2 C -> I, ReLU, KNConv 3x3 I -> I, ReLU, KNConv 2x2 I -> C; plus identity.

    With ``kernel_size=1`` the outer convolutions are the 1 x 1 ones of a ResNet.
    """

    def __init__(
        self,
        channels: int,
        inner: int,
        dropout: float,
        kernel_size: int = 2,
        activation: type[nn.Module] = nn.ReLU,
    ):
        super().__init__()
        self.act = activation()
        self.conv1 = KNConv2d(channels, inner, kernel_size, padding=kernel_size - 1, dropout=dropout)
        self.conv2 = KNConv2d(inner, inner, 3, padding=1, dropout=dropout)
        self.conv3 = KNConv2d(inner, channels, kernel_size, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.act(self.conv1(self.act(x))))
        return x + self.conv3(self.act(y))


class Transition(nn.Sequential):
    """ReLU, KNConv, MaxPool: to the next set's width and half its map."""

    def __init__(self, activation: type[nn.Module], conv: KNConv2d, pool: nn.Module):
        super().__init__()
        self.act, self.conv, self.pool = activation(), conv, pool


class FinalConv(nn.Sequential):
    """MaxPool 2x2, ReLU, KNConv 2x2: the last feature map of KNResNet-18 and -34."""

    def __init__(self, activation: type[nn.Module], conv: KNConv2d):
        super().__init__()
        self.pool, self.act, self.conv = nn.MaxPool2d(2), activation(), conv


class KNResNet(ClassifierHead, nn.Module):
    """A kernel normalized residual network.

    Args:
        block: `Basic` or `Bottleneck`.
        widths: C of each of the four sets.
        inner: I of each set's blocks.
        depths: blocks in each set.
        final: channels of `FinalConv`; None for a network without one, whose last set and last transition then have
            1 x 1 kernels (KNResNet-50).
        extra: I of one more `Basic` block after the last set; None for none.
        paddings: of the three transitions and of `FinalConv`; None for those of the authors' released code.
        stem_kernel: kernel size of the stride-2 stem.
        activation: the class of every activation.
        init: of the weights: "fan_in", Kaiming normal by fan-in, under which every KNConv puts out a variance of 2;
            "lecun", a variance of 1; or "published", Kaiming normal by fan-out, under which the stem puts out far less
            than the blocks behind it. A small network learned as well with the first as with the last
            (docs/architectures.md).
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: KNConv 3x3 as the stem (32 x 32 images) in place of KNConv 7x7 stride 2 and a max pool.
        dropout: p of every KNConv; the KernelNorm before the pool has min(5 p, 0.25).

    Shape:
        Input (N, in_chans, H, W), from `minimum_size` pixels per side on: 16 for KNResNet-18 and -34 with
        ``low_resolution``, 93 without; 8 and 29 for KNResNet-50. Output (N, num_classes).
    """

    def __init__(
        self,
        block: type[nn.Module],
        widths: Sequence[int],
        inner: Sequence[int],
        depths: Sequence[int],
        final: int | None,
        *,
        extra: int | None = None,
        paddings: Sequence | None = None,
        stem_kernel: int = 7,
        activation: type[nn.Module] = nn.ReLU,
        init: str = "fan_in",
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
        dropout: float = 0.05,
    ):
        super().__init__()
        if init not in INITIALIZATIONS:
            raise UnknownName("initialization", init, INITIALIZATIONS)
        self.num_classes, self.low_resolution = num_classes, low_resolution
        self.num_features = final or widths[-1]
        paddings = paddings or _released_paddings(low_resolution, final is not None)
        kernels = (2, 2, 2, 2 if final else 1)
        self.minimum_size = _minimum_size(low_resolution, kernels[1:], paddings, final is not None)
        self.stem = knconv_stem(in_chans, widths[0], low_resolution, dropout, stem_kernel)
        self.transitions, self.sets = nn.ModuleList(), nn.ModuleList()
        for i, kernel in enumerate(kernels):
            if i:
                conv = KNConv2d(widths[i - 1], widths[i], kernel, padding=paddings[i - 1], dropout=dropout)
                self.transitions.append(Transition(activation, conv, nn.MaxPool2d(2)))
            blocks = [block(widths[i], inner[i], dropout, kernel, activation) for _ in range(depths[i])]
            self.sets.append(nn.Sequential(*blocks))
        if extra:
            self.sets[-1].append(Basic(widths[-1], extra, dropout, activation=activation))
        self.final = nn.Identity()
        if final:
            self.final = FinalConv(activation, KNConv2d(widths[-1], final, 2, padding=paddings[-1], dropout=dropout))
        self.norm = KernelNorm2d(dropout=min(5 * dropout, 0.25))
        self.act = activation()
        self.fc = self.new_classifier(num_classes)
        INITIALIZATIONS[init](self)

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H', W'), normalized and activated."""
        height, width = x.shape[2:]
        if min(height, width) < self.minimum_size:
            hint = "" if self.low_resolution else ", or build the network with low_resolution=True"
            raise KNPortError(
                f"images of {height} x {width} leave no pixel of the last map; enlarge them to {self.minimum_size} x "
                f"{self.minimum_size} or more{hint}"
            )
        x = self.stem(x)
        for i, blocks in enumerate(self.sets):
            x = blocks(self.transitions[i - 1](x) if i else x)
        return self.act(self.norm(self.final(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))  # (N, C, H, W) -> (N, C)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


def knconv_stem(
    in_chans: int, channels: int, low_resolution: bool, dropout: float, kernel_size: int = 7
) -> nn.Sequential:
    """KNConv 3x3, or KNConv 7x7 stride 2 and MaxPool 3x3 stride 2 (to a quarter of the size)."""
    if low_resolution:
        return nn.Sequential(KNConv2d(in_chans, channels, 3, padding=1, dropout=dropout))
    conv = KNConv2d(in_chans, channels, kernel_size, stride=2, padding=kernel_size // 2, dropout=dropout)
    return nn.Sequential(conv, nn.MaxPool2d(3, stride=2, padding=1))


def kaiming_init(model: nn.Module) -> None:
    """Kaiming normal (fan out) convolutions and zero biases, as published."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


INITIALIZATIONS: dict[str, Callable[[nn.Module], None]] = {
    "fan_in": functools.partial(lecun_init, gain=math.sqrt(2)),
    "lecun": lecun_init,
    "published": kaiming_init,
}


def _released_paddings(low_resolution: bool, final: bool) -> tuple:
    # The last map is 4 x 4 from 32 pixels and 8 x 8 (7 x 7 without the padding) from 224.
    third = TOP_LEFT if low_resolution else ((2, 1), (2, 1))
    return TOP_LEFT, BOTTOM_RIGHT, third if final else 0, int(low_resolution)


def _minimum_size(low_resolution: bool, kernels: Sequence[int], paddings: Sequence, final: bool) -> int:
    """Pixels per side from which no max pool is left without a window."""

    def fits(size: int) -> bool:
        size = size if low_resolution else -(-size // 4)  # the stem halves twice, rounding up
        for kernel, padding in zip(kernels, paddings, strict=False):
            ((before, after),) = padding_pairs(padding, (kernel,) * 2, (1, 1), (1, 1))[:1]
            size = (size + before + after - kernel + 1) // 2
            if size < 1:
                return False
        if not final:
            return True
        ((before, after),) = padding_pairs(paddings[3], (2, 2), (1, 1), (1, 1))[:1]
        return size >= 2 and size // 2 + before + after >= 2

    return next(size for size in range(1, 1024) if fits(size))


@register(original="baseline_resnet18")
def knresnet18(**kwargs) -> KNResNet:
    """KNResNet-18: 11.69 M parameters, 3.56 G MACs at 224 x 224. ImageNet 71.17 % (TMLR Table 2)."""
    return KNResNet(Basic, (64, 256, 512, 724), (256, 256, 512, 724), (2, 2, 1, 1), 512, **kwargs)


@register(original="baseline_resnet34")
def knresnet34(**kwargs) -> KNResNet:
    """KNResNet-34: 21.79 M parameters, 7.51 G MACs at 224 x 224. ImageNet 74.60 % (TMLR Table 2)."""
    return KNResNet(Basic, (64, 256, 512, 512), (256, 320, 640, 843), (4, 5, 3, 2), 512, **kwargs)


@register(original="baseline_resnet50")
def knresnet50(**kwargs) -> KNResNet:
    """KNResNet-50: 25.56 M parameters, 10.51 G MACs at 224 x 224. ImageNet 76.54 % (TMLR Table 2)."""
    return KNResNet(Bottleneck, (256, 512, 810, 2048), (64, 128, 201, 512), (4, 5, 4, 2), None, **kwargs)


@register(original="baseline_resnet18")
def knresnet18_macs(**kwargs) -> KNResNet:
    """KNResNet-18 at 0.69 of its widths, with the MACs of a ResNet-18: 5.81 M parameters, 1.82 G MACs at 224 x 224."""
    return KNResNet(Basic, (48, 176, 352, 512), (176, 176, 352, 512), (2, 2, 1, 1), 352, **kwargs)


@register(original="baseline_resnet34")
def knresnet34_macs(**kwargs) -> KNResNet:
    """KNResNet-34 at 0.69 of its widths, with the MACs of a ResNet-34: 10.48 M parameters, 3.68 G MACs at 224 x 224."""
    sizes = (48, 176, 352, 352), (168, 224, 440, 584), (4, 5, 3, 2), 352
    return KNResNet(Basic, *sizes, **kwargs)


@register(original="baseline_resnet50")
def knresnet50_macs(**kwargs) -> KNResNet:
    """KNResNet-50 at 0.61 of its widths, with the MACs of a ResNet-50: 9.79 M parameters, 4.11 G MACs at 224 x 224."""
    sizes = (160, 312, 496, 1248), (40, 78, 118, 304), (4, 5, 4, 2), None
    return KNResNet(Bottleneck, *sizes, **kwargs)


@register(original="cifar_resnet8x2")
def kncifar_resnet8x2(*, num_classes: int = 10, low_resolution: bool = True, **kwargs) -> KNResNet:
    """A KNResNet of one block per set, for a laptop, to cifar_resnet8x2: 0.31 M parameters, 54 M MACs at 32 x 32."""
    sizes = (32, 64, 96, 96), (64, 64, 96, 116), (1, 1, 1, 1), 64
    return KNResNet(Basic, *sizes, num_classes=num_classes, low_resolution=low_resolution, **kwargs)
