"""Weight standardization: which convolutions get it beside the new norms (Qiao et al., 2019)."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from knport.surgery.graph import Graph
from knport.surgery.kinds import describe
from knport.surgery.norm_kinds import timm_layer
from knport.surgery.norm_plan import ALREADY, KEPT, REPLACED, STANDARDIZED, NormVerdict
from knport.surgery.roles import TRANSPARENT
from knport.surgery.sites import Site


def conv_verdicts(
    graph: Graph, sites: dict[str, Site], blocked: dict[str, str], norms: list[NormVerdict]
) -> list[NormVerdict]:
    """One verdict per convolution: standardized where it feeds or reads one of the new norms.

    Args:
        graph, sites: of the model.
        blocked: path -> why it may not be touched, for gates, classifiers, computed weights, filters.
        norms: the verdicts on the norms.
    """
    new = {v.path for v in norms if v.verdict in (REPLACED, ALREADY)}
    return [_verdict(graph, site, blocked, new) for site in sites.values() if site.kind == "conv"]


def _verdict(graph: Graph, site: Site, blocked: dict[str, str], new: set[str]) -> NormVerdict:
    conv = site.module
    row = NormVerdict(path=site.path, kind="conv", layer=describe(conv), aliases=site.aliases, verdict=KEPT, reason="")
    if isinstance(conv, timm_layer("StdConv2d")):
        return replace(row, verdict=ALREADY, reason="has weight standardization already")
    problem = "a layer of knport" if site.ours else blocked.get(site.path) or _problem(conv)
    near = _norms_around(graph, site.path) & new
    if problem is None and not near:
        problem = "no norm of the new kind next to it"
    if problem:
        return replace(row, reason=problem)
    return replace(row, verdict=STANDARDIZED, reason=f"next to {sorted(near)[0]}; weight and bias kept")


def _problem(conv: nn.Module) -> str | None:
    if not isinstance(conv, nn.Conv2d):
        return "timm's layer with weight standardization is two-dimensional"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}; timm's layer with weight standardization knows zeros only"
    if conv.weight[0].numel() < 2:
        return "a filter of one weight has no variance"
    return None


def _norms_around(graph: Graph, path: str) -> set[str]:
    calls = graph.calls[path]
    ends = [end for i in calls for back in (False, True) for end in graph.ends(i, TRANSPARENT, back=back)]
    return {end.name for end in ends if end.role == "norm"}
