"""The promises of kernel normalization, each a test on one model: whether it holds, what was found, who is to blame."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from knport.check_runs import ForwardFailed, Run, difference, first_difference, run, without_dropout
from knport.inputs import Call, image, tensors
from knport.surgery.copying import copy_model
from knport.weights import pack, unpack


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One promise and whether it holds.

    Args:
        name: what is promised.
        holds: whether it does.
        detail: what was found, in words and numbers.
        paths: the modules or parameters that break it, the first that is to blame first.
    """

    name: str
    holds: bool
    detail: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is tested.

    Args:
        model: a copy that no one else uses.
        call: the arguments of its forward, in its dtype.
        count: how many images they hold.
        tolerance: by how much two runs may differ, relative to the largest value.
    """

    model: nn.Module
    call: Call
    count: int
    tolerance: float


def _no_batchnorm(subject: Subject) -> Promise:
    paths = [path for path, module in subject.model.named_modules() if isinstance(module, _BatchNorm)]
    return _promise("no BatchNorm is left", paths, "none", f"{len(paths)} left:")


def _independence(name: str, training: bool) -> Callable[[Subject], Promise]:
    def promise(subject: Subject) -> Promise:
        if subject.count < 2:
            return Promise(name=name, holds=False, detail="not tested: give two images or more as example_inputs")
        model = copy_model(subject.model)
        model = without_dropout(model) if training else model
        try:
            whole = run(model, subject.call, training=training, watch=True)
            again = run(model, subject.call, training=training, seed=1, watch=True)
            if training and difference(whole.out, again.out) > 0:
                path = first_difference(whole, again, lambda t: t, 0.0)
                detail = f"not tested: {path or 'the network'} draws random numbers that no dropout rate turns off"
                return Promise(name=name, holds=False, detail=detail, paths=(path,) if path else ())
            return _one_by_one(name, subject, model, whole, training)
        except ForwardFailed as error:
            return Promise(name=name, holds=False, detail=f"the forward pass fails {error}")

    return promise


def _one_by_one(name: str, subject: Subject, model: nn.Module, whole: Run, training: bool) -> Promise:
    """Every image by itself against its place in the batch."""
    worst = 0.0
    for i in range(subject.count):
        single = run(model, image(subject.call, i, subject.count), training=training, watch=True)
        apart = difference(image(whole.out, i, subject.count), single.out)
        worst = max(worst, apart)
        if not apart <= subject.tolerance:
            path = first_difference(whole, single, lambda t, i=i: image(t, i, subject.count), subject.tolerance)
            where = f"; the first module to differ is {path}" if path else ""
            detail = f"image {i} alone differs by {apart:.1e} of the largest output from image {i} in its batch{where}"
            return Promise(name=name, holds=False, detail=detail, paths=(path,) if path else ())
    return Promise(name=name, holds=True, detail=f"{subject.count} images alone and in a batch differ by {worst:.0e}")


def _shapes(subject: Subject) -> Promise:
    name = "the batch size and the mode change no shape"
    one = image(subject.call, 0, subject.count)
    try:
        shapes = set()
        for training in (False, True):
            whole, single = (
                run(copy_model(subject.model), call, training=training).out for call in (subject.call, one)
            )
            shapes |= {_shapes_of(image(whole, 0, subject.count)), _shapes_of(single)}
    except ForwardFailed as error:
        return Promise(name=name, holds=False, detail=f"the forward pass fails {error}")
    return Promise(name=name, holds=len(shapes) == 1, detail=f"one image gives {' or '.join(sorted(shapes))}")


def _shapes_of(out: Any) -> str:
    return ", ".join(str(tuple(t.shape)) for t in tensors(out))


def _gradients(subject: Subject) -> Promise:
    name = "every parameter gets a gradient"
    model = without_dropout(copy_model(subject.model)).train()
    model.zero_grad()
    try:
        out = model(*subject.call[0], **subject.call[1])
        sum(t.square().sum() for t in tensors(out) if t.requires_grad).backward()
    except Exception as error:  # a user's forward or backward may raise anything
        return Promise(name=name, holds=False, detail=f"the backward pass fails: {type(error).__name__}: {error}")
    trained = {path: p for path, p in model.named_parameters() if p.requires_grad}
    paths = [path for path, p in trained.items() if p.grad is None or not p.grad.isfinite().all()]
    frozen = sum(1 for _ in model.parameters()) - len(trained)
    rest = f", {frozen} are frozen" if frozen else ""
    return _promise(name, paths, f"all {len(trained)} do{rest}", f"{len(paths)} of {len(trained)} do not:")


def _deterministic(subject: Subject) -> Promise:
    name = "evaluation is deterministic"
    first, second = (run(subject.model, subject.call, training=False, seed=seed, watch=True) for seed in (0, 1))
    if difference(first.out, second.out) == 0:
        return Promise(name=name, holds=True, detail="two passes give the same bits")
    path = first_difference(first, second, lambda t: t, 0.0)
    detail = f"two passes differ, first in {path or 'a function'}"
    return Promise(name=name, holds=False, detail=detail, paths=(path,) if path else ())


def _in_place(subject: Subject) -> Promise:
    name = "nothing is edited in place that is still read"
    careful = copy_model(subject.model)
    switched = {p: m for p, m in careful.named_modules() if getattr(m, "inplace", False) is True}
    for module in switched.values():
        module.inplace = False
    before = [t.clone() for t in tensors(subject.call)]
    out, expected = (run(m, subject.call, training=False).out for m in (subject.model, careful))
    if not all(torch.equal(a, b) for a, b in zip(before, tensors(subject.call), strict=True)):
        return Promise(name=name, holds=False, detail="the network writes into its input")
    if difference(out, expected) <= subject.tolerance:
        return Promise(name=name, holds=True, detail=f"{len(switched)} activations in place, all harmless")
    paths = []
    for path, module in switched.items():
        module.inplace = True
        if not difference(run(careful, subject.call, training=False).out, expected) <= subject.tolerance:
            paths.append(path)
        module.inplace = False
    return _promise(name, paths or [""], "", "the output changes with inplace in")


def _copies(subject: Subject) -> Promise:
    name = "copies, pickles and saved weights give the same output"
    expected = run(subject.model, subject.call, training=False).out
    for way, remake in (("a deep copy", copy_model), ("a pickle", _pickled), ("safetensors", _saved)):
        try:
            twin = remake(subject.model)
        except Exception as error:  # whatever a user's module cannot do
            return Promise(name=name, holds=False, detail=f"{way} cannot be made: {type(error).__name__}: {error}")
        if difference(run(twin, subject.call, training=False).out, expected) > 0:
            return Promise(name=name, holds=False, detail=f"{way} gives another output")
    return Promise(name=name, holds=True, detail="bit for bit")


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    """A copy with other values, into which the weights are loaded."""
    twin = copy_model(model)
    with torch.no_grad():
        for tensor in (*twin.parameters(), *(b for b in twin.state_dict().values() if isinstance(b, Tensor))):
            tensor.zero_()
    packed = pack(model)
    unpack(twin, replace(packed, tensors=safetensors.torch.load(safetensors.torch.save(packed.tensors))))
    return twin


def _promise(name: str, paths: list[str], good: str, bad: str) -> Promise:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    detail = f"{bad} {paths[0] or 'several together'}{more}" if paths else good
    return Promise(name=name, holds=not paths, detail=detail, paths=tuple(path for path in paths if path))


PROMISES: tuple[Callable[[Subject], Promise], ...] = (
    _no_batchnorm,
    _independence("no image sees another in evaluation", training=False),
    _independence("no image sees another in training, dropout 0", training=True),
    _shapes,
    _gradients,
    _deterministic,
    _in_place,
    _copies,
)
