"""Which kernels run, and why: the plain operators of `knport.kernels.eager`, or the Triton kernels.

The Triton kernels run where nothing speaks against them: on NVIDIA and AMD GPUs, outside of `torch.func`'s transforms,
for the cases that they cover. The environment variable KNPORT_KERNELS, read when knport is imported, says otherwise:
"eager" keeps them out everywhere, "triton" asks for them inside `torch.compile` and in Triton's interpreter too.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from knport.errors import UnknownName
from knport.kernels.cpu_units import Units

WISHES = ("auto", "eager", "triton")
WISH = os.environ.get("KNPORT_KERNELS", "auto")
if WISH not in WISHES:
    raise UnknownName("the environment variable KNPORT_KERNELS", WISH, WISHES)

_HAS_TRITON = importlib.util.find_spec("triton") is not None
# What Triton itself reads: its kernels then run in Python, on CPU tensors.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Offsets into the units' six rows of statistics are 32-bit integers in the kernels (those into x are 64-bit).
_MOST_PIXELS = 2**28


class Backend(NamedTuple):
    name: str
    """ "triton" or "eager"."""
    reason: str


def backend(
    x: Tensor, how: Units, *parameters: Tensor | None, norm: bool = False, statistics_given: bool = False
) -> Backend:
    """The kernels that normalize `x`, and the reason.

    Args:
        x: (N, C, H, W), or one or three spatial dimensions.
        how: the layer.
        parameters: weight and bias, for a convolution.
        norm: whether this is a KernelNorm, not a convolution.
        statistics_given: whether the statistics were taken beforehand.
    """
    reason = (
        _unavailable(x)
        or ("the statistics were taken beforehand" if statistics_given else None)
        or (_uncovered_norm(x, how) if norm else _uncovered_convolution(how))
        or _unsuited(x, *parameters)
    )
    if reason is not None:
        return Backend("eager", reason)
    return Backend("triton", f"{x.dtype} on {x.device.type}" if x.is_cuda else "interpreted")


def _unavailable(x: Tensor) -> str | None:
    if WISH == "eager":
        return "KNPORT_KERNELS=eager"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_INTERPRETED and WISH == "triton" and x.device.type == "cpu"):
        return f"the input is on {x.device.type}; the Triton kernels are for GPUs"
    return None


def _uncovered_convolution(how: Units) -> str | None:
    if how.groups > 1:
        return f"groups={how.groups}: filters of a group cannot be centred"
    if how.padding_mode != "zeros":
        return f"padding_mode={how.padding_mode!r}: the kernels pad with zeros"
    if how.dropout and how.dropout_form == "unit":
        return "dropout_form='unit' draws a mask for every unit"
    return None


def _uncovered_norm(x: Tensor, how: Units) -> str | None:
    from knport.functional.statistics import SMALLEST_GAUSSIAN_UNIT  # which imports this package

    kernel_size, stride, *_ = how.kernel
    if any(s < k for s, k in zip(stride, kernel_size, strict=True)):
        return "the units overlap"
    if how.dropout and how.dropout_form not in ("expected", "moments"):
        return f"dropout_form={how.dropout_form!r} draws masks"
    if how.dropout and how.dropout_form == "moments" and x.shape[1] * how.kernel.places < SMALLEST_GAUSSIAN_UNIT:
        return f"units of fewer than {SMALLEST_GAUSSIAN_UNIT} entries draw masks"
    return None


def _unsuited(x: Tensor, *parameters: Tensor | None) -> str | None:
    tensors = [x, *(p for p in parameters if p is not None)]
    for t in tensors:
        if t.dtype not in _DTYPES:
            return f"no kernel for {t.dtype}"
    if len({t.dtype == torch.float64 for t in tensors}) > 1:
        return "float64 beside a lower precision"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export: the exported graph is of PyTorch's own operators"
        # The compiler fuses the plain operators with their neighbours, which it cannot do with a finished kernel.
        return None if WISH == "triton" else "torch.compile fuses the plain operators (KNPORT_KERNELS=triton overrides)"
    if torch._C._are_functorch_transforms_active():
        return "torch.func: the kernels have no rule for its transforms"
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter):
            return f"{type(t).__name__} is no plain tensor"
        if t.numel() == 0:
            return "a tensor is empty"
    if x.numel() // x.shape[1] > _MOST_PIXELS:
        return f"more than {_MOST_PIXELS} pixels"
    return None
