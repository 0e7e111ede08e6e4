"""KNResNet-18/34/50 in the widths of the first version of the kernel normalization paper (its Figure 5).

The first submission has other widths, other paddings (1, 0, 1 and 0 on all sides, in place of alternating sides) and
twice the dropout (0.1) of the final paper and the released code, which `architectures.knresnet` follows. No code of
it was published and the text gives only the inner widths: the widths and depths here are those whose parameters add
up to its Tables 1, 2 and 4. For KNResNet-34 and -50 all counts agree. For KNResNet-18 the sum is 11,206,468 where
Table 1 rounds to 11.207 M, and how its four 256-wide blocks are split over the first two sets (here 2 and 2) makes no
difference to the sum. Use these networks for the first version's numbers only (its Table 2 for ImageNet).

Parameters match those of the ResNets; multiply-accumulates are 6.0, 3.7 and 3.3 times theirs (the first version reports
6.2, 4.6 and 4.6 times their seconds per epoch on CIFAR-100). For KNResNet-18 that factor depends on the split.

Images are 29 x 29 or larger with ``low_resolution``, 113 x 113 or larger without: the last 2 x 2 kernel is not padded.
"""

from __future__ import annotations

from architectures.knresnet import Basic, Bottleneck, KNResNet
from architectures.registry import register

PADDINGS = (1, 0, 1, 0)


def _v1(block, widths, inner, depths, final, *, dropout: float = 0.1, **kwargs) -> KNResNet:
    return KNResNet(block, widths, inner, depths, final, paddings=PADDINGS, dropout=dropout, **kwargs)


@register(original="baseline_resnet18")
def knresnet18_v1(**kwargs) -> KNResNet:
    """KNResNet-18 of the first version: 11.70 M parameters, 10.81 G MACs at 224 x 224. ImageNet 70.90 %."""
    return _v1(Basic, (256, 256, 512, 512), (512, 512, 512, 480), (2, 2, 1, 1), 512, **kwargs)


@register(original="baseline_resnet34")
def knresnet34_v1(**kwargs) -> KNResNet:
    """KNResNet-34 of the first version: 21.80 M parameters, 13.36 G MACs at 224 x 224. ImageNet 74.60 %."""
    return _v1(Basic, (256, 256, 512, 512), (256, 448, 512, 512), (4, 4, 4, 2), 512, **kwargs)


@register(original="baseline_resnet50")
def knresnet50_v1(**kwargs) -> KNResNet:
    """KNResNet-50 of the first version: 25.55 M parameters, 13.40 G MACs at 224 x 224. ImageNet 76.0 %.

    Two bottlenecks of the last set are followed by one basic block.
    """
    return _v1(Bottleneck, (256, 512, 512, 1024), (128, 128, 236, 256), (5, 4, 3, 2), 1024, extra=256, **kwargs)
