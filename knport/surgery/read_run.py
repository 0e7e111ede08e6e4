"""The running reader: execute the model once and record which call read which tensor. Needs no tracing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from knport.surgery.follow import follow_function, follow_module, tokens_of
from knport.surgery.graph import Graph
from knport.surgery.kinds import channels_last
from knport.surgery.read_fx import first_shape, writes_in_place
from knport.surgery.roles import function_role, module_role, reads_first_only

_MARK = "_knport_node"  # the index of the node that made (or last wrote) a tensor, kept on the tensor itself


def read_run(model: nn.Module, args: tuple, kwargs: dict, leaves: dict[int, str]) -> Graph:
    """Run `model` on the inputs with every leaf call and every function on tensors recorded; any failure raises."""
    recorder = _Recorder(leaves)
    for path, module in model.named_modules():
        recorder.watch(module, path)
    for tensor in _tensors((args, kwargs)):
        _mark(tensor, recorder.read.add("input", "input", "input", (), tuple(tensor.shape)))
        recorder.read.input_shape = recorder.read.input_shape or tuple(tensor.shape)
    with recorder:
        out = model(*args, **kwargs)
    recorder.add("output", "output", "output", _sources(out), out)
    return recorder.read


class _Recorder(TorchFunctionMode):
    def __init__(self, leaves: dict[int, str]):
        super().__init__()
        self.leaves = leaves
        self.read = Graph(reader="one executed forward")
        self.inside: list[list[int]] = []  # what the leaves being executed read; the steps inside them are theirs
        self.owners: list[str] = [""]

    def watch(self, module: nn.Module, path: str) -> None:
        """Hook a module of the reading copy: a leaf to record it, a container to know whose functions are called."""
        if id(module) not in self.leaves:
            module.register_forward_pre_hook(lambda *_: self.owners.append(path))
            module.register_forward_hook(lambda *_: self._leave())
            return
        module.register_forward_pre_hook(self._before_leaf, with_kwargs=True)
        module.register_forward_hook(self._after_leaf, with_kwargs=True)

    def _leave(self) -> None:
        self.owners.pop()

    def _before_leaf(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inside.append(_sources((args, kwargs)))

    def _after_leaf(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if len(self.inside) == 1:  # still there, so that what follows records no steps of its own
            x, role = next(iter((*args, *kwargs.values())), None), module_role(module)
            inplace = getattr(module, "inplace", False) is True
            tokens = tokens_of(x) if role == "linear" else None
            index = self.add("module", self.leaves[id(module)], role, self.inside[0], out, inplace, tokens)
            follow_module(role, index, x, out, channels_last(module))
        self.inside.pop()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside:
            return function(*args, **kwargs)
        inputs = _sources((args, kwargs))
        out = function(*args, **kwargs)
        name = getattr(function, "__name__", "")
        if first_shape(out) is not None and (name != "__get__" or inputs):  # x.T, but not the attributes of modules
            role, inputs = function_role(name), inputs[:1] if reads_first_only(name) else inputs
            follow_function(function, role, args, kwargs, out)
            self.add("function", name, role, inputs, out, writes_in_place(function, args, kwargs))
        return out

    def add(self, op: str, name: str, role: str, inputs: list[int], out: Any, inplace=False, tokens=None) -> int:
        """Append a node, mark the tensors that it made, and return its index."""
        index = self.read.add(op, name, role, inputs, first_shape(out), inplace, self.owners[-1], tokens)
        for tensor in _tensors(out):
            _mark(tensor, index)
        return index


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _mark(tensor: Tensor, index: int) -> None:
    if not isinstance(tensor, nn.Parameter):  # a parameter outlives this run
        setattr(tensor, _MARK, index)


def _sources(value: Any) -> list[int]:
    return [getattr(tensor, _MARK) for tensor in _tensors(value) if hasattr(tensor, _MARK)]
