"""Follow every value through views and shuffles: where on its map it lies, and which channel of the last norm it is.

Executed beside the model on small whole numbers. So tokens are recognised as the grid of a feature map, windows and
shifted maps as something else, and a linear layer as one that reads whole channel vectors, or does not.

Legend: N images, C channels, H x W the map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_ORIGIN = "_knport_origin"  # kept on the tensor itself
_MOVES = frozenset({"reshape", "move", "pad", "cat"})
_KEEPS = frozenset({"act", "dropout", "identity"})
_SUMS = frozenset({"add", "mul"})
_NUMBERS = {"dtype": torch.int32, "device": "cpu"}  # whatever `torch.device` the caller has set


@dataclass(frozen=True)
class Origin:
    """What the values of a tensor were.

    Args:
        position: of the tensor's shape; 1 + place among the N H W positions of its map, 0 for none (a class token).
        grid: (H, W) of that map.
        channel: of the tensor's shape; 1 + channel of the norm `norm`, 0 for none (padding). None behind a layer.
        norm: index of that norm's node.
    """

    position: Tensor
    grid: tuple[int, int] | None = None
    channel: Tensor | None = None
    norm: int | None = None


@dataclass(frozen=True)
class Tokens:
    """How the input (..., C) of a linear layer is laid out.

    Args:
        norm: the node of the norm whose whole channel vectors these are, or None.
        grid: (H, W) when they are an (N, H, W, C) map or (N, prefix + H W, C) in the map's order, else None.
        prefix: tokens before the grid.
        why: why there is no grid.
    """

    norm: int | None = None
    grid: tuple[int, int] | None = None
    prefix: int = 0
    why: str = ""


def follow_module(role: str, index: int, x: Any, out: Any, channels_last: bool) -> None:
    """Give `out`, made by a leaf module of this role from `x`, its origin."""
    if not isinstance(out, Tensor):
        return
    old = origin_of(x) if isinstance(x, Tensor) else None
    if role in ("conv", "kn_conv", "pool") and out.dim() == 4:
        _set(out, _fresh_map(out))
    elif role in ("norm", "kn_norm") and out.dim() > 1:
        dim = out.dim() - 1 if channels_last else 1
        place = _Place(_none(out), None) if old is None or x.shape != out.shape else _vectors(old, out, channels_last)
        _set(out, Origin(place.position, place.grid, _channels(out, dim), index))
    elif old is not None and role in ("linear", "kn_linear") and out.shape[:-1] == x.shape[:-1]:
        place = _vectors(old, out, True)
        _set(out, Origin(place.position, place.grid))
    elif old is not None and role in _KEEPS and out.shape == x.shape:
        _set(out, old)


def follow_function(function: Callable | str, role: str, args: tuple, kwargs: dict, out: Any) -> None:
    """Give what a function (or the tensor method of that name) returned its origin."""
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    known = [(tensor, origin) for tensor in tensors if (origin := origin_of(tensor)) is not None]
    if not known:
        return
    if role in _MOVES:
        _move(function, args, kwargs, out, [origin for _, origin in known])
    elif isinstance(out, Tensor) and role in (_KEEPS | _SUMS):
        same = next((origin for tensor, origin in known if tensor.shape == out.shape), None)
        if same is not None:
            _set(out, same if role in _KEEPS else Origin(same.position, same.grid))
    elif role == "pool" and isinstance(out, Tensor) and out.dim() == 4:
        _set(out, _fresh_map(out))


def origin_of(tensor: Tensor) -> Origin | None:
    """What is known about a tensor."""
    return getattr(tensor, _ORIGIN, None)


def tokens_of(x: Any) -> Tokens:
    """The layout of a linear layer's input."""
    origin = origin_of(x) if isinstance(x, Tensor) else None
    if origin is None or x.dim() < 2:
        return Tokens(why="the layout of its tokens is not known")
    norm = None
    if origin.channel is not None and torch.equal(origin.channel, _channels(x, x.dim() - 1)):
        norm = origin.norm
    place = origin.position[..., 0]
    if not torch.equal(place, origin.position[..., -1]) or origin.grid is None or not bool(place.any()):
        return Tokens(norm, why="its tokens lie on no map")
    height, width = origin.grid
    raster = 1 + torch.arange(x.shape[0] * height * width, **_NUMBERS).view(x.shape[0], -1)
    prefix = place[0].numel() - height * width
    flat = place.reshape(x.shape[0], -1)
    fits = prefix >= 0 and (x.dim() == 3 or (prefix == 0 and place.shape[1:] == origin.grid))
    if fits and torch.equal(flat[:, prefix:], raster) and not bool(flat[:, :prefix].any()):
        return Tokens(norm, origin.grid, prefix)
    return Tokens(norm, why="its tokens are windows, or shifted, or not in the order of the map")


