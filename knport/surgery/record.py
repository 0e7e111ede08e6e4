"""What was done to a model, left on the model itself, so that `knport.save` can write down how to do it again."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from knport.surgery.norm_plan import NormPlan
    from knport.surgery.plan import Plan

_ATTRIBUTE = "_knport_plans"  # an attribute like any other: deepcopy and pickle take it along
Model = TypeVar("Model", bound=nn.Module)


def remember(model: Model, plan: Plan | NormPlan) -> Model:
    """`model`, with `plan` noted as the last that was carried out on it."""
    setattr(model, _ATTRIBUTE, (*plans_of(model), plan))
    return model


def plans_of(model: nn.Module) -> tuple[Plan | NormPlan, ...]:
    """The plans that were carried out on `model`, in order."""
    return getattr(model, _ATTRIBUTE, ())
