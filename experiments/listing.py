"""What `python -m experiments list` says: names that can be given, and the papers' tables as commands."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from knport.errors import KNPortError


def listing(words: Sequence[str] = ()) -> str:
    """Each kind of thing with the things of that kind, one a line.

    Args:
        words: names of kinds for those alone (all else); any other word is one that must occur.

    Raises: `KNPortError` if there is nothing.
    """
    kinds = [word for word in words if word in KINDS] or list(KINDS)
    contained = [word.lower() for word in words if word not in KINDS]
    parts = []
    for kind in kinds:
        found = [name for name in KINDS[kind]() if all(word in name.lower() for word in contained)]
        if found or not contained:
            parts.append("\n  ".join([f"{kind} ({len(found)}):", *found]))
    if not parts:
        raise KNPortError(
            f"nothing contains {' and '.join(contained)}: give part of a name, or one of {', '.join(KINDS)}"
        )
    return "\n".join(parts)


def _recipes() -> Iterable[str]:
    from experiments.recipes import RECIPES

    return [f"{name:22} {(recipe.__doc__ or '').splitlines()[0]}" for name, recipe in RECIPES.items()]


def _norms() -> Iterable[str]:
    from experiments.models import NORMS

    return NORMS


def _models() -> Iterable[str]:
    from experiments.models import list_models

    return list_models()


def _tables() -> Iterable[str]:
    from experiments.paper_runs import paper_runs

    return map(str, paper_runs())


KINDS: dict[str, Callable[[], Iterable[str]]] = {
    "recipes": _recipes,
    "norms": _norms,
    "models": _models,
    "tables": _tables,
}
