"""From the graph to verdicts: which norms go, which convolutions take over, and why the rest stays."""

from __future__ import annotations

from dataclasses import dataclass

from knport.surgery.config import KNConfig
from knport.surgery.enlarge import target_size
from knport.surgery.graph import Graph, is_map
from knport.surgery.head import norms_before_head
from knport.surgery.kinds import describe
from knport.surgery.plan import ABSORBED, ALREADY, KEPT, KERNEL_NORM, KN_CONV, Verdict
from knport.surgery.roles import TRANSPARENT
from knport.surgery.sites import Site, conv_before


@dataclass(frozen=True)
class Match:
    """The outcome: paths by what happens to them, and for each changed one its partners' paths."""

    absorbed: dict[str, list[str]]
    final: set[str]
    convs: dict[str, list[str]]

    def calls(self, graph: Graph) -> set[int]:
        """Calls of the norms that go and of the convolutions that become KNConv."""
        return {i for path in (*self.absorbed, *self.convs) for i in graph.calls[path]}


def match(graph: Graph, sites: dict[str, Site], blocked: dict[str, str], config: KNConfig) -> Match:
    """Pair norms with convolutions.

    A convolution read by norms only takes over from them, and so do all convolutions that read a norm (through
    activations, pooling, dropout, concatenation). A module that is called several times must fit at every call, so
    whatever does not fit is struck out until nothing changes.
    """
    convs = {p for p, s in sites.items() if s.kind == "conv" and not s.ours and p not in blocked}
    norms = {p for p, s in sites.items() if s.kind == "norm" and not s.ours and p not in blocked}
    head_convs = {p for p, s in sites.items() if s.kind == "conv" and p in blocked}
    at_head = norms_before_head(graph, head_convs) if config.final_norm else set()
    final = {p for p in norms if all(i in at_head for i in graph.calls[p])}
    while True:
        absorbed = {p: found for p in norms - final if (found := _takers(graph, p, convs, norms))}
        fitting = {p for p in convs if _giver_names(graph, p, absorbed, final)}
        if fitting == convs:
            break
        convs = fitting
    order = list(sites)
    return Match(
        {p: absorbed[p] for p in order if p in absorbed},
        final,
        {p: _giver_names(graph, p, absorbed, final) for p in order if p in convs},
    )


def _takers(graph: Graph, norm: str, convs: set[str], norms: set[str]) -> list[str]:
    """The convolutions that do the work of `norm`; empty when one of its calls has none."""
    takers: dict[str, None] = {}
    for index in graph.calls[norm]:
        before = conv_before(graph, index)
        here = [before] if before in convs and _read_by_norms_only(graph, before, norms) else []
        after = graph.ends(index, TRANSPARENT)
        if after and all(end.role == "conv" and end.name in convs for end in after):
            here += [end.name for end in after]
        if not here:
            return []
        takers.update(dict.fromkeys(here))
    return list(takers)


def _read_by_norms_only(graph: Graph, conv: str, norms: set[str]) -> bool:
    ends = [end for i in graph.calls[conv] for end in graph.ends(i, frozenset({"identity"}))]
    return bool(ends) and all(end.role == "norm" and end.name in norms for end in ends)


def _giver_names(graph: Graph, conv: str, absorbed: dict, final: set[str]) -> list[str]:
    """The norms for which `conv` becomes a KNConv; empty when one of its calls has none."""
    givers: dict[str, None] = {}
    for index in graph.calls[conv]:
        after = [end.name for end in graph.ends(index, frozenset({"identity"}))]
        here = after if after and all(name in absorbed or name in final for name in after) else []
        here += [end.name for end in graph.ends(index, TRANSPARENT, back=True) if end.name in absorbed]
        if not here:
            return []
        givers.update(dict.fromkeys(here))
    return list(givers)


def verdicts(
    graph: Graph, sites: dict[str, Site], blocked: dict[str, str], found: Match, config: KNConfig
) -> tuple[Verdict, ...]:
    """One `Verdict` per site."""
    sides = _sides(graph, sites, found, config)
    rows = []
    for path, site in sites.items():
        layer = describe(site.module)
        head = {"path": path, "kind": site.kind, "layer": layer, "aliases": site.aliases}
        if site.ours:
            rows.append(Verdict(**head, verdict=ALREADY, reason="a layer of knport; nothing to do"))
        elif path in blocked:
            rows.append(Verdict(**head, verdict=KEPT, reason=blocked[path]))
        elif site.kind == "norm":
            rows.append(_norm_verdict(head, graph, found, config))
        else:
            rows.append(_conv_verdict(head, graph, site, found, sides, config))
    return (*rows, *_functional(graph))


