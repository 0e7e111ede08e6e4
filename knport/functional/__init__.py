"""Kernel normalization in plain tensors: `unit_statistics`, `kernel_norm`, `kn_conv`, and `naive`, their definition."""

from knport.functional import naive
from knport.functional.efficient import kernel_norm, kn_conv
from knport.functional.statistics import DROPOUT_FORMS, unit_statistics

__all__ = ["DROPOUT_FORMS", "kernel_norm", "kn_conv", "naive", "unit_statistics"]
