"""The networks of a sweep: torchvision's that read images or videos, and the smallest of each timm model file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import nn

SMALLEST = Path(__file__).parent / "results" / "sweep" / "smallest.csv"
_TASKS = ("classification", "segmentation", "video", "detection", "optical_flow")
_SMALL_DETECTION = {"min_size": 96, "max_size": 128}  # pixels, in the place of 800 and 1333


@dataclass(frozen=True)
class Network:
    """One network of the sweep.

    Args:
        name: ``timm/NAME`` or ``torchvision/NAME``.
        task: "classification", "segmentation", "video", "detection" or "optical_flow".
        build: makes it.
    """

    name: str
    task: str
    build: Callable[[], nn.Module]


def networks() -> list[Network]:
    """Every network of the sweep, by name."""
    found = [Network(f"timm/{name}", "classification", _timm(name)) for name in smallest().values()]
    for name in torchvision.models.list_models():
        task = _task(name)
        if task in _TASKS:
            found.append(Network(f"torchvision/{name}", task, _torchvision(name, task)))
    return sorted(found, key=lambda network: network.name)


def smallest() -> dict[str, str]:
    """timm model file -> its smallest model, from the committed survey."""
    best: dict[str, tuple[int, str]] = {}
    with SMALLEST.open(newline="") as file:
        for row in csv.DictReader(file):
            size = (int(row["parameters"]), row["model"])
            best[row["file"]] = min(best.get(row["file"], size), size)
    return {file: name for file, (_, name) in sorted(best.items())}


def survey() -> None:
    """Count the parameters of every timm model on the meta device, and write the smallest of each file (minutes)."""
    best = {}
    for file in timm.list_modules():
        for name in timm.list_models(module=file):
            with torch.device("meta"):
                model = timm.create_model(name)
            size = (sum(p.numel() for p in model.parameters()), name)
            best[file] = min(best.get(file, size), size)
    SMALLEST.parent.mkdir(parents=True, exist_ok=True)
    with SMALLEST.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(("file", "model", "parameters"))
        table.writerows((file, name, count) for file, (count, name) in sorted(best.items()))


def _timm(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name)


def _torchvision(name: str, task: str) -> Callable[[], nn.Module]:
    options: dict[str, Any] = {"weights": None}
    if task in ("detection", "segmentation"):
        options["weights_backbone"] = None
    if task == "detection" and not name.startswith("ssd"):
        options |= _SMALL_DETECTION
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # which takes a minute and changes no shape
    return lambda: torchvision.models.get_model(name, **options)


def _task(name: str) -> str:
    """torchvision's folder of a model; classifiers lie beside the folders."""
    module = torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
    return module.partition(".")[0] if "." in module else "classification"
