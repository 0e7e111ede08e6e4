"""A resizing: the widths that change in a converted network, why others do not, and the way to carry it out."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class WidthChange:
    """Channels that change together: `layers` put out `before` channels now and `after` then."""

    layers: tuple[str, ...]
    before: int
    after: int


@dataclass(frozen=True, kw_only=True)
class KeptWidths:
    """Layers whose widths do not change, and why."""

    layers: tuple[str, ...]
    reason: str


@dataclass(frozen=True, kw_only=True)
class NewShape:
    """The shape that a parameter or buffer gets; `kernel`: a weight whose scale follows its fan-in."""

    name: str
    shape: tuple[int, ...]
    kernel: bool = False


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """How a converted network gets back to a number of parameters or multiply-accumulates (MACs).

    Args:
        quantity: "parameters" or "MACs" (per image, of convolutions, linear layers and matrix products).
        target: the wanted number.
        strategy: "width" or "inner".
        counts: the quantity in the original network, in the converted one, and after resizing.
        parameters: of the resized network, whatever was counted.
        multiplier: the factor that all widths were given before they were rounded.
        changes: the groups of channels that change.
        kept: the layers that keep their widths, by reason.
        shapes: of every parameter and buffer that changes.
        attributes: (module path, attribute, value) of every number that states a width.
        features: (index, channels) of the entries of `feature_info`.
        notes: what could not be brought up to date.
    """

    quantity: str
    target: int
    strategy: str
    counts: tuple[int, int, int]
    parameters: int
    multiplier: float
    changes: tuple[WidthChange, ...]
    kept: tuple[KeptWidths, ...]
    shapes: tuple[NewShape, ...] = field(repr=False)
    attributes: tuple[tuple[str, str, int], ...] = field(repr=False)
    features: tuple[tuple[int, int], ...] = field(repr=False)
    notes: tuple[str, ...] = ()

    @property
    def off_by(self) -> float:
        """Relative distance of the result from the target."""
        return self.counts[2] / self.target - 1


def resize(model: nn.Module, resizing: Resizing) -> nn.Module:
    """Give the tensors and attributes of `model`, a converted network, their new sizes, in place.

    A weight that shrinks keeps its first channels, times sqrt(old fan-in / new fan-in); one that grows is filled up
    with normal numbers of the same spread per tap. Biases, gains and statistics are cut off or repeated. So a fresh
    network stays as it was initialized (its zeros and its embedded kernels too), but a trained one loses what it knew.
    """
    return resize_to(model, resizing.shapes, resizing.attributes, resizing.features)


def resize_to(
    model: nn.Module,
    shapes: Iterable[NewShape],
    attributes: Iterable[tuple[str, str, int]],
    features: Iterable[tuple[int, int]],
) -> nn.Module:
    """`resize` by the rows of a `Resizing`. All tensors are made before the first one is put in place."""
    held = _tensors(model)
    new = {id(held[row.name]): resized(held[row.name], row) for row in shapes}
    for module in model.modules():
        for store in (module._parameters, module._buffers):
            store.update({name: new[id(tensor)] for name, tensor in store.items() if id(tensor) in new})
    for path, name, value in attributes:
        module = model.get_submodule(path)
        setattr(module, name, (value,) if isinstance(getattr(module, name), tuple) else value)
    rows = feature_rows(model)
    for index, channels in features:
        rows[index]["num_chs"] = channels
    return model


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def feature_rows(model: nn.Module) -> list[dict]:
    """timm's `feature_info`, a list of dicts; empty for a model without, and for timm's feature extractors, which give
    those features out, so that their widths stay."""
    rows = getattr(model, "feature_info", None)
    return rows if isinstance(rows, list) and all(isinstance(row, dict) for row in rows) else []


def resized(old: Tensor, row: NewShape) -> Tensor:
    """`old` in the shape of `row`; a parameter stays one, with its `requires_grad`."""
    data = old.detach()
    if row.kernel:
        fan_in = math.prod(old.shape[1:]) / math.prod(row.shape[1:])
        data = _grown(data, row.shape) * math.sqrt(fan_in) if data.is_floating_point() else data
    for dim, size in enumerate(row.shape):
        repeats = -(-size // data.shape[dim])
        data = torch.cat([data] * repeats, dim) if repeats > 1 else data
        data = data.narrow(dim, 0, size)
    data = data.clone()  # keeps the order of strides: channels last stays so
    return nn.Parameter(data, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else data


def _grown(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A weight filled up to at least `shape` (out, in, ...) with normal numbers, of each tap's own spread."""
    full = tuple(max(have, want) for have, want in zip(weight.shape, shape, strict=True))
    if full == tuple(weight.shape):
        return weight
    spread = weight.float().std(dim=(0, 1), correction=0).to(weight.dtype)
    large = torch.randn(full, dtype=weight.dtype, device=weight.device) * spread
    large[tuple(slice(size) for size in weight.shape)] = weight
    return large
