"""Rewrite the table of all families in docs/convert.md from a committed sweep: `python -m experiments.family_table`.

What stands between the two marker comments is replaced; nothing in it is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torchvision

from experiments.markers import rewrite
from experiments.one_command import one_command
from experiments.sweep_models import smallest
from experiments.sweep_summary import read_rows
from knport.errors import KNPortError

BEGIN, END = "<!-- families: made by python -m experiments.family_table -->", "<!-- end of families -->"
HEADING = "| family | networks | norms converted | kept, and why |\n|---|---|---:|---|"
MOST = 3  # reasons per family that are told
Row = dict[str, str]


def family_table(
    csv: Path = Path("experiments/results/sweep/sweep.csv"),
    page: Path = Path("docs/convert.md"),
) -> None:
    """Rewrite the part of `page` between the markers.

    Raises:
        KNPortError: no such CSV, an empty one, no page, or no markers on it.
    """
    rows = read_rows(csv)
    if not rows:
        raise KNPortError(f"{csv}: no rows; python -m experiments sweep makes them")
    rewrite(page, BEGIN, END, section(rows, csv.as_posix()))


def section(rows: list[Row], csv: str) -> str:
    """Headline and table, as Markdown.

    Args:
        rows: of the sweep.
        csv: where they come from, relative to the checkout.
    """
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[family(row["model"])].append(row)
    lines = [_line(name, families[name]) for name in sorted(families)]
    return "\n".join([_headline(rows, len(families), csv), "", HEADING, *lines])


def family(model: str) -> str:
    """``timm resnetv2``: the library and the file that a network is defined in."""
    library, _, name = model.partition("/")
    if library == "timm":
        return f"timm {_FILES[name]}" if name in _FILES else f"timm {name}"
    module = torchvision.models.get_model_builder(name).__module__
    return f"torchvision {module.removeprefix('torchvision.models.')}"


_FILES = {model: file for file, model in smallest().items()}


def _headline(rows: list[Row], families: int, csv: str) -> str:
    done, norms = _sum(rows, "absorbed", "kernelnorm"), _sum(rows, "absorbed", "kernelnorm", "kept_norms")
    batch, left = _sum(rows, "batchnorms"), _sum(rows, "batchnorms_left")
    errors = sum(bool(row["error"]) for row in rows)
    return (
        f"{len(rows)} networks of {families} families, the smallest of each timm file and all of torchvision's: "
        f"{done:,} of {norms:,} norms are converted, {batch - left:,} of {batch:,} BatchNorms are gone, {errors} "
        f"networks ended with an error. A LayerNorm that is kept sees one position at a time, as a KernelNorm "
        f"would. M stands for the name of a module. Made from [{csv}](../{csv}), with `KNConfig()`."
    )


def _line(name: str, rows: list[Row]) -> str:
    done, norms = _sum(rows, "absorbed", "kernelnorm"), _sum(rows, "absorbed", "kernelnorm", "kept_norms")
    networks = rows[0]["model"].partition("/")[2] if len(rows) == 1 else str(len(rows))
    errors = [row["error"] for row in rows if row["error"]]
    why = f"error: {errors[0]}" if errors else _reasons(row["kept_why"] for row in rows)
    return f"| {name} | {networks} | {f'{done} / {norms}' if norms else 'none there'} | {_cell(why)} |"


def _reasons(texts: Iterable[str]) -> str:
    """``12 LayerNorm: it is read by ...``, over all networks of a family, most frequent first."""
    counts: Counter[str] = Counter()
    for text in texts:
        for part in filter(None, re.split(r"; (?=\d+ )", text)):
            number, _, reason = part.partition(" ")
            counts[reason.split(";")[0]] += int(number)  # what follows explains, as the page does
    told = [f"{number} {reason}" for reason, number in counts.most_common(MOST)]
    rest = sum(counts.values()) - sum(number for _, number in counts.most_common(MOST))
    return "; ".join([*told, *([f"{rest} for other reasons"] if rest else [])])


def _sum(rows: list[Row], *columns: str) -> int:
    return sum(int(row[column] or 0) for row in rows for column in columns)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(family_table, "python -m experiments.family_table")


if __name__ == "__main__":
    sys.exit(main())
