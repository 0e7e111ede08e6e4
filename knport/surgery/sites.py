"""The norms and convolutions of a model: their paths and, for each that must stay as it is, the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from knport.surgery.filters import Selection
from knport.surgery.graph import Graph, Node, is_map
from knport.surgery.kinds import KN_NORMS, conv_problem, kind, norm_problem
from knport.surgery.roles import TRANSPARENT

_KINDS = {"norm": "norm", "kn_norm": "norm", "conv": "conv", "kn_conv": "conv"}
_TO_OUTPUT = frozenset({"act", "pool", "dropout", "identity", "resize", "reshape"})


@dataclass(frozen=True)
class Site:
    """A norm ("norm") or a convolution ("conv") under all its names.

    Args:
        path: its first dotted name.
        kind: "norm" or "conv".
        module: itself.
        aliases: its other names.
        tied: whether another module holds one of its parameters too.
    """

    path: str
    kind: str
    module: nn.Module
    aliases: tuple[str, ...]
    tied: bool

    @property
    def ours(self) -> bool:
        return kind(self.module).startswith("kn_")


def find_sites(model: nn.Module) -> dict[str, Site]:
    """Every norm and convolution by its first path, in module order; what is inside a norm belongs to it."""
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(path)
    inside = {id(part) for m in model.modules() if kind(m) != "other" for part in m.modules() if part is not m}
    owners = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    sites = {}
    for path, module in model.named_modules():
        if kind(module) in _KINDS and id(module) not in inside:
            tied = any(owners[id(p)] > 1 for p in module.parameters(recurse=False))
            sites[path] = Site(path, _KINDS[kind(module)], module, tuple(names[id(module)][1:]), tied)
    return sites


def blocked_sites(graph: Graph, sites: dict[str, Site], selection: Selection) -> dict[str, str]:
    """path -> why this norm or convolution stays as it is, whatever stands around it."""
    pooled, blocked = graph.pooled(), {}
    for path, site in sites.items():
        problem = conv_problem if site.kind == "conv" else norm_problem
        reason = selection.refusal(path, *_partners(graph, site)) or problem(site.module) or _not_called(graph, site)
        if reason is None:
            place = _conv_place if site.kind == "conv" else _norm_place
            reason = next(filter(None, (place(graph, graph.nodes[i], site, pooled) for i in graph.calls[path])), None)
        if reason is not None and not site.ours:
            blocked[path] = reason
    return blocked


def _partners(graph: Graph, site: Site) -> list[str]:
    """Sites whose being included includes this one: for a norm the convolution right before it; for a convolution
    the norms right after it, and those it reads that have no convolution of their own."""
    calls = graph.calls.get(site.path, ())
    if site.kind == "norm":
        return [conv for i in calls if (conv := conv_before(graph, i))]
    after = [end.name for i in calls for end in graph.ends(i, frozenset({"identity"})) if end.role == "norm"]
    read = [end for i in calls for end in graph.ends(i, TRANSPARENT, back=True) if end.role == "norm"]
    return after + [norm.name for norm in read if conv_before(graph, norm.index) is None]


def conv_before(graph: Graph, norm: int) -> str | None:
    """Path of the convolution that a norm reads directly."""
    node = graph.nodes[norm]
    while node.inputs:
        node = graph.nodes[node.inputs[0]]
        if node.role != "identity" or len(graph.readers[node.index]) != 1:
            break
    return node.name if node.role == "conv" else None


def _not_called(graph: Graph, site: Site) -> str | None:
    return None if graph.calls.get(site.path) else "never called as a module when the model was run to read it"


def _norm_place(graph: Graph, node: Node, site: Site, pooled: list[bool]) -> str | None:
    if len(node.shape or ()) - 2 not in KN_NORMS:
        return (
            f"reads a tensor of shape {graph.in_shape(node.index)}, which is no (N, channels, ...) map; not offered yet"
        )
    return None


def _conv_place(graph: Graph, node: Node, site: Site, pooled: list[bool]) -> str | None:
    if any(pooled[i] for i in node.inputs):
        return "on a 1x1 map after global pooling (a squeeze-excite gate or the head)"
    read_by_norm = any(graph.nodes[r].role == "norm" for r in graph.readers[node.index])
    whole = is_map(graph.in_shape(node.index)) and not is_map(node.shape) and not any(_pads(site.module))
    if whole and not read_by_norm and set(site.module.stride) == {1}:
        return "covers the whole map at once: a linear layer of the head"
    return "the classifier" if is_classifier(graph, node, site.module) else None


def _pads(conv: nn.Module) -> list[bool]:
    return [bool(p) for p in conv.padding] if not isinstance(conv.padding, str) else [conv.padding == "same"]


def is_classifier(graph: Graph, node: Node, conv: nn.Module) -> bool:
    """A 1x1 convolution with a bias between the last feature map and the output (segmentation heads)."""
    if set(conv.kernel_size) != {1} or conv.bias is None:
        return False
    return {end.role for end in graph.ends(node.index, _TO_OUTPUT)} == {"output"}
