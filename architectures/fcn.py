"""Fully convolutional networks for segmentation on KNResNet-18/34/50 and on ResNet-18/34/50.

The kernel normalized ones follow Figure 6 of the paper (the same in both versions; the authors published no code of
them). Where they differ from the KNResNets for classification: the kernels of basic and transition blocks and of the
transitions' max pools are 3 x 3, the widths are 64, 128, 256 and 512, dropout is 0.1 and before the classifier 0.5.
The figure does not give the pools' stride and padding (2 and 1 halve the map), nor the text the initialization (see
`architectures.initialization`). All parameter counts are the paper's.

The competitors are torchvision's ResNets with two convolutions in the place of pool and linear layer, as in the
authors' released code. (They are not torchvision's own ``fcn_resnet50``, whose last stages are dilated.)

All give logits at 1/32 of the image (1/8 with ``low_resolution``); losses and metrics are taken after bilinear
upsampling. Kernel normalization sits in every convolution but the last, and as a KernelNorm before that.

Legend: N images, C channels of a set, I inner channels of its blocks, H x W the image, K classes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.resnet import Bottleneck as TorchvisionBottleneck

from architectures.head import ClassifierHead
from architectures.initialization import lecun_init
from architectures.knresnet import Basic, Bottleneck, Transition, knconv_stem
from architectures.norms import with_norm
from architectures.registry import register
from architectures.resnet import build_resnet
from knport import KernelNorm2d, KNConv2d

WIDTHS = (64, 128, 256, 512)


class PixelClassifier(ClassifierHead):
    """Mix-in: the classifier is a 1 x 1 convolution."""

    classifier_path = "classifier"
    num_features = WIDTHS[-1]

    def new_classifier(self, num_classes: int) -> nn.Module:
        return nn.Conv2d(self.num_features, num_classes, 1) if num_classes else nn.Identity()


class KNFCN(PixelClassifier, nn.Module):
    """A kernel normalized fully convolutional network.

    Args:
        block: `Basic` (with 3 x 3 kernels) or `Bottleneck`.
        inner: I of each of the four sets' blocks.
        depths: blocks in each set.
        widths: C of each set.
        last_conv: one more KNConv 3x3 before the KernelNorm (50).
        num_classes: K; 0 for the features of each position.
        in_chans: channels of the images.
        low_resolution: a KNConv 3x3 as the stem, which keeps the size.
        dropout: p of every KNConv; the KernelNorm has min(5 p, 0.5).

    Shape:
        Input (N, in_chans, H, W) of any size from 2 x 2; output (N, K, H/32, W/32), rounded up.
    """

    def __init__(
        self,
        block: type[nn.Module],
        inner: Sequence[int],
        depths: Sequence[int],
        *,
        widths: Sequence[int] = WIDTHS,
        last_conv: bool = False,
        num_classes: int = 19,
        in_chans: int = 3,
        low_resolution: bool = False,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.num_classes, self.num_features = num_classes, widths[-1]
        options = {"kernel_size": 3} if block is Basic else {}
        self.stem = knconv_stem(in_chans, widths[0], low_resolution, dropout)
        self.sets = nn.Sequential()
        for i, (channels, hidden, depth) in enumerate(zip(widths, inner, depths, strict=True)):
            blocks = [block(channels, hidden, dropout, **options) for _ in range(depth)]
            if i:
                conv = KNConv2d(widths[i - 1], channels, 3, padding=1, dropout=dropout)
                blocks.insert(0, Transition(nn.ReLU, conv, nn.MaxPool2d(3, stride=2, padding=1)))
            self.sets.append(nn.Sequential(*blocks))
        self.last = nn.Sequential()
        if last_conv:
            self.last = nn.Sequential(nn.ReLU(), KNConv2d(widths[-1], widths[-1], 3, padding=1, dropout=dropout))
        self.norm, self.act = KernelNorm2d(dropout=min(5 * dropout, 0.5)), nn.ReLU()
        self.classifier = self.new_classifier(num_classes)
        lecun_init(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.sets(self.stem(x)))
        return self.classifier(self.act(self.norm(x)))


class FCN(PixelClassifier, nn.Sequential):
    """backbone, classifier: see `build_fcn`."""

    classifier_path = "classifier.4"


def build_fcn(
    block: type[nn.Module],
    depths: Sequence[int],
    *,
    norm: str = "batch",
    num_classes: int = 19,
    in_chans: int = 3,
    low_resolution: bool = False,
    dropout: float = 0.1,
) -> FCN:
    """A ResNet up to its last map, conv 3x3 to 512 channels, norm, ReLU, dropout, conv 1x1.

    Args:
        block, depths, norm, in_chans, low_resolution: as `architectures.resnet.build_resnet`.
        num_classes: K.
        dropout: of the features before the classifier.

    Shape:
        Input (N, in_chans, H, W) of any size; output (N, K, H/32, W/32), rounded up.
    """
    trunk = build_resnet(block, depths, in_chans=in_chans, low_resolution=low_resolution)
    children = OrderedDict((name, child) for name, child in trunk.named_children() if name not in ("avgpool", "fc"))
    conv = nn.Conv2d(512 * block.expansion, 512, 3, padding=1, bias=False)
    head = nn.Sequential(conv, nn.BatchNorm2d(512), nn.ReLU(), nn.Dropout(dropout), nn.Identity())
    model = FCN(OrderedDict(backbone=nn.Sequential(children), classifier=head))
    model.reset_classifier(num_classes)
    for new in (conv, model.get_classifier()):
        if isinstance(new, nn.Conv2d):
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    return with_norm(model, norm)


@register(original="fcn_resnet18")
def fcn_knresnet18(**kwargs) -> KNFCN:
    """KNResNet-18 for segmentation: 13.53 M parameters, 40.4 G MACs at 1024 x 512."""
    return KNFCN(Basic, (128, 256, 512, 625), (2, 2, 2, 1), **kwargs)


@register(original="fcn_resnet34")
def fcn_knresnet34(**kwargs) -> KNFCN:
    """KNResNet-34 for segmentation: 23.40 M parameters, 64.1 G MACs at 1024 x 512."""
    return KNFCN(Basic, (128, 256, 256, 512), (4, 4, 4, 3), **kwargs)


@register(original="fcn_resnet50")
def fcn_knresnet50(**kwargs) -> KNFCN:
    """KNResNet-50 for segmentation: 32.87 M parameters, 97.8 G MACs at 1024 x 512."""
    return KNFCN(Bottleneck, (128, 256, 458, 512), (4, 4, 4, 3), last_conv=True, **kwargs)


@register(original="fcn_resnet18")
def fcn_knresnet18_macs(**kwargs) -> KNFCN:
    """KNResNet-18 for segmentation, with the MACs of its ResNet: 6.48 M parameters, 20.00 G MACs at 1024 x 512."""
    return KNFCN(Basic, (88, 176, 352, 440), (2, 2, 2, 1), widths=(48, 88, 176, 352), **kwargs)


@register(original="fcn_resnet34")
def fcn_knresnet34_macs(**kwargs) -> KNFCN:
    """KNResNet-34 for segmentation, with the MACs of its ResNet: 14.35 M parameters, 39.78 G MACs at 1024 x 512."""
    return KNFCN(Basic, (104, 200, 200, 400), (4, 4, 4, 3), widths=(48, 104, 200, 400), **kwargs)


@register(original="fcn_resnet50")
def fcn_knresnet50_macs(**kwargs) -> KNFCN:
    """KNResNet-50 for segmentation, with the MACs of its ResNet: 15.71 M parameters, 47.34 G MACs at 1024 x 512."""
    widths = (48, 88, 176, 352)
    return KNFCN(Bottleneck, (88, 176, 320, 352), (4, 4, 4, 3), widths=widths, last_conv=True, **kwargs)


@register
def fcn_resnet18(**kwargs) -> FCN:
    """FCN on ResNet-18: 13.55 M parameters, 20.2 G MACs at 1024 x 512."""
    return build_fcn(BasicBlock, (2, 2, 2, 2), **kwargs)


@register
def fcn_resnet34(**kwargs) -> FCN:
    """FCN on ResNet-34: 23.65 M parameters, 39.5 G MACs at 1024 x 512."""
    return build_fcn(BasicBlock, (3, 4, 6, 3), **kwargs)


@register
def fcn_resnet50(**kwargs) -> FCN:
    """FCN on ResNet-50: 32.96 M parameters, 47.5 G MACs at 1024 x 512."""
    return build_fcn(TorchvisionBottleneck, (3, 4, 6, 3), **kwargs)