def _move(function: Callable | str, args: tuple, kwargs: dict, out: Any, origins: list[Origin]) -> None:
    """Do to positions and channels what the function did to the values."""
    norms = {origin.norm for origin in origins if origin.channel is not None}
    moved = {}
    for part in ("position", "channel") if len(norms) == 1 else ("position",):

        def stand_in(tensor: Tensor, part: str = part) -> Tensor:
            origin = origin_of(tensor)
            value = None if origin is None else getattr(origin, part)
            return _none(tensor) if value is None else value

        result = _apply(function, *pytree.tree_map_only(Tensor, stand_in, (args, kwargs)))
        if result is None:
            return
        moved[part] = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
    grid = next((origin.grid for origin in origins if origin.grid), None)
    norm = norms.pop() if len(norms) == 1 else None
    for i, tensor in enumerate(leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)):
        parts = {name: tensors[i] for name, tensors in moved.items() if i < len(tensors)}
        if "position" in parts and all(part.shape == tensor.shape for part in parts.values()):
            _set(tensor, Origin(parts["position"], grid, parts.get("channel"), norm))


def _apply(function: Callable | str, args: tuple, kwargs: dict) -> Any:
    """The function's result on whole numbers; None where it cannot be had (an index on another device, say)."""
    if isinstance(function, str):
        name = function

        def function(tensor, *args, **kwargs):
            return getattr(tensor, name)(*args, **kwargs)

    try:
        return function(*args, **kwargs)
    except Exception:  # any function of a user's model; nothing is known about what it returns, then
        pass
    try:  # the numbers are expanded, and `view` takes no expanded tensor where it takes the model's own
        return function(*pytree.tree_map_only(Tensor, Tensor.contiguous, args), **kwargs)
    except Exception:
        return None


def _set(tensor: Tensor, origin: Origin) -> None:
    setattr(tensor, _ORIGIN, origin)


def _none(like: Tensor) -> Tensor:
    return torch.zeros((), **_NUMBERS).expand(like.shape)


def _channels(like: Tensor, dim: int) -> Tensor:
    shape = [1] * like.dim()
    shape[dim] = like.shape[dim]
    return torch.arange(1, like.shape[dim] + 1, **_NUMBERS).view(shape).expand(like.shape)


@dataclass(frozen=True)
class _Place:
    position: Tensor
    grid: tuple[int, int] | None


def _vectors(old: Origin, out: Tensor, channels_last: bool) -> _Place:
    """Where the vectors of a layer lie that works on the last dimension; of merged patches, on the coarser map."""
    if not channels_last:
        return _Place(old.position, old.grid)
    first = old.position[..., 0]
    if old.grid is not None:
        images, (height, width) = out.shape[0], old.grid
        flat = first.reshape(images, -1)
        for step in (2, 4):
            coarse = (-(-height // step), -(-width // step))
            if flat.shape[1] == coarse[0] * coarse[1]:
                full = torch.arange(1, images * height * width + 1, **_NUMBERS).view(images, height, width)
                if torch.equal(flat, full[:, ::step, ::step].flatten(1)):
                    order = torch.arange(1, flat.numel() + 1, **_NUMBERS).view(first.shape)
                    return _Place(order.unsqueeze(-1).expand(out.shape), coarse)
    return _Place(first.unsqueeze(-1).expand(out.shape), old.grid)


def _fresh_map(x: Tensor) -> Origin:
    """Positions of an (N, C, H, W) map."""
    images, _, height, width = x.shape
    position = torch.arange(1, images * height * width + 1, **_NUMBERS).view(images, 1, height, width)
    return Origin(position.expand(x.shape), (height, width))
