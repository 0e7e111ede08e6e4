"""`kn_conv` and `kernel_norm` on the Triton kernels, where `knport.kernels.dispatch.backend` chooses these.

The mathematics of `knport.functional.efficient`; the convolution itself stays PyTorch's. Around it, one pass that reads
x and one that reads the convolution's output and writes the result; on the way back two passes beside its own.

Legend: N images, C channels, H x W the input's map, O x P the units, n = C k_h k_w.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from knport.errors import UnknownName
from knport.functional.efficient import _compute_dtype, _padded_convolution
from knport.functional.statistics import SMALLEST_GAUSSIAN_UNIT, full_precision
from knport.geometry import output_size
from knport.kernels import triton_functions, triton_ops
from knport.kernels.cpu_units import Units
from knport.kernels.triton_epilogue import ACTIVATIONS
from knport.kernels.triton_support import Box3, draw_seed
from knport.kernels.triton_units import EXPECTED, MOMENTS, PLAIN


def kn_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: Units,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(kn_conv(x) + residual) in as many passes as kn_conv alone.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        weight: (C_out, C, k_h, k_w).
        bias: (C_out,) or None.
        how: the rest of the layer; one group, padded with zeros, and no mask for every unit.
        residual: (N, C_out, O, P), or None for nothing.
        activation: "none", "relu", "gelu", "silu" or "mish".

    Returns:
        (N, C_out, O, P), in the dtype that the convolution has here (autocast included).
    """
    if activation not in ACTIVATIONS:
        raise UnknownName("activation", activation, ACTIVATIONS)
    kernels = _kernels()
    dtype = _compute_dtype(x)
    with _on_device_of(x):
        x, mean, var, own = _statistics(kernels, x, how)
        used, sums, exact_sum = kernels.centre_filters(weight, dtype)
        c = _padded_convolution(x, used, *how.kernel[1:], 1, "zeros")
        rounded, shifted = used.dtype != sums.dtype, mean is not own
        means = (mean, var, own, exact_sum, sums, bias, residual)
        return kernels.normalize_units(
            c, *means, how.eps, dtype, ACTIVATIONS.index(activation), rounded=rounded, shifted=shifted
        )


def kernel_norm(x: Tensor, how: Units) -> Tensor:
    """As `knport.functional.kernel_norm`, for units that do not overlap, and have 64 entries where dropout draws."""
    box = how.kernel
    units = output_size(x.shape[2:], *box)
    form = _form(how)
    size = tuple(o * k for o, k in zip(units, box.kernel_size, strict=True))
    where = (Box3.of(x.shape[2:], box), form, how.dropout, x.shape[1] * box.places, how.eps, units, size)
    with _on_device_of(x):
        return _kernels().kernel_norm(x, _seed(x, form), *where)


def _statistics(kernels, x: Tensor, how: Units) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x for the convolution to read, mu', var' (of the window) and mu of the unit under the kernel."""
    dropout, n = how.dropout, x.shape[1] * how.window.places
    small = how.dropout_form == "moments" and n < SMALLEST_GAUSSIAN_UNIT
    masked = dropout > 0 and (how.dropout_form == "shared" or small)
    form = PLAIN if masked else _form(how)
    x, maps, higher = kernels.channel_moments(x, form == MOMENTS)
    seed, units = _seed(x, form), output_size(x.shape[2:], *how.window)
    where = (Box3.of(x.shape[2:], how.window), form, dropout, n, units)
    mean, var, full = kernels.unit_statistics(maps, higher, seed, *where)
    if masked:
        with full_precision(x):
            _, kept, _ = kernels.channel_moments(F.dropout(x, dropout), False)
        mean, var, _ = kernels.unit_statistics(kept, kept, seed, *where)
        var = torch.maximum(var, (mean - full).square())  # as in knport.functional.statistics
    if how.window == how.kernel:
        return x, mean, var, full
    where = (Box3.of(x.shape[2:], how.kernel), PLAIN, 0.0, n, output_size(x.shape[2:], *how.kernel))
    return x, mean, var, kernels.unit_statistics(maps, maps, seed, *where)[0]


def _form(how: Units) -> int:
    if not how.dropout:
        return PLAIN
    return EXPECTED if how.dropout_form == "expected" else MOMENTS


def _seed(x: Tensor, form: int) -> Tensor:
    return draw_seed(x) if form == MOMENTS else x.new_empty(0, dtype=torch.int64)


def _kernels():
    return triton_ops if torch.compiler.is_compiling() else triton_functions


def _on_device_of(x: Tensor):
    """Triton launches on the current device, whatever its arguments are on."""
    return torch.cuda.device_of(x) if x.is_cuda and not torch.compiler.is_compiling() else nullcontext()
