"""How many parameters a converted model has, from the plan alone."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from knport.surgery.plan import ABSORBED, KERNEL_NORM, KN_CONV, KN_LINEAR, Verdict


def parameters_of(model: nn.Module) -> int:
    """Parameters of a model; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def parameters_after(model: nn.Module, verdicts: Iterable[Verdict]) -> int:
    """Parameters that the model will have once the verdicts are carried out."""
    total, modules = parameters_of(model), dict(model.named_modules())
    for verdict in verdicts:
        module = modules.get(verdict.path)
        if verdict.verdict in (ABSORBED, KERNEL_NORM):
            total -= sum(p.numel() for p in module.parameters(recurse=False))
        elif verdict.verdict == KN_LINEAR:
            total += 0 if module.bias is not None else module.out_features
        elif verdict.verdict == KN_CONV:
            total += 0 if module.bias is not None else module.out_channels
            total += module.weight.numel() * ((verdict.enlarge or 1) ** verdict.ndim - 1)
    return total
