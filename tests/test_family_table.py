"""The table of all families: counted from the rows of a sweep, written between the markers and nowhere else."""

from __future__ import annotations

import csv

import pytest

from experiments import family_table as module
from experiments.family_table import BEGIN, END, family, family_table, section
from knport.errors import KNPortError


def row(model: str, absorbed=0, kernelnorm=0, kept=0, why="", error="") -> dict[str, str]:
    numbers = {
        "absorbed": absorbed,
        "kernelnorm": kernelnorm,
        "kept_norms": kept,
        "batchnorms": 5,
        "batchnorms_left": 1,
    }
    return {"model": model, "kept_why": why, "error": error, **{k: str(v) for k, v in numbers.items()}}


ROWS = [
    row("torchvision/resnet18", absorbed=20),
    row("torchvision/resnet50", absorbed=50, kept=3, why="2 Odd: own forward; stays; 1 Other: a | b"),
    row("torchvision/wide_resnet50_2", absorbed=1, kernelnorm=2, kept=1, why="1 Odd: own forward; stays"),
    row("torchvision/alexnet"),
    row("torchvision/vgg11", error="KNPortError: no"),
]


def test_the_lines_add_up():
    text = section(ROWS, "experiments/results/sweep/sweep.csv")
    assert "5 networks of 3 families" in text and "73 of 77 norms" in text and "20 of 25 BatchNorms" in text
    assert "| torchvision resnet | 3 | 73 / 77 | 3 Odd: own forward; 1 Other: a \\| b |" in text
    assert "| torchvision alexnet | alexnet | none there |  |" in text
    assert "| torchvision vgg | vgg11 | none there | error: KNPortError: no |" in text


def test_rare_reasons_are_counted_together():
    rows = [row("torchvision/resnet18", kept=10, why="4 A: a; 3 B: b; 2 C: c; 1 D: d")]
    assert "4 A: a; 3 B: b; 2 C: c; 1 for other reasons |" in section(rows, "x.csv")


def test_families_are_files():
    assert family("torchvision/r3d_18") == "torchvision video.resnet"
    name, file = next(iter(module._FILES.items()))
    assert family(f"timm/{name}") == f"timm {file}"


def test_only_what_stands_between_the_markers_is_rewritten(tmp_path):
    table, page = tmp_path / "sweep.csv", tmp_path / "page.md"
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    family_table(table, page)
    once = page.read_text()
    assert (
        once.startswith(f"before\n{BEGIN}\n\n5 networks")
        and once.endswith(f"|\n\n{END}\nafter\n")
        and "old" not in once
    )
    family_table(table, page)
    assert page.read_text() == once


def test_mistakes_are_told(tmp_path):
    with pytest.raises(KNPortError, match="no rows"):
        family_table(tmp_path / "none.csv", tmp_path / "page.md")
    table, page = tmp_path / "sweep.csv", tmp_path / "page.md"
    table.write_text(",".join(ROWS[0]) + "\n" + ",".join(ROWS[0].values()) + "\n")
    page.write_text("no markers")
    with pytest.raises(KNPortError, match="expected the line"):
        family_table(table, page)
