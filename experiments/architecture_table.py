"""docs/architectures.md, the table of all kernel normalized networks beside their originals.

    python -m experiments.architecture_table

Everything is counted on the meta device: parameters, multiply-accumulates of one image (convolutions and matrix
products; no norm's statistics) and the most bytes of tensors alive during the forward pass of a training step of one
float32 image, weights left out: activations kept for the backward pass and what is alive beside them.
"""

from __future__ import annotations

import csv
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import architectures
from experiments import flat_images, learned
from experiments.live_tensors import LiveTensors
from experiments.one_command import one_command
from experiments.signal_propagation import FAMILIES, INIT, SMALL, family_of, kernel_normalized, read_csv, spread

MIB = 2**20
HEADER = "| network | parameters | MACs | peak activations | to the original | SD, stem to head |"
INTRODUCTION = """# Networks

Made by `python -m experiments.architecture_table`; every number is counted, none is quoted. These are the names that
`architectures.create_model` takes and, once `architectures` is imported, `timm.create_model`.

Each kernel normalized network stands over its original. Published networks have the published parameters. The others
have those of their original within 1 %; names in `_macs` have its multiply-accumulates within 1 % instead. MACs count
convolutions and matrix products of one image. Peak activations are the most MiB of tensors alive during the forward
pass of a training step on one float32 image, without the weights, in plain PyTorch operators. "To the original" gives
all three as ratios. The last column is the largest over the smallest SD of activations of the stages of a freshly built
network, see [below](#scale-of-activations).
"""
PROPAGATION = """## Scale of activations

![SD of activations from stem to head](signal_propagation.svg)

The standard deviation of what each stage puts out, on random images in evaluation mode, of freshly built networks: made
by `python -m experiments.signal_propagation`, numbers in [signal_propagation.csv](signal_propagation.csv). All stay
within a factor of 4. Where no paper says otherwise a network begins with LeCun normal weights, under which every kernel
normalized layer puts out variance 1, the KNResNets with Kaiming normal ones by fan-in, twice that variance
(`architectures.initialization`). The authors' KNResNets began with Kaiming normal weights by fan-out, of which a stem
that makes 64 channels of three puts out far less than the blocks behind it (in brackets): `init="published"`. Among the
trials above are both with biases of zero, three seeds each; published checkpoints load into either.
"""


@dataclass(frozen=True)
class Count:
    """What a network costs."""

    model: str
    image: str
    """Height x width of the image counted on."""
    parameters: int
    macs: int
    """Of one image."""
    peak_mib: float
    """Activations alive at most, forward pass of one image in training."""


def count(name: str, image: tuple[int, int, int, int]) -> Count:
    """Count network `name` on an image of (classes, channels, height, width)."""
    classes, *shape = image
    with torch.device("meta"):
        model = build(name, classes, small=shape[-1] <= 64).train()
        live = LiveTensors()
        with FlopCounterMode(display=False) as counter, live:
            model(torch.empty(1, *shape))
    counted = sum(parameter.numel() for parameter in model.parameters())
    return Count(name, f"{shape[1]} x {shape[2]}", counted, counter.get_total_flops() // 2, round(live.peak / MIB, 2))


def build(name: str, classes: int, small: bool) -> nn.Module:
    """`name` of `architectures`, or ``timm/NAME``."""
    if name.startswith("timm/"):
        return timm.create_model(name.removeprefix("timm/"), num_classes=classes)
    return architectures.create_model(name, num_classes=classes, low_resolution=small)


def image_of(name: str) -> tuple[int, int, int, int]:
    """(classes, channels, height, width) that a network was made for."""
    if name.startswith("fcn"):
        return 19, 3, 512, 1024
    return (10, 3, 32, 32) if any(part in name for part in SMALL) else (1000, 3, 224, 224)


def table(counts: dict[str, Count], spreads: dict[str, float]) -> str:
    """Markdown: a section per family, an original under the networks made of it."""
    families: dict[str, list[str]] = {}
    for name in kernel_normalized():
        if name in counts:
            families.setdefault(family_of(name), []).append(name)
    parts = []
    for family in sorted(families, key=lambda f: [*FAMILIES, f].index(f)):
        lines = [f"## {family}\n", HEADER, "| --- | ---: | ---: | ---: | --- | ---: |"]
        groups: dict[str | None, list[str]] = {}
        for name in families[family]:
            groups.setdefault(architectures.original_of(name), []).append(name)
        for original, names in groups.items():
            lines += [row(counts[name], counts.get(original or ""), scale(name, spreads)) for name in names]
            lines += [row(counts[original], None)] if original else []
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def scale(name: str, spreads: dict[str, float]) -> str:
    """The spread of a network's SDs, in brackets with the published weights; empty where nothing is measured."""
    own, other = (f"{spreads[key]:.1f}" if key in spreads else "" for key in (name, f"{name}{INIT}published"))
    return f"{own} ({other})" if other else own


def row(one: Count, original: Count | None, spread_of_sd: str = "") -> str:
    """One line of the table."""
    ratios = ""
    if original:
        pairs = (("parameters", "macs", "peak_mib"), ("params", "MACs", "memory"))
        shown = zip(*pairs, strict=True)
        ratios = ", ".join(f"{label} x {getattr(one, f) / getattr(original, f):.2f}" for f, label in shown)
    mega = f"{one.parameters / 1e6:.2f} M"
    return f"| {one.model} | {mega} | {one.macs / 1e9:.2f} G | {one.peak_mib:.0f} MiB | {ratios} | {spread_of_sd} |"


def architecture_table(folder: Path = Path("docs"), keep: bool = False, results: Path = learned.FOLDER) -> None:
    """Count every network and write architectures.csv and architectures.md.

    Args:
        folder: to write to; signal_propagation.csv and flat_images.csv are read there.
        keep: take the counts that the CSV holds already, and count only what is new.
        results: folder of what the small networks learned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "architectures.csv"
    counts = read_counts(path) if keep and path.exists() else {}
    for name in kernel_normalized():
        for each in (name, architectures.original_of(name)):
            if each and each not in counts:
                counts[each] = count(each, image_of(name))
                write_counts(path, counts)
    traced = folder / "signal_propagation.csv"
    spreads = {name: spread(found) for name, found in read_csv(traced).items()} if traced.exists() else {}
    sections = [INTRODUCTION.strip(), table(counts, spreads), learned.section(results), PROPAGATION.strip()]
    sections.append(flat_images.section(folder / "flat_images.csv"))
    text = "\n\n".join(filter(None, sections))
    (folder / "architectures.md").write_text(f"{text}\n", encoding="utf-8")


def write_counts(path: Path, counts: dict[str, Count]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Count)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(counts[name]) | {"peak_mib": f"{counts[name].peak_mib:.2f}"} for name in sorted(counts))


def read_counts(path: Path) -> dict[str, Count]:
    """What `write_counts` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    made = (
        r | {"parameters": int(r["parameters"]), "macs": int(r["macs"]), "peak_mib": float(r["peak_mib"])} for r in rows
    )
    return {r["model"]: Count(**r) for r in made}


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(architecture_table, "python -m experiments.architecture_table")


if __name__ == "__main__":
    sys.exit(main())
