"""Processes for tests, forked from the one that runs them: no imports to pay for, and patches stay in place."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

needs_fork = pytest.mark.skipif(
    torch.accelerator.is_available() or not hasattr(os, "fork"), reason="a forked process cannot use the GPU"
)


class Processes:
    """`count` processes that do `work()`; several are one gloo group, as a launcher would start them.

    Leaving the context kills what is left of them.

    Args:
        folder: where they meet and where `said` is kept.
    """

    def __init__(self, work: Callable[[], object], folder: Path, count: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.monotonic_ns()}"
        self.meeting, self.logs = folder / f"meeting-{name}", [folder / f"log-{name}-{rank}" for rank in range(count)]
        self.codes: dict[int, int] = {}
        self.pids = [self._fork(work, rank, count) for rank in range(count)]

    def _fork(self, work: Callable[[], object], rank: int, count: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        code = 1
        torch.set_num_threads(1)  # the threads of the parent are not there any more, and would be waited for
        try:
            self._redirect(self.logs[rank])
            if count > 1:
                join(rank, count, self.meeting)
            work()
            code = 0
        except SystemExit as stopped:
            code = stopped.code
        except BaseException:
            traceback.print_exc()
        finally:  # whatever happens, this copy of the tests ends here
            try:
                sys.stdout.flush()
            finally:
                os._exit(code)

    @staticmethod
    def _redirect(log: Path) -> None:
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        for number in (1, 2):
            os.dup2(sys.stdout.fileno(), number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to all that are left."""
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, number)

    def wait(self, seconds: float = 300) -> list[int]:
        """The exit codes, minus the signal's number of what was killed. Fails the test after `seconds`."""
        deadline = time.monotonic() + seconds
        while len(self.ended()) < len(self.pids):
            time.sleep(0.002)
            assert time.monotonic() < deadline, f"not ended after {seconds} s:\n{self.said()}"
        return [self.codes[pid] for pid in self.pids]

    def ended(self) -> set[int]:
        """Ranks of the processes that have ended."""
        for pid in set(self.pids) - set(self.codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return {rank for rank, pid in enumerate(self.pids) if pid in self.codes}

    def said(self) -> str:
        return "".join(log.read_text() for log in self.logs if log.exists())

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.wait()


def join(rank: int, count: int, meeting: Path) -> None:
    """Make this process one of `count`, in place of a launcher; they meet in a file, so that no port can be taken."""
    AcceleratorState._reset_state(reset_partial_state=True)  # the tests before have made it a lone one
    GradientState._reset_state()
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}.items():
        os.environ[name] = str(value)
    store = torch.distributed.FileStore(str(meeting), count)
    limit = timedelta(seconds=240)  # a test that hangs should say so
    torch.distributed.init_process_group("gloo", rank=rank, world_size=count, store=store, timeout=limit)


def run_two(work: Callable[[], object], folder: Path) -> str:
    """Do `work` in two processes, to the end; what they said."""
    with Processes(work, folder, 2) as two:
        codes = two.wait()
        assert codes == [0, 0], two.said()
        return two.said()
