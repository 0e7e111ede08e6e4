"""How the scale of activations travels through freshly built networks: `python -m experiments.signal_propagation`.

The standard deviation of what every stage puts out, from stem to the last feature map, on random images (standard
normal pixels) in evaluation mode, as in the signal propagation plots of Brock et al. (2021). A network whose scale
grows or shrinks by orders of magnitude starts badly; the promise here is a factor of 4 between the largest and the
smallest. The published KNResNets are measured with their published initial weights too, which do not keep it.
Writes docs/signal_propagation.csv and .svg.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn

import architectures
from experiments import plots
from experiments.one_command import one_command
from knport.errors import UnknownName

LIMIT = 4.0
INIT = ", init="
FAMILIES = ("knresnet", "fcn_knresnet", "kndensenet", "knconvnext", "knconvmixer", "knvit", "knconformer")
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
SKIPPED = (nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.Mish, nn.AdaptiveAvgPool2d)  # no stages by themselves
SMALL = ("cifar", "_k12", "_k24", "_k40", "dp_")  # parts of the names of networks for 32 x 32 images


class Stage(NamedTuple):
    """What one stage puts out."""

    name: str
    """Dotted path in the model; a branch's number behind it where there are several."""
    sd: float
    """Standard deviation over images, channels and positions."""


@torch.no_grad()
def propagate(model: nn.Module, images: Tensor) -> list[Stage]:
    """The stages of `model` in the order in which they ran, each of its first call.

    Args:
        model: a network of `architectures`; put in evaluation mode.
        images: (N, C, H, W).
    """
    found: dict[str, Stage] = {}

    def look(name: str):
        def hook(module: nn.Module, args: tuple, out) -> None:
            tensors = [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]
            for number, tensor in enumerate(tensors):
                branch = f"{name}[{number}]" if len(tensors) > 1 else name
                found.setdefault(branch, Stage(branch, tensor.float().std().item()))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in stages(model)]
    try:
        model.eval()(images)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def stages(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Stems, blocks, transitions, norms: the children of `model`, those of containers in their place."""
    heads = classifiers(model) if not prefix else []
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        if any(child is head for head in heads) or isinstance(child, SKIPPED):
            continue
        inner = list(child.children())
        if isinstance(child, CONTAINERS) and any(list(grandchild.children()) for grandchild in inner):
            yield from stages(child, f"{path}.")
        elif not isinstance(child, CONTAINERS) or inner:
            yield path, child


def classifiers(model: nn.Module) -> list[nn.Module]:
    """The last layers, and the containers that hold nothing but pooling, norm and last layer."""
    if hasattr(model, "get_classifier"):
        heads = model.get_classifier()
    else:  # of torchvision
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)][-1:]
    heads = list(heads) if isinstance(heads, tuple | list) else [heads]
    return heads + [child for child in model.children() if any(head in child.children() for head in heads)]


def spread(found: list[Stage]) -> float:
    """The largest SD over the smallest."""
    values = [stage.sd for stage in found]
    return max(values) / max(min(values), 1e-12)


def measure(name: str, *, seed: int = 0, count: int = 2, size: int | None = None) -> list[Stage]:
    """`propagate` of a freshly built network on `count` images of `size` pixels (32 or 128 if None).

    `name` may end in ", init=published" for that argument of the KNResNets.
    """
    torch.manual_seed(seed)
    name, _, init = name.partition(INIT)
    small = any(part in name for part in SMALL)
    model = architectures.create_model(name, 10, low_resolution=small, **({"init": init} if init else {}))
    size = size or (32 if small else 128)
    images = torch.randn(count, 3, size, size).to(memory_format=torch.channels_last)
    return propagate(model.to(memory_format=torch.channels_last), images)


def kernel_normalized() -> list[str]:
    """The kernel normalized networks of `architectures`."""
    return [name for name in architectures.list_models() if "kn" in name]


def measured() -> list[str]:
    """What is measured: all of them, and the published KNResNets with their published initial weights, too."""
    published = [name for name in kernel_normalized() if name.startswith("knresnet") and not name.endswith("_macs")]
    return sorted([*kernel_normalized(), *(f"{name}{INIT}published" for name in published)])


def write_csv(path: Path, traces: dict[str, list[Stage]]) -> None:
    """One row per network and stage."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("model", "number", "stage", "sd"))
        for model, found in traces.items():
            writer.writerows((model, i, stage.name, f"{stage.sd:.4g}") for i, stage in enumerate(found))


def read_csv(path: Path) -> dict[str, list[Stage]]:
    """What `write_csv` wrote."""
    traces: dict[str, list[Stage]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            traces.setdefault(row["model"], []).append(Stage(row["stage"], float(row["sd"])))
    return traces


def draw(traces: dict[str, list[Stage]]) -> str:
    """SVG: SD against the share of stages passed, a panel per family, a line per network."""
    families: dict[str, dict[str, list[Stage]]] = {}
    for name, found in traces.items():
        families.setdefault(family_of(name), {})[name] = found
    columns = 3
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(10.5, 2.5 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes, (family, members) in zip(grid, families.items(), strict=False):
        for found in members.values():
            x = [i / max(1, len(found) - 1) for i in range(len(found))]
            axes.plot(x, [stage.sd for stage in found], linewidth=0.9, alpha=0.8)
        axes.set_title(f"{family} ({len(members)})", fontsize=9)
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    for axes in list(grid):
        axes.set_axis_off()
    figure.supxlabel("stem to last feature map", fontsize=9)
    figure.supylabel("SD of activations", fontsize=9)
    return plots.to_svg(figure, themed=False)


def family_of(name: str) -> str:
    """The family that a name begins with, e.g. "knresnet" of "knresnet18_macs"."""
    return next((f for f in FAMILIES if name.startswith(f)), "small and private")


def signal_propagation(
    models: tyro.conf.Positional[tuple[str, ...]] = (), folder: Path = Path("docs"), redraw: bool = False
) -> None:
    """Measure networks (all kernel normalized ones if none is named) and write the table and the picture.

    Networks that are in the table already and not named stay in it; `redraw` measures nothing.
    """
    unknown = {name.partition(INIT)[0] for name in models} - set(architectures.list_models())
    if unknown:
        raise UnknownName("architecture", min(unknown), architectures.list_models())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "signal_propagation.csv"
    traces = read_csv(path) if path.exists() and (models or redraw) else {}
    for name in () if redraw else models or measured():
        traces[name] = measure(name)
        write_csv(path, dict(sorted(traces.items())))  # at once: large networks take minutes
        print(f"{name}: SD {min(s.sd for s in traces[name]):.2f} to {max(s.sd for s in traces[name]):.2f}", flush=True)
    write_csv(path, dict(sorted(traces.items())))
    path.with_suffix(".svg").write_text(draw(read_csv(path)), encoding="utf-8")  # of the rounded: a redraw is the same


def main() -> int:
    """The command line; an error is one line and exit code 2."""
    return one_command(signal_propagation, "python -m experiments.signal_propagation")


if __name__ == "__main__":
    sys.exit(main())
