"""convert: rewrite a vision network to kernel normalization. Read the model, plan, swap modules on a copy."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from knport.errors import KNPortError, NothingToConvert, UnsupportedModule
from knport.surgery.budget import parameters_after, parameters_of
from knport.surgery.config import KNConfig
from knport.surgery.copying import copy_model
from knport.surgery.filters import select, texts
from knport.surgery.guard import refuse_wrapped
from knport.surgery.head import missing_norms
from knport.surgery.inplace import switch_off
from knport.surgery.match import match
from knport.surgery.matching import Goal, goal_of, match_widths
from knport.surgery.plan import ALREADY, KEPT, FinalNorm, Plan, Verdict, structure_of
from knport.surgery.read import read_all
from knport.surgery.sites import blocked_sites, find_sites
from knport.surgery.verdicts import verdicts
from knport.surgery.widths_text import with_widths

__all__ = ["KNConfig", "Plan", "Verdict", "convert", "plan"]


def plan(
    model: nn.Module,
    config: KNConfig | None = None,
    *,
    include: Any = None,
    exclude: Any = None,
    example_inputs: Any = None,
    match_params: Any = None,
    match_macs: Any = None,
    strategy: str = "width",
) -> Plan:
    """What `convert` would do to `model`: one verdict and reason for every norm and every convolution.

    Nothing is changed. The arguments are those of `convert`.

    Example:
        >>> plan = knport.plan(timm.create_model("resnet50"))
        >>> print(plan)
        >>> model = plan.apply(timm.create_model("resnet50", pretrained=True))
    """
    config = KNConfig() if config is None else config
    _check_arguments(config)
    goal = goal_of(match_params, match_macs, strategy)
    refuse_wrapped(model)
    sites = find_sites(model)
    if "" in sites and sites[""].kind != "linear":
        hint = "wrap it, torch.nn.Sequential(module), and convert that"
        raise UnsupportedModule("", f"the model is itself a {sites[''].kind} ({type(model).__name__})", hint)
    selection = select(model, {path: (path, *site.aliases) for path, site in sites.items()}, include, exclude)
    graph = read_all(model, example_inputs, [path for path, site in sites.items() if site.kind != "linear"])
    blocked = blocked_sites(graph, sites, selection)
    found = match(graph, sites, blocked, config)
    removed = {i for path in found.absorbed for i in graph.calls[path]}
    places, notes = missing_norms(graph, found.calls(graph)) if config.final_norm else ([], [])
    rows = verdicts(graph, sites, blocked, found, config)
    made = Plan(
        model=type(model).__name__,
        config=config,
        verdicts=rows,
        final_norms=tuple(_final_norm(place, config) for place in places),
        inplace_off=switch_off(graph, removed, dict(model.named_modules())),
        notes=(*notes, *_batch_note(rows), *_dropout_note(rows, config)),
        parameters=(parameters_of(model), parameters_after(model, rows)),
        reader=graph.reader,
        input_shape=graph.input_shape,
        structure=structure_of(model),
        include=texts(include, "include"),
        exclude=texts(exclude, "exclude"),
    )
    return made if goal is None else _resized(model, made, goal, example_inputs)


def convert(
    model: nn.Module,
    config: KNConfig | None = None,
    *,
    include: Any = None,
    exclude: Any = None,
    example_inputs: Any = None,
    match_params: Any = None,
    match_macs: Any = None,
    strategy: str = "width",
    inplace: bool = False,
) -> nn.Module:
    """A copy of `model` with kernel normalization in the place of its normalization layers.

    A convolution before or behind a norm becomes a KNConv with the same weights and the norm goes (a bias that
    BatchNorm took away again goes with it, and one of 0 at the input is spread: docs/convert.md); a norm that no
    convolution can take over from, and the last one before the head, becomes a KernelNorm (Nasirigerdeh et al., TMLR
    2024). 1x1 convolutions are enlarged (`KNConfig.enlarge`). A linear layer that reads a LayerNorm or RMSNorm becomes
    a KNLinear, with the norm's gain and bias in its weights and statistics of neighbouring tokens where these lie on a
    known grid; with ``KNConfig(enlarge="none", dropout=0)`` it computes what LayerNorm and linear layer did. Class,
    methods, names, hooks, device, dtype, train flag and `requires_grad` stay. `knport.plan` with the same arguments
    says what is done and why.

    Args:
        model: a vision network with BatchNorm, GroupNorm, InstanceNorm, LayerNorm or their kin.
        config: see `KNConfig`.
        include: the norms to convert; their convolutions and linear layers follow. A glob (``"layer1.*"``) or
            ``"re:..."`` on full dotted names, a module class, a callable (name, module) -> bool, or a list of those.
            What names a container covers all in it.
        exclude: norms, convolutions and linear layers to leave alone, likewise.
        example_inputs: what the model's forward takes, to read it with: a tensor, a tuple of arguments or a dict of
            keyword arguments. Default: zeros of the size that the model states, else (2, channels, 224, 224).
        match_params: resize the converted network until it has the parameters of `model` ("model") or a number of them,
            within 0.5 % (1 % where channels come in groups). All widths are multiplied by one factor, then rounded.
            Resized layers keep the first channels of their weights, scaled to the new fan-in: what a trained network
            knew is lost. The output keeps its size.
        match_macs: the same for multiply-accumulates per image.
        strategy: "width" resizes all widths, "inner" only those that no residual sum, concatenation or classifier sees.
        inplace: change `model` itself; an optimizer that was made before knows nothing of the new parameters.

    Returns:
        The converted model.

    Raises:
        NothingToConvert: no norm can be converted.
        UnmatchedPattern: a filter matches nothing.
        AlreadyWrapped: the model is wrapped, compiled or prepared.
        UnsupportedModule: a function works in place where that would corrupt a skip connection.
        KNPortError: the model could not be run to read it. On any error nothing has changed.

    Example:
        >>> model = knport.convert(timm.create_model("resnet50"), knport.KNConfig(dropout=0.1), exclude="layer4")
    """
    made = plan(
        model,
        config,
        include=include,
        exclude=exclude,
        example_inputs=example_inputs,
        match_params=match_params,
        match_macs=match_macs,
        strategy=strategy,
    )
    if made.changes:
        return made.apply(model, inplace=inplace)
    if not any(verdict.verdict == ALREADY for verdict in made.verdicts):
        raise NothingToConvert(_nothing(made))
    warnings.warn(f"{made.model} is converted already; nothing was changed", UserWarning, stacklevel=2)
    return model if inplace else copy_model(model)


def _check_arguments(config: KNConfig) -> None:
    if not isinstance(config, KNConfig):
        raise KNPortError(f"config={config!r}; expected a knport.KNConfig")


def _resized(model: nn.Module, made: Plan, goal: Goal, example_inputs: Any) -> Plan:
    resizing = match_widths(model, made, goal, example_inputs)
    return dataclasses.replace(
        made,
        verdicts=with_widths(made.verdicts, resizing),
        parameters=(made.parameters[0], resizing.parameters),
        resizing=resizing,
    )


def _batch_note(rows: tuple[Verdict, ...]) -> list[str]:
    left = sum(1 for v in rows if v.verdict == KEPT and "BatchNorm" in v.layer)
    return [f"{left} BatchNorm stay: in training an image still depends on its batch"] if left else []


def _dropout_note(rows: tuple[Verdict, ...], config: KNConfig) -> list[str]:
    small = [v.path for v in rows if v.dropout == 0.0] if config.dropout else []
    return [f"no dropout in {', '.join(small)}: too few values in a unit (see KNConfig.dropout)"] if small else []


def _final_norm(place, config: KNConfig) -> FinalNorm:
    before = "the activation before the pooling" if place.role == "act" else "where the head begins"
    return FinalNorm(path=place.path, before=before, dropout=config.final_dropout, ndim=place.ndim)


def _nothing(made: Plan) -> str:
    norms = {v.layer.split()[0]: v.reason for v in made.verdicts if v.kind == "norm"}
    if not norms:
        return f"{made.model} holds no normalization to convert"
    seen = "; ".join(f"{layer}: {reason}" for layer, reason in norms.items())
    return f"no normalization of {made.model} can be converted ({seen})"
