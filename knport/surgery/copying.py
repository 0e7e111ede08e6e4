"""Deep copies of models: to read them cheaply, and to change them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def copy_model(model: nn.Module) -> nn.Module:
    """A deep copy, also of models with the old `torch.nn.utils.weight_norm`, whose weight `deepcopy` refuses."""
    return copy.deepcopy(model, {id(t): t.detach().clone() for t in _computed(model)})


def copy_onto(model: nn.Module, device: str) -> nn.Module:
    """A deep copy for reading: no hooks, tensors on `device`; for "meta" no tensor is copied."""

    def twin(tensor: Tensor) -> Tensor:
        if device == "meta":
            return torch.empty_like(tensor, device="meta", requires_grad=False)
        return tensor.detach().to(device, copy=True)

    new = copy.deepcopy(model, _memo(model, twin))
    for module in new.modules():  # a user's hooks must not fire while we read
        module._forward_hooks.clear()
        for key, hook in list(module._forward_pre_hooks.items()):
            if not type(hook).__module__.startswith("torch.nn.utils"):  # the old weight_norm and its kin are hooks too
                del module._forward_pre_hooks[key]
    return new


def _memo(model: nn.Module, twin: Callable[[Tensor], Tensor]) -> dict[int, Any]:
    memo: dict[int, Any] = {id(p): nn.Parameter(twin(p), p.requires_grad) for p in model.parameters()}
    memo.update({id(tensor): twin(tensor) for tensor in (*model.buffers(), *_computed(model))})
    return memo


def _computed(model: nn.Module) -> Iterator[Tensor]:
    """Tensors that hooks computed from parameters and left on the modules."""
    for module in model.modules():
        yield from (t for t in vars(module).values() if isinstance(t, Tensor) and not t.is_leaf)
