"""From rows to statements: accuracy per cell as mean and SD over seeds, who is ahead, and whether that means anything.

Two norms differ *clearly* at a batch size when the difference of their means exceeds two standard errors, counting
both the spread over seeds and the finite number of test images; otherwise they are *within the spread*. Networks are
compared only under the same budget (steps, training images, classes); a cell under another budget is marked.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from experiments.labels import METRICS, NORM_LABELS, Metric
from experiments.published import published
from experiments.results import Row
from knport.errors import KNPortError

STANDARD_ERRORS = 2.0


@dataclass(frozen=True, kw_only=True)
class Cell:
    """All seeds of one network at one batch size; scores in percent.

    `sd` is None with fewer than two finished seeds, `mean` with none. `budget` is (steps, training images, classes).
    """

    batch_size: int
    rows: tuple[Row, ...]

    @property
    def finished(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.finished)

    @property
    def values(self) -> list[float]:
        return [row.value for row in self.finished]

    @property
    def mean(self) -> float | None:
        return statistics.mean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def failed(self) -> int:
        return sum(row.status == "failed" for row in self.rows)

    @property
    def budget(self) -> tuple:
        return budget(self.finished[0]) if self.finished else ()

    @property
    def variance_of_mean(self) -> float:
        """Of `mean`, in squared percent: seeds, and the binomial draw of the test images (shared by the seeds).

        The pixels of an image are no independent draws: of mean IoU the seeds alone count.
        """
        share = self.mean / 100
        drawn = self.rows[0].score == "top1" and self.finished[0].test_images
        test_images = drawn or math.inf
        return (self.sd or 0.0) ** 2 / len(self.values) + 1e4 * share * (1 - share) / test_images

    @property
    def published(self) -> float | None:
        row = self.rows[0]
        kind = kind_of(row.norm, row.norm_family)
        return published(row.recipe, row.model, kind, self.batch_size, row.classes)


@dataclass(frozen=True, kw_only=True)
class Series:
    """One network (model and norm) over the batch sizes it was planned at."""

    model: str
    norm: str
    family: str
    cells: dict[int, Cell]
    original: str = ""

    @property
    def kind(self) -> str:
        """The kind of norm in the network."""
        return kind_of(self.norm, self.family)

    @property
    def backbone(self) -> str:
        """The network that this one is compared within."""
        return self.original or self.model

    @property
    def label(self) -> str:
        """The norm as shown: its kind, and for kernel normalization whether it was converted or built in."""
        kind = NORM_LABELS.get(self.kind, self.norm)
        return f"{kind}, as built" if self.norm == "original" and self.kind == "kernel" else kind


def kind_of(norm: str, family: str) -> str:
    """The kind of norm: the one asked for, or of a model as it is, the one found in it."""
    return family if norm == "original" else norm


def metric_of(rows: Iterable[Row]) -> Metric:
    """What the rows are ranked by.

    Raises:
        KNPortError: by more than one thing.
    """
    names = {row.score for row in rows}
    if len(names) > 1:
        raise KNPortError(f"rows ranked by {' and '.join(sorted(names))} cannot stand in one table")
    name = next(iter(names), "top1")
    return METRICS.get(name) or Metric(name, name.replace("_", " "), f"{name.replace('_', ' ')} [%]")


def series_of(rows: Iterable[Row]) -> list[Series]:
    """Group rows by network, in the order in which backbones first appear, within each the original first.

    A network whose original is not among the rows is a backbone of its own.
    """
    rows = list(rows)
    present = {row.model for row in rows}
    rows = [row if row.original in present else replace(row, original="") for row in rows]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.norm), []).append(row)
    backbone = {model: found[0].backbone for (model, _), found in groups.items()}
    places = list(dict.fromkeys(backbone.values()))
    order = sorted(
        groups, key=lambda pair: (places.index(backbone[pair[0]]), backbone[pair[0]] != pair[0], pair[1] != "original")
    )
    return [_series(model, norm, groups[model, norm]) for model, norm in order]


def batch_sizes_of(rows: Iterable[Row]) -> list[int]:
    """Every batch size of the comparison, ascending."""
    return sorted({row.batch_size for row in rows})


def budget(row: Row) -> tuple:
    """What must be equal for two accuracies to be compared."""
    return row.steps, row.train_images, row.classes


def main_budget(series: Iterable[Series], batch_size: int) -> tuple:
    """The budget of most finished cells at this batch size."""
    cells = [s.cells[batch_size] for s in series if batch_size in s.cells]
    counts = Counter(cell.budget for cell in cells if cell.finished)
    return counts.most_common(1)[0][0] if counts else ()


def best_norms(series: list[Series], batch_size: int) -> set[tuple[str, str]]:
    """The (model, norm) with the highest mean of each backbone that has at least two comparable norms."""
    return {(ranked[0].model, ranked[0].norm) for ranked in rankings(series, batch_size) if len(ranked) > 1}


def clearly_apart(a: Cell, b: Cell) -> bool:
    """Whether the means differ by more than two standard errors of the difference."""
    error = math.sqrt(a.variance_of_mean + b.variance_of_mean)
    return abs(a.mean - b.mean) > STANDARD_ERRORS * error


def headline(rows: Iterable[Row]) -> str:
    """One sentence on the first backbone that has several norms: who is ahead at each batch size, and is it clear."""
    rows = list(rows)
    series = series_of(rows)
    firsts = {size: ranked[0] for size in batch_sizes_of(rows) if (ranked := rankings(series, size))}
    firsts = {size: ranked for size, ranked in firsts.items() if len(ranked) > 1}
    if not firsts:
        return "No two norms of one model have finished at the same batch size and budget yet."
    first = next(iter(firsts.values()))[0].backbone
    firsts = {size: ranked for size, ranked in firsts.items() if ranked[0].backbone == first}
    text = "; ".join(_verdict(ranked, size) for size, ranked in firsts.items())
    if len({s.backbone for s in series}) > 1:
        text = f"{first}: {text}"
    seeds = min(len(s.cells[size].values) for size, ranked in firsts.items() for s in ranked)
    text = text if ":" in text else text[0].upper() + text[1:]
    return text + ("." if seeds > 1 else " (one seed: its spread is not known).")


def format_cell(cell: Cell | None) -> str:
    """`41.9 ± 0.4`; without SD for one seed; 'failed', 'running' or 'not run' where there is no accuracy."""
    if cell is None:
        return "not run"
    if cell.mean is None:
        states = {row.status for row in cell.rows}
        return "failed" if "failed" in states else "running" if "running" in states else "not run"
    return f"{cell.mean:.1f}" + (f" ± {cell.sd:.1f}" if cell.sd is not None else "")


def _series(model: str, norm: str, rows: list[Row]) -> Series:
    family = next((row.norm_family for row in rows if row.norm_family), "" if norm == "original" else norm)
    cells = {
        size: Cell(batch_size=size, rows=tuple(row for row in rows if row.batch_size == size))
        for size in batch_sizes_of(rows)
    }
    return Series(model=model, norm=norm, family=family, cells=cells, original=rows[0].original)


def rankings(series: list[Series], batch_size: int) -> list[list[Series]]:
    """Per backbone, its networks with a result under its main budget, best first; those with several norms first."""
    groups: dict[str, list[Series]] = {}
    for one in series:
        if batch_size in one.cells:
            groups.setdefault(one.backbone, []).append(one)
    found = []
    for group in groups.values():
        main = main_budget(group, batch_size)
        here = [one for one in group if one.cells[batch_size].budget == main and main]
        found.append(sorted(here, key=lambda one: -one.cells[batch_size].mean))
    return sorted(filter(None, found), key=lambda ranked: len(ranked) < 2)


def _verdict(ranked: list[Series], batch_size: int) -> str:
    best, *others = [(s.label, s.cells[batch_size]) for s in ranked]
    level = [(label, cell) for label, cell in others if not clearly_apart(best[1], cell)]
    behind = [(label, cell) for label, cell in others if clearly_apart(best[1], cell)]
    at = f"at batch size {batch_size}"
    if not behind:
        low, high = f"{others[-1][1].mean:.1f}", f"{best[1].mean:.1f}"
        norms = "both norms" if len(ranked) == 2 else f"all {len(ranked)} norms"
        return f"{at} {norms} are within the spread ({low if low == high else f'{low} to {high}'} %)"
    gap = f"{best[1].mean - behind[0][1].mean:.1f} points above {behind[0][0]}"
    if level:
        names = " and ".join(label for label, _ in [best, *level])
        means = " and ".join(f"{cell.mean:.1f}" for _, cell in [best, *level])
        return f"{at} {names} are within the spread ({means} %), {gap}"
    return f"{at} {best[0]} is best ({best[1].mean:.1f} %), {gap}"
