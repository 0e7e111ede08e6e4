"""The optimizer of a run: torch's SGD and AdamW, any other by timm, with the weight decay of norms set apart if asked.

Learning rates are set by the loop before each step (`experiments.schedule`), the same for all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

import knport
from experiments.run import Run
from experiments.settings import OptimizationSettings
from knport.errors import UnknownName

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    LayerNorm2d,
    knport.LocalContextNorm,
    knport.PositionalNorm,
)
NUMBER = (bool, int, float)
SECOND_ORDER = ("adahessian",)  # need gradients of gradients


def build_optimizer(run: Run, net: nn.Module, *, fused: bool | None = None) -> torch.optim.Optimizer:
    """The optimizer of the parameters of `net`.

    Args:
        run: the run.
        net: the network on its device.
        fused: of SGD and AdamW: one kernel for all parameters; None for torch's choice.

    Raises: `UnknownName` for an optimizer that timm does not have.
    """
    settings = run.optimization
    groups = parameter_groups(net, settings)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=run.lr, momentum=settings.momentum, fused=fused)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=run.lr, fused=fused)
    from timm.optim import create_optimizer_v2, list_optimizers

    known = ("sgd", "adamw", *(name for name in list_optimizers() if name not in SECOND_ORDER))
    if settings.optimizer not in known:
        raise UnknownName("optimizer", settings.optimizer, known)
    return create_optimizer_v2(groups, settings.optimizer, lr=run.lr)


def parameter_groups(net: nn.Module, settings: OptimizationSettings) -> list[dict[str, object]]:
    """All parameters in the model's order, in one group, or with those of norms in a second."""
    if settings.norm_weight_decay is None:
        return [{"params": list(net.parameters()), "weight_decay": settings.weight_decay}]
    of_norms = {id(p) for module in net.modules() if isinstance(module, NORMS) for p in module.parameters(False)}
    others = [p for p in net.parameters() if id(p) not in of_norms]
    norms = [p for p in net.parameters() if id(p) in of_norms]
    groups = [{"params": others, "weight_decay": settings.weight_decay}]
    return groups + ([{"params": norms, "weight_decay": settings.norm_weight_decay}] if norms else [])


def numbers(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What an optimizer remembers beside tensors, for JSON: counts in its groups and beside parameters.

    SGD and AdamW of torch have none of it; some of timm count their steps so.
    """
    groups = [
        {name: value for name, value in group.items() if name not in ("params", "lr") and isinstance(value, NUMBER)}
        for group in optimizer.param_groups
    ]
    states = {
        path: found
        for path, parameter in named
        if (found := {k: v for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, NUMBER)})
    }
    return {"groups": groups, "state": states}


def restore_numbers(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], stored: dict[str, Any] | None
) -> None:
    """Give back what `numbers` took; None is of a checkpoint that is older than this."""
    for group, values in zip(optimizer.param_groups, (stored or {}).get("groups", []), strict=False):
        group |= values
    for path, values in (stored or {}).get("state", {}).items():
        optimizer.state[named[path]] |= values
