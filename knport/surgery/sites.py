"""The norms, convolutions and linear layers of a model: their paths and, for each that must stay, the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from knport.surgery.filters import Selection
from knport.surgery.graph import Graph, Node, is_map
from knport.surgery.kinds import channels_last, conv_problem, kind, linear_problem, norm_problem
from knport.surgery.roles import BEFORE_NORM, SHUFFLES, TRANSPARENT

_KINDS = {
    "norm": "norm",
    "kn_norm": "norm",
    "conv": "conv",
    "kn_conv": "conv",
    "linear": "linear",
    "kn_linear": "linear",
}
NOT_CALLED = "never called as a module when the model was run to read it"
_PROBLEMS = {"norm": norm_problem, "conv": conv_problem, "linear": linear_problem}
_TO_OUTPUT = frozenset({"act", "pool", "dropout", "identity", "resize", "reshape"})


@dataclass(frozen=True)
class Site:
    """A norm ("norm"), a convolution ("conv") or a linear layer ("linear") under all its names.

    Args:
        path: its first dotted name.
        kind: "norm", "conv" or "linear".
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
    """Every norm, convolution and linear layer by its first path, in module order; a norm's parts belong to it."""
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
    """path -> why this norm, convolution or linear layer stays as it is, whatever stands around it."""
    pooled, blocked = graph.pooled(), {}
    for path, site in sites.items():
        reason = selection.refusal(path, *_partners(graph, site))
        reason = reason or _PROBLEMS[site.kind](site.module) or _not_called(graph, site)
        if reason is None:
            calls = [graph.nodes[i] for i in graph.calls[path]]
            reason = next(filter(None, (_place(graph, call, site, pooled) for call in calls)), None)
        if reason is not None and not site.ours:
            blocked[path] = reason
    return blocked


def _partners(graph: Graph, site: Site) -> list[str]:
    """Sites whose being included includes this one: for a norm the layer right before it, or if there is none those
    that read it; for a convolution or linear layer the norms behind it, and those it reads that have none before."""
    calls = graph.calls.get(site.path, ())
    if site.kind == "norm":
        before = [layer for i in calls if (layer := layer_before(graph, i))]
        after = [end for i in calls for end in graph.ends(i, TRANSPARENT | SHUFFLES)]
        return before or [end.name for end in after if end.role in ("conv", "linear")]
    through = TRANSPARENT if site.kind == "conv" else TRANSPARENT | SHUFFLES
    after = [end.name for i in calls for end in norms_behind(graph, i)]
    read = [end for i in calls for end in graph.ends(i, through, back=True) if end.role == "norm"]
    return after + [norm.name for norm in read if layer_before(graph, norm.index) is None]


def layer_before(graph: Graph, norm: int) -> str | None:
    """Path of the convolution or linear layer whose output a norm reads, at most through activations and pooling."""
    node = graph.nodes[norm]
    while node.inputs:
        node = graph.nodes[node.inputs[0]]
        if len(node.inputs) != 1 or node.role not in BEFORE_NORM | {"reshape"}:
            break
    if node.role not in ("conv", "linear"):
        return None
    return node.name if any(end.index == norm for end in norms_behind(graph, node.index)) else None


def norms_behind(graph: Graph, layer: int) -> list[Node]:
    """The norms that read a call of a convolution or linear layer, at most through activations and pooling."""
    return [end for end in ends_behind(graph, layer) if end.role in ("norm", "kn_norm")]


def ends_behind(graph: Graph, layer: int) -> list[Node]:
    """What reads a call of a convolution or linear layer, looking through activations and pooling."""
    linear = graph.nodes[layer].role == "linear"  # its (..., C) is often viewed as (N, C) for a BatchNorm
    return graph.ends(layer, BEFORE_NORM | {"reshape"} if linear else BEFORE_NORM)


def _not_called(graph: Graph, site: Site) -> str | None:
    return None if graph.calls.get(site.path) else NOT_CALLED


def _place(graph: Graph, node: Node, site: Site, pooled: list[bool]) -> str | None:
    """Why what a call reads forbids it."""
    if site.kind == "linear":
        return None
    return _conv_place(graph, node, site, pooled) if site.kind == "conv" else _norm_place(graph, node, site)


def _norm_place(graph: Graph, node: Node, site: Site) -> str | None:
    if channels_last(site.module) or len(node.shape or ()) in (2, 3, 4, 5):
        return None
    return f"reads a tensor of shape {graph.in_shape(node.index)}, which is neither (N, channels) nor a map"


def _conv_place(graph: Graph, node: Node, site: Site, pooled: list[bool]) -> str | None:
    if any(pooled[i] for i in node.inputs):
        return "on a 1x1 map after global pooling (a squeeze-excite gate or the head)"
    read_by_norm = any(graph.nodes[r].role == "norm" for r in graph.readers[node.index])
    whole = is_map(graph.in_shape(node.index)) and not is_map(node.shape) and not any(pads(site.module))
    if whole and not read_by_norm and set(site.module.stride) == {1}:
        return "covers the whole map at once: a linear layer of the head"
    return "the classifier" if is_classifier(graph, node, site.module) else None


def pads(conv: nn.Module) -> list[bool]:
    return [bool(p) for p in conv.padding] if not isinstance(conv.padding, str) else [conv.padding == "same"]


def is_classifier(graph: Graph, node: Node, conv: nn.Module) -> bool:
    """A 1x1 convolution with a bias between the last feature map and the output (segmentation heads)."""
    if set(conv.kernel_size) != {1} or conv.bias is None:
        return False
    return {end.role for end in graph.ends(node.index, _TO_OUTPUT)} == {"output"}
