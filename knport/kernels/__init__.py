"""What kernel normalization adds to a convolution, each step with its backward pass written out.

`channel_moments` reads the input once more, `draw_statistics` works on one-channel maps, `normalize_units` scales and
shifts the convolution's output. Left to autograd, every step of the arithmetic would save a tensor; here the input, the
convolution's output and one-channel maps are all that is kept: the full-size tensors of convolution and BatchNorm.
"""

from knport.kernels.cpu import takes
from knport.kernels.eager import (
    Draw,
    channel_moments,
    draw,
    draw_statistics,
    drawn_statistics,
    higher_moments,
    normalize_units,
    reciprocal_sd,
)

__all__ = [
    "Draw",
    "channel_moments",
    "draw",
    "draw_statistics",
    "drawn_statistics",
    "higher_moments",
    "normalize_units",
    "reciprocal_sd",
    "takes",
]
