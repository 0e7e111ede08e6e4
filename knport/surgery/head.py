"""The norm before the head: which norms stand there, and where one is to be added."""

from __future__ import annotations

from dataclasses import dataclass

from knport.surgery.graph import Graph, Node
from knport.surgery.roles import TRANSPARENT

_TO_HEAD = (TRANSPARENT | {"reshape"}) - {"cat"}
_CHAIN = TRANSPARENT - {"cat"}
_SITES = ("norm", "kn_norm", "conv", "kn_conv")
_THROUGH_SUMS = TRANSPARENT | {"add", "mul"}


@dataclass(frozen=True)
class Place:
    """Where a KernelNorm is to be added: in front of the module at `path`, whose role is `role`."""

    path: str
    role: str
    ndim: int


def norms_before_head(graph: Graph, head_convs: set[str]) -> set[int]:
    """The calls of norms between which and the head, or a classifying convolution, stand no other layers.

    Args:
        graph: the model.
        head_convs: paths of convolutions that belong to the head.
    """
    head, pooled = graph.head(), graph.pooled()

    def is_head(end: Node) -> bool:
        if end.role == "conv" and end.name in head_convs:
            return True
        return head[end.index] and any(pooled[i] for i in end.inputs)

    found = set()
    for node in graph.nodes:
        if node.role == "norm" and not pooled[node.index]:
            ends = graph.ends(node.index, _TO_HEAD)
            if ends and all(is_head(end) for end in ends):
                found.add(node.index)
    return found


def missing_norms(graph: Graph, converted: set[int]) -> tuple[list[Place], list[str]]:
    """Where the last feature map reaches the pooling of the head with no norm in between.

    Args:
        graph: the model.
        converted: calls of the norms that go and of the convolutions that become KNConv.

    Returns:
        The places, and a note for every head without one.
    """
    head, pooled = graph.head(), graph.pooled()
    places, notes = [], []
    for node in graph.nodes:
        reduces = pooled[node.index] and not any(pooled[i] for i in node.inputs)
        if not (reduces and head[node.index]) or node.role in _SITES or _has_norm(graph, node):
            continue
        chain, source = _chain_to(graph, node)
        if source.role in ("norm", "kn_norm") and source.index not in converted:
            continue
        ends = [source, *graph.ends(source.index, _THROUGH_SUMS, back=True)] if source.inputs else [source]
        if not any(end.index in converted for end in ends):
            continue
        place = _place(graph, chain, len(source.shape or ()) - 2)
        if place is None:
            notes.append(f"no KernelNorm added before the head: nothing but functions stands before {node.name}")
        elif place not in places:
            places.append(place)
    return places, notes


def _has_norm(graph: Graph, node: Node) -> bool:
    """Whether a norm follows the head's pooling (ConvNeXt): the classifier is served."""
    todo = list(graph.readers[node.index])
    while todo:
        i = todo.pop()
        if graph.nodes[i].role in ("norm", "kn_norm"):
            return True
        todo.extend(graph.readers[i])
    return False


def _chain_to(graph: Graph, node: Node) -> tuple[list[Node], Node]:
    """The steps from the last feature map to the head's pooling `node`, and the step that made that map."""
    chain, source = [node], graph.nodes[node.inputs[0]]
    while source.role in _CHAIN and source.inputs:
        chain.append(source)
        source = graph.nodes[source.inputs[0]]
    return chain[::-1], source


def _place(graph: Graph, chain: list[Node], ndim: int) -> Place | None:
    """The activation if it is a module called once (the papers' order: norm, activation, pooling), else the first
    module of the chain that is."""
    modules = [n for n in chain if n.op == "module" and len(graph.calls[n.name]) == 1]
    acts = [n for n in modules if n.role == "act"]
    chosen = next(iter(acts + modules), None)
    return None if chosen is None else Place(chosen.name, chosen.role, ndim)
