"""The cells of a comparison: every model, norm, batch size and seed as a resolved `Run`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.originals import original_of
from experiments.results import Key, Row
from experiments.run import DEFAULTS, Run, resolve
from experiments.tasks import task_of
from knport.errors import KNPortError, UnknownName


def grid(
    recipe: str,
    *,
    models: Sequence[str],
    norms: Sequence[str],
    batch_sizes: Sequence[int],
    seeds: Sequence[int],
    per_batch_size: dict[str, Sequence[Any]],
    extra: Sequence[str],
    out: Path,
    **overrides: Any,
) -> list[Run]:
    """All runs, one seed after the other, so that a first full table is there early.

    Args:
        per_batch_size: fields of `Run` with no value (the recipe's), one for all batch sizes, or one for each.
        extra: further cells as ``MODEL:NORM:BATCH_SIZE[:FIELD=VALUE...]``, for every seed unless ``seed=`` is given.
        out: parent of the run folders.
        overrides: fields of `Run` for every cell; None leaves the recipe's value.

    Raises:
        KNPortError: numbers of values that do not match, an unknown recipe or field, a malformed extra cell.
    """
    overrides = {name: value for name, value in overrides.items() if value is not None}
    values = [_aligned(name, given, batch_sizes) for name, given in per_batch_size.items()]
    cells = []
    for seed in seeds:
        for i, size in enumerate(batch_sizes):
            special = {name: given[i] for name, given in zip(per_batch_size, values, strict=True) if given}
            cells += [
                {"model": model, "norm": norm, "batch_size": size, "seed": seed} | special
                for model in models
                for norm in norms
            ]
        cells += [{"seed": seed} | cell for cell in map(parse_cell, extra) if cell.get("seed", seed) == seed]
    runs = [_resolved(recipe, out, overrides | cell) for cell in cells]
    if not runs:
        raise KNPortError("nothing to run; give at least one model, norm, batch size and seed, or an extra cell")
    return list({key_of(run): run for run in runs}.values())


def parse_cell(text: str) -> dict[str, Any]:
    """``knresnet18:original:32:epochs=2`` -> the fields of `Run` it sets.

    Raises:
        KNPortError: not of that form, or an unknown field.
    """
    parts = text.split(":")
    if len(parts) < 3 or not parts[2].isdigit() or not all("=" in part for part in parts[3:]):
        raise KNPortError(f"extra cell {text!r}; expected MODEL:NORM:BATCH_SIZE[:FIELD=VALUE...], e.g. {_EXAMPLE}")
    return {"model": parts[0], "norm": parts[1], "batch_size": int(parts[2])} | parse_fields(parts[3:])


def parse_fields(texts: Sequence[str]) -> dict[str, Any]:
    """``["epochs=2", "augment=none"]`` -> the fields of `Run` they set.

    Raises:
        KNPortError: not of that form, or an unknown field.
    """
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise KNPortError(f"{text!r}; expected FIELD=VALUE, e.g. augment=none")
        if name not in DEFAULTS:
            raise UnknownName("field of a run", name, DEFAULTS)
        found[name] = _value(value)
    return found


def key_of(run: Run) -> Key:
    """The run's place in the grid."""
    return Key(run.model, run.norm, run.batch_size, run.seed)


def planned_row(run: Run, command: str, *, status: str = "not run", reason: str = "") -> Row:
    """The row of a run that has left no result."""
    setting = {"epochs": run.epochs, "lr": run.lr, "dropout": run.dropout, "classes": run.subset.classes}
    images = {"train_images": run.subset.train_images, "test_images": run.subset.test_images}
    ends = {"command": command, "status": status, "reason": reason}
    known = {"recipe": run.recipe, "original": original_of(run.model), "score": task_of(run).score}
    return Row(**known, **key_of(run)._asdict(), **setting, **images, **ends)


_EXAMPLE = "knresnet18:original:32:epochs=2"


def _aligned(name: str, given: Sequence[Any], batch_sizes: Sequence[int]) -> list[Any]:
    if len(given) not in (0, 1, len(batch_sizes)):
        raise KNPortError(
            f"{len(given)} values of {name} for {len(batch_sizes)} batch sizes; give one for all, or one for each"
        )
    return list(given) * len(batch_sizes) if len(given) == 1 else list(given)


def _resolved(recipe: str, out: Path, cell: dict[str, Any]) -> Run:
    name = f"{cell['model'].replace('/', '-')}-{cell['norm']}-b{cell['batch_size']}-s{cell['seed']}"
    return resolve(recipe, **{"run_dir": str(out / name)} | cell)


def _value(text: str) -> bool | int | float | str:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
