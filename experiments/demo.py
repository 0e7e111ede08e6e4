"""`python -m experiments demo`: three norms at two batch sizes on real images that come with scikit-learn.

A few minutes on two CPU cores, nothing to download. Digits are easy: every norm reaches about 98 %, so what the demo
shows is that kernel normalization costs no accuracy there, at batch size 2 or 32, and what it costs in time and memory.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.compare import compare

COMMAND = "python -m experiments demo"


def demo(
    *,
    seeds: Sequence[int] = (0, 1),
    epochs: Sequence[int] = (5, 10),
    out: Path = Path("runs/demo"),
) -> Path:
    """Compare BatchNorm, GroupNorm and kernel normalization on scikit-learn's digits; returns the report's path.

    Args:
        seeds: of initialization, order, augmentation and dropout.
        epochs: at batch size 2 and at batch size 32.
        out: folder of the report; a second call with the same settings shows what is there.
    """
    return compare(
        "digits",
        models=("cifar_resnet8",),
        norms=("original", "group", "kernel"),
        batch_sizes=(2, 32),
        seeds=seeds,
        epochs=epochs,
        out=str(out),
        cost_seconds=4.0,
        quiet=not sys.stdout.isatty(),
        command=_command(seeds, epochs, out),
    )


def _command(seeds: Sequence[int], epochs: Sequence[int], out: Path) -> str:
    given = {"seeds": (seeds, (0, 1)), "epochs": (epochs, (5, 10))}
    flags = [f"--{name} {' '.join(map(str, v))}" for name, (v, usual) in given.items() if tuple(v) != usual]
    flags += ["--out DIR" if out.is_absolute() else f"--out {out}"] * (out != Path("runs/demo"))
    return " ".join([COMMAND, *flags])
