"""Kernel normalization in plain tensors, and `naive`, its definition."""

from knport.functional import naive
from knport.functional.efficient import kernel_norm, kn_conv, kn_conv_statistics
from knport.functional.statistics import DROPOUT_FORMS, unit_statistics
from knport.functional.tokens import kn_linear, kn_linear_statistics

__all__ = [
    "DROPOUT_FORMS",
    "kernel_norm",
    "kn_conv",
    "kn_conv_statistics",
    "kn_linear",
    "kn_linear_statistics",
    "naive",
    "unit_statistics",
]
