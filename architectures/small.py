"""The kernel normalized networks of differentially private training, as in the authors' released code (dp-torch).

All take 32 x 32 images. No image sees another, so per-sample gradients exist. Activations are Mish, dropout is 0.1,
and PyTorch's own initialization stays. Every activation makes a new tensor: the released DenseNet activates in place
what it concatenates afterwards, so that its early features pass through Mish again in every layer; that is an error
there, and is not repeated here.

Legend: N images, C channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from architectures.head import ClassifierHead
from architectures.knresnet import Basic, KNResNet
from architectures.registry import register
from knport import KernelNorm2d, KNConv2d


class PostActivation(nn.Sequential):
    """KNConv 3x3, activation."""

    def __init__(self, in_channels: int, channels: int, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.conv = KNConv2d(in_channels, channels, 3, padding=1, dropout=dropout)
        self.act = activation()


class PreActivation(nn.Sequential):
    """Activation, KNConv 3x3."""

    def __init__(self, in_channels: int, channels: int, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.act = activation()
        self.conv = KNConv2d(in_channels, channels, 3, padding=1, dropout=dropout)


class Residual(nn.Module):
    """x plus two layers of it."""

    def __init__(self, layer: type[nn.Module], channels: int, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.layers = nn.Sequential(*(layer(channels, channels, activation, dropout) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Downsampling(nn.Module):
    """A pre-activation block of stride 2; the shortcut is a KNConv 1x1 of the activated input."""

    def __init__(self, in_channels: int, channels: int, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.act = activation()
        self.conv = KNConv2d(in_channels, channels, 3, stride=2, padding=1, dropout=dropout)
        self.layer = PreActivation(channels, channels, activation, dropout)
        self.shortcut = KNConv2d(in_channels, channels, 1, stride=2, dropout=dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(x)
        return self.layer(self.conv(x)) + self.shortcut(x)


class Dense(nn.Module):
    """x, and `growth` channels made of it, concatenated."""

    def __init__(self, in_channels: int, growth: int, activation: type[nn.Module], dropout: float):
        super().__init__()
        self.layer = PreActivation(in_channels, growth, activation, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.layer(x)), dim=1)  # (N, C, H, W) -> (N, C + growth, H, W)


class DPNet(ClassifierHead, nn.Module):
    """Layers, KernelNorm, activation, average pool, linear.

    Args:
        make_layers: from channels of the images, activation and dropout, the layers up to the KernelNorm.
        channels: of their output.
        pool: height and width of the map that the linear layer sees.
        final_activation: whether one follows the KernelNorm.
        norm_dropout: p of the KernelNorm as a multiple of the KNConvs', at most 0.5.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: accepted like everywhere; these networks have one form, for small images.
        activation: the class of every activation.
        dropout: p of every KNConv.

    Shape:
        Input (N, in_chans, H, W), from 8 x 8. Output (N, num_classes).
    """

    def __init__(
        self,
        make_layers: Callable[[int, type[nn.Module], float], list[nn.Module]],
        channels: int,
        *,
        pool: int,
        final_activation: bool = True,
        norm_dropout: float = 5.0,
        num_classes: int = 10,
        in_chans: int = 3,
        low_resolution: bool = True,
        activation: type[nn.Module] = nn.Mish,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.layers = nn.Sequential(*make_layers(in_chans, activation, dropout))
        self.norm = KernelNorm2d(dropout=min(norm_dropout * dropout, 0.5))
        self.act = activation() if final_activation else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(pool)
        self.num_features = channels * pool**2
        self.fc = self.new_classifier(num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.act(self.norm(self.layers(x))))
        return self.fc(x.flatten(1))  # (N, C, pool, pool) -> (N, C * pool * pool) -> (N, num_classes)


def _resnet8(in_chans: int, *options) -> list[nn.Module]:
    return [
        PostActivation(in_chans, 64, *options),
        PostActivation(64, 128, *options),
        nn.MaxPool2d(2),
        Residual(PostActivation, 128, *options),
        PostActivation(128, 256, *options),
        nn.MaxPool2d(2),
        Residual(PostActivation, 256, *options),
        nn.MaxPool2d(2),
    ]


def _resnet13(in_chans: int, *options) -> list[nn.Module]:
    layers = [_stem(in_chans, 64, *options)]
    for channels, wider in ((64, 64), (64, 128), (128, 256)):
        layers.append(Residual(PreActivation, channels, *options))
        layers += [PreActivation(channels, wider, *options), nn.MaxPool2d(2)]
    return [*layers, Residual(PreActivation, 256, *options)]


def _preact_resnet18(in_chans: int, *options) -> list[nn.Module]:
    layers = [_stem(in_chans, 64, *options)]
    layers += [Residual(PreActivation, 64, *options) for _ in range(2)]
    for channels in (128, 256, 512):
        layers += [Downsampling(channels // 2, channels, *options), Residual(PreActivation, channels, *options)]
    return layers


def _densenet20x16(in_chans: int, *options) -> list[nn.Module]:
    layers, channels = [_stem(in_chans, 32, *options)], 32
    for block in range(3):
        if block:  # a transition, which keeps the channels
            layers += [PreActivation(channels, channels, *options), nn.AvgPool2d(2)]
        for _ in range(5):
            layers.append(Dense(channels, 16, *options))
            channels += 16
    return layers


def _stem(in_chans: int, channels: int, activation: type[nn.Module], dropout: float) -> KNConv2d:
    return KNConv2d(in_chans, channels, 3, padding=1, dropout=dropout)


@register
def dp_knresnet8(**kwargs) -> DPNet:
    """KNResNet-8, post-activation: 1.86 M parameters, 0.304 G MACs at 32 x 32 (10 classes)."""
    return DPNet(_resnet8, 256, pool=2, final_activation=False, norm_dropout=2.5, **kwargs)


@register
def dp_knresnet13(**kwargs) -> DPNet:
    """KNResNet-13, pre-activation: 2.04 M parameters, 0.209 G MACs at 32 x 32 (10 classes)."""
    return DPNet(_resnet13, 256, pool=2, **kwargs)


@register
def dp_knpreact_resnet18(**kwargs) -> DPNet:
    """PreActResNet-18 of KNConvs, strided ones too: 11.17 M parameters, 0.555 G MACs at 32 x 32 (10 classes).

    The released code describes its shortcuts as 2 x 2 and builds them 1 x 1; here they are as built.
    """
    return DPNet(_preact_resnet18, 512, pool=1, **kwargs)


@register
def dp_kndensenet20x16(**kwargs) -> DPNet:
    """DenseNet of 3 blocks of 5 layers, growth 16: 0.76 M parameters, 0.285 G MACs at 32 x 32 (10 classes)."""
    return DPNet(_densenet20x16, 272, pool=1, **kwargs)


@register
def dp_knresnet18(*, activation: type[nn.Module] = nn.Mish, **kwargs) -> KNResNet:
    """KNResNet-18 with Mish, PyTorch's initialization and, for large images, a 5 x 5 stem.

    11.68 M parameters and 1.11 G MACs at 32 x 32 (1000 classes). ImageNet 32 x 32 at epsilon 8: 22.01 % (TMLR Table 4).
    """
    sizes = (64, 256, 512, 724), (256, 256, 512, 724), (2, 2, 1, 1), 512
    model = KNResNet(Basic, *sizes, activation=activation, stem_kernel=5, **kwargs)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return model
