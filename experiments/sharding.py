"""Fully sharded training (FSDP2): a process keeps its share of the weights, the gradients and the optimizer's state.

`accelerate launch --config_file experiments/slurm/fsdp.yaml ...` asks for it; torch's `fully_shard` does it, before the
optimizer is made. accelerate's own preparation is not used: it wants to be given the optimizer, and on CPUs it quietly
replicates instead. Checkpoints hold whole tensors, so that a run goes on, and is measured, with or without sharding.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from experiments.run import Run
from knport.errors import KNPortError

UNIT = 1_000_000  # parameters that are gathered and given back together, at least


def asked(processes: int) -> bool:
    """Whether the launcher was told to shard. Raises `KNPortError` if it was told to use DeepSpeed."""
    if _set("ACCELERATE_USE_DEEPSPEED"):
        raise KNPortError("DeepSpeed is not supported; launch with --multi_gpu, or with experiments/slurm/fsdp.yaml")
    return processes > 1 and _set("ACCELERATE_USE_FSDP")


def check(run: Run) -> None:
    """Raise `KNPortError` for settings that have not been made to work with shares of tensors."""
    for name, value, instead in (
        ("private training", run.private, "launch without FSDP"),
        ("--mixed-precision fp16", run.mixed_precision == "fp16", "use bf16"),
        ("--compile", run.compile, "leave it out"),
    ):
        if value:
            raise KNPortError(f"{name} does not work with FSDP: {instead}")


def shard(net: nn.Module, device: torch.device, processes: int) -> nn.Module:
    """Shard the parameters of `net`, in place: unit by unit those of its smallest large modules, then the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # shares are cut from memory: no channels-last weights
    for module in _units(net):
        fully_shard(module, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def whole(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Every tensor in full. All processes must ask, since each has a share."""
    return [value.full_tensor() if _is_share(value) else value for value in tensors]


def like(target: Tensor, value: Tensor) -> Tensor:
    """This process's share of `value`, if `target` is a share of a tensor of that shape."""
    if not _is_share(target) or value.shape != target.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements)


def load(net: nn.Module, tensors: dict[str, Tensor]) -> None:
    """`net.load_state_dict` of whole tensors."""
    targets = net.state_dict()
    net.load_state_dict({name: like(targets.get(name, value), value) for name, value in tensors.items()})


def _units(net: nn.Module) -> list[nn.Module]:
    """Modules of `UNIT` parameters or more of which no part is one."""
    found = []
    for child in net.children():
        if sum(parameter.numel() for parameter in child.parameters()) >= UNIT:
            found += _units(child) or [child]
    return found


def _is_share(value: Tensor) -> bool:
    return hasattr(value, "full_tensor")  # a DTensor, whose class takes long to import


def _set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
