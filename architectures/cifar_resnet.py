"""The small residual networks for 32 x 32 images of He et al. (2016, section 4.2), with 1 x 1 shortcuts.

Post-activation, BatchNorm, three stages of n blocks: 6 n + 2 layers. They are originals to convert, and small enough
for a laptop.

Legend: N images, C channels, H x W the map.
"""

from __future__ import annotations

from torch import Tensor, nn

from architectures.head import ClassifierHead
from architectures.registry import register


class Block(nn.Module):
    """conv 3x3, norm, ReLU, conv 3x3, norm; plus the shortcut; ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.act2 = nn.ReLU()
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        return self.act2(y + self.shortcut(x))


class CifarResNet(ClassifierHead, nn.Module):
    """A residual network for small images.

    Args:
        depth: blocks per stage, n.
        width: multiplies the stages' 16, 32 and 64 channels.
        num_classes: size of the last layer; 0 for pooled features.
        in_chans: channels of the images.
        low_resolution: accepted like everywhere; this network has one form, for small images.

    Shape:
        Input (N, in_chans, H, W), from about 8 x 8. Output (N, num_classes).
    """

    def __init__(
        self, depth: int, *, width: int = 1, num_classes: int = 10, in_chans: int = 3, low_resolution: bool = True
    ):
        super().__init__()
        channels = 16 * width
        self.num_classes = num_classes
        self.conv = nn.Conv2d(in_chans, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.ReLU()
        stages = []
        for stage in range(3):
            for block in range(depth):
                stride = 2 if stage and not block else 1
                stages.append(Block(channels, 16 * width * 2**stage, stride))
                channels = 16 * width * 2**stage
        self.blocks = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.num_features = channels
        self.fc = self.new_classifier(num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming normal (fan out) convolutions, as He et al."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.act(self.norm(self.conv(x))))
        return self.fc(self.pool(x).flatten(1))  # (N, C, H, W) -> (N, C) -> (N, num_classes)


@register
def cifar_resnet8(**kwargs) -> CifarResNet:
    """ResNet-8: 78 k parameters at width 1, 12.8 M MACs at 32 x 32."""
    return CifarResNet(1, **kwargs)


@register
def cifar_resnet8x2(**kwargs) -> CifarResNet:
    """ResNet-8 twice as wide: 308 k parameters, 50 M MACs at 32 x 32."""
    return CifarResNet(1, width=2, **kwargs)


@register
def cifar_resnet14(**kwargs) -> CifarResNet:
    """ResNet-14: 175 k parameters at width 1."""
    return CifarResNet(2, **kwargs)


@register
def cifar_resnet20(**kwargs) -> CifarResNet:
    """ResNet-20: 272 k parameters at width 1."""
    return CifarResNet(3, **kwargs)
