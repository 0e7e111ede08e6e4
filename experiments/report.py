"""The report of a comparison, as a page to look at and as Markdown, made from run folders or from their tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from experiments import page, privacy_report, tables
from experiments.collect import NOTES, collect
from experiments.paper_table import SOURCE
from experiments.published import setting_of
from experiments.results import Results, Row, read, write, write_text
from experiments.summary import STANDARD_ERRORS, headline
from knport.errors import KNPortError

READING = (
    "Accuracies are top-1 in percent on the test images after the last step: mean ± standard deviation over n seeds, "
    "no deviation for one seed. Best of its column and model in bold. Two norms count as different when their means "
    f"are more than {STANDARD_ERRORS:g} standard errors apart, from the seeds and from the number of test images.",
    "A training step is forward, loss, backward and SGD, in float32 and channels-last, on images already on the "
    "device: the median and the 20 to 80 % quantiles; the networks of a batch size take turns, and ratios are formed "
    "within a turn.",
    "MACs are those of convolutions and linear layers, one image forward. FLOP counters do not see the statistics of a "
    "normalization, so the measured time says what kernel normalization costs.",
    "Peak MiB: all tensors alive during a step, weights and momentum included. Saved MiB: what autograd keeps from the "
    "forward pass for the backward pass.",
)


def report(folder: tyro.conf.Positional[Path]) -> Path:
    """Write `report.html`, `report.md`, `results.csv` and `curves.csv` into `folder`; returns the page's path.

    Args:
        folder: holds run folders, or else a `results.csv` (with `curves.csv` beside it) from an earlier comparison,
            or the tables of `python -m experiments privacy`, or both.

    Raises:
        KNPortError: the folder holds neither.
    """
    folder = Path(folder)
    private = privacy_report.sections(folder)
    results = Results((), ()) if private and not _compared(folder) else load(folder)
    if any(folder.glob("*/run.json")) or (folder / NOTES).exists():
        write(folder, results)
        results = read(folder)  # the report shows the digits that the tables hold
    write_text(folder / "report.md", markdown(results.rows, private))
    write_text(folder / "report.html", page.html(results, READING, private))
    return folder / "report.html"


def load(folder: Path) -> Results:
    """The results of a folder of runs, or of its `results.csv`.

    Raises:
        KNPortError: no such folder, or nothing in it.
    """
    if not folder.is_dir():
        raise KNPortError(f"{folder}: no such folder; expected one with run folders or a results.csv")
    results = collect(folder)
    if not results.rows:
        results = read(folder)
    if not results.rows:
        raise KNPortError(f"{folder}: no run in it; start one with `python -m experiments compare RECIPE`")
    return results


def _compared(folder: Path) -> bool:
    return (folder / "results.csv").exists() or (folder / NOTES).exists() or any(folder.glob("*/run.json"))


def markdown(rows: Sequence[Row], private: Sequence[privacy_report.Section] = ()) -> str:
    """The whole report as Markdown, without pictures."""
    if not rows:
        return "\n\n".join(["# Private training", *privacy_report.markdown(private)]) + "\n"
    parts = [f"# {page.title(rows)}", headline(rows), tables.accuracy(rows).markdown()]
    parts += [f"- {note}" for note in tables.remarks(rows)]
    parts += ["## Cost of a training step", tables.costs(rows).markdown(), page.measured_on(rows)]
    parts += privacy_report.markdown(private)
    parts += ["## Setting", tables.settings(rows).markdown(), page.machine(rows)]
    parts += [f"```\n{command}\n```" for command in page.commands(rows)]
    parts += ["## How to read this", *(f"- {text}" for text in READING)]
    if any(cell == "paper" for cell in tables.accuracy(rows).header):
        parts.append(f"- paper: {SOURCE}; {setting_of(rows[0].recipe)}.")
    return "\n\n".join(filter(None, parts)) + "\n"
