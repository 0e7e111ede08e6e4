"""The `norm` argument of the competitors."""

from __future__ import annotations

import torch
from torch import nn

from knport import replace_norm


def with_norm(model: nn.Module, norm: str) -> nn.Module:
    """`model`, built with BatchNorm, with another norm of `knport.replace_norm` in its place ("batch" leaves it)."""
    if norm == "batch":
        return model
    with torch.device("cpu"):  # under torch.device("meta") the reading of the model would compute nothing
        return replace_norm(model, norm, inplace=True)
