"""When memory runs out: the same batch in smaller micro-batches, from the last checkpoint on.

Running out of memory is treated like being killed. What a run has noted decides, as a function of the step, how many
images it passes at once; it starts again from its last checkpoint, so that the step that failed leaves no trace in
weights, buffers or random draws. A lone process starts again by itself, and so do several whose first step does not
fit. Later on, processes wait for each other in collectives and cannot all be called back: they end, and the same
command (or ``--max_restarts`` of the launcher) goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from torch import nn

from experiments.memory import is_out_of_memory
from experiments.run_folder import read_rows
from experiments.signals import agree
from knport.errors import KNPortError

NAME = "micro_batch.csv"
HEADER = "step,images\n"


class OutOfMemory(KNPortError):
    """A step did not fit; what it may pass at once has been halved.

    Args:
        message: what happened, and how it goes on.
        together: all processes of the run raise this at the same step.
    """

    def __init__(self, message: str, *, together: bool):
        self.together = together
        super().__init__(message)


class MicroBatch:
    """How many images a process passes through the network at once, as a function of the step.

    Args:
        folder: of the run; `micro_batch.csv` in it lists where memory ran out: from that step on, so many images.
        images: at once where memory suffices.
    """

    def __init__(self, folder: Path, images: int):
        self.path, self.images = folder / NAME, images
        self.shortages = [(int(row["step"]), int(row["images"])) for row in read_rows(self.path)]

    def at(self, step: int) -> int:
        """Images at once at step `step`."""
        return min([self.images, *(images for first, images in self.shortages if first <= step)])

    def give_up(self, step: int, net: nn.Module, accelerator: Accelerator, *, together: bool = False) -> NoReturn:
        """Note that step `step` did not fit, and raise `OutOfMemory`; `KNPortError` if it was a single image.

        Args:
            net: what was trained.
            together: all processes do this, at the same step; one notes it.
        """
        rank, together = accelerator.process_index, together or accelerator.num_processes == 1
        before, after = self.at(step), self._halve(step, write=not together or rank == 0)
        how = "; going on" if together else f" in process {rank}; the same command goes on"
        raise OutOfMemory(
            f"{self.path.parent}: out of memory at step {step} with {before} images at once{how} from the last"
            f" checkpoint with {after}: {consequence(net, after)}",
            together=together,
        ) from None

    def _halve(self, step: int, write: bool) -> int:
        before = self.at(step)
        if before == 1:
            raise KNPortError(
                "out of memory with one image at a time: take a smaller network or image, --mixed-precision bf16, or a"
                " device with more memory"
            )
        after = (before + 1) // 2
        self.shortages.append((step, after))
        if not write:
            return after
        with self.path.open("a") as file:  # in one write: of several processes, more than one may run out
            file.write((HEADER if file.tell() == 0 else "") + f"{step},{after}\n")
        return after

    def record(self) -> dict[str, Any]:
        """What `run.json` says of it: nothing where memory sufficed."""
        rows = [{"step": step, "images_at_once": images} for step, images in sorted(set(self.shortages))]
        return {"out_of_memory": rows} if rows else {}


def all_fit(attempt: Callable[[], object], net: nn.Module, accelerator: Accelerator) -> bool:
    """Whether `attempt` finds enough memory on every process; what it did to gradients and buffers of `net` is undone.

    Args:
        attempt: a forward and backward pass without collectives, so that no process waits for one that failed.
    """
    buffers, short = [buffer.clone() for buffer in net.buffers()], False
    try:
        attempt()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        short = True
    net.zero_grad()
    for buffer, before in zip(net.buffers(), buffers, strict=True):
        buffer.copy_(before)
    return not agree(accelerator, int(short))[0]


def consequence(net: nn.Module, images: int) -> str:
    """What micro-batches of `images` images change about the training of `net`."""
    norms = [module for module in net.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return "the gradients are the same to rounding, for dropouts drawn anew"
    return (
        f"but its {len(norms)} BatchNorm layers now normalize {images} images at a time, which is another training: a"
        " batch-independent norm (--norm kernel, --norm group) would not change"
    )
