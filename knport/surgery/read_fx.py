"""The torch.fx reader: trace with our leaf rule, then run the trace once for the shapes."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from knport.errors import KNPortError
from knport.surgery.follow import follow_function, follow_module, tokens_of
from knport.surgery.graph import Graph, Shape
from knport.surgery.kinds import channels_last
from knport.surgery.roles import function_role, module_role, reads_first_only


def read_fx(model: nn.Module, args: tuple, kwargs: dict, leaves: dict[int, str]) -> Graph:
    """Trace `model` (its leaves as one node each) and run the trace on `args`; any failure raises."""
    if kwargs:
        raise KNPortError("torch.fx traces positional inputs only; keyword inputs are read by running the model")
    trace = _Tracer(leaves).trace(model, concrete_args=_defaults(model, len(args)))
    interpreter = _Interpreter(model, trace, leaves)
    interpreter.run(*args)
    return interpreter.read


def _defaults(model: nn.Module, given: int) -> dict[str, Any]:
    """Defaults of the arguments that are not given: traced as constants, lest ``mask=None`` takes the masked branch."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1 + given :]
    return {p.name: p.default for p in parameters if p.default is not p.empty}


class _Tracer(fx.Tracer):
    def __init__(self, leaves: dict[int, str]):
        super().__init__(param_shapes_constant=True)
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return id(module) in self.leaves


class _Interpreter(fx.Interpreter):
    """Runs the trace and writes a `Graph` node for every step that yields a tensor."""

    def __init__(self, model: nn.Module, trace: fx.Graph, leaves: dict[int, str]):
        super().__init__(model, graph=trace)
        self.leaves = leaves
        self.read = Graph(reader="torch.fx")
        self.index_of: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        shape = first_shape(result)
        if n.op == "placeholder" and shape is not None:
            self.read.input_shape = self.read.input_shape or shape
            self._add(n, "input", n.name, "input", shape)
        elif n.op == "output":
            self._add(n, "output", "output", "output", shape)
        elif n.op == "call_module":
            self._module(n, self.fetch_attr(n.target), result)
        elif n.op in ("call_function", "call_method") and shape is not None:
            name = n.target if isinstance(n.target, str) else n.target.__name__
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            follow_function(n.target, function_role(name), args, kwargs, result)
            self._add(n, "function", name, function_role(name), shape, writes_in_place(n.target, n.args, n.kwargs))
        return result

    def _module(self, n: fx.Node, module: nn.Module, result: Any) -> None:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x = next(iter((*args, *kwargs.values())), None)
        role, inplace = module_role(module), getattr(module, "inplace", False) is True
        tokens = tokens_of(x) if role == "linear" else None
        self._add(n, "module", self.leaves[id(module)], role, first_shape(result), inplace, tokens)
        follow_module(role, self.index_of[n], x, result, channels_last(module))

    def _add(self, n: fx.Node, op: str, name: str, role: str, shape: Shape | None, inplace=False, tokens=None) -> None:
        inputs = [self.index_of[i] for i in n.all_input_nodes if i in self.index_of]
        if op == "function" and reads_first_only(name):
            inputs = inputs[:1]
        owner = next(reversed(n.meta.get("nn_module_stack") or {"": None}))
        self.index_of[n] = self.read.add(op, name, role, inputs, shape, inplace, owner, tokens)


def first_shape(value: Any) -> Shape | None:
    """Shape of the first tensor in a (nested) value."""
    return next((tuple(leaf.shape) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)


def writes_in_place(function: Any, args: tuple, kwargs: dict) -> bool:
    """Whether a call writes into its first argument: ``relu_``, ``x += y``, ``F.relu(x, inplace=True)``."""
    name = function if isinstance(function, str) else getattr(function, "__name__", "")
    if name.strip("_") in ("iadd", "isub", "imul", "itruediv") or (name.endswith("_") and not name.startswith("_")):
        return True
    if "inplace" in kwargs:
        return kwargs["inplace"] is True
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # builtins and method names have no signature and no such argument
        return False
    return "inplace" in names and len(args) > names.index("inplace") and args[names.index("inplace")] is True
