"""What a table of a paper is: networks down, scores across, the values of one or two versions of the paper in a cell.

Nasirigerdeh, Torkzadehmahani, Rueckert, Kaissis, "Kernel Normalized Convolutional Networks": the first submission
("v1", 2022) and the final paper ("TMLR", 2024), whose networks and recipes differ; Kim et al., "Normalized
Convolutional Neural Network" (2020), for normalized convolutions.
"""

from __future__ import annotations

from typing import NamedTuple

TMLR, V1, NCNN = "TMLR 2024", "v1 2022", "Kim et al. 2020"
SOURCE = "Nasirigerdeh et al., Kernel Normalized Convolutional Networks, TMLR 2024"


class Value(NamedTuple):
    """A published mean in percent, and its SD over three runs where one is given."""

    mean: float
    sd: float | None = None


class Column(NamedTuple):
    """What a column of a table holds: a score at a batch size (None: that of the table's version)."""

    label: str
    score: str = "top1"
    batch_size: int | None = None


class Line(NamedTuple):
    """A network of a table: its name there, the kind of norm, ours with its `--norm`, and values by version."""

    network: str
    kind: str
    model: str
    norm: str
    values: dict[str, tuple[Value | None, ...]]
    dropout: float | None = None
    """What the line is about, where it is not the network's own."""

    def norm_of(self, version: str) -> str:
        """Ours: GroupNorm of the first version has groups of 32 channels, later 32 groups."""
        return "group_of_32" if (self.norm, version) == ("group", V1) else self.norm


class PaperTable(NamedTuple):
    """A table of a paper. `recipes` and `batch_sizes` go by version; `classes` and `images` of the whole data set."""

    name: str
    title: str
    recipes: dict[str, str]
    batch_sizes: dict[str, int]
    columns: tuple[Column, ...]
    lines: tuple[Line, ...]
    setting: str
    classes: int
    images: int


def kind_in(line: Line, version: str) -> str:
    """The kind of norm as our rows call it."""
    return line.kind if line.norm == "original" else line.norm_of(version)
