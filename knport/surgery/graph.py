"""The one graph type that both readers produce: calls of leaf modules and functions, with tensor shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from knport.surgery.follow import Tokens

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One step of the data flow.

    Args:
        index: position in execution order.
        op: "input", "module", "function" or "output".
        name: the module's path, or the function's name.
        role: see `knport.surgery.roles`.
        inputs: the nodes whose tensors it reads.
        shape: of its (first) output tensor; None when it has none.
        inplace: whether it writes into its input.
        owner: path of the innermost module whose forward takes the step.
        tokens: of a linear layer, how its input is laid out.
    """

    index: int
    op: str
    name: str
    role: str
    inputs: tuple[int, ...]
    shape: Shape | None
    inplace: bool = False
    owner: str = ""
    tokens: Tokens | None = None


def is_map(shape: Shape | None) -> bool:
    """Whether a tensor has more than one position per image."""
    return shape is not None and math.prod(shape[2:]) > 1


@dataclass
class Graph:
    """A model as it was read: nodes in execution order, who reads whom, and which calls a module path has."""

    reader: str
    input_shape: Shape | None = None
    nodes: list[Node] = field(default_factory=list)
    readers: list[list[int]] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)

    def add(self, op: str, name: str, role: str, inputs, shape, inplace: bool = False, owner: str = "", tokens=None):
        """Append a node and return its index."""
        index, inputs = len(self.nodes), tuple(dict.fromkeys(inputs))
        self.nodes.append(Node(index, op, name, role, inputs, shape, inplace, owner, tokens))
        self.readers.append([])
        for i in inputs:
            self.readers[i].append(index)
        if op == "module":
            self.calls.setdefault(name, []).append(index)
        return index

    def in_shape(self, index: int) -> Shape | None:
        """Shape of a node's first input."""
        inputs = self.nodes[index].inputs
        return self.nodes[inputs[0]].shape if inputs else None

    def ends(self, index: int, through: frozenset[str], *, back: bool = False) -> list[Node]:
        """The first nodes after (or before) a node whose role is not in `through`, in execution order."""
        step = (lambda i: self.nodes[i].inputs) if back else (lambda i: self.readers[i])
        found, seen, todo = set(), set(), list(step(index))
        while todo:
            i = todo.pop()
            if i in seen:
                continue
            seen.add(i)
            if self.nodes[i].role in through:
                todo.extend(step(i))
            else:
                found.add(i)
        return [self.nodes[i] for i in sorted(found)]

    def pooled(self) -> list[bool]:
        """Per node: is it one position per image that was reduced from a larger map (gates, heads)?"""
        flags: list[bool] = []
        for node in self.nodes:
            reduces = node.role not in ("conv", "kn_conv", "norm") and any(
                is_map(self.nodes[i].shape) for i in node.inputs
            )
            flags.append(not is_map(node.shape) and (reduces or any(flags[i] for i in node.inputs)))
        return flags

    def head(self) -> list[bool]:
        """Per node: is it pooled and read by nothing but the rest of the head (so: no squeeze-excite gate)?"""
        pooled, flags = self.pooled(), [True] * len(self.nodes)
        for node in reversed(self.nodes):
            own = node.op == "output" or pooled[node.index]
            flags[node.index] = own and all(flags[r] for r in self.readers[node.index])
        return flags
