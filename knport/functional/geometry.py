"""Moved to `knport.geometry`."""

from knport.geometry import Box, Pairs, ntuple, output_size, pad, padding_pairs, window_pairs

__all__ = ["Box", "Pairs", "ntuple", "output_size", "pad", "padding_pairs", "window_pairs"]
