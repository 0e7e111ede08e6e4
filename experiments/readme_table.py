"""Rewrite the README's result table and picture from a committed CSV: `python -m experiments.readme_table`.

What stands between the two marker comments is replaced; nothing in it is written by hand. The picture is written
beside the CSV.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import backbones, page, plots, tables
from experiments.markers import replaced
from experiments.one_command import one_command
from experiments.originals import with_originals
from experiments.results import Row, read, write_text
from experiments.summary import batch_sizes_of, metric_of, series_of

BEGIN, END = "<!-- results: made by python -m experiments.readme_table -->", "<!-- end of results -->"
PICTURE = "accuracy.svg"


def readme_table(
    csv: Path = Path("experiments/results/families/results.csv"),
    readme: Path = Path("README.md"),
) -> None:
    """Rewrite the part of `readme` between the markers, and the picture beside `csv`.

    Raises:
        KNPortError: no such CSV, or no markers in the README.
    """
    rows = with_originals(read(csv).rows)
    picture = csv.with_name(PICTURE)
    text = updated(readme.read_text(encoding="utf-8"), section(rows, csv.as_posix(), picture.as_posix()))
    write_text(picture, drawing(rows))
    write_text(readme, text)


def drawing(rows: Sequence[Row]) -> str:
    """SVG: score against batch size; of several backbones a panel each."""
    if _several(rows):
        return backbones.picture(rows)
    return plots.accuracy_plot(series_of(rows), batch_sizes_of(rows), themed=False)


def _several(rows: Sequence[Row]) -> bool:
    return len({one.backbone for one in series_of(rows)}) >= backbones.SEVERAL


def updated(text: str, content: str) -> str:
    """`text` with what stands between the markers replaced by `content`.

    Raises:
        KNPortError: a marker is missing, stands twice, or the two are in the wrong order.
    """
    return replaced(text, BEGIN, END, content, "README")


def section(rows: tuple[Row, ...], csv: str, picture: str) -> str:
    """Headline, table, remarks, setting, picture, command and source, as Markdown; paths relative to the README."""
    row = rows[0]
    images = f"{row.train_images:,} training and {row.test_images:,} test images of {row.classes} classes"
    name = metric_of(rows).name
    name = name[0].upper() + name[1:]
    parts = [backbones.statement(rows), *scores(rows), *tables.remarks(rows)]
    parts.append(f"![{name} against batch size]({picture})")
    short = _SHORT.get(name, name)
    parts.append(f"{short} in percent after the last step, mean ± SD over n seeds; {row.recipe}, {images}.")
    parts.append("<details><summary>Setting and command</summary>")
    if _several(rows):
        parts += _matrices(rows, batch_sizes_of(rows)[1:-1])
    parts += [tables.settings(rows).markdown(), page.machine(rows)]
    parts += [f"```\n{command}\n```" for command in page.commands(rows)]
    parts.append(f"Every number is made from [{csv}]({csv}).\n\n</details>")
    return "\n\n".join(parts)


_SHORT = {"Top-1 accuracy": "Top-1"}


def scores(rows: Sequence[Row]) -> list[str]:
    """One table; of several backbones one for the smallest batch size and one for the largest."""
    if not _several(rows):
        return [tables.accuracy(rows).markdown()]
    return _matrices(rows, sorted({batch_sizes_of(rows)[0], batch_sizes_of(rows)[-1]}))


def _matrices(rows: Sequence[Row], sizes: Sequence[int]) -> list[str]:
    """One table for each batch size, backbones down and norms across."""
    return [text for size in sizes for text in (f"Batch size {size}:", backbones.matrix(rows, size).markdown())]


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(readme_table, "python -m experiments.readme_table")


if __name__ == "__main__":
    sys.exit(main())
