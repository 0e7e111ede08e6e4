"""match_params and match_macs: resize a converted network until it counts what the original counts.

The converted network is followed once (`channel_groups`), the widths that its code holds as numbers are found by
running it with every width changed, and the rest is a search on a quadratic form (`width_search`) that rebuilds
nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from knport.errors import KNPortError, UnknownName
from knport.surgery.budget import parameters_of
from knport.surgery.channel_groups import follow
from knport.surgery.copying import copy_onto
from knport.surgery.resizing import KeptWidths, Resizing, WidthChange
from knport.surgery.width_form import Form, Terms, count
from knport.surgery.width_network import Sizes, WidthNetwork
from knport.surgery.width_search import search
from knport.surgery.widths import Axis
from knport.surgery.widths_text import named

if TYPE_CHECKING:
    from knport.surgery.plan import Plan

STRATEGIES = ("width", "inner")
TOLERANCE, GROUPED_TOLERANCE = 0.005, 0.01
_OUTER = ("residual sum", "concatenation", "classifier")  # what sees a width that the strategy "inner" leaves


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is to be counted, how much of it is wanted, and which widths may change for it.

    Args:
        macs: multiply-accumulates per image, else parameters.
        wanted: "model" or a number.
        strategy: "width" or "inner".
    """

    macs: bool
    wanted: Any
    strategy: str

    @property
    def quantity(self) -> str:
        return "MACs" if self.macs else "parameters"

    @property
    def asked(self) -> str:
        """The argument as the caller wrote it."""
        return f"{'match_macs' if self.macs else 'match_params'}={self.wanted!r}"


def goal_of(match_params: Any, match_macs: Any, strategy: str) -> Goal | None:
    """The goal that the arguments of `knport.plan` state; None for none, an error for one that makes no sense."""
    if strategy not in STRATEGIES:
        raise UnknownName("strategy", strategy, STRATEGIES)
    if match_params is not None and match_macs is not None:
        raise KNPortError("match_params and match_macs are both given; widths can meet one of them")
    if match_params is None and match_macs is None:
        return None
    macs = match_macs is not None
    goal = Goal(macs=macs, wanted=match_macs if macs else match_params, strategy=strategy)
    number = isinstance(goal.wanted, int | float) and not isinstance(goal.wanted, bool) and goal.wanted >= 1
    if goal.wanted != "model" and not number:
        raise KNPortError(f'{goal.asked}; expected "model" or a number of {goal.quantity}, at least 1')
    return goal


