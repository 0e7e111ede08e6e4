"""SIGTERM, SIGUSR2 and Ctrl-C as a request that all processes of a run agree on at a step boundary."""

from __future__ import annotations

import signal
import threading

import torch
from accelerate import Accelerator

CAUGHT = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGUSR2"):
    CAUGHT.append(signal.SIGUSR2)  # what submitit sends before a job's time limit


class TrainingStopped(SystemExit):
    """The run was asked to stop and has saved. A `SystemExit`, so that loops over runs do not swallow it.

    Args:
        number: the signal's number; the exit code is 128 more, as schedulers expect: 143 for SIGTERM, 130 for Ctrl-C.
    """

    def __init__(self, number: int):
        self.number = number
        super().__init__(128 + number)


class StopRequest:
    """A context that catches SIGTERM, SIGINT and SIGUSR2, keeping the first in `received`; a second Ctrl-C interrupts.

    Outside the main thread nothing is caught, since Python allows no handlers there.
    """

    received = 0

    def __enter__(self) -> StopRequest:
        main = threading.current_thread() is threading.main_thread()
        self._before = {number: signal.signal(number, self._note) for number in CAUGHT} if main else {}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number


def agree(accelerator: Accelerator, *values: int) -> list[int]:
    """The maximum of each value over all processes: one small collective, none for a single process."""
    if accelerator.num_processes == 1:
        return list(values)
    own = torch.tensor([values], device=accelerator.device)
    return accelerator.gather(own).amax(0).tolist()
