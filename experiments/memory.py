"""Errors that say that memory has run out, and giving back what they held.

`accelerate.utils.find_executable_batch_size` has the same end. Its test for such errors is used here; its loop is not,
since it restarts without telling the other processes, and empties the cache while the error still holds the tensors.
"""

from __future__ import annotations

import gc

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or a library's workspace on it, has no memory left."""
    return (
        isinstance(error, torch.OutOfMemoryError)
        or should_reduce_batch_size(error)
        or (isinstance(error, RuntimeError) and "_STATUS_ALLOC_FAILED" in str(error))  # cuBLAS and cuDNN
    )


def release() -> None:
    """Give back what a failed attempt held, cycles too. Not inside `except`: there the error still holds its frames."""
    gc.collect()
    clear_device_cache()
