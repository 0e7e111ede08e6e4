"""Kernel normalization as `torch.nn` modules."""

from knport.layers.kernel_norm import KernelNorm1d, KernelNorm2d, KernelNorm3d
from knport.layers.kn_conv import KNConv1d, KNConv2d, KNConv3d
from knport.layers.kn_linear import KNLinear
from knport.layers.local_context_norm import LocalContextNorm
from knport.layers.normalized_conv import NormalizedConv2d
from knport.layers.positional_norm import PositionalNorm

__all__ = [
    "KNConv1d",
    "KNConv2d",
    "KNConv3d",
    "KNLinear",
    "KernelNorm1d",
    "KernelNorm2d",
    "KernelNorm3d",
    "LocalContextNorm",
    "NormalizedConv2d",
    "PositionalNorm",
]
