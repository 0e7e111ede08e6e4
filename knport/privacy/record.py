"""What a KNConv keeps of its forward pass while Opacus trains it: the mean and the scale of each unit, dropout drawn.

Opacus keeps a stack of the inputs of a layer's calls (`layer.activations`) and takes them off its end in the backward
pass. The stack here is aligned with it, so that calls which Opacus does not see, with its hooks disabled or left over
from a step that failed, are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from knport.errors import KNPortError
from knport.functional.statistics import UnitStatistics
from knport.kernels import reciprocal_sd


def record(layer: nn.Module, statistics: UnitStatistics) -> None:
    """The `statistics_hook` of a prepared layer; keeps nothing unless Opacus holds the layer's parameters.

    Raises:
        KNPortError: with dropout, where Opacus is told to run the layer a second time (``"functorch"``).
    """
    held = any(hasattr(p, "grad_sample") for p in layer._parameters.values())
    if not (held and layer.training and torch.is_grad_enabled()):
        return
    if layer.dropout and hasattr(layer, "ft_compute_sample_grad"):
        raise KNPortError(
            f"{type(layer).__name__} with dropout={layer.dropout} under grad_sample_mode='functorch', which runs the "
            "layer a second time, where the dropout of the statistics would be another; use grad_sample_mode='hooks' "
            "or 'ghost', or set dropout=0"
        )
    kept = vars(layer).setdefault("_recorded", [])
    del kept[len(getattr(layer, "activations", ())) :]
    rstd = reciprocal_sd(statistics.full_mean, statistics.var, layer.eps)
    kept.append((statistics.mean.detach(), rstd.detach()))


def take(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and reciprocal standard deviation, each (N, 1, O, P), of the call whose input Opacus has just taken.

    Raises:
        KNPortError: nothing was recorded.
    """
    call = len(layer.activations)
    kept = vars(layer).get("_recorded", [])
    if call >= len(kept):
        raise KNPortError(
            f"{type(layer).__name__} kept no statistics of its forward pass; call knport.privacy.prepare(model) before "
            "make_private, and after any change of the model"
        )
    taken = kept[call]
    del kept[call:]
    if not kept:
        del layer._recorded
    return taken
