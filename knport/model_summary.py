"""knport.summary: what is in a network, and what it costs, before and after."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from knport import measure, text
from knport.errors import KNPortError
from knport.inputs import Call, call_of
from knport.surgery.kinds import kind


@dataclass(frozen=True, kw_only=True)
class Contents:
    """One network.

    Args:
        model: class name.
        norms: how many of each class of norm.
        layers: how many of each kind of convolution, e.g. ``Conv2d 3x3``, and of linear layers.
        parameters: how many.
        macs: multiply-accumulates per image, of convolutions and matrix products in evaluation.
        saved_bytes: bytes per image that autograd keeps in training; None where the network cannot train on the
            inputs (detection without targets).
    """

    model: str
    norms: dict[str, int]
    layers: dict[str, int]
    parameters: int
    macs: int
    saved_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One network, or two side by side; ``print(summary)`` shows a table.

    Args:
        before: the first network.
        after: the second; None when only one was given.
        input_shape: of the images that costs were counted with.
    """

    before: Contents
    after: Contents | None
    input_shape: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same as nested dictionaries of numbers and strings, fit for JSON."""
        found = {"before": vars(self.before), "after": None if self.after is None else vars(self.after)}
        return {**found, "input_shape": list(self.input_shape)}

    def __str__(self) -> str:
        return f"{self._title()}\n\n{text.aligned(self._heading(), self._rows(), right=(1, 2, 3))}"

    def __rich__(self):
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._title()), text.coloured(self._heading(), self._rows(), right=(1, 2, 3)))

    def _title(self) -> str:
        size = " x ".join(map(str, self.input_shape[1:]))
        return f"{self.before.model}, costs per image of {size}"

    def _heading(self) -> tuple[str, ...]:
        return ("", "before", "after", "ratio") if self.after else ("", "number")

    def _rows(self) -> list[tuple[str, ...]]:
        pair = [c for c in (self.before, self.after) if c]
        rows = [
            _row("parameters", [f"{c.parameters:,}" for c in pair], [c.parameters for c in pair]),
            _row("MACs", [f"{c.macs / 1e6:,.1f} M" for c in pair], [c.macs for c in pair]),
            _row("activations kept", [_mib(c.saved_bytes) for c in pair], [c.saved_bytes for c in pair]),
        ]
        for field in ("norms", "layers"):
            found = [getattr(c, field) for c in pair]
            for name in dict.fromkeys(name for counts in found for name in counts):
                rows.append(_row(name, [str(counts.get(name, 0)) for counts in found]))
        return rows


def summary(before: nn.Module, after: nn.Module | None = None, example_inputs: Any = None) -> Summary:
    """Norms left, convolutions by kind, parameters, multiply-accumulates and saved activations of one or two networks.

    Nothing is computed: shapes are followed on the meta device where the network allows it.

    Args:
        before: a network.
        after: the converted one, to stand beside it.
        example_inputs: what their forward takes: a tensor, a tuple of arguments or a dict of keyword arguments.
            Default: two images of the size that `before` states, else 224 x 224.

    Raises:
        KNPortError: a network cannot be run on these inputs.

    Example:
        >>> model = torchvision.models.resnet18()
        >>> print(knport.summary(model, knport.convert(model)))
    """
    for model in (before, after):
        if model is not None and not isinstance(model, nn.Module):
            raise KNPortError(f"expected a torch.nn.Module, got {type(model).__name__}")
    call = call_of(before, example_inputs)
    shapes = [tuple(leaf.shape) for leaf in (*call[0], *call[1].values()) if hasattr(leaf, "shape")]
    return Summary(
        before=_contents(before, call),
        after=None if after is None else _contents(after, call),
        input_shape=shapes[0] if shapes else (),
    )


def _contents(model: nn.Module, call: Call) -> Contents:
    norms, layers = Counter(), Counter()
    inside = {id(part) for m in model.modules() if kind(m) == "norm" for part in m.modules() if part is not m}
    for module in model.modules():
        if id(module) not in inside and kind(module) in ("norm", "kn_norm"):
            norms[type(module).__name__] += 1
        elif kind(module) in ("conv", "kn_conv", "linear", "kn_linear"):
            layers[_layer(module)] += 1
    return Contents(
        model=type(model).__name__,
        norms=dict(sorted(norms.items())),
        layers=dict(sorted(layers.items())),
        parameters=measure.parameters(model),
        macs=measure.macs_per_image(model, call),
        saved_bytes=_saved(model, call),
    )


def _saved(model: nn.Module, call: Call) -> int | None:
    try:
        return measure.saved_bytes_per_image(model, call)
    except KNPortError:
        return None


def _mib(count: int | None) -> str:
    return "not known" if count is None else f"{count / 2**20:,.2f} MiB"


def _layer(module: nn.Module) -> str:
    """``Conv2d 3x3 depthwise``: class, kernel and whether its channels are in groups."""
    name = type(module).__name__
    if not isinstance(module, _ConvNd):
        return name
    size = "x".join(map(str, module.kernel_size))
    depthwise = module.groups == module.in_channels > 1
    return f"{name} {size}" + (" depthwise" if depthwise else " grouped" if module.groups > 1 else "")


def _row(name: str, cells: list[str], numbers: list[int | None] = ()) -> tuple[str, ...]:
    if len(cells) == 1:
        return name, *cells
    ratio = f"x {numbers[1] / numbers[0]:.2f}" if numbers and all(numbers) else ""
    return name, *cells, ratio