def match_widths(model: nn.Module, plan: Plan, goal: Goal, example_inputs: Any = None) -> Resizing:
    """The `Resizing` that gives `model`, once `plan` is carried out, the wanted count.

    Args:
        model: the original network; only read.
        plan: its conversion, without a resizing.
        goal: see `Goal`.
        example_inputs: as for `knport.plan`.

    Raises:
        KNPortError: the network cannot be followed, or the target cannot be met; the message names the nearest count
            and the layers that keep their widths, with the reasons.
    """
    network = WidthNetwork(model, plan, example_inputs)
    terms = network.products if goal.macs else network.terms
    unit = network.batch if goal.macs else 1
    before = _count_original(model, network, goal)
    converted = count(network.widths, terms)
    target = before if goal.wanted == "model" else round(goal.wanted * unit)
    sizes, factor = {}, 1.0
    if abs(converted - target) > TOLERANCE * target:
        network.settle()
        sizes, factor = _solve(network, goal, terms, target)
    counts = before // unit, converted // unit, count(network.widths, terms, sizes) // unit
    return _report(network, goal, sizes, factor, target // unit, counts)


def _count_original(model: nn.Module, network: WidthNetwork, goal: Goal) -> int:
    if not goal.macs:
        return parameters_of(model)
    flow = follow(copy_onto(model, network.device).eval(), network.args, network.kwargs)
    return count(flow.widths, flow.products)


def _solve(network: WidthNetwork, goal: Goal, terms: Terms, target: int) -> tuple[Sizes, float]:
    """Sizes that meet the target, with a run of the network at them to prove it."""
    while True:
        free = [w for w in network.free() if _may_change(network, w, goal.strategy)]
        form = Form(network.widths, free, terms)
        now = torch.tensor([network.widths.size[w] for w in free], dtype=torch.float64)
        blocks = _blocks(network, free)
        found, factor = search(form, now, blocks, target, TOLERANCE)
        gap = abs(form(found) - target) / target
        allowed = GROUPED_TOLERANCE if bool((blocks > 1).any()) else TOLERANCE
        if gap > allowed:
            raise KNPortError(_out_of_reach(network, goal, form(found), target))
        sizes = {w: int(x) for w, x in zip(free, found.tolist(), strict=True) if x != network.widths.size[w]}
        step = network.failing_step(sizes)
        if step is None:
            return sizes, factor
        network.fix(step)


def _may_change(network: WidthNetwork, width: int, strategy: str) -> bool:
    return strategy == "width" or not any(word in _OUTER for word in network.widths.marks.get(width, ()))


def _blocks(network: WidthNetwork, free: list[int]) -> torch.Tensor:
    """How many channels of one layer a width stands for: more than one where channels come in groups."""
    most: Counter[int] = Counter()
    for axis in network.flow.layers.values():
        most |= Counter(network.widths.resolve(axis))
    return torch.tensor([max(1, most[w]) for w in free], dtype=torch.float64)


def _out_of_reach(network: WidthNetwork, goal: Goal, nearest: int, target: int) -> str:
    unit = network.batch if goal.macs else 1
    kept = "; ".join(f"{row.reason}: {named(row)}" for row in _kept(network, goal.strategy))
    return (
        f"{goal.asked}: {target // unit:,} {goal.quantity} are out of reach of strategy={goal.strategy!r}; the nearest "
        f"that was found is {nearest // unit:,} ({nearest / target - 1:+.2%}). "
        f"Widths that cannot change: {kept or 'none'}. Ask for a nearer number"
        + (", or take strategy='width'" if goal.strategy == "inner" else "")
    )


def _report(
    network: WidthNetwork, goal: Goal, sizes: Sizes, factor: float, target: int, counts: tuple[int, int, int]
) -> Resizing:
    shapes, attributes, features = network.rows(sizes)
    of_head, note = network.head_attributes(sizes) if sizes else ([], [])
    return Resizing(
        quantity=goal.quantity,
        target=target,
        strategy=goal.strategy,
        counts=counts,
        parameters=count(network.widths, network.terms, sizes),
        multiplier=factor,
        changes=_changes(network, sizes),
        kept=_kept(network, goal.strategy) if sizes else (),
        shapes=tuple(shapes),
        attributes=(*attributes, *of_head),
        features=tuple(features),
        notes=(*network.notes, *note) if sizes else (),
    )


def _changes(network: WidthNetwork, sizes: Sizes) -> tuple[WidthChange, ...]:
    together: dict[Axis, list[str]] = {}
    for path, axis in network.flow.layers.items():
        together.setdefault(network.widths.resolve(axis), []).append(path)
    total = network.widths.total
    rows = [WidthChange(layers=tuple(p), before=total(a), after=total(a, sizes)) for a, p in together.items()]
    return tuple(row for row in rows if row.before != row.after)


def _kept(network: WidthNetwork, strategy: str) -> tuple[KeptWidths, ...]:
    """Layers with a part that may not change, by the reason."""
    reasons: dict[str, list[str]] = {}
    for path, axis in network.flow.layers.items():
        why = next(filter(None, (_why_kept(network, w, strategy) for w in network.widths.resolve(axis))), None)
        if why:
            reasons.setdefault(why, []).append(path)
    return tuple(KeptWidths(layers=tuple(layers), reason=why) for why, layers in reasons.items())


def _why_kept(network: WidthNetwork, width: int, strategy: str) -> str | None:
    if width in network.widths.frozen:
        return network.widths.frozen[width]
    seen = [word for word in _OUTER if word in network.widths.marks.get(width, ())]
    return f"strategy 'inner' leaves what a {seen[0]} sees" if seen and strategy == "inner" else None
