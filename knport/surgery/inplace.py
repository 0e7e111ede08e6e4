"""In-place steps after a norm that goes: they now write into what the norm used to read.

Where that is a new tensor that nobody else reads, as behind conv -> norm, they may; where it is a skip, they must not.
"""

from __future__ import annotations

from torch import nn

from knport.errors import UnsupportedModule
from knport.surgery.graph import Graph, Node
from knport.surgery.roles import VIEWS

# Steps that make a new tensor which their own backward does not need again.
_FRESH = frozenset({"conv", "kn_conv", "kn_norm", "linear", "add", "cat"})


def switch_off(graph: Graph, removed: set[int], modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """Paths of the modules whose `inplace` has to become False.

    Args:
        graph: the model.
        removed: calls of norms that go without another module taking their place.
        modules: path -> module of the model.

    Raises:
        UnsupportedModule: a function writes in place where that cannot be switched off and would not be safe.
    """
    paths: dict[str, None] = {}
    for index in sorted(removed):
        norm = graph.nodes[index]
        _refuse_late_writer(graph, norm)
        if _is_fresh(graph, norm, removed):
            continue
        for name, part in modules[norm.name].named_modules():
            if getattr(part, "inplace", False) is True:
                paths[f"{norm.name}.{name}"] = None
        for step in _writers(graph, norm, removed):
            if step.op == "module":
                paths[step.name] = None
            else:
                raise UnsupportedModule(
                    step.owner,
                    f"{step.name} works in place on what {norm.name} made; without that norm it would write into "
                    "a tensor that other layers still read",
                    f"write it without inplace, make it a torch.nn module, or pass exclude={norm.name!r}",
                )
    return tuple(paths)


def _refuse_late_writer(graph: Graph, norm: Node) -> None:
    """What a norm reads may not be overwritten before the readers of the norm have had it."""
    for index in graph.readers[norm.inputs[0]]:
        step = graph.nodes[index]
        if step.inplace and norm.index < index < max(graph.readers[norm.index], default=-1):
            raise UnsupportedModule(
                step.name if step.op == "module" else step.owner,
                f"{step.name} overwrites what {norm.name} reads before the layers behind that norm have read it",
                f"make it work out of place, or pass exclude={norm.name!r}",
            )


def _writers(graph: Graph, norm: Node, removed: set[int]) -> list[Node]:
    """The first in-place steps on the memory that `norm` hands on."""
    found, todo = [], list(graph.readers[norm.index])
    while todo:
        node = graph.nodes[todo.pop()]
        if node.inplace:
            found.append(node)
        elif node.role in VIEWS or node.index in removed:
            todo.extend(graph.readers[node.index])
    return found


def _is_fresh(graph: Graph, norm: Node, removed: set[int]) -> bool:
    """Whether what `norm` reads is a new tensor that nobody else reads."""
    node = norm
    while True:
        source = graph.nodes[node.inputs[0]]
        if len(graph.readers[source.index]) != 1:
            return False
        hands_on = source.role in VIEWS or source.index in removed or (source.role == "add" and source.inplace)
        if not hands_on:
            return source.role in _FRESH or source.role == "norm"
        node = source
