"""The errors of knport: one family, each message saying what was given, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KNPortError(ValueError):
    """Base of every error that knport raises on purpose; also a `ValueError`."""


class UnknownName(KNPortError):
    """A name that no registry holds. The message lists the nearest names.

    Args:
        kind: what the name stands for, e.g. ``"recipe"``.
        name: what was given.
        known: every name that would have been right.
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {kind} {name!r}; {hint}")


class UnsupportedModule(KNPortError):
    """A module that cannot be rewritten.

    Args:
        path: the module's dotted path in the model.
        found: what stands there.
        hint: what to do about it.
    """

    def __init__(self, path: str, found: str, hint: str):
        self.path = path
        super().__init__(f"{path or '(the model itself)'}: {found}; {hint}")


class NothingToConvert(KNPortError):
    """The model holds no normalization that could be replaced."""


class UnmatchedPattern(KNPortError):
    """An include or exclude filter that matches no module."""


class AlreadyWrapped(KNPortError):
    """The model is wrapped (DDP, FSDP, compiled, prepared); convert the bare model first."""
