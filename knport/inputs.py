"""What a model's forward is called with: as the user gave it, by default as the model states it, and image by image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knport.surgery.read import read

Call = tuple[tuple, dict[str, Any]]  # positional and keyword arguments


def call_of(model: nn.Module, example_inputs: Any) -> Call:
    """The arguments of a forward pass.

    Args:
        model: for the default: a batch of two images of noise of the size that the model states or takes.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments.

    Raises:
        KNPortError: nothing was given, and the model takes none of the usual sizes.
    """
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if example_inputs is not None:
        return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, *read(model).input_shape[1:], generator=generator),), {}


def images_in(call: Call) -> int:
    """How many images a call holds: the length of its first list, else of its first tensor."""
    first = next(iter((*call[0], *call[1].values())), None)
    if isinstance(first, list):
        return len(first)
    return next((len(leaf) for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor) and leaf.dim()), 1)


def image(value: Any, index: int, count: int) -> Any:
    """The part of inputs or outputs that belongs to one of `count` images, as a batch of one.

    Tensors of `count` entries are cut, and lists of `count` entries; the rest is shared by all images.
    """
    if isinstance(value, Tensor):
        return value[index : index + 1] if value.dim() and len(value) == count else value
    if isinstance(value, list) and len(value) == count:
        return [value[index]]
    if isinstance(value, Mapping):
        return {key: image(item, index, count) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [image(item, index, count) for item in value]
    return value


def moved(call: Call, *, device: Any = None, dtype: torch.dtype | None = None) -> Call:
    """The same arguments on another device, floating-point ones in another dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.detach().to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    return pytree.tree_map_only(Tensor, move, call)


def distinct(call: Call) -> Call:
    """The same arguments with noise for images that are all alike: on such, no image could be seen to use another."""
    count = images_in(call)
    generator = torch.Generator().manual_seed(0)

    def spread(tensor: Tensor) -> Tensor:
        alike = tensor.dim() > 1 and bool((tensor == tensor[:1]).all())
        if not (tensor.is_floating_point() and alike and len(tensor) == count):
            return tensor
        size = (max(2, count), *tensor.shape[1:])
        return torch.randn(size, generator=generator).to(tensor)

    return pytree.tree_map_only(Tensor, spread, call)


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a nested value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
