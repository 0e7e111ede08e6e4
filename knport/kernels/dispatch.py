"""Which kernels run, and why.

    "cpu"       one operation of vectorized operators (`cpu_conv`, `cpu_norm`): float32 on CPUs
    "triton"    the Triton kernels, on NVIDIA and AMD GPUs
    "eager"     the formula in plain operators: everything else, every transform, and what torch.compile fuses

The environment variable KNPORT_KERNELS, read when knport is imported, says otherwise: "eager" leaves the formula
everywhere, "triton" asks for the Triton kernels on GPUs, inside `torch.compile` and in Triton's interpreter. They wait
to be asked: they agree with the definition in Triton's interpreter and compile for sm_90, but no GPU has run them yet.
"""

from __future__ import annotations

import importlib.util
import os
from typing import NamedTuple

import torch
from torch import Tensor

from knport.errors import UnknownName
from knport.kernels.cpu import takes
from knport.kernels.cpu_units import Units
from knport.kernels.eager import SMALLEST_GAUSSIAN_UNIT

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
    """ "cpu", "triton" or "eager"."""
    reason: str
    """Why these; where there are others than Triton's, why not those."""


_CPU = Backend("cpu", "the input is on a CPU; the Triton kernels are for GPUs")


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
    if statistics_given:
        return Backend("eager", "the statistics were taken beforehand")
    suits_cpu = WISH != "eager" and takes(x, *parameters) and _is_closed(x, how, norm)
    if suits_cpu and WISH == "auto":  # before more is asked: on small layers it shows
        return _CPU
    reason = _no_triton(x, how, parameters, norm)
    if reason is None:
        return Backend("triton", f"{x.dtype} on {x.device.type}" if x.is_cuda else "interpreted")
    return Backend("cpu" if suits_cpu else "eager", reason)


def _is_closed(x: Tensor, how: Units, norm: bool) -> bool:
    """Whether what dropout does to these units is two numbers for each; masks and other paddings are not."""
    if how.padding_mode != "zeros" or (norm and how.kernel.stride != how.kernel.kernel_size):
        return False
    if not how.dropout or how.dropout_form == "expected":
        return True
    return how.dropout_form == "moments" and x.shape[1] * how.window.places >= SMALLEST_GAUSSIAN_UNIT


def _no_triton(x: Tensor, how: Units, parameters: tuple[Tensor | None, ...], norm: bool) -> str | None:
    covered = _uncovered_norm if norm else _uncovered_convolution
    return _unavailable(x) or covered(x, how) or _unsuited(x, *parameters)


def _unavailable(x: Tensor) -> str | None:
    if WISH == "eager":
        return "KNPORT_KERNELS=eager"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_INTERPRETED and WISH == "triton" and x.device.type == "cpu"):
        return f"the input is on {x.device.type}; the Triton kernels are for GPUs"
    if WISH != "triton":
        return "the Triton kernels have not been measured on a GPU; KNPORT_KERNELS=triton asks for them"
    return None


def _uncovered_convolution(x: Tensor, how: Units) -> str | None:
    if how.groups > 1:
        return f"groups={how.groups}: filters of a group cannot be centred"
    if how.padding_mode != "zeros":
        return f"padding_mode={how.padding_mode!r}: the kernels pad with zeros"
    if how.dropout and how.dropout_form == "unit":
        return "dropout_form='unit' draws a mask for every unit"
    return None


def _uncovered_norm(x: Tensor, how: Units) -> str | None:
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
        return None
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
