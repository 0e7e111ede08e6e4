"""A resizing in words: what the plan prints about widths."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from knport.surgery.plan import Verdict
    from knport.surgery.resizing import KeptWidths, Resizing, WidthChange

_NAMED = 3  # layers of one row that are named


def width_summary(resizing: Resizing | None) -> list[str]:
    """The line of the plan's summary, and what a reader has to know."""
    if resizing is None:
        return []
    before, converted, after = resizing.counts
    line = f"  {resizing.quantity:<13} {before:,} -> {converted:,} converted -> {after:,} resized"
    target = f"target {resizing.target:,}, off by {resizing.off_by:+.2%}"
    if not resizing.changes:
        return [f"  widths        stay: {converted:,} {resizing.quantity} ({target})"]
    return [
        f"{line} ({target})",
        f"  widths        {len(resizing.changes)} groups of channels times {resizing.multiplier:.3f}, then rounded; "
        f"strategy {resizing.strategy!r}",
        "  weights       resized layers keep the first channels of their weights, scaled to the new fan-in:",
        "                a trained network loses what it knew, so train from scratch",
        *(f"  note          {note}" for note in resizing.notes),
    ]


def width_table(resizing: Resizing | None) -> list[str]:
    """One line per group of channels that changes, and one per reason for which others do not."""
    if resizing is None or not resizing.changes:
        return []
    changes = [f"  {row.before:>5} -> {row.after:<5} {named(row)}" for row in resizing.changes]
    kept = [f"  kept           {named(row)}: {row.reason}" for row in resizing.kept]
    return ["", "Widths (output channels of layers that change together)", *changes, *kept]


def named(row: WidthChange | KeptWidths) -> str:
    """The layers of a row, or the first of them and how many more."""
    more = len(row.layers) - _NAMED
    return ", ".join(row.layers[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def with_widths(verdicts: tuple[Verdict, ...], resizing: Resizing) -> tuple[Verdict, ...]:
    """The verdicts, each of which says in its reason what its layer is resized to."""
    new = {(path, name): value for path, name, value in resizing.attributes}
    return tuple(dataclasses.replace(v, reason=v.reason + _resized(v, new)) for v in verdicts)


def _resized(verdict: Verdict, new: dict[tuple[str, str], int]) -> str:
    words = {"in_channels": "in", "out_channels": "out", "in_features": "in", "out_features": "out", "groups": "groups"}
    told = [f"{word} {new[verdict.path, name]}" for name, word in words.items() if (verdict.path, name) in new]
    told += [f"{new[verdict.path, n]} channels" for n in ("num_features", "num_channels") if (verdict.path, n) in new]
    return f"; resized to {', '.join(told)}" if told else ""
