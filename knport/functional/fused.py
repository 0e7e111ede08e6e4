"""`kn_conv` and `kernel_norm` on the Triton kernels: what `knport.kernels.backend` chooses on a GPU.

The same mathematics as `knport.functional.efficient`; the convolution itself stays PyTorch's. Three passes over
full-size tensors around it (x, the convolution's output, the result) and three on the way back.

Legend: N images, C channels, H x W the input's map, O x P the units, n = C k_h k_w.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.errors import UnknownName
from knport.functional.efficient import _compute_dtype, _padded_convolution
from knport.functional.geometry import ntuple, output_size, padding_pairs, window_pairs
from knport.functional.statistics import SMALLEST_GAUSSIAN_UNIT, full_precision
from knport.kernels import triton_functions, triton_ops
from knport.kernels.triton_epilogue import ACTIVATIONS
from knport.kernels.triton_support import Box, draw_seed
from knport.kernels.triton_units import EXPECTED, MOMENTS, PLAIN


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    *,
    dropout: float = 0.0,
    eps: float = 1e-5,
    norm_window=None,
    dropout_form: str = "moments",
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(kn_conv(x) + residual), arguments as `knport.functional.kn_conv`.

    Args:
        residual: (N, C_out, O, P), added to the result; None for nothing.
        activation: "none", "relu", "gelu", "silu" or "mish", of the sum.
    """
    if activation not in ACTIVATIONS:
        raise UnknownName("activation", activation, ACTIVATIONS)
    ndim = x.dim() - 2
    kernel_size = tuple(weight.shape[2:])
    stride, dilation = ntuple(stride, ndim, "stride"), ntuple(dilation, ndim, "dilation")
    pairs = padding_pairs(padding, kernel_size, stride, dilation)
    own_place = (kernel_size, stride, pairs, dilation)
    place = own_place
    if norm_window is not None:
        window = ntuple(norm_window, ndim, "norm_window")
        place = (window, stride, window_pairs(pairs, kernel_size, dilation, window), (1,) * ndim)
    kernels = triton_ops if torch.compiler.is_compiling() else triton_functions
    dtype = _compute_dtype(x)
    with _on_device_of(x):
        x, mean, var, own = _statistics(kernels, x, place, own_place, dropout, dropout_form)
        used, sums, exact_sum = kernels.centre_filters(weight, dtype)
        c = _padded_convolution(x, used, stride, pairs, dilation, 1, "zeros")
        rounded, shifted = used.dtype != sums.dtype, mean is not own
        code = ACTIVATIONS.index(activation)
        return kernels.normalize_units(
            c, mean, var, own, exact_sum, sums, bias, residual, eps, dtype, code, rounded, shifted
        )


def kernel_norm(
    x: Tensor, kernel_size=1, stride=1, padding=0, *, dropout=0.0, eps=1e-5, dropout_form="moments"
) -> Tensor:
    """As `knport.functional.kernel_norm`, for units that do not overlap and have 64 entries at least under dropout."""
    ndim = x.dim() - 2
    kernel_size, stride = ntuple(kernel_size, ndim, "kernel_size"), ntuple(stride, ndim, "stride")
    ones = (1,) * ndim
    pairs = padding_pairs(padding, kernel_size, stride, ones)
    box, out = _box(x, (kernel_size, stride, pairs, ones))
    form = _form(dropout, dropout_form)
    n = x.shape[1] * box.places
    seed = draw_seed(x) if form == MOMENTS else None
    size = tuple(o * k for o, k in zip(out, kernel_size, strict=True))
    kernels = triton_ops if torch.compiler.is_compiling() else triton_functions
    with _on_device_of(x):
        return kernels.kernel_norm(x, seed, box, form, dropout, n, eps, out, size)


def _statistics(kernels, x: Tensor, place, own_place, dropout: float, dropout_form: str):
    """x for the convolution to read, mu', var' (of the window) and mu of the unit under the kernel."""
    n = x.shape[1] * math.prod(place[0])
    masked = dropout > 0 and (dropout_form == "shared" or (dropout_form == "moments" and n < SMALLEST_GAUSSIAN_UNIT))
    form = PLAIN if masked else _form(dropout, dropout_form)
    x, maps = kernels.channel_moments(x, 4 if form == MOMENTS else 2)
    box, out = _box(x, place)
    seed = draw_seed(x) if form == MOMENTS else None
    mean, var, full = kernels.unit_statistics(maps, seed, box, form, dropout, n, out)
    if masked:
        with full_precision(x):
            _, kept = kernels.channel_moments(F.dropout(x, dropout), 2)
        mean, var, _ = kernels.unit_statistics(kept, None, box, PLAIN, 0.0, n, out)
        var = torch.maximum(var, (mean - full).square())  # as in knport.functional.statistics
    own = full
    if place is not own_place:
        own_box, out = _box(x, own_place)
        own, _, _ = kernels.unit_statistics(maps[:, :2].contiguous(), None, own_box, PLAIN, 0.0, n, out)
    return x, mean, var, own


def _form(dropout: float, dropout_form: str) -> int:
    if not dropout:
        return PLAIN
    return EXPECTED if dropout_form == "expected" else MOMENTS


def _box(x: Tensor, place) -> tuple[Box, tuple[int, ...]]:
    kernel_size, stride, pairs, dilation = place
    size = tuple(x.shape[2:])
    return Box.of(size, *place), output_size(size, kernel_size, stride, pairs, dilation)


def _on_device_of(x: Tensor):
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()
