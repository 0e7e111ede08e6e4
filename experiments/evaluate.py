"""Exact evaluation on any number of processes: un-padded shards, one sum at the end.

Letters: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.data.images import ImageSet
from experiments.memory import is_out_of_memory, release

BATCH_SIZE = 256  # images at once


def evaluate(
    model: nn.Module,
    images: ImageSet,
    accelerator: Accelerator,
    *,
    scaling: str,
    channels_last: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """Mean cross-entropy, top-1 and top-5 accuracy in percent, over every image exactly once.

    Process r of w takes images r, r + w, ...; shards may differ by one image. `stopped` is asked before each batch,
    equally often on all processes; when it says so the answer is None. The model's mode is restored.
    """

    def batch(rows: list[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.tensor(rows, device=accelerator.device)
        x = images.scale(images.images[chosen], scaling)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x, images.labels[chosen]

    return evaluate_batches(model, len(images), batch, accelerator, stopped)


def evaluate_batches(
    model: nn.Module,
    images: int,
    batch: Callable[[list[int]], tuple[Tensor, Tensor]],
    accelerator: Accelerator,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, float] | None:
    """What `evaluate` gives, of so many images that `batch` makes.

    Args:
        model: as of `evaluate`, and so are `accelerator` and `stopped`.
        images: their number.
        batch: given the rows of one batch, its images (B, C, H, W) as the model takes them and labels int64 (B,). It
            is asked for the batches of `shard` in order.
    """
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # loss, top 1, top 5, images
    was_training = model.training
    model.eval()
    try:
        for rows in shard(images, accelerator.process_index, accelerator.num_processes):
            if stopped():
                return None
            if rows:
                totals += _count_in_parts(model, *batch(rows), accelerator)
    finally:
        model.train(was_training)
    loss, top1, top5, count = accelerator.reduce(totals, "sum").tolist()
    return {"test_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def shard(images: int, rank: int, world: int) -> list[list[int]]:
    """The rows of each batch of process `rank` of `world`; equally many batches for all, the last perhaps empty."""
    largest = math.ceil(images / world)
    rows = range(rank, images, world)
    return [list(rows[first : first + BATCH_SIZE]) for first in range(0, largest, BATCH_SIZE)]


def _count_in_parts(model: nn.Module, x: Tensor, labels: Tensor, accelerator: Accelerator) -> Tensor:
    """`_count`, of half as many images at once where memory runs out: sums over images, so nothing changes."""
    try:
        return _count(model, x, labels, accelerator)
    except RuntimeError as error:
        if len(x) == 1 or not is_out_of_memory(error):
            raise
    release()
    half = len(x) // 2
    halves = (x[:half], labels[:half]), (x[half:], labels[half:])
    return sum(_count_in_parts(model, *part, accelerator) for part in halves)


@torch.no_grad()
def _count(model: nn.Module, x: Tensor, labels: Tensor, accelerator: Accelerator) -> Tensor:
    with accelerator.autocast():
        logits = model(x).float()  # (B, K)
    best = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)  # (B, 5)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(x), device=x.device)]).double()
