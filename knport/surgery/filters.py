"""include= and exclude=: which norms and convolutions the surgery may touch."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from knport.errors import KNPortError, UnmatchedPattern

_EXPECTED = (
    "a glob or 're:...' on full dotted names, a module class, a callable (name, module) -> bool, or a list of those"
)


@dataclass(frozen=True)
class Filter:
    """One filter and how the user wrote it.

    Args:
        text: for messages.
        matches: (path, module) -> bool, asked of a module and, unless it is a callable, of every container around it.
        subtree: whether matching a container covers what is inside.
    """

    text: str
    matches: Callable[[str, nn.Module], bool]
    subtree: bool


def parse(value: Any, name: str) -> list[Filter] | None:
    """The filters in an include= or exclude= argument; None when it was not given."""
    if value is None:
        return None
    if isinstance(value, list | tuple | set | frozenset):
        return [one for item in value for one in parse(item, name) or ()]
    return [_parse_one(value, name)]


def texts(value: Any, name: str) -> tuple[str, ...] | None:
    """The filters as text, to be shown and written down; None when there are none."""
    filters = parse(value, name)
    return None if filters is None else tuple(one.text.strip("'\"") for one in filters)


def _parse_one(value: Any, name: str) -> Filter:
    if isinstance(value, type):
        return Filter(value.__name__, lambda _, module: isinstance(module, value), subtree=True)
    if isinstance(value, str) and value.startswith("re:"):
        try:
            pattern = re.compile(value[3:])
        except re.error as error:
            raise KNPortError(f"{name}={value!r} is no regular expression: {error}") from None
        return Filter(repr(value), lambda path, _: bool(path) and bool(pattern.fullmatch(path)), subtree=True)
    if isinstance(value, str):
        return Filter(repr(value), lambda path, _: bool(path) and fnmatch.fnmatchcase(path, value), subtree=True)
    if callable(value):
        return Filter(getattr(value, "__name__", repr(value)), lambda path, m: bool(value(path, m)), subtree=False)
    raise KNPortError(f"{name}={value!r}; expected {_EXPECTED}")


@dataclass(frozen=True)
class Selection:
    """Which paths include= named (None when it was not given) and which filter excluded which path."""

    included: frozenset[str] | None
    excluded: dict[str, str]

    def refusal(self, path: str, *partners: str) -> str | None:
        """Why `path` may not be touched; one of `partners` being included is as good as itself being included."""
        if path in self.excluded:
            return f"excluded by {self.excluded[path]}"
        if self.included is not None and self.included.isdisjoint((path, *partners)):
            return "not in include"
        return None


def select(model: nn.Module, sites: dict[str, tuple[str, ...]], include: Any, exclude: Any) -> Selection:
    """Apply both arguments to the norms and convolutions of `model`.

    Args:
        model: the model that the names belong to.
        sites: first path -> all paths of every norm and convolution.
        include: as in `knport.convert`.
        exclude: as in `knport.convert`.

    Raises:
        UnmatchedPattern: a filter that matches no norm, convolution or linear layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    chosen = {"include": {}, "exclude": {}}
    for name, value in (("include", include), ("exclude", exclude)):
        for one in parse(value, name) or ():
            hits = [path for path, names in sites.items() if any(_hit(one, alias, modules) for alias in names)]
            if not hits:
                raise UnmatchedPattern(_unmatched(name, one, model, modules, sites))
            for path in hits:
                chosen[name].setdefault(path, one.text)
    included = None if include is None else frozenset(chosen["include"])
    return Selection(included, chosen["exclude"])


def _hit(one: Filter, path: str, modules: dict[str, nn.Module]) -> bool:
    around = _with_containers(path) if one.subtree else [path]
    return any(one.matches(name, modules[name]) for name in around)


def _with_containers(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a`` and the model itself: whole names, so that ``layer.1`` is never ``layer.10``."""
    parts = path.split(".")
    for end in range(len(parts), -1, -1):
        yield ".".join(parts[:end])


def _unmatched(name: str, one: Filter, model: nn.Module, modules: dict[str, nn.Module], sites: dict) -> str:
    near = difflib.get_close_matches(
        one.text.strip("'\"").removeprefix("re:"), [m for m in modules if m], n=3, cutoff=0.4
    )
    known = f"near names: {', '.join(near)}" if near else f"names look like: {', '.join(list(sites)[:4])}"
    return f"{name}={one.text} matches no norm, convolution or linear layer of {type(model).__name__}; {known}"
