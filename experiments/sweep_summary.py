"""What a sweep found, in a few lines made from its CSV."""

from __future__ import annotations

import csv
from pathlib import Path

_EMPTY = ("", "0")


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of `sweep.csv`, by name."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return sorted(csv.DictReader(file), key=lambda row: row["model"])


def summary(rows: list[dict[str, str]]) -> str:
    """Counts over all networks, and the names of those where something is not as promised."""
    total = {name: sum(int(row[name] or 0) for row in rows) for name in ("norms_called", "batchnorms")}
    left, kernel = (sum(int(row[name] or 0) for row in rows) for name in ("batchnorms_left", "kernelnorm"))
    absorbed = sum(int(row["absorbed"] or 0) for row in rows)
    share = 100 * (1 - left / total["batchnorms"]) if total["batchnorms"] else 100.0
    errors = sum(bool(row["error"]) for row in rows)
    lines = [
        f"{len(rows)} networks, {errors} errors; {total['norms_called']} norms called, {absorbed} absorbed, "
        f"{kernel} KernelNorms; {share:.1f} % of {total['batchnorms']} BatchNorms gone"
    ]
    for title, wrong in (
        ("errors", lambda row: row["error"]),
        ("norms without a verdict", lambda row: row["norms_missing"] not in _EMPTY),
        ("BatchNorms left", lambda row: row["batchnorms_left"] not in _EMPTY),
        ("other shapes", lambda row: not row["error"] and row["shapes"] != "equal"),
        ("parameters without a gradient", lambda row: row["no_gradient"] not in _EMPTY),
    ):
        names = [row["model"] for row in rows if wrong(row)]
        if names:
            lines.append(f"{title} ({len(names)}): {', '.join(names)}")
    return "\n".join(lines)
