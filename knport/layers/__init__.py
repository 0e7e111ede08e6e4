"""Kernel normalization as `torch.nn` modules."""

from knport.layers.kernel_norm import KernelNorm1d, KernelNorm2d, KernelNorm3d
from knport.layers.kn_conv import KNConv1d, KNConv2d, KNConv3d
from knport.layers.kn_linear import KNLinear

__all__ = ["KNConv1d", "KNConv2d", "KNConv3d", "KNLinear", "KernelNorm1d", "KernelNorm2d", "KernelNorm3d"]
