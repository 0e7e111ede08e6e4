"""knport: port PyTorch vision networks to kernel normalization.

model = knport.convert(model)   # any network
knport.KNConv2d(64, 128, 3)     # or layer by layer, in the place of norm and convolution
"""

from knport import functional, privacy
from knport.errors import (
    AlreadyWrapped,
    KNPortError,
    NothingToConvert,
    UnknownName,
    UnmatchedPattern,
    UnsupportedModule,
)
from knport.layers import KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d, KNLinear
from knport.surgery import KNConfig, convert, plan
from knport.surgery.replace import replace_norm

__all__ = [
    "AlreadyWrapped",
    "KNConfig",
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KNLinear",
    "KNPortError",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "NothingToConvert",
    "UnknownName",
    "UnmatchedPattern",
    "UnsupportedModule",
    "convert",
    "functional",
    "plan",
    "privacy",
    "replace_norm",
]
