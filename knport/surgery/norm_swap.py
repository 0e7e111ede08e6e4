"""Carry a `NormPlan` out: build every new norm first, then put each in the place of the old one."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor, nn

from knport.layers.channels_last import ChannelsLast
from knport.surgery.copying import copy_model
from knport.surgery.kinds import fused_parts
from knport.surgery.norm_kinds import KINDS, timm_layer
from knport.surgery.swap import HOOKS, adopt, exchange

if TYPE_CHECKING:
    from knport.surgery.norm_plan import NormPlan, NormVerdict


def swap_norms(model: nn.Module, plan: NormPlan, *, inplace: bool = False) -> nn.Module:
    """`model`, or by default a deep copy of it, with the norms of `plan` replaced."""
    model = model if inplace else copy_model(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    like = next(chain(model.parameters(), model.buffers()), None)
    new: dict[int, nn.Module] = {}
    for verdict in plan.verdicts:
        if not verdict.changes:
            continue
        old = modules[verdict.path]
        new[id(old)] = _norm(old, verdict, plan, like) if verdict.kind == "norm" else _standardized(old)
        if verdict.replaces_activation:
            act = modules[verdict.replaces_activation]
            new[id(act)] = adopt(nn.Identity(), act)
    switched = [modules[path] for path in plan.inplace_off]
    # Nothing has been changed up to here; what follows cannot fail.
    for module in switched:
        module.inplace = False
    exchange(model, new)
    return model


def channels_of(norm: nn.Module) -> int | None:
    """How many channels a norm has; None when it normalizes over several dimensions at once."""
    for name in ("num_features", "num_channels"):
        if hasattr(norm, name):
            return getattr(norm, name)
    shape = getattr(norm, "normalized_shape", None)
    if shape is not None:
        return shape[0] if len(shape) == 1 else None
    weight = getattr(norm, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else None


def eps_of(norm: nn.Module) -> float:
    """What a norm adds to the variance."""
    return getattr(norm, "eps", None) or 1e-5  # RMSNorm(eps=None) leaves it to the dtype


def _norm(old: nn.Module, verdict: NormVerdict, plan: NormPlan, like: Tensor | None) -> nn.Module:
    """What takes the place of a norm: the new one and the dropout and activation that were fused with the old one."""
    new = KINDS[plan.norm].build(channels_of(old), verdict.ndim, eps_of(old), plan.options, verdict.activation)
    _inherit(new, old, like)
    new.train(old.training)
    parts = [new] if not verdict.channels_last or isinstance(new, nn.Identity) else [ChannelsLast(new)]
    parts += fused_parts(old)[:-1] if verdict.replaces_activation == "" else fused_parts(old)
    hooked = any(getattr(old, hooks) for hooks in HOOKS[:-1])
    if len(parts) == 1 and not hooked:
        parts[0].training = old.training
        return parts[0]
    return adopt(nn.Sequential(*parts), old)


def _inherit(new: nn.Module, old: nn.Module, like: Tensor | None) -> None:
    """Gain and bias of the old norm where the new one has them; device, dtype and requires_grad for the others."""
    given = getattr(old, "weight", None)
    given = given if isinstance(given, Tensor) else like
    if given is not None:
        new.to(device=given.device, dtype=given.dtype if given.is_floating_point() else None)
    if isinstance(getattr(old, "weight", None), nn.Parameter):
        new.requires_grad_(old.weight.requires_grad)
    for name in ("weight", "bias"):
        value = getattr(old, name, None)
        if isinstance(value, Tensor) and getattr(new, name, None) is not None:
            # The parameter itself where it is one; FrozenBatchNorm keeps constants.
            setattr(new, name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False))


def _standardized(old: nn.Conv2d) -> nn.Module:
    """timm's convolution with weight standardization (Qiao et al., 2019), with the weights of `old`."""
    new = timm_layer("StdConv2d")(
        old.in_channels,
        old.out_channels,
        old.kernel_size,
        stride=old.stride,
        padding=old.padding,
        dilation=old.dilation,
        groups=old.groups,
        bias=old.bias is not None,
        device="meta",
    )
    new.weight, new.bias = old.weight, old.bias
    return adopt(new, old)
