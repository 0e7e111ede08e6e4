"""Gain and bias of norms that go: into which layers' weights they can be folded, and how.

Of a norm of single positions (LayerNorm, RMSNorm) whose readers take whole channel vectors (linear layers, 1x1
convolutions) into those: at window 1 such a layer on kernel normalized input is the norm and the layer. Of a norm right
behind a convolution or linear layer into that: a branch that begins at zero, because its last gain does, still does;
and a bias that BatchNorm took away again, drawn at random or left over, does not come to life.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from knport.surgery.graph import Graph, Node
from knport.surgery.kinds import activates_before_gain, channels_last, fused_parts, is_pixel_norm, takes_means
from knport.surgery.roles import SHUFFLES
from knport.surgery.sites import Site, pads

_AS_THEY_ARE = frozenset({"identity", "dropout"})
_AS_IT_IS = frozenset({"identity"})
GOLDEN = (math.sqrt(5.0) - 1) / 2  # whose multiples modulo 1 fill the unit interval evenly, however many are taken


def foldable(graph: Graph, sites: dict[str, Site], blocked: dict[str, str]) -> dict[str, list[str]]:
    """path of a norm -> its readers, for each norm that all of its readers can do the work of, exactly."""
    head = graph.head()
    found = {}
    for path, site in sites.items():
        if site.kind == "norm" and not site.ours and path not in blocked and is_pixel_norm(site.module):
            readers = [] if fused_parts(site.module) else _readers(graph, site)
            if readers and all(_takes(graph, end, site, sites, blocked) and not head[end.index] for end in readers):
                found[path] = list(dict.fromkeys(end.name for end in readers))
    return found


def _readers(graph: Graph, norm: Site) -> list[Node]:
    """What reads the norm; empty if one of its calls is read by nothing."""
    ends = [graph.ends(index, SHUFFLES) for index in graph.calls[norm.path]]
    return [end for one in ends for end in one] if all(ends) else []


def _takes(graph: Graph, end: Node, norm: Site, sites: dict[str, Site], blocked: dict[str, str]) -> bool:
    """Whether the layer called at `end` reads nothing but whole channel vectors of this norm, at each of its calls."""
    site = sites.get(end.name) if end.op == "module" else None
    if site is None or site.kind == "norm" or site.ours or site.tied or end.name in blocked:
        return False
    calls = graph.calls[end.name]
    if site.kind == "linear":
        return all(graph.nodes[i].tokens.norm in graph.calls[norm.path] for i in calls)
    plain = set(site.module.kernel_size) == {1} and not any(pads(site.module)) and not channels_last(norm.module)
    sources = {source.name for i in calls for source in graph.ends(i, _AS_THEY_ARE, back=True)}
    return plain and sources == {norm.path}


def affine_behind(graph: Graph, layer: Site, sites: dict[str, Site], absorbed: dict[str, list[str]]) -> str | None:
    """The one norm that goes, does its work in `layer` and is all that reads it, at each call; None if there is none.

    None also for a norm that leaves nothing to do: without gain and bias, and without a bias of the layer to take away.

    An activation, a dropout or a pooling in between, and an activation that comes before the norm's gain (EvoNorm),
    keep the gain from being the last thing that happens to the layer's output.
    """
    if layer.tied:
        return None
    through = _AS_IT_IS if layer.kind == "conv" else _AS_IT_IS | {"reshape"}
    ends = [graph.ends(index, through) for index in graph.calls[layer.path]]
    readers = {end.name if end.op == "module" else "" for one in ends for end in one}
    norm = next(iter(readers)) if len(readers) == 1 and all(ends) else ""
    if layer.path not in absorbed.get(norm, ()) or activates_before_gain(sites[norm].module):
        return None
    channels = {getattr(sites[norm].module, name, None) for name in ("weight", "bias")} - {None}
    cancelled = takes_means(sites[norm].module) and layer.module.bias is not None
    shapes = [graph.nodes[index].shape or () for index in graph.calls[layer.path]]
    own = len(layer.module.weight)
    clear = layer.kind == "conv" or all(shape[1:].count(own) == 1 for shape in shapes)  # which dimension a view keeps
    return norm if (channels or cancelled) and clear and all(values.numel() == own for values in channels) else None


def neutral(norm: nn.Module) -> bool:
    """Whether a norm's gain is 1 and its bias 0 throughout, as both begin; so too on the meta device."""
    gain, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    return all(t is None or t.is_meta or bool((t == start).all()) for t, start in ((gain, 1), (shift, 0)))


def scaled(weight: Tensor, bias: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer whose output `norm`, but for normalizing it, would have read.

    Args:
        weight: (out, ...).
        bias: (out,); nothing is left of it where the norm takes each channel's mean away.
        norm: with gain and bias (out,), or without.
    """
    if takes_means(norm):
        bias = torch.zeros_like(bias)
    gain, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    if gain is not None:
        gain = gain.detach().flatten().to(weight.dtype)
        weight, bias = weight * gain.view(-1, *(1,) * (weight.dim() - 1)), bias * gain
    return weight, bias if shift is None else bias + shift.detach().flatten().to(bias.dtype)


def spread_bias(weight: Tensor) -> Tensor:
    """A bias for a KNConv that reads images: values around 0, no two channels alike, the same at each call.

    Where an image is flat a normalized unit is 0 and the output is the bias. If that is 0, or hardly more after the
    first steps, the next layer's unit has next to no variance, and its gradient is divided by sqrt(eps): one flat image
    then outweighs the rest of a batch. The values fill the interval that torch draws biases from, for weights like
    these: SD 1 / sqrt(n) of what the filters of n values put out.

    Args:
        weight: (out, ...).

    Returns:
        (out,).
    """
    bound = math.sqrt(3.0) * weight.detach().square().mean().sqrt()  # of a uniform distribution with the weights' RMS
    steps = torch.arange(len(weight), device=weight.device, dtype=torch.float64) * GOLDEN
    return (bound * (2 * (steps % 1) - 1)).to(weight.dtype)


def folded(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer that reads what `norm` would have read, with the norm's gain and bias in them.

    Args:
        weight: (out, in / groups), or (out, in / groups, 1, ...) of a 1x1 convolution.
        bias: (out,) or None.
        norm: with gain and bias (in,), or without.
    """
    flat = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    new = flat.new_zeros(len(flat)) if bias is None else bias.to(flat.dtype)
    gain, shift = (_per_filter(getattr(norm, name, None), flat) for name in ("weight", "bias"))
    if shift is not None:
        new = new + (flat * shift).sum(1)
    if gain is not None:
        flat = flat * gain
    return flat.to(weight.dtype).view_as(weight), new.to(weight.dtype)


def _per_filter(values: Tensor | None, weight: Tensor) -> Tensor | None:
    """(in,) values -> one row per filter, of the inputs that it reads: (out, in / groups)."""
    if values is None:
        return None
    groups = values.numel() // weight.shape[1]
    rows = values.to(weight.dtype).view(groups, 1, -1)
    return rows.expand(groups, len(weight) // groups, -1).reshape(weight.shape)
