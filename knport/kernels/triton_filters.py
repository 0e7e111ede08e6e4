"""Centred filters: W - mean(W) per filter in the dtype of the convolution, and the sums that the epilogue needs.

Legend: F filters of L entries each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from knport.kernels.triton_support import accumulator, direct, power_of_two

_MOST = 1024


@triton.jit
def _centre_kernel(weight_ptr, used_ptr, sums_ptr, filters, length, BLOCK: tl.constexpr):
    kind = sums_ptr.dtype.element_ty
    f = tl.program_id(0)
    row = f.to(tl.int64) * length
    total = tl.zeros([BLOCK], kind)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(weight_ptr + row + i, mask=i < length, other=0.0).to(kind)
    exact = tl.sum(total, 0)
    rounded = tl.zeros([BLOCK], kind)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        centred = tl.load(weight_ptr + row + i, mask=i < length, other=0.0).to(kind) - exact / length
        used = centred.to(used_ptr.dtype.element_ty)
        tl.store(used_ptr + row + i, used, mask=i < length)
        rounded += tl.where(i < length, used.to(kind), 0.0)
    tl.store(sums_ptr + f, tl.sum(rounded, 0))
    tl.store(sums_ptr + filters + f, exact)


@triton.jit
def _centre_backward_kernel(grad_ptr, grad_sum_ptr, out_ptr, length, HAS_SUM: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.program_id(0)
    row = f.to(tl.int64) * length
    kind: tl.constexpr = tl.float64 if out_ptr.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([BLOCK], kind)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(grad_ptr + row + i, mask=i < length, other=0.0).to(kind)
    shift = -tl.sum(total, 0) / length
    if HAS_SUM:
        shift += tl.load(grad_sum_ptr + f)
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + row + i, mask=i < length, other=0.0).to(kind) + shift
        tl.store(out_ptr + row + i, grad.to(out_ptr.dtype.element_ty), mask=i < length)


def _rows(x: Tensor) -> Tensor:
    """`x` with each filter's entries side by side in memory, in whatever order."""
    dense = x.is_contiguous() or (x.dim() in (4, 5) and x.is_contiguous(memory_format=_CHANNELS_LAST[x.dim()]))
    return x if dense else x.contiguous()


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def centre_filters(weight: Tensor, dtype: torch.dtype, wrap_triton=direct) -> tuple[Tensor, Tensor]:
    """The centred filters in `dtype`, and (2, F): the sums of those (rounding) and of the filters as given."""
    weight = _rows(weight)
    used = torch.empty_like(weight, dtype=dtype)
    filters = weight.shape[0]
    length = weight.numel() // filters
    sums = torch.empty((2, filters), device=weight.device, dtype=accumulator(weight.dtype))
    wrap_triton(_centre_kernel)[(filters,)](weight, used, sums, filters, length, BLOCK=power_of_two(length, _MOST))
    return used, sums


def centre_filters_backward(grad: Tensor, grad_sum: Tensor | None, dtype: torch.dtype, wrap_triton=direct) -> Tensor:
    """The filters' gradient in `dtype` from that of the centred ones and of the sums of the filters as given.

    Centring takes a constant out of every filter's gradient; that of the sum of the centred filters is nothing else.
    """
    grad = _rows(grad)
    out = torch.empty_like(grad, dtype=dtype)
    filters = grad.shape[0]
    length = grad.numel() // filters
    wrap_triton(_centre_backward_kernel)[(filters,)](
        grad, grad if grad_sum is None else grad_sum, out, length,
        HAS_SUM=grad_sum is not None, BLOCK=power_of_two(length, _MOST),
    )  # fmt: skip
    return out
