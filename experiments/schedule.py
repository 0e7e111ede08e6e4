"""The learning rate as a pure function of the step: nothing to restore, nothing to step twice."""

from __future__ import annotations

import math

from experiments.run import Run

POWER = 0.9  # of poly, as published
START = 0.01  # of the warm-up by epochs, as torchvision's networks are trained


def learning_rate(run: Run, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The learning rate of step `step` (0-based) of `total_steps`.

    ``cosine`` is constant within an epoch, as `CosineAnnealingLR` stepped once per epoch makes it (the papers);
    ``cosine-step`` is the same curve followed step by step, for runs of a few epochs. ``poly`` falls as (1 - step /
    total)^0.9, as segmentation is trained; ``step30`` is x 0.1 every 30 epochs, as ImageNet is. ``halve`` and ``decay``
    are those of the papers' private training: x 0.5 at 70 and 90 % of the steps (epochs 70 and 90 of 100), and x 0.99
    per epoch. `warmup` steps of linear warm-up multiply any; `warmup_epochs` come before it, and take their steps from
    it (where these are more than all steps, as in a trial of a few, there is only warm-up).
    """
    settings = run.optimization
    before = min(settings.warmup_epochs * steps_per_epoch, total_steps)
    if step < before:
        stride = 1 if settings.schedule == "cosine-step" else steps_per_epoch
        return run.lr * (START + (1 - START) * (step // stride * stride) / before)
    warmup = min(1.0, (step + 1) / (settings.warmup + 1))
    return run.lr * warmup * _shape(run, step - before, steps_per_epoch, total_steps - before)


def _shape(run: Run, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """The schedule as a share of the peak."""
    epoch = step // steps_per_epoch
    match run.optimization.schedule:
        case "constant":
            return 1.0
        case "poly":
            return (1 - step / total_steps) ** POWER
        case "step30":
            return 0.1 ** (epoch // 30)
        case "halve":
            return 0.5 ** sum(step >= share * total_steps for share in (0.7, 0.9))
        case "decay":
            return 0.99**epoch
        case "cosine":
            step = epoch * steps_per_epoch
    floor, half_turn = run.optimization.floor, math.pi * min(1.0, step / total_steps)
    return floor + (1 - floor) * (1 + math.cos(half_turn)) / 2
