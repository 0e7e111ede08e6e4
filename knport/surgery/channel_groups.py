"""Channel groups: run a model once and follow the channel axes of every tensor and parameter through it.

Convolutions, linear layers and norms are steps of their own, whose attributes (`out_channels`, `num_features`,
`groups`) belong to the axes; everything between them is followed function by function (`width_rules`). The result says,
for each parameter, which widths its dimensions are made of. So the numbers of parameters and of multiply-accumulates
(MACs) are quadratic forms in the widths, and a network can be resized without knowing its code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from knport.surgery.roles import plain_name
from knport.surgery.width_basics import fixed_like, tensors
from knport.surgery.width_layers import is_layer, keeps_groups, layer_axes
from knport.surgery.width_rules import SUMS, rule_of
from knport.surgery.widths import Axis, Widths

OUTPUT = "the model's output"
_AXES, _DATA = "_knport_axes", "_knport_data"  # kept on the tensors themselves
_QUIET = frozenset({"get", "set", "size", "dim", "numel", "stride", "is_contiguous", "is_floating_point", "item"})
_ATTENTION = ("num_heads", "head_dim", "num_attention_heads", "key_dim")


@dataclass(frozen=True)
class Step:
    """One function or layer: who called it, the shapes it made and the axes they are said to have."""

    name: str
    owner: str
    kind: str
    shapes: tuple[tuple[int, ...], ...]
    axes: tuple[tuple[Axis, ...], ...]
    inputs: tuple[Axis, ...]


class Flow(TorchFunctionMode):
    """The axes of a model's tensors while it runs; see `follow`."""

    def __init__(self, model: nn.Module, first: Flow | None = None, watch_only: bool = False):
        super().__init__()
        self.widths = first.widths if first else Widths()
        self.watch_only = watch_only
        self.steps: list[Step] = []
        self.products: list[tuple[int, tuple[Axis, ...]]] = []  # MACs: count times the axes
        self.attributes: dict[tuple[str, str], Axis] = first.attributes if first else {}  # (path, attribute)
        self.layers: dict[str, Axis] = first.layers if first else {}  # path -> output channels
        self.inputs: dict[str, list[tuple[tuple[int, ...], list[Axis]]]] = {}  # per module: shapes and axes it reads
        self.outputs: dict[str, list[tuple[tuple[int, ...], list[Axis]]]] = {}
        self.tensors: dict[int, tuple[Tensor, list[Axis]]] = first.tensors if first else {}  # the model's own
        self.kernels: set[int] = first.kernels if first else set()  # of them, the weights of convolutions and the like
        self.owners: list[tuple[str, nn.Module]] = [("", model)]
        self.name = ""
        self._own = {id(t) for t in (*model.parameters(), *model.buffers())}
        self._inside = 0
        self.keep_groups = keeps_groups(model)

    def axes(self, tensor: Tensor) -> list[Axis]:
        """The axes of a tensor; one from outside has sizes that cannot change, one of the model's own may."""
        if id(tensor) in self._own:
            if id(tensor) not in self.tensors:
                axes = [(self.widths.new(s),) if s > 1 else self.widths.fixed(s) for s in tensor.shape]
                self.tensors[id(tensor)] = (tensor, axes)
            return self.tensors[id(tensor)][1]
        if not hasattr(tensor, _AXES):
            setattr(tensor, _AXES, [self.widths.fixed(size) for size in tensor.shape])
        return getattr(tensor, _AXES)

    def count(self, times: int, *axes: Axis) -> None:
        """Note that a step makes `times` multiply-accumulates for each combination of the axes' channels."""
        self.products.append((times, axes))

    def unknown(self, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
        """A function without a rule: nothing that it reads may change."""
        for tensor in tensors((args, kwargs)):
            for axis in self.axes(tensor):
                self.widths.freeze(axis, f"read by {self.name} in {type(self.owners[-1][1]).__name__}")
        return fixed_like(self, out)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._inside:
            return function(*args, **kwargs)
        with self._own_work():
            out = function(*args, **kwargs)
            self.name = _function_name(function)
            if self.name not in _QUIET and (tensors(out) or self.name == "setitem"):
                self._record(self.name, tensors((args, kwargs)), out, self._rule(args, kwargs, out))
        return out

    def _rule(self, args: tuple, kwargs: dict, out: Any) -> list[list[Axis]]:
        given = tensors((args, kwargs))
        if not given or self.watch_only:
            return fixed_like(self, out)
        if any(hasattr(self.owners[-1][1], word) for word in _ATTENTION):
            self._freeze_heads(given, out)
        if self.name in SUMS:
            self._mark_sum(given, out)
        rule = rule_of(self.name)
        return self.unknown(args, kwargs, out) if rule is None else rule(self, args, kwargs, out)

    def _freeze_heads(self, given: list[Tensor], out: Any) -> None:
        """Attention reshapes its channels into heads whose number and scale the module holds as numbers."""
        if any(tensor.dim() != result.dim() for tensor in given for result in tensors(out)):
            for tensor in given:
                for axis in self.axes(tensor):
                    self.widths.freeze(axis, f"attention heads of {type(self.owners[-1][1]).__name__}")

    def _mark_sum(self, given: list[Tensor], out: Tensor) -> None:
        """A residual sum: two tensors that both come from the input."""
        from_input = [t for t in given if getattr(t, _DATA, False) and t.dim() == out.dim()]
        if len(from_input) > 1:
            for tensor in from_input:
                for axis in self.axes(tensor):
                    self.widths.mark(axis, "residual sum")

    def _record(self, name: str, given: list[Tensor], out: Any, axes: list[list[Axis]]) -> None:
        data = any(getattr(t, _DATA, False) for t in given)
        inputs = tuple(axis for t in given for axis in self.axes(t))
        for tensor, its in zip(tensors(out), axes, strict=True):
            setattr(tensor, _AXES, its)
            setattr(tensor, _DATA, data or getattr(tensor, _DATA, False))
        owner, module = self.owners[-1]
        shapes = tuple(tuple(t.shape) for t in tensors(out))
        self.steps.append(Step(name, owner, type(module).__name__, shapes, tuple(map(tuple, axes)), inputs))

    def enter(self, module: nn.Module, path: str, args: tuple, kwargs: dict) -> None:
        """Before a module's forward."""
        self.owners.append((path, module))
        if not self._inside:
            with self._own_work():
                self.inputs[path] = [(tuple(t.shape), self.axes(t)) for t in tensors((args, kwargs))]
        self._inside += is_layer(module)

    def leave(self, module: nn.Module, path: str, args: tuple, kwargs: dict, out: Any) -> None:
        """After a module's forward."""
        self._inside -= is_layer(module)
        if not self._inside:
            with self._own_work():
                if is_layer(module):
                    self.name, given = type(module).__name__, tensors((args, kwargs))
                    known = [] if self.watch_only else [layer_axes(self, path, module, given[0], out)]
                    self._record(self.name, given, out, known or fixed_like(self, out))
                self.outputs[path] = [(tuple(t.shape), self.axes(t)) for t in tensors(out)]
        self.owners.pop()

    @contextmanager
    def _own_work(self) -> Iterator[None]:
        """Functions that are called in here are not the model's."""
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def state(self, path: str, **attributes: Axis) -> None:
        """Note that attributes of the module at `path` state these axes."""
        for name, axis in attributes.items():
            self.attributes[path, name] = axis


def follow(model: nn.Module, args: tuple, kwargs: dict, *, first: Flow | None = None, watch_only: bool = False) -> Flow:
    """Run `model` and return the axes of everything in it. The inputs' and the outputs' sizes cannot change.

    Args:
        model: a copy that no one else uses.
        args, kwargs: of its forward.
        first: an earlier run of the same model, whose widths and parameters this one goes on with.
        watch_only: record shapes, and take nothing from them.

    Raises:
        FollowError: the model's forward failed; it holds the flow up to there.
    """
    flow = Flow(model, first, watch_only)
    handles = []
    for path, module in model.named_modules():
        before = lambda m, a, k, path=path: flow.enter(m, path, a, k)  # noqa: E731
        after = lambda m, a, k, out, path=path: flow.leave(m, path, a, k, out)  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    for tensor in tensors((args, kwargs)):
        setattr(tensor, _DATA, True)
        setattr(tensor, _AXES, [flow.widths.fixed(size, "the model's input") for size in tensor.shape])
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), flow:
            out = model(*args, **kwargs)
    except Exception as error:
        raise FollowError(flow, error) from error
    finally:
        for handle in handles:
            handle.remove()
    for tensor in tensors(out):
        for axis in flow.axes(tensor):
            flow.widths.freeze(axis, OUTPUT)
    return flow


class FollowError(Exception):
    """The model's forward failed; `flow` knows how far it came."""

    def __init__(self, flow: Flow, error: Exception):
        super().__init__(f"{type(error).__name__}: {error}")
        self.flow = flow


def _function_name(function: Any) -> str:
    name = getattr(function, "__name__", "")
    if name == "__get__":  # a tensor property: .shape, .T
        return getattr(function.__self__, "__name__", "get")
    return plain_name(name)
