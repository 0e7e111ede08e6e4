"""replace_norm: put another normalization in the place of a network's own, the competitors of kernel normalization."""

from __future__ import annotations

from typing import Any

from torch import nn

from knport.errors import NothingToConvert, UnsupportedModule
from knport.surgery.copying import copy_model
from knport.surgery.filters import select, texts
from knport.surgery.graph import Graph
from knport.surgery.guard import refuse_wrapped
from knport.surgery.inplace import switch_off
from knport.surgery.norm_convs import conv_verdicts
from knport.surgery.norm_kinds import NORMS, NormOptions, kind_of
from knport.surgery.norm_match import Asked, norm_verdicts
from knport.surgery.norm_plan import ALREADY, NormPlan, NormVerdict
from knport.surgery.plan import structure_of
from knport.surgery.read import read_all
from knport.surgery.sites import Site, blocked_sites, find_sites

__all__ = ["NORMS", "NormPlan", "plan_norm", "replace_norm"]


def plan_norm(
    model: nn.Module,
    norm: str,
    *,
    groups: int | None = None,
    group_size: int | None = None,
    window_size: int | tuple[int, int] | None = None,
    include: Any = None,
    exclude: Any = None,
    example_inputs: Any = None,
) -> NormPlan:
    """What `replace_norm` would do to `model`: one verdict and reason for every norm.

    Nothing is changed. The arguments are those of `replace_norm`.

    Example:
        >>> print(knport.plan_norm(torchvision.models.resnet18(), "group"))
    """
    options = NormOptions(groups=groups, group_size=group_size, window_size=window_size)
    kind_of(norm, options)
    refuse_wrapped(model)
    sites = find_sites(model)
    if not any(site.kind == "norm" for site in sites.values()):
        raise NothingToConvert(f"{type(model).__name__} has no norm that {norm!r} could replace")
    if "" in sites:
        hint = "wrap it, torch.nn.Sequential(module), and replace the norms of that"
        raise UnsupportedModule("", f"the model is itself a {sites[''].kind} ({type(model).__name__})", hint)
    touched = {p: s for p, s in sites.items() if s.kind == "norm" or norm == "group_ws"}
    selection = select(model, {path: (path, *site.aliases) for path, site in touched.items()}, include, exclude)
    graph = read_all(model, example_inputs, sites)
    modules = dict(model.named_modules())
    rows = norm_verdicts(graph, sites, Asked(norm, options, selection), modules)
    if norm == "group_ws":
        rows += conv_verdicts(graph, sites, blocked_sites(graph, sites, selection), rows)
    return NormPlan(
        model=type(model).__name__,
        norm=norm,
        options=options,
        verdicts=_in_order(rows, sites),
        inplace_off=_inplace_off(graph, norm, rows, modules),
        reader=graph.reader,
        input_shape=graph.input_shape,
        structure=structure_of(model),
        include=texts(include, "include"),
        exclude=texts(exclude, "exclude"),
    )


def replace_norm(
    model: nn.Module,
    norm: str,
    *,
    groups: int | None = None,
    group_size: int | None = None,
    window_size: int | tuple[int, int] | None = None,
    include: Any = None,
    exclude: Any = None,
    example_inputs: Any = None,
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` with another normalization in the place of its own.

    Gains and biases are kept where both norms have them, as are eps, device, dtype, train flag, `requires_grad`, hooks
    and fused activations. LayerNorms over tokens or channels-last maps are replaced too, by a norm over the dimensions
    in between. `knport.plan_norm` with the same arguments says what is done and why.

    Args:
        model: any network.
        norm: the new norm:

            * "batch": BatchNorm.
            * "group": GroupNorm (Wu & He, 2018).
            * "layer": GroupNorm of one group, all channels and pixels, as in the papers' tables.
            * "instance": InstanceNorm with gain and bias.
            * "local_context": `knport.LocalContextNorm` (Ortiz et al., 2020).
            * "positional": `knport.PositionalNorm`, each pixel over its channels (Li et al., 2019).
            * "group_ws": GroupNorm, and weight standardization (Qiao et al., 2019) in the convolutions around it.
            * "frn": filter response normalization (Singh & Krishnan, 2020); its threshold takes the place of a ReLU.
            * "evonorm_s0": EvoNorm-S0 (Liu et al., 2020), which takes the place of norm and activation; behind a norm
              without activation nothing but gain and bias is left, as in timm's layer.
            * "none": nothing.

            "group_ws", "frn" and "evonorm_s0" are timm's layers.
        groups: of "group", "group_ws" and "evonorm_s0"; default 32. Where the channels are fewer than twice as many,
            groups of two channels or more.
        group_size: channels per group in the place of `groups`; of "local_context" too, default 2.
        window_size: pixels, (height, width) or one number for both, of "local_context"; default 227.
        include: the norms to replace: filters as in `knport.convert`.
        exclude: norms, and convolutions for "group_ws", to leave alone, likewise.
        example_inputs: what the model's forward takes, to read it with, as in `knport.convert`.
        inplace: change `model` itself.

    Returns:
        The rewritten model.

    Raises:
        UnknownName: for another `norm`.
        NothingToConvert: no norm can be replaced.
        UnmatchedPattern: a filter matches nothing.
        AlreadyWrapped: the model is wrapped, compiled or prepared.
        UnsupportedModule: "none" where a function in place would then corrupt a skip connection.
        KNPortError: an option that the norm does not have, or a model that could not be run to read it.
        ImportError: timm is needed and not there.

    Example:
        >>> model = knport.replace_norm(torchvision.models.resnet18(), "group", groups=16)
    """
    made = plan_norm(
        model,
        norm,
        groups=groups,
        group_size=group_size,
        window_size=window_size,
        include=include,
        exclude=exclude,
        example_inputs=example_inputs,
    )
    if made.changes:
        return made.apply(model, inplace=inplace)
    if not made.count("norm")[ALREADY]:
        raise NothingToConvert(_nothing(made))
    return model if inplace else copy_model(model)


def _in_order(rows: list[NormVerdict], sites: dict[str, Site]) -> tuple[NormVerdict, ...]:
    """In the order of the model's modules; functions, which are none of them, last."""
    order = {path: i for i, path in enumerate(sites)}
    return tuple(sorted(rows, key=lambda row: order.get(row.path, len(order))))


def _inplace_off(graph: Graph, norm: str, rows: list[NormVerdict], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """A norm makes a new tensor; where it goes, an activation in place would edit what a skip connection reads."""
    if norm != "none":
        return ()
    gone = {i for row in rows if row.changes for i in graph.calls[row.path]}
    return switch_off(graph, gone, modules)


def _nothing(made: NormPlan) -> str:
    seen = dict.fromkeys(f"{v.layer.split()[0]}: {v.reason}" for v in made.verdicts if v.kind == "norm")
    return f"no norm of {made.model} can be replaced by {made.norm!r} ({'; '.join(seen)})"
