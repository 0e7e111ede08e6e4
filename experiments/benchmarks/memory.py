"""What one step keeps and needs: saved activations, peak memory, the largest tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from experiments.live_tensors import LiveTensors

MIB = 2**20


class Memory(NamedTuple):
    """MiB beyond what is alive before the step; None where it cannot be seen."""

    peak: float | None = None
    largest: float | None = None


class _Largest(LiveTensors):
    """Also the bytes of the largest storage that was made."""

    largest = 0

    def _enter(self, tensor: Tensor) -> None:
        before = self.now
        super()._enter(tensor)
        self.largest = max(self.largest, self.now - before)


def step_memory(step: Callable[[], None], alive: Iterable[Tensor], device: torch.device) -> Memory:
    """Peak and largest tensor of one step; on CUDA the allocator's own peak, elsewhere all that operators return.

    Args:
        step: leaves nothing behind.
        alive: the tensors that exist before, as parameters and the input.
        device: where they are.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        torch.cuda.synchronize(device)
        return Memory((torch.cuda.max_memory_allocated(device) - before) / MIB)
    with _Largest(alive) as live:
        before, live.largest = live.now, 0
        step()
    return Memory((live.peak - before) / MIB, live.largest / MIB)


def saved_mib(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> float:
    """MiB that autograd keeps from `forward` for the backward pass, every storage once, `parameters` not.

    What a custom function hides on its context instead of saving it is not seen.
    """
    own = {_key(tensor) for tensor in parameters}
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        if _key(tensor) not in own:
            storages[_key(tensor)] = tensor.untyped_storage()  # held, so that its address is not handed out again
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = forward()  # what is saved lives as long as the output
    del out
    return sum(storage.nbytes() for storage in storages.values()) / MIB


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
