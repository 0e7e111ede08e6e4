"""The section of docs/architectures.md on what the small networks learn, made of committed CSVs.

`experiments/results/families` holds results.csv, a comparison of each family's original with its kernel normalized
form, and trials.csv of `experiments.placements`.
"""

from __future__ import annotations

import csv
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path

import architectures
from experiments import page
from experiments.results import Row, read
from experiments.tables import spread

TITLE = "## What the small networks learn"
FOLDER = Path("experiments/results/families")


MARGIN = 2.0  # points within which two networks count as level: about what one seed is sure to
RIVALS = ("original", "group", "group_ws")


def section(folder: Path = FOLDER) -> str:
    """Markdown: accuracies of the families, how they were made, and the trials; empty without the CSVs."""
    results, trials = folder / "results.csv", folder / "trials.csv"
    if not results.exists():
        return ""
    rows = [row for row in read(results).rows if row.finished]
    parts = [TITLE, about(rows), families(rows)]
    commands = "\n".join(page.commands(rows))
    parts.append(f"<details><summary>Command</summary>\n\n```\n{commands}\n```\n\n</details>")
    if trials.exists():
        with trials.open(newline="", encoding="utf-8") as file:
            parts += [TRIALS, trials_table(list(csv.DictReader(file)))]
    return "\n\n".join(parts)


def about(rows: Sequence[Row]) -> str:
    """What was trained on what, and who is ahead."""
    one, seeds = rows[0], sorted({row.seed for row in rows})
    images = f"{one.train_images:,} training and {one.test_images:,} test images of {one.classes} classes of CIFAR-100"
    epochs = ", ".join(f"{max(r.epochs for r in rows if r.batch_size == size):g} at {size}" for size in sizes_of(rows))
    text = (
        f"Each family's laptop-sized network and its original, trained alike on {images}: top-1 in percent after the "
        f"last step, {seed_list(seeds)}. ResNet and DenseNet are "
        "trained by SGD and the others by AdamW, with one learning rate, which falls along a cosine, for all networks "
        f"of a family. Epochs by batch size: {epochs}. These are first steps, far from converged, and one seed is sure "
        f"to about two points. Kernel normalization beside the original, level meaning within {MARGIN:g} points:"
    )
    filled = textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join([filled, "\n".join(standing(rows, size) for size in sizes_of(rows))])


def seed_list(seeds: Sequence[int]) -> str:
    """The seeds in words."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    return f"seeds {', '.join(map(str, seeds))} (mean ± SD where there are several)"


def sizes_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row.batch_size for row in rows})


def standing(rows: Sequence[Row], size: int) -> str:
    """In which families kernel normalization is ahead of the original, level with it or behind, at a batch size."""
    places: dict[str, list[str]] = {"ahead in": [], "level in": [], "behind in": []}
    for name in ours_at(rows, size):
        pair = [accuracies(rows, model, size) for model in (architectures.original_of(name) or "", name)]
        if all(pair):
            gap = statistics.mean(pair[1]) - statistics.mean(pair[0])
            place = "level in" if abs(gap) <= MARGIN else "ahead in" if gap > 0 else "behind in"
            places[place].append(f"{name} ({gap:+.1f})")
    found = "; ".join(f"{place} {', '.join(names)}" for place, names in places.items() if names)
    return f"- batch size {size}: {found}"


def ours_at(rows: Sequence[Row], size: int) -> list[str]:
    """The kernel normalized networks with a result at a batch size."""
    return sorted({row.model for row in rows if row.batch_size == size and architectures.original_of(row.model)})


def families(rows: Sequence[Row]) -> str:
    """One line per family and batch size: the original with its norm, the rivals' and kernel normalized."""
    lines = [
        "| original | batch size | steps | learning rate | its norm | GroupNorm | GroupNorm + WS | KN | KN - its |"
    ]
    lines.append("| --- |" + " ---: |" * 8)
    for size in sizes_of(rows):
        for name in ours_at(rows, size):
            original = architectures.original_of(name) or ""
            row = next(row for row in rows if (row.model, row.batch_size) == (name, size))
            scores = [accuracies(rows, original, size, norm) for norm in RIVALS] + [accuracies(rows, name, size)]
            cells = " | ".join(spread(values) if values else "" for values in scores)
            gap = difference(scores[0], scores[-1])
            lines.append(f"| {original} | {size} | {row.steps:,} | {row.lr:g} | {cells} | {gap} |")
    return "\n".join(lines)


def accuracies(rows: Sequence[Row], model: str, batch_size: int, norm: str = "original") -> list[float]:
    return [row.top1 for row in rows if (row.model, row.batch_size, row.norm) == (model, batch_size, norm)]


def difference(of_original: Sequence[float], ours: Sequence[float]) -> str:
    if not of_original or not ours:
        return ""
    return f"{statistics.mean(ours) - statistics.mean(of_original):+.1f}"


TRIALS = """### Trials

Other places for the norms, other initial weights and learning rates, on the same images:
`python -m experiments.placements`. Rows of 312 steps are one epoch, those of 936 three, as in the table above; who is
ahead after the first is not who is ahead after the third."""


def trials_table(rows: Sequence[dict[str, str]]) -> str:
    """One line per network and setting, as in trials.csv, mean and SD over seeds."""
    lines = [
        "| network | batch size | steps | optimizer, learning rate | top-1 |",
        "| --- | ---: | ---: | --- | ---: |",
    ]
    groups: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        key = row["network"], row["batch_size"], row["steps"], f"{row['optimizer']}, {row['lr']}"
        groups.setdefault(key, []).append(float(row["top1"]))
    lines += [f"| {' | '.join(key)} | {spread(values)} |" for key, values in groups.items()]
    return "\n".join(lines)
