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
    x: Tensor,
    *,
    groups: int = 1,
    padding_mode: str = "zeros",
    dropout: float = 0.0,
    dropout_form: str = "moments",
    statistics_given: bool = False,
    overlapping: bool = False,
) -> Backend:
    """The kernels that normalize `x`, and the reason.

    Args:
        x: the input of the layer.
        groups, padding_mode, dropout, dropout_form: the layer's, as in `knport.functional.kn_conv`.
        statistics_given: whether the statistics were taken beforehand.
        overlapping: of `kernel_norm`, whether its units overlap.
    """
    reason = (
        _unavailable(x)
        or _uncovered(groups, padding_mode, dropout, dropout_form, statistics_given, overlapping)
        or _unsuited(x)
    )
    if reason is not None:
        return Backend("eager", reason)
    return Backend("triton", "interpreted" if not x.is_cuda else f"{x.dtype} on {x.device.type}")


def _unavailable(x: Tensor) -> str | None:
    if WISH == "eager":
        return "KNPORT_KERNELS=eager"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not x.is_cuda and not (_INTERPRETED and WISH == "triton" and x.device.type == "cpu"):
        return f"the input is on {x.device.type}; the Triton kernels are for GPUs"
    return None


def _uncovered(groups, padding_mode, dropout, dropout_form, statistics_given, overlapping) -> str | None:
    if groups > 1:
        return f"groups={groups}: filters of a group cannot be centred"
    if padding_mode != "zeros":
        return f"padding_mode={padding_mode!r}: the kernels pad with zeros"
    if dropout and dropout_form == "unit":
        return "dropout_form='unit' draws a mask for every unit"
    if statistics_given:
        return "the statistics were taken beforehand"
    return "the units overlap" if overlapping else None


def _unsuited(x: Tensor) -> str | None:
    if x.dtype not in _DTYPES:
        return f"no kernel for {x.dtype}"
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return "torch.export: the exported graph is of PyTorch's own operators"
        # The compiler fuses the plain operators with their neighbours, which it cannot do with a finished kernel.
        return None if WISH == "triton" else "torch.compile fuses the plain operators (KNPORT_KERNELS=triton overrides)"
    if torch._C._are_functorch_transforms_active():
        return "torch.func: the kernels have no rule for its transforms"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"{type(x).__name__} is no plain tensor"
    if x.numel() == 0:
        return "the input is empty"
    if x.numel() // x.shape[1] > _MOST_PIXELS:
        return f"more than {_MOST_PIXELS} pixels"
    return None
