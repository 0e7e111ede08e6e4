"""ResNets with normalized convolutions (NCNN, Kim et al., 2020) and with weight standardization (Qiao et al., 2019).

The comparison of the NCNN paper's Table 1, at batch size 2: ResNet-50 on Tiny ImageNet and ResNet-18 on CIFAR-10 with
normalized convolutions, "NC", against GroupNorm (``baseline_resnet50`` with ``norm="group"``). In NC networks every
convolution standardizes the columns of im2col that it multiplies and has a gain and a bias of its own, so the
BatchNorms behind it disappear; residual sums and pooled features are not normalized. The paper expects most of both
dualities together, "WS + NC", which it did not run.

    nc      every convolution and the norm behind it become a `knport.NormalizedConv2d`
    nc_ws   the same with standardized filters
    ws      GroupNorm of 32 groups and standardized filters
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torchvision.models import resnet

from architectures.cifar_resnet import CifarResNet
from architectures.registry import register
from architectures.resnet import ResNet, build_resnet
from knport import NormalizedConv2d


def normalize_convolutions(model: nn.Module, weight_standardization: bool = False) -> nn.Module:
    """Replace, in place, every Conv2d of a ResNet by a NormalizedConv2d with the same weights, and drop its BatchNorms.

    Activations in place stay: behind every convolution they edit its output, which nothing else reads.
    """
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            model.set_submodule(path, nn.Identity())
        elif isinstance(module, nn.Conv2d):
            sizes = (module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
            new = NormalizedConv2d(*sizes, weight_standardization=weight_standardization)
            new.weight = module.weight
            model.set_submodule(path, new.to(module.weight.device))
    return model


def _nc(block: type[nn.Module], depths: Sequence[int], weight_standardization: bool = False, **kwargs) -> ResNet:
    return normalize_convolutions(build_resnet(block, depths, **kwargs), weight_standardization)


@register
def nc_resnet18(**kwargs) -> ResNet:
    """ResNet-18 of normalized convolutions: 11.69 M parameters, 1.81 G MACs at 224 x 224."""
    return _nc(resnet.BasicBlock, (2, 2, 2, 2), **kwargs)


@register
def nc_resnet50(**kwargs) -> ResNet:
    """ResNet-50 of normalized convolutions: 25.56 M parameters, 4.09 G MACs at 224 x 224."""
    return _nc(resnet.Bottleneck, (3, 4, 6, 3), **kwargs)


@register
def nc_ws_resnet18(**kwargs) -> ResNet:
    """ResNet-18 of normalized convolutions with standardized filters: 11.69 M parameters, 1.81 G MACs at 224 x 224."""
    return _nc(resnet.BasicBlock, (2, 2, 2, 2), weight_standardization=True, **kwargs)


@register
def nc_ws_resnet50(**kwargs) -> ResNet:
    """ResNet-50 of normalized convolutions with standardized filters: 25.56 M parameters, 4.09 G MACs at 224 x 224."""
    return _nc(resnet.Bottleneck, (3, 4, 6, 3), weight_standardization=True, **kwargs)


@register
def nc_cifar_resnet8x2(**kwargs) -> CifarResNet:
    """cifar_resnet8x2 of normalized convolutions, for a laptop: 309 k parameters, 49 M MACs at 32 x 32."""
    return normalize_convolutions(CifarResNet(1, width=2, **kwargs))


@register
def ws_resnet18(**kwargs) -> ResNet:
    """ResNet-18 with GroupNorm and standardized filters: 11.69 M parameters, 1.81 G MACs at 224 x 224."""
    return build_resnet(resnet.BasicBlock, (2, 2, 2, 2), norm="group_ws", **kwargs)


@register
def ws_resnet50(**kwargs) -> ResNet:
    """ResNet-50 with GroupNorm and standardized filters: 25.56 M parameters, 4.09 G MACs at 224 x 224."""
    return build_resnet(resnet.Bottleneck, (3, 4, 6, 3), norm="group_ws", **kwargs)
