"""What kernel normalization adds to a convolution, each step with its backward pass written out.

Left to autograd, every step of the arithmetic would save a tensor; here the input, the convolution's output and
one-channel maps are all that is kept: the full-size tensors of convolution and BatchNorm. `dispatch.backend` says which
of the forms runs.
"""

from knport.kernels.dispatch import Backend, backend
from knport.kernels.eager import (
    SMALLEST_GAUSSIAN_UNIT,
    Draw,
    channel_moments,
    draw,
    drawn_statistics,
    higher_moments,
    normalize_units,
    reciprocal_sd,
)

__all__ = [
    "SMALLEST_GAUSSIAN_UNIT",
    "Backend",
    "Draw",
    "backend",
    "channel_moments",
    "draw",
    "drawn_statistics",
    "higher_moments",
    "normalize_units",
    "reciprocal_sd",
]
