"""What a network costs, without running it on real data: parameters, multiply-accumulates, activations kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from knport.errors import KNPortError
from knport.inputs import Call, images_in, moved, tensors
from knport.surgery.copying import copy_onto

T = TypeVar("T")


def parameters(model: nn.Module) -> int:
    """Parameters of a model; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def macs_per_image(model: nn.Module, call: Call) -> int:
    """Multiply-accumulates of convolutions and matrix products in evaluation, per image.

    The statistics of any normalization are no such products and are not counted.
    """

    def count(twin: nn.Module, call: Call) -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            twin.eval()(*call[0], **call[1])
        return counter.get_total_flops() // 2

    return _on_a_copy(model, call, count) // images_in(call)


def saved_bytes_per_image(model: nn.Module, call: Call) -> int:
    """Bytes that autograd keeps of a forward pass in training for the backward pass, per image.

    Every storage counts once; parameters and buffers do not. What a custom function hides on its context instead of
    saving it is not seen.
    """

    def count(twin: nn.Module, call: Call) -> int:
        own = {_key(t) for t in (*twin.parameters(), *twin.buffers())}
        kept: dict[int, Any] = {}

        def pack(tensor: Tensor) -> Tensor:
            if _key(tensor) not in own:
                kept[_key(tensor)] = tensor.untyped_storage()  # held, so that its address is not handed out again
            return tensor

        with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
            out = twin.train()(*call[0], **call[1])
            total = sum(t.sum() for t in tensors(out) if t.is_floating_point())
        del total
        return sum(storage.nbytes() for storage in kept.values())

    return _on_a_copy(model, call, count) // images_in(call)


def _on_a_copy(model: nn.Module, call: Call, count: Callable[[nn.Module, Call], T]) -> T:
    """Count on the meta device, where nothing is computed; on the CPU where the model needs values."""
    problem: Exception | None = None
    for device in ("meta", "cpu"):
        if device == "cpu" and any(t.is_meta for t in (*model.parameters(), *model.buffers())):
            break
        try:
            with torch.random.fork_rng(devices=[]):
                return count(copy_onto(model, device), moved(call, device=device))
        except Exception as error:  # a user's forward may raise anything
            problem = error
    raise KNPortError(
        f"could not run {type(model).__name__} to measure it ({type(problem).__name__}: {problem}); "
        "pass example_inputs=, what its forward takes"
    ) from problem


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
