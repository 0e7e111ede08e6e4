"""From pairs to a plan's rows: one verdict with a reason for every norm and every convolution, and for every linear
layer that changes or is never called."""

from __future__ import annotations

import math

from knport.geometry import ntuple
from knport.kernels.eager import SMALLEST_GAUSSIAN_UNIT
from knport.surgery.config import KNConfig
from knport.surgery.enlarge import target_size
from knport.surgery.follow import Tokens
from knport.surgery.graph import Graph, Node, is_map
from knport.surgery.kinds import activation_note, describe, takes_means
from knport.surgery.match import Match
from knport.surgery.plan import ABSORBED, ALREADY, KEPT, KERNEL_NORM, KN_CONV, KN_LINEAR, Verdict
from knport.surgery.roles import SHUFFLES, TRANSPARENT
from knport.surgery.sites import NOT_CALLED, Site, layer_before, norms_behind


def verdicts(
    graph: Graph, sites: dict[str, Site], blocked: dict[str, str], found: Match, config: KNConfig
) -> tuple[Verdict, ...]:
    """One `Verdict` per site that a plan speaks of."""
    sides = _sides(graph, sites, found, config)
    rows = []
    for path, site in sites.items():
        head = {"path": path, "kind": site.kind, "layer": describe(site.module), "aliases": site.aliases}
        if site.ours:
            rows.append(Verdict(**head, verdict=ALREADY, reason="a layer of knport; nothing to do"))
        elif path in blocked:
            if site.kind != "linear" or blocked[path] == NOT_CALLED:
                rows.append(Verdict(**head, verdict=KEPT, reason=blocked[path]))
        elif site.kind == "norm":
            rows.append(_norm(head, graph, site, blocked, found, config))
        elif path in found.layers:
            layer = _conv if site.kind == "conv" else _linear
            rows.append(layer(head, graph, sites, found, sides, config))
        elif site.kind == "conv":
            rows.append(Verdict(**head, verdict=KEPT, reason=_why_not(graph, path)))
    return (*rows, *_functional(graph))


def _functional(graph: Graph) -> list[Verdict]:
    """Norms and convolutions that are called as functions: seen, and left."""
    rows = []
    for node in graph.nodes:
        if node.role in ("functional norm", "functional conv"):
            path = f"{node.owner}.{node.name}()".lstrip(".")
            reason = "called as a function: there is no module to replace; make it a torch.nn module to convert it"
            layer = f"torch function {node.name}"
            rows.append(Verdict(path=path, kind=node.role[11:], layer=layer, verdict=KEPT, reason=reason))
    return rows


# --- norms


def _norm(head: dict, graph: Graph, site: Site, blocked: dict, found: Match, config: KNConfig) -> Verdict:
    path = head["path"]
    rest = activation_note(site.module)
    if path in found.absorbed:
        by = names(found.absorbed[path])
        return Verdict(**head, verdict=ABSORBED, reason=f"its work is done by {by}{_affine(site, found)}{rest}")
    ndim = len(graph.nodes[graph.calls[path][0]].shape) - 2
    if path in found.final:
        p = config.final_dropout
        reason = f"the last norm before the head: KernelNorm with dropout {p:g}{rest}"
        return Verdict(**head, verdict=KERNEL_NORM, reason=reason, dropout=p, ndim=ndim)
    if path in found.lone:
        reason = f"{_why_lone(graph, path, blocked)}{rest}"
        return Verdict(**head, verdict=KERNEL_NORM, reason=reason, dropout=config.dropout, ndim=ndim)
    reason = f"{_why_not_folded(graph, path, blocked)}; it sees one position at a time, as a KernelNorm would"
    return Verdict(**head, verdict=KEPT, reason=reason)


def _affine(site: Site, found: Match) -> str:
    """What becomes of the gain and bias of a norm that goes."""
    if site.path in found.folded.values():
        return "; gain and bias folded into their weights"
    if not list(site.module.parameters(recurse=False)):
        return ""
    if takers := [path for path, norm in found.affine.items() if norm == site.path]:
        return f"; gain and bias folded into {names(takers)}"
    return "; gain and bias dropped"


def _why_lone(graph: Graph, path: str, blocked: dict[str, str]) -> str:
    for index in graph.calls[path]:
        before = layer_before(graph, index)
        if before in blocked:
            return f"{before}, which it follows, stays as it is ({blocked[before].split(';')[0]})"
    ends = [end for index in graph.calls[path] for end in graph.ends(index, TRANSPARENT)]
    other = [end for end in ends if end.role != "conv"]
    if not ends or other:
        return f"it is read by {_readers(other) or 'nothing'}, and no layer next to it can do its work"
    return f"{names(list(dict.fromkeys(end.name for end in ends)))}, which it feeds, cannot do its work"


