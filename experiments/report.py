"""`python -m experiments report [FOLDER ...]`: a page to look at, the same as Markdown, and the tables as CSV.

Made from run folders or from their tables. Without a folder: from everything measured that is committed, beside the
tables of the papers.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from io import StringIO
from pathlib import Path

import tyro

from experiments import activations, page, paper_report, tables
from experiments.backbones import statement
from experiments.comparison import Comparison, Found, find, holds_runs, is_comparison, read_stages
from experiments.originals import with_originals
from experiments.paper_table import SOURCE
from experiments.published import setting_of
from experiments.results import COLUMNS, Results, Row, read, write, write_text
from experiments.summary import STANDARD_ERRORS
from experiments.tables import Section
from knport.errors import KNPortError

COMMITTED = Path("experiments/results")
READING = (
    "Scores are in percent on the test images after the last step: mean ± standard deviation over n seeds, no "
    "deviation for one seed. Best of its column and backbone in bold. Two norms count as different when their means "
    f"are more than {STANDARD_ERRORS:g} standard errors apart, from the seeds and, of top-1, from the number of test "
    "images. Of segmentation the score is the mean IoU.",
    "A training step is forward, loss, backward and SGD, in float32 and channels-last, on images already on the "
    "device: the median and the 20 to 80 % quantiles; the networks of a batch size take turns, and ratios are formed "
    "within a turn.",
    "MACs are those of convolutions and linear layers, one image forward. FLOP counters do not see the statistics of a "
    "normalization, so the measured time says what kernel normalization costs.",
    "Peak MiB: all tensors alive during a step, weights and momentum included. Saved MiB: what autograd keeps from the "
    "forward pass for the backward pass.",
)


def report(folders: tyro.conf.Positional[tuple[Path, ...]] = (), *, out: Path | None = None) -> Path:
    """Write report.html, report.md, results.csv and curves.csv; returns the page's path.

    Args:
        folders: each holds run folders, or else a `results.csv` (with `curves.csv` beside it) from an earlier
            comparison, or the tables of `python -m experiments privacy`, or both. None: all in experiments/results,
            and the tables of the papers.
        out: where to write to. None: into the folder, or with none or several into runs/report.

    Raises:
        KNPortError: a folder holds neither.
    """
    folders = (folders,) if isinstance(folders, str | Path) else folders
    if len(folders) == 1:
        return _of_one(Path(folders[0]), out)
    found = [find(Path(folder)) for folder in folders or committed()]
    comparisons = [comparison for one in found for comparison in one.comparisons]
    rows = [row for comparison in comparisons for row in comparison.results.rows]
    private = [section for one in found for section in one.sections]
    out = out or Path("runs/report")
    _write_tables(out, comparisons)
    return _write(out, comparisons, private, paper_report.sections(rows))


def committed(root: Path = COMMITTED) -> list[Path]:
    """The folders of measured results that the report can show.

    Raises:
        KNPortError: there are none: this is not the checkout.
    """
    found = [path.parent for path in sorted(root.glob("*/results.csv")) if is_comparison(path)]
    found += sorted({path.parent for name in ("accuracy.csv", "membership.csv") for path in root.glob(f"*/{name}")})
    if not found:
        raise KNPortError(f"{root}: no results; call it from the checkout, or name folders")
    return list(dict.fromkeys(found))


def load(folder: Path) -> Results:
    """The results of a folder of runs, or of its `results.csv`."""
    found = find(folder).comparisons
    rows = [row for comparison in found for row in comparison.results.rows]
    return Results(tuple(rows), tuple(line for comparison in found for line in comparison.results.curves))


def markdown(comparisons: Sequence[Comparison], private: Sequence[Section] = (), papers: Sequence[Section] = ()) -> str:
    """The whole report as Markdown, without pictures."""
    parts = [f"# {page.heading(comparisons)}"]
    for comparison in comparisons:
        parts += [f"# {page.title(comparison.results.rows)}"] * (len(comparisons) > 1)
        parts += _comparison(comparison.results.rows)
    parts += [text for section in private for text in section.markdown()]
    if papers:
        parts += ["# The papers' tables", paper_report.READING]
        parts += [text for section in papers for text in section.markdown()]
    if comparisons:
        parts += ["## How to read this", *(f"- {text}" for text in READING)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _comparison(rows: Sequence[Row]) -> list[str]:
    parts = [statement(rows), tables.accuracy(rows).markdown()]
    parts += [f"- {note}" for note in tables.remarks(rows)]
    more = tables.further(rows)
    parts += [more.markdown()] if more else []
    parts += ["## Cost of a training step", tables.costs(rows).markdown(), page.measured_on(rows)]
    parts += ["## Setting", tables.settings(rows).markdown(), page.machine(rows)]
    parts += [f"```\n{command}\n```" for command in page.commands(rows)]
    if "paper" in tables.accuracy(rows).header:
        parts.append(f"- paper: {SOURCE}; {setting_of(rows[0].recipe)}.")
    return parts


def _of_one(folder: Path, out: Path | None) -> Path:
    """One folder: its tables are written beside its runs, and the report shows the digits that the tables hold."""
    found = find(folder)
    if holds_runs(folder):
        rows = tuple(row for comparison in found.comparisons for row in comparison.results.rows)
        curves = tuple(line for comparison in found.comparisons for line in comparison.results.curves)
        write(folder, Results(rows, curves))
        stages = read_stages(folder)
        if stages:
            activations.write(folder / activations.FILE, stages)
        found = _reread(folder, found)
    if out and found.comparisons:
        _write_tables(out, found.comparisons)
    return _write(out or folder, found.comparisons, found.sections, ())


def _reread(folder: Path, found: Found) -> Found:
    results = read(folder)
    comparisons = []
    for one in found.comparisons:
        recipe = one.results.rows[0].recipe
        rows = with_originals(row for row in results.rows if row.recipe == recipe)
        curves = tuple(line for line in results.curves if line["recipe"] == recipe)
        stages = activations.read(folder / activations.FILE) if one.stages else ()
        comparisons.append(one._replace(results=Results(rows, curves), stages=tuple(stages)))
    return found._replace(comparisons=tuple(comparisons))


def _write(out: Path, comparisons: Sequence[Comparison], private: Sequence[Section], papers: Sequence[Section]) -> Path:
    write_text(out / "report.md", markdown(comparisons, private, papers))
    write_text(out / "report.html", page.html(comparisons, READING, private, papers))
    return out / "report.html"


def _write_tables(out: Path, comparisons: Sequence[Comparison]) -> None:
    """All rows of all comparisons in one table, and all curves, each with the comparison it is of."""
    named = [(one.name, row) for one in comparisons for row in one.results.rows]
    lines = [[name, *row] for name, row in zip((n for n, _ in named), _texts([row for _, row in named]), strict=True)]
    write_text(out / "results.csv", _csv(("comparison", *COLUMNS), lines))
    curves = [(one.name, line) for one in comparisons for line in one.results.curves]
    columns = list(dict.fromkeys(name for _, line in curves for name in line))
    written = [[name, *("" if line.get(c) is None else line[c] for c in columns)] for name, line in curves]
    write_text(out / "curves.csv", _csv(("comparison", *columns), written))


def _texts(rows: Sequence[Row]) -> list[list[str]]:
    return [["" if getattr(row, name) is None else str(getattr(row, name)) for name in COLUMNS] for row in rows]


def _csv(header: Sequence[str], lines: Sequence[Sequence[object]]) -> str:
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue()
