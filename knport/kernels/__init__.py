"""The two passes that kernel normalization adds to a convolution, each with its backward pass written out.

Left to autograd, every step of the arithmetic would save a full-size tensor; here x and the convolution's output are
all that is kept, as with convolution and BatchNorm.
"""

from knport.kernels.eager import channel_moments, draw_statistics, normalize_units, reciprocal_sd

__all__ = ["channel_moments", "draw_statistics", "normalize_units", "reciprocal_sd"]
