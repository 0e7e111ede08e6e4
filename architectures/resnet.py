"""The competitors in the papers' tables: ResNet-18/34/50 and PreActResNet-18/34/50 with any norm.

The ResNets are torchvision's, the PreActResNets those of He et al. (2016b) with a norm and an activation before the
average pool, which the kernel normalization papers add to them and which helps them (section 4.1). For small images
the first convolution is 3 x 3 with stride 1 and there is no max pool. ``norm`` is any of `knport.replace_norm`:
"batch" as built, "group" (32 groups), "layer" (one group over all channels and pixels), "instance", "local_context",
"positional", "none" and what else it offers.

The names begin with ``baseline_`` because timm owns ``resnet18``, ``tv_resnet34`` and their like: registering those
would replace its networks.

Legend: N images, C channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models import resnet

from architectures.head import ClassifierHead
from architectures.norms import with_norm
from architectures.registry import register


class ResNet(ClassifierHead, resnet.ResNet):
    """torchvision's ResNet, with timm's `get_classifier` and `reset_classifier`."""


def build_resnet(
    block: type[nn.Module],
    depths: Sequence[int],
    *,
    norm: str = "batch",
    num_classes: int = 1000,
    in_chans: int = 3,
    low_resolution: bool = False,
) -> ResNet:
    """torchvision's ResNet with another norm, other images and a stem for small ones.

    Args:
        block: torchvision's ``BasicBlock`` or ``Bottleneck``.
        depths: blocks in each of the four stages.
        norm: of `knport.replace_norm`.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: a 3 x 3 first convolution and no max pool.

    Shape:
        Input (N, in_chans, H, W) of any size; output (N, num_classes).
    """
    model = ResNet(block, list(depths), num_classes=num_classes or 1)
    model.num_classes, model.num_features = num_classes, 512 * block.expansion
    kernel = {"kernel_size": 3, "padding": 1} if low_resolution else {"kernel_size": 7, "stride": 2, "padding": 3}
    model.conv1 = nn.Conv2d(in_chans, 64, **kernel, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    if low_resolution:
        model.maxpool = nn.Identity()
    if not num_classes:
        model.fc = nn.Identity()
    return with_norm(model, norm)


class PreActBasic(nn.Module):
    """norm, ReLU, conv 3x3, norm, ReLU, conv 3x3; plus the shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, inner: int, stride: int):
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, inner, 3, stride, padding=1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.shortcut = _shortcut(in_channels, inner, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        return self.conv2(self.act2(self.norm2(self.conv1(y)))) + skip


class PreActBottleneck(nn.Module):
    """norm, ReLU, conv 1x1, norm, ReLU, conv 3x3, norm, ReLU, conv 1x1 to four times as many; plus the shortcut."""

    expansion = 4

    def __init__(self, in_channels: int, inner: int, stride: int):
        super().__init__()
        self.norm1, self.act1 = nn.BatchNorm2d(in_channels), nn.ReLU()
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.norm2, self.act2 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm3, self.act3 = nn.BatchNorm2d(inner), nn.ReLU()
        self.conv3 = nn.Conv2d(inner, 4 * inner, 1, bias=False)
        self.shortcut = _shortcut(in_channels, 4 * inner, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.norm1(x))
        skip = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(self.act2(self.norm2(self.conv1(y))))
        return self.conv3(self.act3(self.norm3(y))) + skip


def _shortcut(in_channels: int, channels: int, stride: int) -> nn.Module | None:
    """A 1 x 1 convolution of the activated input where the identity does not fit."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Conv2d(in_channels, channels, 1, stride, bias=False)


class PreActResNet(ClassifierHead, nn.Module):
    """A pre-activation residual network with a norm and an activation before the pool.

    Args:
        block: `PreActBasic` or `PreActBottleneck`.
        depths: blocks in each of the four stages.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: conv 3x3 as the stem in place of conv 7x7 stride 2, norm, ReLU, max pool.

    Shape:
        Input (N, in_chans, H, W) of any size; output (N, num_classes).
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: Sequence[int],
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        low_resolution: bool = False,
    ):
        super().__init__()
        self.num_classes = num_classes
        if low_resolution:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, 64, 3, padding=1, bias=False))
        else:
            conv = nn.Conv2d(in_chans, 64, 7, stride=2, padding=3, bias=False)
            self.stem = nn.Sequential(conv, nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1))
        blocks, channels = [], 64
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(block(channels, 64 * 2**stage, stride=2 if stage and not i else 1))
                channels = 64 * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.act = nn.BatchNorm2d(channels), nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.fc = self.new_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.blocks(self.stem(x))))
        return self.fc(self.pool(x).flatten(1))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


def _preact(block: type[nn.Module], depths: Sequence[int], *, norm: str = "batch", **kwargs) -> PreActResNet:
    return with_norm(PreActResNet(block, depths, **kwargs), norm)


@register
def baseline_resnet18(**kwargs) -> ResNet:
    """ResNet-18: 11.69 M parameters, 1.81 G MACs at 224 x 224."""
    return build_resnet(resnet.BasicBlock, (2, 2, 2, 2), **kwargs)


@register
def baseline_resnet34(**kwargs) -> ResNet:
    """ResNet-34: 21.80 M parameters, 3.66 G MACs at 224 x 224."""
    return build_resnet(resnet.BasicBlock, (3, 4, 6, 3), **kwargs)


@register
def baseline_resnet50(**kwargs) -> ResNet:
    """ResNet-50: 25.56 M parameters, 4.09 G MACs at 224 x 224."""
    return build_resnet(resnet.Bottleneck, (3, 4, 6, 3), **kwargs)


@register
def preact_resnet18(**kwargs) -> PreActResNet:
    """PreActResNet-18: 11.69 M parameters, 1.81 G MACs at 224 x 224."""
    return _preact(PreActBasic, (2, 2, 2, 2), **kwargs)


@register
def preact_resnet34(**kwargs) -> PreActResNet:
    """PreActResNet-34: 21.80 M parameters, 3.66 G MACs at 224 x 224."""
    return _preact(PreActBasic, (3, 4, 6, 3), **kwargs)


@register
def preact_resnet50(**kwargs) -> PreActResNet:
    """PreActResNet-50: 25.55 M parameters, 4.09 G MACs at 224 x 224."""
    return _preact(PreActBottleneck, (3, 4, 6, 3), **kwargs)
