"""What a run cannot recompute from its configuration and step: weights, optimizer, average, and where it is."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from experiments import checkpoint, sharding
from experiments.budget import Budget
from experiments.meter import LossMeter
from experiments.optimizer import build_optimizer, numbers, restore_numbers, restored
from experiments.run import Run

VALUES = ("step", "evaluated", "best_score", "best_step", "seconds")


class State:
    """Everything that a checkpoint holds.

    Args:
        run: the run.
        net: the model on its device; trained in place.
        total_steps: of the run.
        scaler: of fp16's gradients, or None.
        budget: of a private run, or None.
        shares: processes over which weights and optimizer are sharded.
    """

    step = 0
    """Optimizer steps done."""
    evaluated = 0
    """Step of the last evaluation that is in the log."""
    best_score = -1.0
    """Best accuracy (or mean IoU) so far, in percent."""
    best_step = 0
    """Its step."""
    seconds = 0.0
    """Time spent training, over all starts, without evaluation and checkpoints."""

    def __init__(
        self,
        run: Run,
        net: nn.Module,
        total_steps: int,
        scaler: torch.amp.GradScaler | None,
        budget: Budget | None = None,
        shares: int = 1,
    ):
        self.run, self.net, self.scaler, self.budget = run, net, scaler, budget
        device = next(net.parameters()).device
        self.average = copy.deepcopy(net).requires_grad_(False) if run.optimization.ema else None
        self.plain = copy.deepcopy(net) if shares > 1 else None  # to be tested: whole, and without collectives
        for sharded in (net, self.average) if shares > 1 else ():
            if sharded is not None:
                sharding.shard(sharded, device, shares)
        self.parameters = list(net.parameters())
        self.meter = LossMeter(device, total_steps)
        self.averaged = list(self.average.parameters()) if run.optimization.ema else []
        # fused reads memory as it lies, and Opacus' gradients are not laid out as channels-last weights are
        fused = (device.type in ("cpu", "cuda") or None) if budget is None and shares == 1 else False
        self.optimizer = build_optimizer(run, net, fused=fused)

    @property
    def evaluated_net(self) -> nn.Module:
        """The weights that are tested and published: the average's where there is one. All processes must ask."""
        net = self.net if self.average is None else self.average
        if self.plain is None:
            return net
        found = net.state_dict()
        self.plain.load_state_dict(dict(zip(found, sharding.whole(found.values()), strict=True)))
        return self.plain

    def update_average(self) -> None:
        """Move the average towards the weights of step `step`; the decay grows to `ema` and depends on it alone."""
        if self.average is not None:
            decay = min(self.run.optimization.ema, (1 + self.step) / (10 + self.step))
            get_ema_multi_avg_fn(decay)(self.averaged, self.parameters, self.step)

    def copy_buffers(self) -> None:
        """The average has the buffers (BatchNorm's) of the weights in training."""
        if self.average is not None:
            for own, buffer in zip(self.average.buffers(), self.net.buffers(), strict=True):
                own.copy_(buffer)

    def finite(self) -> bool:
        """Whether all weights are: the update after a finite loss may still have overflowed."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.parameters])
        return bool(torch.stack(sharding.whole(norms)).isfinite().all())

    def tensors(self) -> checkpoint.Tensors:
        """`model` is what was evaluated; with an average, `in_training` are the weights it follows.

        All processes must ask: of what is sharded, each has a part.
        """
        optimizer = {
            f"{name}/{key}": value
            for name, parameter in self.net.named_parameters()
            for key, value in self.optimizer.state.get(parameter, {}).items()
            if isinstance(value, Tensor)
        }
        tensors = {"model": self.evaluated_net.state_dict(), "optimizer": optimizer}
        if self.average is not None:
            tensors["in_training"] = self.net.state_dict()
        return {name: dict(zip(group, sharding.whole(group.values()), strict=True)) for name, group in tensors.items()}

    def values(self) -> dict[str, Any]:
        """The rest, as JSON."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        values = {name: getattr(self, name) for name in VALUES} | {"losses": self.meter.state(), "scaler": scaler}
        values["optimizer"] = numbers(self.optimizer, self.net.named_parameters())
        return values if self.budget is None else values | {"privacy": self.budget.state()}

    def load(self, tensors: checkpoint.Tensors, values: dict[str, Any]) -> None:
        """Become what `tensors` and `values` were taken from."""
        sharding.load(self.net, tensors.get("in_training", tensors["model"]))
        if self.average is not None:
            sharding.load(self.average, tensors["model"])
        named = dict(self.net.named_parameters())
        for name, value in tensors["optimizer"].items():
            path, _, key = name.rpartition("/")
            value = sharding.like(named[path], value)
            self.optimizer.state[named[path]][key] = restored(named[path], key, value, self.optimizer)
        restore_numbers(self.optimizer, named, values.get("optimizer"))
        for name in VALUES:
            setattr(self, name, values[name])
        self.meter.load(values["losses"])
        if self.budget is not None:
            self.budget.load(values["privacy"], self.step)
        if self.scaler is not None:
            self.scaler.load_state_dict(values["scaler"])
