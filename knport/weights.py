"""A model's tensors in the form that safetensors keeps, each once, and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from knport.errors import KNPortError


@dataclass(frozen=True)
class Packed:
    """The tensors of a model.

    Args:
        tensors: by their name in the state_dict; on the CPU, contiguous, none of them twice.
        shared: other names of the same tensors -> the name above.
    """

    tensors: dict[str, Tensor]
    shared: dict[str, str]


def pack(model: nn.Module) -> Packed:
    """The parameters and persistent buffers of `model`.

    Raises:
        KNPortError: some state is no tensor, or has no values (meta device).
    """
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise KNPortError(f"{name} of the state_dict is a {type(value).__name__}; only tensors can be saved")
        if value.is_meta:
            raise KNPortError(f"{name} lies on the meta device; it has no values to save")
        memory = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        first = names.setdefault(memory, name) if value.numel() else name
        if first == name:
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        else:
            shared[name] = first
    return Packed(tensors, shared)


def unpack(model: nn.Module, packed: Packed) -> None:
    """Put the tensors into `model`, whose own take over their dtypes; every name and shape has to fit.

    Raises:
        KNPortError: a tensor is missing, unknown or of another shape.
    """
    state = {**packed.tensors, **{name: packed.tensors.get(first) for name, first in packed.shared.items()}}
    own = model.state_dict()
    _compare(own, state)
    state = OrderedDict(state)
    state._metadata = own._metadata  # versions of the modules' own formats, which some ask for (MNASNet)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if name in state and tensor.dtype != state[name].dtype:
            tensor.data = tensor.data.to(state[name].dtype)
    with torch.no_grad():
        model.load_state_dict(state, strict=True)


def _compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor | None]) -> None:
    for name in {**own, **state}:
        expected, found = (_shape(tensors.get(name)) for tensors in (own, state))
        if expected != found:
            raise KNPortError(f"the weights do not fit the model: {name} is {found}, the model has {expected}")


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
