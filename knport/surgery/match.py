"""From the graph to pairs: which norms go, and which convolutions and linear layers do their work."""

from __future__ import annotations

from dataclasses import dataclass

from knport.surgery.config import KNConfig
from knport.surgery.fold import affine_behind, foldable
from knport.surgery.graph import Graph
from knport.surgery.head import norms_before_head
from knport.surgery.kinds import channels_last, is_pixel_norm
from knport.surgery.roles import SHUFFLES, TRANSPARENT
from knport.surgery.sites import Site, ends_behind, layer_before, norms_behind


@dataclass(frozen=True)
class Match:
    """The outcome: paths by what happens to them, and for each changed one its partners' paths.

    Args:
        absorbed: norms that go -> the layers that do their work.
        final: norms before the head, which become KernelNorms.
        lone: norms that become KernelNorms because nothing can do their work.
        layers: convolutions and linear layers that become KNConv and KNLinear -> their norms.
        folded: those of them whose norm's gain and bias go into their weights -> that norm.
        affine: those whose output another norm read, and nothing else -> that norm, whose gain and bias are the last
            thing that happens to the output and go into the weights too.
    """

    absorbed: dict[str, list[str]]
    final: set[str]
    lone: set[str]
    layers: dict[str, list[str]]
    folded: dict[str, str]
    affine: dict[str, str]

    def calls(self, graph: Graph) -> set[int]:
        """Calls of the norms that go and of the layers that do their work, but for exact pairs."""
        exact = {*self.folded, *self.folded.values()}
        return {i for path in (*self.absorbed, *self.layers) if path not in exact for i in graph.calls[path]}


def match(graph: Graph, sites: dict[str, Site], blocked: dict[str, str], config: KNConfig) -> Match:
    """Pair norms with layers.

    First the exact pairs (`fold.foldable`). Then the others: a convolution or linear layer that only norms read takes
    over from them, and so do all that read a norm (through activations, pooling, dropout, concatenation). A module
    that is called several times must fit at every call, so whatever does not fit is struck out until nothing changes.
    """
    exact = foldable(graph, sites, blocked)
    folded = {taker: norm for norm, takers in exact.items() for taker in takers}
    pairing = _Pairing(graph, sites, blocked, config, exact)
    layers = {p for p, s in sites.items() if s.kind != "norm" and not s.ours and p not in blocked}
    while True:
        absorbed = {p: found for p in pairing.norms - pairing.final if (found := pairing.takers(p, layers))}
        fitting = {p for p in layers if p in folded or pairing.givers(p, absorbed)}
        if fitting == layers:
            break
        layers = fitting
    order = [p for p in sites if p in layers]
    behind = {p: norm for p in order if (norm := affine_behind(graph, sites[p], sites, absorbed))}
    return Match(
        {p: {**exact, **absorbed}[p] for p in sites if p in exact or p in absorbed},
        pairing.final,
        pairing.norms - pairing.final - set(absorbed),
        {p: ([folded[p]] if p in folded else []) + pairing.givers(p, absorbed) for p in order},
        folded,
        behind,
    )


class _Pairing:
    """Norms and layers side by side, those of exact pairs left out."""

    def __init__(self, graph: Graph, sites: dict[str, Site], blocked: dict[str, str], config: KNConfig, exact: dict):
        self.graph, self.head, self.pooled = graph, graph.head(), graph.pooled()
        self.norms = {
            path
            for path, site in sites.items()
            if site.kind == "norm" and not site.ours and path not in blocked and path not in exact
            if not is_pixel_norm(site.module) or self._may_change(site, config)
        }
        head_convs = {p for p, s in sites.items() if s.kind == "conv" and p in blocked}
        at_head = norms_before_head(graph, head_convs) if config.final_norm else set()
        self.final = {p for p in self.norms if all(i in at_head for i in graph.calls[p])}

    def _may_change(self, norm: Site, config: KNConfig) -> bool:
        """A norm of single positions that has no exact partners changes on (N, C, ...) maps of several only."""
        calls = self.graph.calls[norm.path]
        return not (channels_last(norm.module) or config.enlarge == "none" or any(self.pooled[i] for i in calls))

    def takers(self, norm: str, layers: set[str]) -> list[str]:
        """The layers that do the work of `norm`; empty when one of its calls has none."""
        takers: dict[str, None] = {}
        for index in self.graph.calls[norm]:
            here = self._before(index, layers) + self._after(index, layers)
            if not here:
                return []
            takers.update(dict.fromkeys(here))
        return list(takers)

    def _before(self, norm: int, layers: set[str]) -> list[str]:
        layer = layer_before(self.graph, norm)
        if layer not in layers:
            return []
        ends = [end for i in self.graph.calls[layer] for end in ends_behind(self.graph, i)]
        return [layer] if all(end.role == "norm" and end.name in self.norms for end in ends) else []

    def _after(self, norm: int, layers: set[str]) -> list[str]:
        ends = self.graph.ends(norm, TRANSPARENT)
        if not all(end.role == "conv" for end in ends):
            ends = self.graph.ends(norm, TRANSPARENT | SHUFFLES)
            if not all(end.role == "linear" and end.tokens.norm == norm for end in ends):
                return []
            if any(self.head[end.index] and not self.pooled[norm] for end in ends):
                return []  # the classifier reads a feature map's norm: the last one, which stays a norm
        return [end.name for end in ends] if all(end.name in layers for end in ends) else []

    def givers(self, layer: str, absorbed: dict[str, list[str]]) -> list[str]:
        """The norms for which `layer` is changed; empty when one of its calls has none."""
        givers: dict[str, None] = {}
        for index in self.graph.calls[layer]:
            behind = [norm.name for norm in norms_behind(self.graph, index)]
            here = behind if all(name in absorbed or name in self.final for name in behind) else []
            here += [name for name in self._read(index) if layer in absorbed.get(name, ())]
            if not here:
                return []
            givers.update(dict.fromkeys(here))
        return list(givers)

    def _read(self, layer: int) -> list[str]:
        """The norms that a call of a layer reads."""
        node = self.graph.nodes[layer]
        if node.role == "linear":
            return [] if node.tokens.norm is None else [self.graph.nodes[node.tokens.norm].name]
        return [end.name for end in self.graph.ends(layer, TRANSPARENT, back=True) if end.role == "norm"]
