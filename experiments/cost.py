"""What one training step costs: parameters, multiply-accumulates, milliseconds, memory.

A step is forward, cross-entropy, backward, SGD with momentum, on random images that already lie on the device. FLOP
counters see convolutions and matrix products only: the statistics of kernel normalization (and of every other norm) are
not in `macs`, so the measured time stands beside it. Times of the networks of one batch size are taken in turn, one
step each per round in rotating order, so that a slow moment of the machine falls on all of them, and ratios are formed
within a round.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from experiments.live_tensors import LiveTensors
from experiments.results import Cost
from knport import (
    KernelNorm1d,
    KernelNorm2d,
    KernelNorm3d,
    KNConv1d,
    KNConv2d,
    KNConv3d,
    KNLinear,
    LocalContextNorm,
    NormalizedConv2d,
    PositionalNorm,
    UnknownName,
)

MIB = 2**20
WARM_UP = 2
KERNEL_LAYERS = (KernelNorm1d, KernelNorm2d, KernelNorm3d, KNConv1d, KNConv2d, KNConv3d, KNLinear)
Network = tuple[str, str]  # (model, norm)


class Batch(NamedTuple):
    """What a training step eats: images (N, C, H, W) and labels (N,)."""

    images: Tensor
    labels: Tensor


def measure(
    build: Callable[[str, str], nn.Module],
    networks: Iterable[Network],
    batch: Batch,
    *,
    seconds: float = 15.0,
    originals: Mapping[str, str] | None = None,
) -> dict[Network, Cost]:
    """Measure every network on one batch; one that cannot make a step is left out (its training says why).

    Args:
        build: makes the network of a (model, norm), on the CPU; it is measured in the channels-last layout.
        networks: the (model, norm) pairs; ratios are to the pair (model, "original") where it is among them.
        batch: images and labels on the device to measure on.
        seconds: about how long the timing of all networks together may take; at least five rounds are made.
        originals: model -> the model that ratios are to, where that is another one.
    """
    device = batch.images.device
    batch = Batch(batch.images.contiguous(memory_format=torch.channels_last), batch.labels)

    def placed(model: str, norm: str) -> nn.Module:  # as runs train by default
        return build(model, norm).to(device, memory_format=torch.channels_last)

    static = {network: found for network in networks if (found := _static(placed, network, batch))}
    networks = list(static)
    times = time_steps({network: placed(*network) for network in networks}, batch, seconds=seconds)
    costs = {}
    for model, norm in networks:
        mine, base = times[model, norm], times.get(((originals or {}).get(model) or model, "original"))
        ratios = [a / b for a, b in zip(mine, base, strict=True)] if base else None
        costs[model, norm] = Cost(
            **static[model, norm],
            **_spread("ms_per_step", [1000 * t for t in mine]),
            **_spread("slowdown", ratios),
            cost_device=cost_device(device),
        )
    return costs


def describe(model: nn.Module, image_shape: tuple[int, int, int]) -> Cost:
    """What is known without running on the target: parameters, MACs of one (C, H, W) image, the kind of norm.

    MACs are counted on the meta device, where kernel normalization is made of plain operators: some devices take their
    box means as matrix products, which are no work of convolutions or linear layers.
    """
    counted = copy.deepcopy(model).eval().to("meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        counted(torch.zeros(1, *image_shape, device="meta"))
    parameters = sum(p.numel() for p in model.parameters())
    return Cost(norm_family=norm_family(model), parameters=parameters, macs=counter.get_total_flops() // 2)


def norm_family(model: nn.Module) -> str:
    """The most frequent kind of normalization: kernel, batch, group, layer, instance, ..., or none."""
    found = Counter(filter(None, map(_family_of_layer, model.modules())))
    return "kernel" if found["kernel"] else (found.most_common(1) or [("none", 0)])[0][0]


def time_steps(models: Mapping[Network, nn.Module], batch: Batch, *, seconds: float) -> dict[Network, list[float]]:
    """Seconds of one training step, one number per round and model; entry i of every list is from the same round."""
    steps = {network: TrainingStep(model, batch) for network, model in models.items()}
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    one_round = sum(_timed(step, batch) for step in steps.values())
    rounds = round(min(50, max(5, seconds / max(one_round, 1e-6))))
    times: dict[Network, list[float]] = {network: [] for network in steps}
    order = list(steps)
    for _ in range(rounds):
        for network in order:
            times[network].append(_timed(steps[network], batch))
        order = order[1:] + order[:1]
    return times


class TrainingStep:
    """Forward, loss, backward and SGD with momentum, on the same batch every time."""

    def __init__(self, model: nn.Module, batch: Batch):
        self.model, self.batch = model.train(), batch
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        F.cross_entropy(self.model(self.batch.images), self.batch.labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> list[Tensor]:
        """What lives from step to step: batch, parameters, buffers, momentum."""
        momentum = [t for t in tree_leaves(list(self.optimizer.state.values())) if isinstance(t, Tensor)]
        return [*self.batch, *self.model.parameters(), *self.model.buffers(), *momentum]


def saved_activations(model: nn.Module, batch: Batch) -> float:
    """MiB that autograd keeps from the forward pass and loss for the backward pass.

    Every storage counts once, parameters and buffers do not. What a custom function hides on its context instead of
    saving it is not seen.
    """
    own = {_storage_key(t) for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        if _storage_key(tensor) not in own:
            # holding on to the storage keeps its address from being handed out again
            storages[_storage_key(tensor)] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model.train()(batch.images), batch.labels)
    return sum(storage.nbytes() for storage in storages.values()) / MIB


def peak_memory(model: nn.Module, batch: Batch) -> float:
    """Peak MiB of tensors alive during one training step of a warmed-up network: weights, momentum, batch, all.

    On CUDA the allocator's own count, elsewhere that of `LiveTensors`. `model` lies where the batch does.
    """
    step = TrainingStep(model, batch)
    step()
    device = batch.images.device
    if device.type != "cuda":
        with LiveTensors(step.tensors()) as live:
            step()
        return live.peak / MIB
    torch.cuda.synchronize(device)
    others = torch.cuda.memory_allocated(device) - _nbytes(step.tensors())
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - others) / MIB


def cost_device(device: torch.device) -> str:
    """The accelerator's product name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type