def _why_not_folded(graph: Graph, path: str, blocked: dict[str, str]) -> str:
    """Why a norm of single positions has no layers that could do its work exactly."""
    calls, head = graph.calls[path], graph.head()
    ends = [end for index in calls for end in graph.ends(index, SHUFFLES)]
    if not ends or any(head[end.index] or end.role == "output" for end in ends):
        return "the last norm before the head"
    for end in ends:
        if end.name in blocked:
            return f"it is read by {end.name}, which stays as it is ({blocked[end.name].split(';')[0]})"
    across = [end for end in ends if end.role == "linear" and end.tokens.norm not in calls]
    if across:
        return f"{across[0].name} does not read its channels, but across positions or several norms at once"
    other = [end for end in ends if end.role != "linear"]
    if other:
        return f"it is read by {_readers(other)}"
    several = next((end.name for end in ends if len(graph.calls[end.name]) > 1), None)
    if several is not None:
        return f"{several} reads other norms too when it is called again"
    return f"{ends[0].name} shares its weights with another layer"


def _readers(ends: list[Node]) -> str:
    texts = [f"{end.name} ({end.role})" if end.op == "module" else f"the function {end.name}" for end in ends]
    texts = ["the output" if end.role == "output" else text for end, text in zip(ends, texts, strict=True)]
    return names(list(dict.fromkeys(texts)))


# --- convolutions and linear layers


def _conv(head: dict, graph: Graph, sites: dict[str, Site], found: Match, sides: dict, config: KNConfig) -> Verdict:
    path, module = head["path"], sites[head["path"]].module
    window, size = config.norm_window, None
    at_input = _reads_images(graph, path)
    reason = _takes_over(path, sites, found, at_input)
    if path in sides:
        size = target_size(config.enlarge)
        window = window or (3 if size is None else None)
        reason += f"; kernel enlarged to {config.enlarge}" if size else f"; statistics of a {window} pixel window"
    ndim = len(module.kernel_size)
    entries = module.in_channels * math.prod(ntuple(window or size or module.kernel_size, ndim, "norm_window"))
    dropout = config.dropout if entries >= SMALLEST_GAUSSIAN_UNIT else 0.0
    more = {"dropout": dropout, "ndim": ndim, "enlarge": size, "side": sides.get(path, 0)}
    more["reads_images"] = at_input
    more |= _folding(path, sites, found)
    return Verdict(**head, verdict=KN_CONV, reason=reason, norm_window=window, **more)


def _linear(head: dict, graph: Graph, sites: dict[str, Site], found: Match, sides: dict, config: KNConfig) -> Verdict:
    path = head["path"]
    layouts = [graph.nodes[i].tokens for i in graph.calls[path]]
    window, where = _token_window(layouts, config)
    more = {"dropout": config.dropout, "norm_window": window} | _folding(path, sites, found)
    if window != 1:
        height, width = layouts[0].grid
        more |= {"prefix_tokens": layouts[0].prefix, "grid_size": None if height == width else (height, width)}
    reason = f"{_takes_over(path, sites, found)}; {where}"
    return Verdict(**head, verdict=KN_LINEAR, reason=reason, **more)


def _token_window(layouts: list[Tokens], config: KNConfig) -> tuple[int | tuple[int, ...], str]:
    """The window that a linear layer takes its statistics of, and why."""
    window = config.norm_window or (1 if config.enlarge == "none" else 3)
    if window == 1:
        return 1, "statistics of each position"
    if isinstance(window, tuple) and len(window) != 2:
        return 1, f"statistics of each position: a window of {window} fits no grid of tokens"
    why = next((one.why for one in layouts if one.grid is None), None)
    if why is None and len({(one.prefix, one.grid) for one in layouts}) > 1:
        why = "its calls see different grids"
    if why is not None:
        return 1, f"statistics of each position: {why}"
    (height, width), prefix = layouts[0].grid, layouts[0].prefix
    text = f"statistics of a {window} token window on the {height}x{width} grid"
    return window, text + (f" behind {prefix} tokens of their own" if prefix else "")


def _takes_over(path: str, sites: dict[str, Site], found: Match, at_input: bool = False) -> str:
    module = sites[path].module
    start = "starts spread around 0" if at_input else "starts at 0"
    new = module.bias is None or (at_input and (module.bias.is_meta or not module.bias.any()))
    bias = f"bias {start}" if new else "bias kept"
    if path in found.folded:
        bias = "gain and bias of the norm folded in"
    elif module.bias is not None and path in found.affine and takes_means(sites[found.affine[path]].module):
        bias = f"bias {start}: {found.affine[path]} took away what it had"
    return f"takes over from {names(found.layers[path])}; {bias}"


def _reads_images(graph: Graph, path: str) -> bool:
    """Whether the layer is called on an input of the network, through activations, padding and pooling at most."""
    return any(end.op == "input" for i in graph.calls[path] for end in graph.ends(i, TRANSPARENT, back=True))


def _folding(path: str, sites: dict[str, Site], found: Match) -> dict:
    affine = {"affine": found.affine[path]} if path in found.affine else {}
    if path not in found.folded:
        return affine
    norm = sites[found.folded[path]]
    return affine | {"fold": norm.path, "eps": getattr(norm.module, "eps", None)}


def _why_not(graph: Graph, path: str) -> str:
    calls = graph.calls[path]
    near = [end for i in calls for end in norms_behind(graph, i)]
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
        if node.role == "conv" and node.name in found.layers:
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