def _functional(graph: Graph) -> list[Verdict]:
    """Norms and convolutions that are called as functions: seen, and left."""
    rows = []
    for node in graph.nodes:
        if node.role in ("functional norm", "functional conv"):
            path = f"{node.owner}.{node.name}()".lstrip(".")
            reason = "called as a function, not as a module; not offered yet"
            layer = f"torch function {node.name}"
            rows.append(Verdict(path=path, kind=node.role[11:], layer=layer, verdict=KEPT, reason=reason))
    return rows


def _norm_verdict(head: dict, graph: Graph, found: Match, config: KNConfig) -> Verdict:
    path = head["path"]
    ndim = len(graph.nodes[graph.calls[path][0]].shape) - 2
    rest = "; its activation stays" if "+" in head["layer"] else ""
    if path in found.absorbed:
        by = names(found.absorbed[path])
        return Verdict(**head, verdict=ABSORBED, reason=f"its work is done by {by}; gain and bias dropped{rest}")
    if path in found.final:
        p = config.final_dropout
        reason = f"the last norm before the head: KernelNorm with dropout {p:g}{rest}"
        return Verdict(**head, verdict=KERNEL_NORM, reason=reason, dropout=p, ndim=ndim)
    reason = f"no convolution next to it can do its work{rest}"
    return Verdict(**head, verdict=KERNEL_NORM, reason=reason, dropout=config.dropout, ndim=ndim)


def _conv_verdict(head: dict, graph: Graph, site: Site, found: Match, sides: dict, config: KNConfig) -> Verdict:
    path = head["path"]
    if path not in found.convs:
        return Verdict(**head, verdict=KEPT, reason=_why_not(graph, path))
    bias = "bias starts at 0" if site.module.bias is None else "bias kept"
    reason, window, size = f"takes over from {names(found.convs[path])}; {bias}", config.norm_window, None
    if path in sides:
        size = target_size(config.enlarge)
        window = window or (3 if size is None else None)
        reason += f"; kernel enlarged to {config.enlarge}" if size else f"; statistics of a {window} pixel window"
    ndim = len(site.module.kernel_size)
    more = {"dropout": config.dropout, "ndim": ndim, "enlarge": size, "norm_window": window, "side": sides.get(path, 0)}
    return Verdict(**head, verdict=KN_CONV, reason=reason, **more)


def _why_not(graph: Graph, path: str) -> str:
    calls = graph.calls[path]
    near = [end for i in calls for end in graph.ends(i, frozenset({"identity"}))]
    near += [end for i in calls for end in graph.ends(i, TRANSPARENT, back=True)]
    norms = list(dict.fromkeys(end.name for end in near if end.role in ("norm", "kn_norm")))
    if not norms:
        return "no norm right after it, and it reads none"
    if len(calls) > 1:
        return f"called {len(calls)} times, and not with a norm that goes at each call"
    return f"the norm next to it ({names(norms)}) stays or becomes a KernelNorm of its own"


def _sides(graph: Graph, sites: dict[str, Site], found: Match, config: KNConfig) -> dict[str, int]:
    """The 1x1 convolutions that are enlarged -> the side on which each pads, opposite to the one before it."""
    if config.enlarge == "none":
        return {}
    last: list[tuple[int, int]] = []  # per node: (index, side) of the latest enlarged convolution it depends on
    sides: dict[str, int] = {}
    for node in graph.nodes:
        latest = max((last[i] for i in node.inputs), default=(-1, 1))
        if node.role == "conv" and node.name in found.convs:
            module = sites[node.name].module
            small = set(module.kernel_size) == {1} and not sites[node.name].tied
            if small and all(is_map(graph.in_shape(i)) for i in graph.calls[node.name]):
                latest = (node.index, sides.setdefault(node.name, 1 - latest[1]))
        last.append(latest)
    return sides


def names(paths: list[str]) -> str:
    """``a``, ``a and b``, ``a, b and 3 more``."""
    if len(paths) <= 2:
        return " and ".join(paths)
    return f"{paths[0]}, {paths[1]} and {len(paths) - 2} more"