def _static(build: Callable[[str, str], nn.Module], network: Network, batch: Batch) -> dict[str, Any]:
    """Everything but time, of a network that is freed before the next one comes; empty if it makes no step."""
    try:
        model = build(*network)
        TrainingStep(model, batch)()
    except UnknownName:
        raise
    except (RuntimeError, ValueError):
        return {}
    cost = describe(model, tuple(batch.images.shape[1:]))
    return {
        "norm_family": cost.norm_family,
        "parameters": cost.parameters,
        "macs": cost.macs,
        "saved_mib": saved_activations(model, batch),
        "peak_mib": peak_memory(model, batch),
    }


def _family_of_layer(layer: nn.Module) -> str | None:
    if isinstance(layer, nn.GroupNorm):
        return "layer" if layer.num_groups == 1 else "group"
    kinds = {"kernel": KERNEL_LAYERS, "batch": _BatchNorm, "layer": nn.LayerNorm, "instance": _InstanceNorm}
    kinds |= {"normalized": NormalizedConv2d, "local_context": LocalContextNorm, "positional": PositionalNorm}
    return next((name for name, kind in kinds.items() if isinstance(layer, kind)), None)


def _timed(step: TrainingStep, batch: Batch) -> float:
    _wait(batch.images.device)
    start = time.perf_counter()
    step()
    _wait(batch.images.device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _spread(name: str, values: list[float] | None) -> dict[str, float]:
    if not values:
        return {}
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {name: statistics.median(values), f"{name}_q20": cuts[0], f"{name}_q80": cuts[-1]}


def _storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum({_storage_key(t): t.untyped_storage().nbytes() for t in tensors}.values())
