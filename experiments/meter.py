"""What a run measures on the way: the training loss without a host sync per step, and peak memory."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from knport.errors import KNPortError

CAPACITY = 128  # steps between two looks at the losses
CURVE_POINTS = 2000  # rows of losses.csv at most


class NonFiniteLoss(KNPortError):
    """A loss became NaN or infinite: `loss`, at `step` (0-based)."""

    def __init__(self, step: int, loss: float, message: str = ""):
        self.step, self.loss = step, loss
        super().__init__(message or f"the loss is {loss} at step {step}")


class LossMeter:
    """Collects the loss of each step on the device and looks at it only in `flush`.

    Args:
        device: where the losses are.
        total_steps: of the run; `losses.csv` gets the mean of every ``ceil(total_steps / 2000)`` steps.
    """

    def __init__(self, device: torch.device, total_steps: int):
        self.buffer, self.used = torch.zeros(CAPACITY, device=device), 0
        self.every = math.ceil(total_steps / CURVE_POINTS)
        self.sum, self.count, self.pending = 0.0, 0, []

    def add(self, loss: Tensor) -> bool:
        """Note the loss of a step; True when the buffer is full and must be flushed."""
        self.buffer[self.used] = loss
        self.used += 1
        return self.used == CAPACITY

    def flush(self, step: int, reduce) -> list[tuple[int, float]]:
        """Read the losses of the steps up to `step` (not included) since the last flush.

        Args:
            step: steps done.
            reduce: averages a tensor over processes.

        Returns: rows (steps done, mean loss) for `losses.csv`. Raises `NonFiniteLoss` for the first bad step.
        """
        if not self.used:
            return []
        losses = reduce(self.buffer[: self.used].clone()).tolist()
        first, self.used = step - self.used, 0
        rows = []
        for done, loss in enumerate(losses, first + 1):
            if not math.isfinite(loss):
                raise NonFiniteLoss(done - 1, loss)
            self.pending.append(loss)
            if done % self.every == 0:
                rows.append((done, math.fsum(self.pending) / len(self.pending)))
                self.pending = []
        self.sum, self.count = self.sum + math.fsum(losses), self.count + len(losses)
        return rows

    def mean(self) -> float:
        """Mean loss of the steps since the last call; NaN if there were none."""
        mean = self.sum / self.count if self.count else math.nan
        self.sum, self.count = 0.0, 0
        return mean

    def state(self) -> dict[str, Any]:
        """What `load` needs to go on from here, as JSON."""
        return {"sum": self.sum, "count": self.count, "pending": self.pending}

    def load(self, state: dict[str, Any]) -> None:
        self.sum, self.count, self.pending = state["sum"], state["count"], list(state["pending"])


def reset_peak_memory(device: torch.device) -> None:
    """Start a new maximum; on Linux also for the CPU, where the process's high-water mark is reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return  # not permitted in some containers: the maximum is then the process's


def peak_mib(device: torch.device) -> float:
    """Peak memory in MiB: what tensors took on a GPU; resident memory of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 2**10
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes on macOS, KiB elsewhere
