"""What the on-device pipeline of small images costs: order, crop, flip and scaling beside a training step.

`python -m experiments.benchmarks.pipeline` appends rows to experiments/results/pipeline/pipeline.csv. An epoch of the
feed and a few training steps (forward, loss, backward, SGD) are taken in turn, so that a slow moment falls on both, and
the share is formed within a round. An epoch, because a batch is a slice of a chunk that is prepared at once. Times are
those of the thread, not of the clock: a busy machine adds to neither.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

from experiments.benchmarks.timing import spread
from experiments.data.images import ImageSet
from experiments.feed import Feed
from experiments.models import build
from experiments.optimizer import build_optimizer
from experiments.results import append_rows
from experiments.run import Run, resolve
from experiments.run_folder import environment

COMMAND = "python -m experiments.benchmarks.pipeline"
RESULTS = Path(__file__).parents[1] / "results" / "pipeline" / "pipeline.csv"
COLUMNS = ("model", "batch_size", "rounds", "pipeline_ms_per_step", "step_ms", "share_percent")
COLUMNS += ("share_percent_q25", "share_percent_q75", "device", "threads", "torch", "commit", "date", "command")
MODEL, IMAGES = "knresnet18", 50_000


def pipeline(
    *,
    model: str = MODEL,
    batch_sizes: Sequence[int] = (2, 256),
    rounds: int = 5,
    seconds: float = 10.0,
    images: int = IMAGES,
    out: Path = RESULTS,
) -> list[dict[str, object]]:
    """Measure on one CPU thread, append to the CSV and print; returns the rows.

    Args:
        model: the network, with the recipe of CIFAR-100.
        batch_sizes: images per step.
        rounds: of an epoch of the feed and of training steps.
        seconds: of training steps per round, one step at least.
        images: in the epoch, random ones of CIFAR's size.
        out: the CSV.
    """
    torch.set_num_threads(1)
    rows = [_measure(model, size, rounds, seconds, images) for size in batch_sizes]
    append_rows(out, COLUMNS, rows)
    for row in rows:
        print(
            f"{model}, batch size {row['batch_size']}: {row['pipeline_ms_per_step']} of {row['step_ms']} ms,"
            f" {row['share_percent']} %"
        )
    return rows


def _measure(model: str, batch_size: int, rounds: int, seconds: float, images: int) -> dict[str, object]:
    run = resolve("cifar100", model=model, batch_size=batch_size)
    feed, step = Feed(random_images(images), run), training_step(run)
    step(*feed.batch(0))  # warm-up
    feeds, steps = [], []
    for number in range(rounds):
        first = (number + 1) * feed.steps_per_epoch
        feeds.append(_timed(lambda first=first: [feed.batch(first + i) for i in range(feed.steps_per_epoch)]))
        batch = feed.batch(first)
        times = [_timed(lambda batch=batch: step(*batch))]
        while sum(times) + times[-1] < seconds:
            times.append(_timed(lambda batch=batch: step(*batch)))
        steps.append(statistics.median(times))
    each = [1000 * epoch / feed.steps_per_epoch for epoch in feeds]
    share = spread([ms / (10 * step) for ms, step in zip(each, steps, strict=True)])
    here = environment(torch.device("cpu"), 1)
    return {
        "model": model,
        "batch_size": batch_size,
        "rounds": rounds,
        "pipeline_ms_per_step": f"{statistics.median(each):.4g}",
        "step_ms": f"{1000 * statistics.median(steps):.4g}",
        "share_percent": f"{share.median:.3g}",
        "share_percent_q25": f"{share.q25:.3g}",
        "share_percent_q75": f"{share.q75:.3g}",
        **{name: here[name] for name in ("device", "threads", "torch", "commit")},
        "date": datetime.date.today().isoformat(),
        "command": f"{COMMAND} --model {model} --batch-sizes {batch_size} --rounds {rounds} --seconds {seconds:g}",
    }


def random_images(count: int) -> ImageSet:
    """As many images of CIFAR's size and classes, of noise."""
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    return ImageSet(images=pixels, labels=torch.arange(count) % 100, num_classes=100, mean=(0.5,) * 3, std=(0.25,) * 3)


def training_step(run: Run) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Forward, cross-entropy, backward and update of the run's network."""
    torch.manual_seed(0)
    net = build(run.model, run.norm, num_classes=100, image_size=32).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(run, net, fused=True)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _timed(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


if __name__ == "__main__":
    tyro.cli(pipeline)
