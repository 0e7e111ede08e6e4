"""The networks of `experiments.placements` that differ from those of `architectures`: other places for the norms, and
changes to a network as it begins."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from architectures.convmixer import KNConvMixer
from knport import KernelNorm2d, KNConv2d

Build = Callable[..., nn.Module]
"""Makes a network from num_classes, in_chans and low_resolution."""
Change = Callable[[nn.Module], None]


def changed(kind: Build, *changes: Change) -> Build:
    """A constructor of the same network with `changes` made to it."""

    @functools.wraps(kind)
    def build(**kwargs) -> nn.Module:
        model = kind(**kwargs)
        for change in changes:
            change(model)
        return model

    return build


def scale_weights(gain: float) -> Change:
    """The initial weights of all convolutions times `gain`."""

    def change(model: nn.Module) -> None:
        with torch.no_grad():
            for module in convolutions(model):
                module.weight *= gain

    return change


def stem(**attributes) -> Change:
    """Attributes of the first KNConv, whose units are few values of the image."""

    def change(model: nn.Module) -> None:
        _, first = first_knconv(model)
        for name, value in attributes.items():
            setattr(first, name, value)

    return change


def plain_stem(model: nn.Module) -> None:
    """A convolution in the place of the first KNConv."""
    path, first = first_knconv(model)
    conv = nn.Conv2d(first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding)
    conv.load_state_dict(first.state_dict())
    model.set_submodule(path, conv)


def zero_biases(model: nn.Module) -> None:
    """As the authors' networks begin."""
    for module in convolutions(model):
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def standardize(model: nn.Module) -> None:
    """Weight standardization in every convolution."""
    for module in list(convolutions(model)):
        parametrize.register_parametrization(module, "weight", Standardized())


class Standardized(nn.Module):
    """Weight -> each filter with mean 0 and variance 2 / fan-in (weight standardization, Qiao et al. 2019)."""

    def forward(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        flat = flat - flat.mean(1, keepdim=True)
        return (2**0.5 * flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-6)).view_as(weight)


def convolutions(model: nn.Module):
    return (module for module in model.modules() if isinstance(module, nn.Conv2d))


def first_knconv(model: nn.Module) -> tuple[str, KNConv2d]:
    return next((path, module) for path, module in model.named_modules() if isinstance(module, KNConv2d))


class PreActivation(KNConvMixer):
    """Activation, KNConv in the place of KNConv, activation, as in the KNResNets: sums without activation."""

    residual = False  # whether the pointwise convolution has an identity beside it, too

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stem[0](x)
        for block in self.blocks:
            x = x + block.depthwise(block.act1(x))
            x = block.pointwise(block.act2(x)) + (x if self.residual else 0)
        return self.stem[1](self.norm(x))


class ResidualPreActivation(PreActivation):
    residual = True


class NormedBranches(KNConvMixer):
    """A KernelNorm of every pixel wherever the original has a BatchNorm, in front of KNConvs as they are."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        p = self.blocks[0].depthwise.dropout
        self.norms = nn.ModuleList(KernelNorm2d(dropout=p) for _ in range(2 * len(self.blocks) + 1))

    def forward_features(self, x: Tensor) -> Tensor:
        norms = iter(self.norms)
        x = next(norms)(self.stem(x))
        for block in self.blocks:
            x = x + next(norms)(block.act1(block.depthwise(x)))
            x = next(norms)(block.act2(block.pointwise(x)))
        return self.norm(x)


class OwnChannel(nn.Conv2d):
    """A depthwise KNConv without dropout whose units are k x k pixels of the filter's own channel, not of all."""

    @classmethod
    def of(cls, conv: KNConv2d) -> OwnChannel:
        k = conv.kernel_size[0]
        new = cls(conv.in_channels, conv.out_channels, k, padding=k // 2, groups=conv.groups)
        new.load_state_dict(conv.state_dict())
        return new

    def forward(self, x: Tensor) -> Tensor:
        k, padding = self.kernel_size[0], self.padding[0]
        mean = F.avg_pool2d(x, k, 1, padding)  # zeros around the map belong to the units, as in KNConv
        rstd = (F.avg_pool2d(x * x, k, 1, padding) - mean * mean).clamp_min(0).add(1e-5).rsqrt()
        y = F.conv2d(x, self.weight, None, 1, padding, 1, self.groups)
        return (y - mean * self.weight.sum((1, 2, 3)).view(-1, 1, 1)) * rstd + self.bias.view(-1, 1, 1)


def own_channels(model: nn.Module) -> None:
    """Statistics of the filter's own channel in every depthwise KNConv of odd kernel."""
    for path, module in list(model.named_modules()):
        if isinstance(module, KNConv2d) and module.groups == module.in_channels:
            model.set_submodule(path, OwnChannel.of(module))
