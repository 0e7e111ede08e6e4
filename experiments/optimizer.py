"""The optimizer of a run: torch's SGD and AdamW, any other by timm, with the weight decay of norms set apart if asked.

Learning rates are set by the loop before each step (`experiments.schedule`), the same for all parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
COUNTS = ("step", "mu_product")  # of torch: on the CPU, unless fused
# need gradients of gradients; keep what is neither a tensor nor a number
UNFIT = ("adahessian", "kron", "kronc", "kronw")


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

    known = tuple(name for name in list_optimizers() if name not in UNFIT)
    if settings.optimizer not in known:
        raise UnknownName("optimizer", settings.optimizer, known)
    return create_optimizer_v2(groups, settings.optimizer, lr=run.lr)


def parameter_groups(net: nn.Module, settings: OptimizationSettings) -> list[dict[str, object]]:
    """All parameters in the model's order: one group, or with those of norms and other biases in groups of theirs."""
    of_norms = {id(p) for module in net.modules() if isinstance(module, NORMS) for p in module.parameters(False)}
    kinds: dict[float, list[nn.Parameter]] = {settings.weight_decay: []}  # weight decay -> parameters
    for path, parameter in net.named_parameters():
        decay = None
        if id(parameter) in of_norms:
            decay = settings.norm_weight_decay
        elif path.rpartition(".")[2] == "bias":
            decay = settings.bias_weight_decay
        kinds.setdefault(settings.weight_decay if decay is None else decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in kinds.items() if parameters]


def numbers(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, Tensor]]) -> dict[str, Any]:
    """What an optimizer remembers beside its tensors for parameters, for JSON; a list holds the value of a tensor.

    SGD and AdamW of torch have nothing of the kind; some of timm count their steps so.
    """
    groups = [_numbers(group.items(), skip=("params", "lr"), tensors=True) for group in optimizer.param_groups]
    states = {path: _numbers(optimizer.state.get(parameter, {}).items()) for path, parameter in named}
    return {"groups": groups, "state": {path: found for path, found in states.items() if found}}


def restore_numbers(
    optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor], stored: dict[str, Any] | None
) -> None:
    """Give back what `numbers` took; None is of a checkpoint that is older than this."""
    for group, values in zip(optimizer.param_groups, (stored or {}).get("groups", []), strict=False):
        group |= {name: torch.tensor(value[0]) if isinstance(value, list) else value for name, value in values.items()}
    for path, values in (stored or {}).get("state", {}).items():
        optimizer.state[named[path]] |= values


def restored(parameter: Tensor, name: str, value: Tensor, optimizer: torch.optim.Optimizer) -> Tensor:
    """A stored tensor of the optimizer as it was beside `parameter`: in its layout, or of another shape."""
    if value.shape == parameter.shape and value.ndim:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    counted_on_cpu = name in COUNTS and not optimizer.defaults.get("fused")
    return value if counted_on_cpu else value.to(parameter.device)


def _numbers(items: Iterable[tuple[str, Any]], skip: Sequence[str] = (), tensors: bool = False) -> dict[str, Any]:
    found = {}
    for name, value in items:
        if tensors and isinstance(value, Tensor) and value.ndim == 0:
            found[name] = [value.item()]
        elif isinstance(value, bool | int | float) and name not in skip:
            found[name] = value
    return found
