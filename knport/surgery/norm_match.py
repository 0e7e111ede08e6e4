"""From the graph to verdicts of `replace_norm`: which norms give way to another, and why the rest stays."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from knport.surgery.filters import Selection
from knport.surgery.graph import Graph, Node, is_map
from knport.surgery.kinds import describe
from knport.surgery.norm_activation import activation_of
from knport.surgery.norm_kinds import KINDS, NormKind, NormOptions, group_count
from knport.surgery.norm_plan import ALREADY, KEPT, REPLACED, NormVerdict
from knport.surgery.norm_swap import channels_of
from knport.surgery.sites import Site

_KIN = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_KIN_NAMES = ("FrozenBatchNorm", "RmsNorm", "SimpleNorm", "FilterResponseNorm", "EvoNorm", "LocalContext", "Positional")
_KNOWN_LIBRARIES = ("torch.", "timm.", "torchvision.", "knport.")
_OVER_CHANNELS = ("LayerNorm", "RMSNorm", "RmsNorm", "SimpleNorm")  # of the last dimension, unless they say 2d
_READS_FEATURES = frozenset({"linear", "conv", "kn_conv", "pool", "output", "add", "norm", "kn_norm"})


@dataclass(frozen=True)
class Asked:
    """What the user asked for: a name of `KINDS`, its options, and the filters' outcome."""

    norm: str
    options: NormOptions
    selection: Selection

    @property
    def kind(self) -> NormKind:
        return KINDS[self.norm]


def norm_verdicts(
    graph: Graph, sites: dict[str, Site], asked: Asked, modules: dict[str, nn.Module]
) -> list[NormVerdict]:
    """One verdict per norm; a norm that is called as a function has a row too."""
    rows = [_verdict(graph, site, asked, modules) for site in sites.values() if site.kind == "norm"]
    for node in graph.nodes:
        if node.role == "functional norm":
            path = f"{node.owner}.{node.name}()".lstrip(".")
            reason = "called as a function, not as a module: nothing can be put in its place; make it a torch.nn module"
            layer = f"torch function {node.name}"
            rows.append(NormVerdict(path=path, kind="norm", layer=layer, verdict=KEPT, reason=reason))
    return rows


def _verdict(graph: Graph, site: Site, asked: Asked, modules: dict[str, nn.Module]) -> NormVerdict:
    row = NormVerdict(
        path=site.path, kind="norm", layer=describe(site.module), aliases=site.aliases, verdict=KEPT, reason=""
    )
    problem = asked.selection.refusal(site.path) or _problem(site.module)
    if problem is None and not graph.calls.get(site.path):
        problem = "never called as a module when the model was run to read it"
    if problem:
        return replace(row, reason=problem)
    last = _channels_last(site.module)
    if same := _already(site.module, asked, last):
        return replace(row, verdict=ALREADY, reason=same)
    ndims = {len(graph.nodes[i].shape or ()) - 2 for i in graph.calls[site.path]}
    problem = _place_problem(graph, site, asked, ndims, last)
    if problem:
        return replace(row, reason=problem)
    taken = activation_of(graph, site, asked.kind, modules)
    return replace(
        row,
        verdict=REPLACED,
        reason=_words(site.module, asked) + taken.words,
        ndim=min(ndims),
        channels_last=last and min(ndims) > 0,
        activation=taken.own,
        replaces_activation=taken.replaces,
    )


def _words(norm: nn.Module, asked: Asked) -> str:
    """What stands in its place, and what is kept."""
    if asked.norm == "none":
        return "removed"
    text = f"becomes {asked.kind.title}"
    channels = channels_of(norm)
    if "groups" in asked.kind.options:
        groups = group_count(channels, asked.options)
        text += f" of {groups} groups of {channels // groups} channels"
    elif asked.norm == "layer":
        text += " of one group: all channels and pixels"
    kept = [word for word, name in (("gain", "weight"), ("bias", "bias")) if getattr(norm, name, None) is not None]
    return text + (f"; {' and '.join(kept)} kept" if kept else "; gain starts at 1, bias at 0")


