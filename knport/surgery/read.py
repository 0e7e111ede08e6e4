"""Read a model into a `Graph` without touching it: on a copy, on the meta device where possible.

torch.fx with our own leaf rule is tried first; a model that it cannot trace is executed once with its calls recorded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from knport.errors import KNPortError
from knport.surgery.copying import copy_onto
from knport.surgery.graph import Graph
from knport.surgery.kinds import is_leaf
from knport.surgery.read_fx import read_fx
from knport.surgery.read_run import read_run

_FALLBACK_SIZES = {  # pixels per side for a model that states none; 299 is Inception's
    1: ((224,), (32,)),
    2: ((224, 224), (299, 299), (32, 32)),
    3: ((16, 224, 224), (32, 32, 32), (16, 16, 16)),
}
_Reader = Callable[[nn.Module, tuple, dict, dict], Graph]


def read_all(model: nn.Module, example_inputs: Any, paths: Iterable[str]) -> Graph:
    """The data flow in evaluation mode; where that leaves modules of `paths` uncalled (the auxiliary heads of
    GoogLeNet), that in training mode if it calls more of them. Otherwise as `read`."""
    graph = read(model, example_inputs)
    missing = [path for path in paths if path not in graph.calls]
    if not missing:
        return graph
    try:
        second = read(model, example_inputs, training=True)
    except KNPortError:
        return graph
    return second if any(path in second.calls for path in missing) else graph


def read(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    training: bool = False,
    readers: tuple[_Reader, ...] = (read_fx, read_run),
) -> Graph:
    """The data flow of `model`.

    Args:
        model: any module; its parameters, buffers, flags and the random state stay as they are.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments. Default: zeros of the
            size that the model states (timm's `pretrained_cfg`, `img_size`), else (2, channels, 224, 224), else 299
            and 32 pixels, for every argument that has no default.
        training: read it in training mode.
        readers: tried in order.

    Raises:
        KNPortError: no reader could run the model on these inputs.
    """
    devices = ("meta",) if any(p.is_meta for p in model.parameters()) else ("meta", "cpu")
    problems: list[Exception] = []
    for args, kwargs in candidate_inputs(model, example_inputs):
        for device in devices:
            for reader in readers:
                try:
                    return _read_once(copy_onto(model, device).train(training), args, kwargs, device, reader)
                except Exception as error:  # a user's forward may raise anything; the next reader may do without
                    problems.append(error)
    problem = problems[len(devices) * len(readers) - 1]  # of the plain run on the first inputs, which says most
    raise KNPortError(
        f"could not run {type(model).__name__} to read it ({type(problem).__name__}: {problem}); "
        "pass example_inputs=, what its forward takes: a tensor, a tuple of arguments or a dict"
    ) from problem


def _read_once(twin: nn.Module, args: tuple, kwargs: dict, device: str, reader: _Reader) -> Graph:
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().to(device), (args, kwargs))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        return reader(twin, args, kwargs, _leaves(twin))


def _leaves(model: nn.Module) -> dict[int, str]:
    """id of every outermost leaf module -> its first path."""
    leaves: dict[int, str] = {}
    below: set[int] = set()
    for path, module in model.named_modules():
        if path and id(module) not in below and is_leaf(module):
            leaves[id(module)] = path
            below.update(id(part) for part in module.modules() if part is not module)
    return leaves


def candidate_inputs(model: nn.Module, example_inputs: Any) -> Iterator[tuple[tuple, dict]]:
    """Arguments and keyword arguments to run `model` with, in the order in which they are to be tried."""
    if isinstance(example_inputs, Mapping):
        yield (), dict(example_inputs)
    elif example_inputs is not None:
        yield (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}
    else:
        for size in _default_sizes(model):
            yield (torch.zeros(2, *size, dtype=_dtype(model), device="cpu"),) * _images_asked_for(model), {}


def _images_asked_for(model: nn.Module) -> int:
    """How many arguments the model's forward cannot do without: optical flow takes two images."""
    parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return max(1, sum(p.default is p.empty and p.kind in positional for p in parameters))


def _default_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Input sizes (channels, ...) to try, what the model states first."""
    stated = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = stated.get("input_size") if isinstance(stated, Mapping) else getattr(stated, "input_size", None)
    if size:
        yield tuple(size)
    first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
    ndim, channels = (2, 3) if first is None else (first.weight.dim() - 2, first.in_channels)
    if (own := _own_size(model, ndim)) is not None:
        yield (channels, *own)
    for size in _FALLBACK_SIZES[ndim]:
        yield (channels, *size)


def _own_size(model: nn.Module, ndim: int) -> tuple[int, ...] | None:
    """The image size that a vision transformer, or its patch embedding, was built for."""
    for module in model.modules():
        size = getattr(module, "img_size", None) or getattr(module, "image_size", None)
        if isinstance(size, int):
            return (size,) * ndim
        if isinstance(size, tuple | list) and len(size) == ndim and all(isinstance(s, int) for s in size):
            return tuple(size)
    return None


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
