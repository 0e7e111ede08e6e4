"""Exact evaluation on any number of processes: un-padded shards, one sum at the end.

Letters: B images, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

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
    rows = torch.arange(accelerator.process_index, len(images), accelerator.num_processes, device=accelerator.device)
    largest_shard = math.ceil(len(images) / accelerator.num_processes)
    totals = torch.zeros(4, dtype=torch.float64, device=accelerator.device)  # loss, top 1, top 5, images
    was_training = model.training
    model.eval()
    try:
        for first in range(0, largest_shard, BATCH_SIZE):
            if stopped():
                return None
            part = rows[first : first + BATCH_SIZE]
            if len(part):
                x = images.scale(images.images[part], scaling)
                x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
                totals += _count_in_parts(model, x, images.labels[part], accelerator)
    finally:
        model.train(was_training)
    loss, top1, top5, count = accelerator.reduce(totals, "sum").tolist()
    return {"test_loss": loss / count, "top1": 100 * top1 / count, "top5": 100 * top5 / count}


def _count_in_parts(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
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
def _count(model: nn.Module, x: torch.Tensor, labels: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    with accelerator.autocast():
        logits = model(x).float()  # (B, K)
    best = logits.topk(min(5, logits.shape[1])).indices == labels.unsqueeze(1)  # (B, 5)
    loss = F.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([loss, best[:, 0].sum(), best.sum(), torch.tensor(len(x), device=x.device)]).double()
