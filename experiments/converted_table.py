"""Rewrite the table of converted networks in docs/convert.md: `python -m experiments.converted_table`.

What stands between the two marker comments is replaced; nothing in it is written by hand.
"""

from __future__ import annotations

import csv
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from experiments.markers import rewrite
from experiments.one_command import one_command
from experiments.tables import spread
from knport.errors import KNPortError

BEGIN = "<!-- converted: made by python -m experiments.converted_table -->"
END = "<!-- end of converted -->"
MARGIN = 1.0  # points of accuracy that a converted network may lose
Cell = tuple[str, int, str]  # model, batch size, norm
Scores = dict[Cell, list[float]]


def converted_table(
    results: Path = Path("experiments/results/converted_digits/results.csv"),
    page: Path = Path("docs/convert.md"),
) -> None:
    """Rewrite the part of `page` between the markers.

    Raises:
        KNPortError: no finished run in `results`, no page, or no markers on it.
    """
    scores = read_scores(results)
    rewrite(page, BEGIN, END, section(scores))


def read_scores(results: Path) -> Scores:
    """Accuracies in percent of the finished runs, one per seed. Raises `KNPortError` if there are none."""
    found: Scores = defaultdict(list)
    if results.exists():
        with results.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["status"] == "finished":
                    found[row["model"], int(row["batch_size"]), row["norm"]].append(float(row["top1"]))
    if not found:
        raise KNPortError(f"{results}: no finished runs; python -m experiments compare makes them")
    return found


def section(scores: Scores) -> str:
    """A sentence and a table, as Markdown."""
    models = list(dict.fromkeys(model for model, _, _ in scores))
    sizes = sorted({size for _, size, _ in scores})
    heading = " | ".join(f"{size}: original | converted" for size in sizes)
    lines = [f"| network, batch size | {heading} |", "|---|" + "---:|" * 2 * len(sizes)]
    for model in models:
        cells = [_cell(scores.get((model, size, norm), [])) for size in sizes for norm in ("original", "kernel")]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join([_sentence(scores, models, sizes), "", *lines])


def _sentence(scores: Scores, models: list[str], sizes: list[int]) -> str:
    parts = []
    for size in sizes:
        pairs = {m: (scores.get((m, size, "original")), scores.get((m, size, "kernel"))) for m in models}
        losses = {m: statistics.mean(a) - statistics.mean(b) for m, (a, b) in pairs.items() if a and b}
        behind = [f"{model} by {loss:.1f}" for model, loss in losses.items() if loss > MARGIN]
        kept = len(losses) - len(behind)
        text = (
            f"at batch size {size}, {kept} of {len(losses)} converted networks reach the original less {MARGIN:g} point"
        )
        parts.append(text + (f" (behind: {', '.join(behind)})" if behind else ""))
    return f"{'; '.join(parts)}.".capitalize()


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{spread(values)} (n={len(values)})"


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(converted_table, "python -m experiments.converted_table")


if __name__ == "__main__":
    sys.exit(main())
