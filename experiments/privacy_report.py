"""The sections of the report on private training: accuracy by epsilon, and membership inference."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments import plots
from experiments.labels import NORM_LABELS
from experiments.results import number
from experiments.tables import Section, Table, Text

ACCURACY_FILE, MEMBERSHIP_FILE = "accuracy.csv", "membership.csv"
READING = {
    ACCURACY_FILE: (
        "Top-1 in percent on the test images after the last step, mean ± standard deviation over seeds.",
        "The learning rate of each norm was chosen by one more seed at epsilon 8; that search is not in epsilon.",
        "All norms but kernel normalization get inputs without mean and SD, as in the papers. These two numbers come "
        "from the training images and are not in epsilon.",
    ),
    MEMBERSHIP_FILE: (
        "Area under the curve of an attack that tells members of the training set from others: 50 is guessing, 100 is "
        "certainty; mean ± standard deviation over networks, each trained on its own half of the images.",
        "Loss threshold: an image that fits well is taken for a member. Likelihood ratio: LiRA, with the other networks"
        " of the setting as shadow models.",
        "Wrong labels: images that can only be fitted by memorizing them.",
        "An attack that fails proves nothing; epsilon is what is guaranteed. The bound is the largest area that "
        "(epsilon, delta) allows any attack.",
    ),
}


def sections(folder: Path) -> list[Section]:
    """One for each of `accuracy.csv` and `membership.csv` that lies in `folder`."""
    found = []
    for name, make in ((ACCURACY_FILE, _accuracy), (MEMBERSHIP_FILE, _membership)):
        if (folder / name).exists():
            with (folder / name).open(newline="") as file:
                rows = list(csv.DictReader(file))
            devices = sorted({f"{row['device']}, torch {row['torch']}" for row in rows})
            remarks = (*READING[name], f"Device: {'; '.join(devices)}.")
            title, pictures, table = make(rows)
            found.append(Section(title, pictures, table, remarks, tuple(dict.fromkeys(row["command"] for row in rows))))
    return found


def _accuracy(rows: list[dict[str, str]]) -> tuple[str, tuple[str, ...], Table]:
    norms = list(dict.fromkeys(row["norm"] for row in rows))
    epsilons = list(dict.fromkeys(row["epsilon"] for row in rows))
    cells = {
        (norm, epsilon): [float(row["top1"]) for row in rows if (row["norm"], row["epsilon"]) == (norm, epsilon)]
        for norm in norms
        for epsilon in epsilons
    }
    header = ("norm", *(_name(epsilon) for epsilon in epsilons))
    best = {epsilon: max(norms, key=lambda norm: statistics.mean(cells[norm, epsilon] or [0])) for epsilon in epsilons}
    lines = tuple(
        (Text(_label(norm)), *(_spread(cells[norm, epsilon], norm == best[epsilon]) for epsilon in epsilons))
        for norm in norms
    )
    return "Private training", (_accuracy_plot(cells, norms, epsilons),), Table(header, lines, names=1)


def _membership(rows: list[dict[str, str]]) -> tuple[str, tuple[str, ...], Table]:
    from experiments.membership import bound

    settings = list(dict.fromkeys(row["epsilon"] for row in rows))
    attacks = list(dict.fromkeys((row["images"], row["attack"]) for row in rows))
    cells = {
        (images, attack, epsilon): [
            100 * float(row["auc"])
            for row in rows
            if (row["images"], row["attack"], row["epsilon"]) == (images, attack, epsilon)
        ]
        for images, attack in attacks
        for epsilon in settings
    }
    lines = [
        (Text(images), Text(attack), *(_spread(cells[images, attack, epsilon]) for epsilon in settings))
        for images, attack in attacks
    ]
    deltas = {row["epsilon"]: number(row["delta"]) for row in rows}
    bounds = [bound(number(epsilon), deltas[epsilon] or 0.0) for epsilon in settings]
    lines.append((Text("any"), Text("bound"), *(Text("100" if b is None else f"{100 * b:.2f}") for b in bounds)))
    accuracy = {e: [float(r["top1"]) for r in rows if r["epsilon"] == e] for e in settings}
    lines.append((Text("test images"), Text("top-1"), *(Text(f"{statistics.mean(accuracy[e]):.1f}") for e in settings)))
    header = ("images", "attack", *(_name(epsilon) for epsilon in settings))
    return "Membership inference", (_membership_plot(cells, attacks, settings),), Table(header, tuple(lines))


def _name(epsilon: str) -> str:
    return f"epsilon {float(epsilon):g}" if epsilon else "not private"


def _label(norm: str) -> str:
    return NORM_LABELS.get(norm, norm)


def _spread(values: Sequence[float], best: bool = False) -> Text:
    if not values:
        return Text("not run")
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return Text(f"{statistics.mean(values):.1f}{sd}", best, f"n={len(values)}")


def _accuracy_plot(cells: dict, norms: Sequence[str], epsilons: Sequence[str]) -> str:
    figure, axes = plots.panel()
    for norm in norms:
        points = [(i, cells[norm, epsilon]) for i, epsilon in enumerate(epsilons) if cells[norm, epsilon]]
        y = [statistics.mean(values) for _, values in points]
        bars = [statistics.stdev(values) if len(values) > 1 else 0.0 for _, values in points]
        colour, _, marker = plots.STYLES.get(norm, plots.OTHER)
        axes.errorbar([i for i, _ in points], y, bars, color=colour, marker=marker, markersize=6, label=_label(norm))
    axes.set_xticks(range(len(epsilons)), [_name(epsilon) for epsilon in epsilons])
    axes.set_title("top-1 accuracy [%]", loc="left", fontsize=10.5, color=plots.INK, pad=8)
    axes.legend(frameon=False, labelcolor=plots.INK)
    return plots.to_svg(figure, themed=True)


def _membership_plot(cells: dict, attacks: Sequence[tuple[str, str]], settings: Sequence[str]) -> str:
    figure, axes = plots.panel()
    colours = [plots.STYLES["batch"][0], plots.STYLES["kernel"][0]]
    for number_, epsilon in enumerate(settings):
        x = [i + 0.18 * (2 * number_ - 1) for i in range(len(attacks))]
        values = [cells[images, attack, epsilon] for images, attack in attacks]
        for place, own in zip(x, values, strict=True):
            axes.plot([place] * len(own), own, ".", color=colours[number_ % 2], alpha=0.5, markersize=6)
        means = [statistics.mean(own) for own in values]
        axes.plot(x, means, "_", color=colours[number_ % 2], markersize=18, markeredgewidth=2.4, label=_name(epsilon))
    axes.axhline(50, color=plots.INK, linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(attacks)), [f"{attack}\n{images}" for images, attack in attacks], fontsize=8.5)
    axes.set_title("attack's AUC [%]", loc="left", fontsize=10.5, color=plots.INK, pad=8)
    axes.legend(
        frameon=False, labelcolor=plots.INK, loc="lower right", bbox_to_anchor=(1.03, 0.96), ncols=2, fontsize=9
    )
    return plots.to_svg(figure, themed=True)
