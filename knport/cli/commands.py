"""The commands: each takes what was asked and returns the exit code."""

from __future__ import annotations

import fnmatch
import sys
from json import dumps, loads
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

import knport
from knport.cli.request import CHOICES, Conversion, Network
from knport.errors import KNPortError
from knport.folder import recipe_in
from knport.origin import build, list_names
from knport.surgery.record import plans_of


def plan_command(network: Network, conversion: Conversion, json: bool = False) -> int:
    """What converting a network would do to every norm and convolution, and why. Of a saved folder: what was done.

    Args:
        network: which network.
        conversion: how it would be converted.
        json: print JSON.
    """
    if network.folder:
        plans = recipe_in(network.folder).plans
        _show("\n\n".join(map(str, plans)), _dump([loads(plan.to_json()) for plan in plans]) if json else None)
        return 0
    model = network.build()
    plan = conversion.plan(model, network.example_inputs(model))
    _show(plan, plan.to_json() if json else None)
    return 0


def convert_command(network: Network, conversion: Conversion, out: Path, json: bool = False) -> int:
    """Convert a network and save it: knport.load(FOLDER) brings it back.

    Args:
        network: which network.
        conversion: how it is converted.
        out: the folder to write knport.json and model.safetensors to.
        json: print JSON.
    """
    if network.folder:
        raise KNPortError(f"{network.model} is a folder; convert a network by its name, or in Python")
    if conversion.norm == "original":
        raise KNPortError("norm original: nothing is converted, so there is nothing to save")
    model = network.build()
    before = sum(p.numel() for p in model.parameters())
    model = conversion.apply(model, network.example_inputs(model))
    origin = network.origin()
    folder = knport.save(model, out, base=origin.name, base_kwargs=origin.kwargs)
    after = sum(p.numel() for p in model.parameters())
    norms = dict(plans_of(model)[-1].count("norm"))
    done = {"folder": str(folder), "parameters": [before, after], "norms": norms}
    counts = ", ".join(f"{number} {verdict}" for verdict, number in norms.items())
    text = f"{folder}: {before:,} -> {after:,} parameters; norms: {counts}\nknport.load({str(folder)!r}) loads it"
    _show(text, _dump(done) if json else None)
    return 0


def summary_command(network: Network, conversion: Conversion, json: bool = False) -> int:
    """Norms, convolutions, parameters, MACs and saved activations of a network before and after it is converted.

    Args:
        network: which network.
        conversion: how it is converted.
        json: print JSON.
    """
    before, after, inputs = _pair(network, conversion)
    found = knport.summary(before, None if after is before else after, inputs)
    _show(found, _dump(found.to_dict()) if json else None)
    return 0


def check_command(network: Network, conversion: Conversion, json: bool = False) -> int:
    """Test the promises of kernel normalization on a network once it is converted; exit code 1 when one is broken.

    Args:
        network: which network.
        conversion: how it is converted.
        json: print JSON.
    """
    _, after, inputs = _pair(network, conversion)
    report = knport.check(after, inputs)
    _show(report, _dump(report.to_dict()) if json else None)
    return 0 if report else 1


def list_command(contains: tyro.conf.Positional[str] = "", json: bool = False) -> int:
    """The networks and norms that can be named.

    Args:
        contains: only names with this text in them, or that fit this glob.
        json: print JSON.
    """
    pattern = contains if any(sign in contains for sign in "*?[") else f"*{contains}*"
    models = [name for name in list_names() if fnmatch.fnmatchcase(name, pattern)]
    if not models:
        raise KNPortError(f"no network has {contains!r} in its name; `knport list` shows all")
    found = {"norms": list(CHOICES), "models": models}
    lines = [f"norms: {', '.join(CHOICES)}", f"models ({len(models)}):", *(f"  {name}" for name in models)]
    _show("\n".join(lines), _dump(found) if json else None)
    return 0


def _pair(network: Network, conversion: Conversion) -> tuple[Any, Any, Any]:
    """The network before and after, and inputs for both."""
    if network.folder:
        after = knport.load(network.folder)
        before = build(recipe_in(network.folder).base)
        return before, after, network.example_inputs(before)
    before = network.build()
    inputs = network.example_inputs(before)
    return before, conversion.apply(before, inputs), inputs


def _dump(value: Any) -> str:
    return dumps(value, indent=1)


def _show(value: Any, as_json: str | None) -> None:
    """JSON as it is; on a terminal in colours, unless NO_COLOR is set; in plain text elsewhere."""
    console = Console()
    if as_json is None and console.is_terminal and not isinstance(value, str):
        console.print(value)
    else:
        print(value if as_json is None else as_json, file=sys.stdout)
