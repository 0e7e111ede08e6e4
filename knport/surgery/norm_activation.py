"""Norms with an activation of their own (FRN with its threshold, EvoNorm): which activation they take the place of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from knport.surgery.graph import Graph
from knport.surgery.kinds import activation_note, fused_parts
from knport.surgery.norm_kinds import NormKind
from knport.surgery.sites import Site

_GATES = ("sigmoid", "hardsigmoid", "softmax", "tanh")  # what no norm has of its own


@dataclass(frozen=True)
class Taken:
    """What becomes of the activation behind a norm.

    Args:
        own: whether the new norm acts as activation too.
        replaces: path of the activation module that goes, "" for the one fused with the old norm, None for neither.
        words: for the reason.
    """

    own: bool
    replaces: str | None
    words: str


@dataclass(frozen=True)
class _Act:
    """The activation that follows a norm: its class or function, its path, and why it cannot be removed."""

    name: str
    path: str
    fixed: str = ""


def activation_of(graph: Graph, site: Site, kind: NormKind, modules: dict[str, nn.Module]) -> Taken:
    """What the new norm does about the activation behind the old one."""
    fused = fused_parts(site.module)
    if not kind.activation:
        return Taken(False, None, activation_note(site.module))
    act = _Act(type(fused[-1]).__name__, "") if fused else _next(graph, site, modules)
    takes_any = kind.activation == "any"
    if act is None:
        return Taken(False, None, "; no activation follows" + (": gain and bias only" if takes_any else ""))
    if act.name.lower() in _GATES or (not takes_any and act.name != kind.activation):
        return Taken(False, None, f"; {act.name} stays")
    if act.fixed:
        return Taken(takes_any, None, f"; {act.name} stays behind it: it is {act.fixed}")
    return Taken(True, act.path, f"; takes the place of {act.path or 'the fused'} ({act.name}) too")


def _next(graph: Graph, site: Site, modules: dict[str, nn.Module]) -> _Act | None:
    """The one activation that reads the norm, and nothing else does; None where a call has none."""
    calls = graph.calls[site.path]
    ends = [graph.ends(i, frozenset({"identity"})) for i in calls]
    if not all(len(found) == 1 and found[0].role == "act" for found in ends):
        return None
    steps = {(found[0].op, found[0].name) for found in ends}
    op, name = min(steps)
    if op != "module":
        return _Act({"relu": "ReLU"}.get(name.strip("_"), name), name, "a function")
    if len(steps) > 1 or len(graph.calls[name]) != len(calls):
        return _Act(type(modules[name]).__name__, name, f"called {len(graph.calls[name])} times")
    return _Act(type(modules[name]).__name__, name)
