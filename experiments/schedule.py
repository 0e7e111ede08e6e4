"""The learning rate as a pure function of the step: nothing to restore, nothing to step twice."""

from __future__ import annotations

import math

from experiments.run import Run

FLOOR = 0.01  # the cosine ends at this share of the peak, as published
POWER = 0.9  # of poly, as published


def learning_rate(run: Run, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of step `step` (0-based) of `total_steps`.

    ``cosine`` is constant within an epoch, as `CosineAnnealingLR` stepped once per epoch makes it (the papers);
    ``cosine-step`` is the same curve followed step by step, for runs of a few epochs. `warmup` steps of linear warm-up
    multiply any. ``poly`` falls as (1 - step / total)^0.9, as segmentation is trained; ``step30`` is x 0.1
    every 30 epochs, as ImageNet is. ``halve`` and ``decay`` are those of the papers' private training: x 0.5 at 70 and
    90 % of the steps (epochs 70 and 90 of 100), and x 0.99 per epoch.
    """
    schedule = run.optimization.schedule
    warmup = min(1.0, (step + 1) / (run.optimization.warmup + 1))
    if schedule == "constant":
        return run.lr * warmup
    if schedule == "poly":
        return run.lr * warmup * (1 - step / total_steps) ** POWER
    if schedule == "step30":
        return run.lr * warmup * 0.1 ** (step // steps_per_epoch // 30)
    if schedule == "halve":
        return run.lr * warmup * 0.5 ** sum(step >= share * total_steps for share in (0.7, 0.9))
    if schedule == "decay":
        return run.lr * warmup * 0.99 ** (step // steps_per_epoch)
    if schedule == "cosine":
        step = step // steps_per_epoch * steps_per_epoch
    half_turn = math.pi * min(1.0, step / total_steps)
    return run.lr * warmup * (FLOOR + (1 - FLOOR) * (1 + math.cos(half_turn)) / 2)
