"""Every row of the papers' tables as a run: what to resolve, and the command that starts it."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any, NamedTuple

from experiments.paper_table import TMLR, V1, Line, PaperTable
from experiments.paper_tables import TABLES, TIMES

LAUNCH = ("accelerate", "launch", "-m", "experiments", "train")
# Table 6: a network of the table with BatchNorm and with kernel normalization, by version
TIMED_RECIPES = {
    ("CIFAR-100", V1): "cifar100_v1",
    ("ImageNet", V1): "imagenet_v1",
    ("ImageNet", TMLR): "imagenet",
    ("CityScapes", V1): "cityscapes",
}


class PaperRun(NamedTuple):
    """One cell (of CityScapes, three) of a table."""

    table: str
    """As the paper calls it."""
    row: str
    """Network, kind of norm and column."""
    versions: tuple[str, ...]
    """Of the paper."""
    settings: dict[str, Any]
    """What `experiments.run.resolve` is given: recipe, model, norm, and what the recipe does not decide."""

    @property
    def command(self) -> str:
        """What starts the run; DIR is the folder of the data set. More seeds, as in the papers: ``--seed 1``, 2."""
        words = [*LAUNCH, self.settings["recipe"]]
        for name, value in self.settings.items():
            if name != "recipe":
                words += [f"--{name.replace('_', '-')}", f"{value:g}" if isinstance(value, float) else str(value)]
        return shlex.join([*words, "--data-dir", "DIR"])

    def __str__(self) -> str:
        return f"{self.table} ({', '.join(self.versions)}), {self.row}\n      {self.command}"


def paper_runs() -> list[PaperRun]:
    """All of them, in the papers' order, and the strongest rival that they did not run beside Table 1.

    Cells that one run fills, in both versions or several scores, are one.
    """
    found: dict[tuple, PaperRun] = {}
    for run in (*_cells(), *_times(), *_rivals()):
        key = (run.table, *run.settings.items())
        versions = found[key].versions if key in found else ()
        found[key] = run._replace(versions=tuple(dict.fromkeys((*versions, *run.versions))))
    return list(found.values())


def _cells() -> Iterator[PaperRun]:
    for table in TABLES:
        for line in table.lines:
            for version, values in line.values.items():
                for column, value in zip(table.columns, values, strict=True):
                    if value is not None:
                        size = column.batch_size
                        row = f"{line.network} {line.kind}" + (f", batch size {size}" if size else "")
                        yield PaperRun(table.name, row, (version,), _settings(table, line, version, size))


def _settings(table: PaperTable, line: Line, version: str, batch_size: int | None) -> dict[str, Any]:
    given = {"batch_size": batch_size, "dropout": line.dropout}
    named = {"recipe": table.recipes[version], "model": line.model, "norm": line.norm_of(version)}
    if line.dropout is not None:  # which the default folder does not tell from the network's own
        given["run_dir"] = f"runs/{named['recipe']}/{line.model}-dropout{line.dropout:g}-b{batch_size}"
    return named | {name: value for name, value in given.items() if value is not None}


def _times() -> Iterator[PaperRun]:
    """Table 6: an epoch of each; `log.csv` has its seconds and the peak of the memory."""
    for data_set, network, _, _, where, version in TIMES:
        depth = network.removeprefix("ResNet-")
        dense = "fcn_" if data_set == "CityScapes" else ""
        first = "_v1" if version == V1 and not dense else ""
        models = {"batch": f"{dense or 'baseline_'}resnet{depth}", "kernel": f"{dense}knresnet{depth}{first}"}
        for kind, model in models.items():
            recipe = TIMED_RECIPES[data_set, version]
            where_to = {"epochs": 1, "run_dir": f"runs/times/{recipe}-{model}"}
            settings = {"recipe": recipe, "model": model, "norm": "original"} | where_to
            yield PaperRun("Table 6", f"{data_set} {network} {kind}, {where}", (version,), settings)


def _rivals() -> Iterator[PaperRun]:
    """GroupNorm with weight standardization, at GroupNorm's learning rates."""
    for name, model in (("ResNet", "baseline_resnet"), ("PreactResNet", "preact_resnet")):
        for depth in (18, 34, 50):
            for size in (2, 32, 256):
                row = f"{name}-{depth} group and weight standardization, batch size {size}"
                settings = {"recipe": "cifar100", "model": f"{model}{depth}", "norm": "group_ws", "batch_size": size}
                yield PaperRun("Beside Table 1", row, ("not in the papers",), settings)
