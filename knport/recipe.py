"""knport.json: how a saved model is built again, as text that is checked when it is read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass
from typing import Any

from knport.errors import KNPortError
from knport.origin import Origin
from knport.surgery.norm_plan import NormPlan
from knport.surgery.plan import Plan
from knport.typed_json import decode, encode

FORMAT, VERSION = "knport", 1
_PLANS = {"convert": Plan, "replace_norm": NormPlan}


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The file of weights that belongs to a recipe.

    Args:
        sha256: of the file.
        size: of the file in bytes.
        shared: other names of tensors that are in the file once.
    """

    sha256: str
    size: int
    shared: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that is needed to build a saved model again but its weights.

    Args:
        base: how the original is built.
        plans: what was done to it, in order.
        weights: the file that belongs to it.
        training: the mode the model was in.
        frozen: names of the parameters without gradient.
    """

    base: Origin
    plans: tuple[Plan | NormPlan, ...]
    weights: Weights
    training: bool
    frozen: tuple[str, ...]


def write_recipe(recipe: Recipe) -> str:
    """The recipe as JSON, with its version and a checksum."""
    kinds = {kind: name for name, kind in _PLANS.items()}
    content = {
        "format": FORMAT,
        "version": VERSION,
        "written_by": {name: _version(name) for name in ("knport", "torch", "timm", "torchvision")},
        "base": encode(recipe.base),
        "plans": [{"kind": kinds[type(plan)], "plan": encode(plan)} for plan in recipe.plans],
        "weights": encode(recipe.weights),
        "training": recipe.training,
        "frozen": encode(recipe.frozen),
    }
    return json.dumps({**content, "checksum": _checksum(content)}, indent=1) + "\n"


def read_recipe(text: str, where: str) -> Recipe:
    """The recipe in a text that `write_recipe` made.

    Args:
        text: JSON.
        where: the file's path, for messages.

    Raises:
        KNPortError: the text is cut short, changed, of a newer version, or no recipe.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise KNPortError(f"{where} is no JSON or cut short: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise KNPortError(f"{where} is no recipe of knport")
    version = content.get("version")
    if not isinstance(version, int) or version < 1:
        raise KNPortError(f"{where}: version {version!r}; expected a number from 1 to {VERSION}")
    if version > VERSION:
        by = (content.get("written_by") or {}).get("knport", "a newer one")
        raise KNPortError(f"{where} is of version {version}, this knport reads up to {VERSION}; install knport {by}")
    checksum = content.pop("checksum", None)
    if checksum != _checksum(content):
        raise KNPortError(f"{where} was changed after it was written; its checksum is another")
    try:
        return _recipe(content)
    except KNPortError as error:
        raise KNPortError(f"{where}: {error}") from error


def _recipe(content: dict[str, Any]) -> Recipe:
    known = {"format", "version", "written_by", "base", "plans", "weights", "training", "frozen"}
    if content.keys() != known:
        odd = sorted(content.keys() ^ known)
        raise KNPortError(f"{', '.join(odd)} {'is' if len(odd) == 1 else 'are'} missing or unknown")
    steps = decode(list[dict[str, Any]], content["plans"], "plans")
    plans = []
    for i, step in enumerate(steps):
        kind = step.get("kind")
        if kind not in _PLANS:
            raise KNPortError(f"plans[{i}].kind is {kind!r}; expected {' or '.join(_PLANS)}")
        plans.append(decode(_PLANS[kind], step.get("plan"), f"plans[{i}].plan"))
    return Recipe(
        base=decode(Origin, content["base"], "base"),
        plans=tuple(plans),
        weights=decode(Weights, content["weights"], "weights"),
        training=decode(bool, content["training"], "training"),
        frozen=decode(tuple[str, ...], content["frozen"], "frozen"),
    )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
