"""Runs of a network for `knport.check`: without dropout, with every layer's output watched, and how two runs differ."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from knport.inputs import Call, tensors

_RATES = ("dropout", "attention_dropout", "drop_rate", "attn_drop_rate", "drop_prob")  # settings of containers, too


class ForwardFailed(Exception):
    """A forward pass raised; the message names the innermost module that was running."""


@dataclass
class Run:
    """What one forward pass gave.

    Args:
        out: its output.
        steps: (path, first output tensor) of every call of a module without children, in order of execution.
    """

    out: Any = None
    steps: list[tuple[str, Tensor]] = field(default_factory=list)


def run(model: nn.Module, call: Call, *, training: bool, seed: int = 0, watch: bool = False) -> Run:
    """One forward pass without gradients.

    Args:
        model: put into the mode asked for.
        call: its arguments, copied first.
        training: the mode.
        seed: of all random numbers drawn.
        watch: record the output of every module without children.

    Raises:
        ForwardFailed: the pass raised.
    """
    model.train(training)
    result, inside = Run(), []
    with _hooks(model, result.steps if watch else None, inside), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        try:
            result.out = model(*call[0], **call[1])
        except Exception as error:  # a user's forward may raise anything
            where = f"in {inside[-1]}: " if inside and inside[-1] else ""
            raise ForwardFailed(f"{where}{type(error).__name__}: {error}") from error
    return result


@contextmanager
def _hooks(model: nn.Module, steps: list | None, inside: list[str]) -> Iterator[None]:
    """Record where the pass is, and with `steps` what every module without children gives."""

    def enter(path: str) -> Callable:
        return lambda *_: inside.append(path)

    def leave(path: str, leaf: bool) -> Callable:
        def hook(module, args, out):
            inside.pop()
            if leaf and steps is not None and (found := tensors(out)):
                steps.append((path, found[0].detach().clone()))

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path)))
        handles.append(module.register_forward_hook(leave(path, not list(module.children()))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_dropout(model: nn.Module) -> nn.Module:
    """`model`, whose dropout rates of every kind are set to 0."""
    for module in model.modules():
        names = [*_RATES, "p"] if "Drop" in type(module).__name__ or "Stochastic" in type(module).__name__ else _RATES
        for name in names:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def difference(first: Any, second: Any) -> float:
    """The largest difference of two outputs, relative to the largest value; inf for other shapes or NaN in one only."""
    left, right = tensors(first), tensors(second)
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    return max((_apart(a, b) for a, b in zip(left, right, strict=True)), default=0.0)


def first_difference(first: Run, second: Run, cut: Callable[[Tensor], Tensor], tolerance: float) -> str:
    """Path of the first module whose output in the one run, `cut`, is not that in the other; "" if there is none."""
    for (path, left), (other, right) in zip(first.steps, second.steps, strict=False):
        if path != other or not difference(cut(left), right) <= tolerance:
            return path
    return ""


def _apart(first: Tensor, second: Tensor) -> float:
    if first.numel() == 0:
        return 0.0
    if not (first.is_floating_point() or first.is_complex()):
        return 0.0 if torch.equal(first, second) else float("inf")
    same = (first == second) | (first.isnan() & second.isnan())
    apart = torch.where(same, 0.0, (first - second).abs()).max()
    scale = torch.where(first.isfinite(), first.abs(), 0.0).max().clamp_min(torch.finfo(first.dtype).tiny)
    found = (apart / scale).item()
    return float("inf") if found != found else found
