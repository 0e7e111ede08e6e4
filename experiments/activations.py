"""`python -m experiments activations RUN_FOLDER ...`: the scale of activations by stage, before and after training.

The standard deviation of what each stage puts out, from stem to the last feature map, on test images: of the network as
it was initialized and as it was trained. Dropout is off. BatchNorm takes the statistics of these images before
training, its running ones afterwards, as evaluation does.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import tyro
from matplotlib.ticker import FuncFormatter, LogLocator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from experiments.plots import INK, panel, style, to_svg
from experiments.results import write_text
from experiments.saved_run import SavedRun, open_run
from experiments.signal_propagation import propagate
from experiments.summary import Series
from knport.errors import KNPortError

FILE = "activations.csv"
IMAGES = 64
DENSE_IMAGES = 4  # of segmentation


class Stage(NamedTuple):
    """What one stage of one run's network puts out; a line of `activations.csv`."""

    model: str
    norm: str
    batch_size: int
    seed: int
    number: int
    stage: str
    initial_sd: float
    trained_sd: float


def activations(folders: tyro.conf.Positional[tuple[Path, ...]], data_dir: str | None = None) -> None:
    """Measure the networks of run folders and write activations.csv into each.

    Args:
        folders: of runs.
        data_dir: where the data set lies now; none: where it lay.

    Raises:
        KNPortError: no such folder, nothing saved in it, or no data.
    """
    if not folders:
        raise KNPortError("name at least one run folder, e.g. python -m experiments activations runs/camvid/*-s0")
    for folder in folders:
        found = measure(open_run(folder, data_dir))
        write(folder / FILE, found)
        sds = [stage.trained_sd for stage in found]
        print(f"{folder / FILE}: {len(found)} stages, SD {min(sds):.2f} to {max(sds):.2f} after training", flush=True)


def measure(saved: SavedRun) -> list[Stage]:
    """The stages of a run's network in the order in which they ran.

    Raises:
        KNPortError: nothing has been saved, or a stage is missing from one of the two networks.
    """
    images = saved.images(DENSE_IMAGES if saved.task.network().get("dense") else IMAGES)
    before = {stage.name: stage.sd for stage in propagate(_with_batch_statistics(saved.initial()), images)}
    after = {stage.name: stage.sd for stage in propagate(saved.trained(), images)}
    if before.keys() != after.keys():
        raise KNPortError(f"{saved.folder}: other stages ran before than after training; the run is of another version")
    run = saved.run
    key = (run.model, run.norm, run.batch_size, run.seed)
    return [Stage(*key, number, name, before[name], after[name]) for number, name in enumerate(before)]


def _with_batch_statistics(net: nn.Module) -> nn.Module:
    """BatchNorm without running statistics normalizes by those of the batch, also in evaluation mode."""
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = None
    return net


def write(path: Path, stages: Iterable[Stage]) -> None:
    """One line per stage."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(Stage._fields)
    writer.writerows((*stage[:-2], f"{stage.initial_sd:.4g}", f"{stage.trained_sd:.4g}") for stage in stages)
    write_text(path, buffer.getvalue())


def read(path: Path) -> list[Stage]:
    """What `write` wrote; nothing where there is no file."""
    if not path.exists():
        return []
    kinds = (str, str, int, int, int, str, float, float)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))[1:]
    return [Stage(*(kind(text) for kind, text in zip(kinds, line, strict=True))) for line in lines]


def activations_plot(series: Sequence[Series], stages: Sequence[Stage]) -> str:
    """SVG: SD against the share of stages passed; dashed before training, solid after it; a line per network."""
    figure, axes = panel()
    for one in series:
        mine = sorted((s for s in stages if (s.model, s.norm) == (one.model, one.norm)), key=lambda s: s.number)
        if not mine:
            continue
        x = [100 * i / max(1, len(mine) - 1) for i in range(len(mine))]
        colour, _, marker = style(one)
        axes.plot(x, [s.initial_sd for s in mine], "--", color=colour, linewidth=1.1, alpha=0.75)
        axes.plot(x, [s.trained_sd for s in mine], color=colour, linewidth=1.9, marker=marker, markersize=4)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.minorticks_off()
    axes.set_xlabel("stem to last feature map [% of stages]", color=INK)
    axes.set_title("SD of activations: before training (dashed), after it", loc="left", fontsize=10.5, color=INK, pad=8)
    return to_svg(figure, themed=True)