def _problem(norm: nn.Module) -> str | None:
    """Why this norm cannot give way to another, wherever it stands."""
    name = type(norm).__name__
    if "forward" in vars(norm):
        return "its forward is patched on the instance"
    if not isinstance(norm, _KIN) and not name.startswith(_KIN_NAMES):
        return f"{name} is more than a norm or none that is known here; what it does besides would be lost"
    if not type(norm).forward.__module__.startswith(_KNOWN_LIBRARIES):
        return f"{name} has its own forward, which another norm would drop"
    return None if channels_of(norm) else f"{name} normalizes several dimensions at once; no channels to go by"


def _channels_last(norm: nn.Module) -> bool:
    kin = isinstance(norm, nn.LayerNorm | nn.RMSNorm) or type(norm).__name__.startswith(_OVER_CHANNELS)
    return kin and "2d" not in type(norm).__name__


def _already(norm: nn.Module, asked: Asked, last: bool) -> str | None:
    """Why nothing is to be done to this norm, or None."""
    name = type(norm).__name__
    over_channels = last or name.startswith("LayerNorm")
    groups = group_count(channels_of(norm), asked.options) if asked.norm in ("group", "group_ws") else 1
    same = {
        "batch": isinstance(norm, _BatchNorm),
        "instance": isinstance(norm, _InstanceNorm),
        "local_context": name == "LocalContextNorm",
        "positional": over_channels or name == "PositionalNorm",
        "frn": name.startswith("FilterResponseNorm"),
        "evonorm_s0": name == "EvoNorm2dS0",
    }
    if asked.norm in ("group", "group_ws", "layer"):
        same[asked.norm] = isinstance(norm, nn.GroupNorm) and norm.num_groups == groups
    if asked.norm == "layer":
        same["layer"] |= isinstance(norm, nn.LayerNorm)
    if not same.get(asked.norm):
        return None
    return f"{name} is {asked.norm} normalization already" + ("; its statistics stay" if asked.norm == "batch" else "")


def _place_problem(graph: Graph, site: Site, asked: Asked, ndims: set[int], last: bool) -> str | None:
    """Why the new norm cannot stand where the old one does."""
    kind = asked.kind
    shapes = {graph.nodes[i].shape for i in graph.calls[site.path]}
    if len(ndims) > 1:
        return f"called with tensors of different dimensions, {sorted(shapes)}"
    ndim = min(ndims)
    if last and ndim == 2 and all(_in_attention(graph, graph.nodes[i]) for i in graph.calls[site.path]):
        return "normalizes queries or keys inside attention, not features"
    if ndim not in kind.ndims:
        return f"{kind.title} takes {' or '.join(f'{d}D' for d in kind.ndims)} maps; this norm reads {min(shapes)}"
    if _needs_map(site.module, asked) and not all(is_map(_channels_first(shape, last)) for shape in shapes):
        return f"reads {min(shapes)}, one position per image, which {kind.title} could only bring to a constant"
    return None


def _needs_map(norm: nn.Module, asked: Asked) -> bool:
    """Whether values of one position would come out of the new norm as constants: two of a group as +1 and -1."""
    if "groups" not in asked.kind.options:
        return asked.kind.needs_map
    return channels_of(norm) // group_count(channels_of(norm), asked.options) <= 2


def _channels_first(shape: tuple[int, ...], last: bool) -> tuple[int, ...]:
    return (shape[0], shape[-1], *shape[1:-1]) if last else shape


def _in_attention(graph: Graph, node: Node) -> bool:
    """Whether a norm of (N, heads, length, width) stands between a projection and the product of queries and keys."""
    views = frozenset({"reshape", "identity"})
    from_projection = all(end.role == "linear" for end in graph.ends(node.index, views, back=True))
    ends = graph.ends(node.index, views | {"dropout"})
    return from_projection and not any(end.role in _READS_FEATURES for end in ends)
