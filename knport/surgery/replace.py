"""Put another normalization in the place of a network's own: the competitors of kernel normalization."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from knport.errors import NothingToConvert, UnknownName

# Every norm over (N, C, *) maps keeps one gain and one bias per channel; LayerNorm over the last dimension does not.
CHANNEL_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.modules.instancenorm._InstanceNorm)


def replace_norm(model: nn.Module, norm: str, *, groups: int = 32, inplace: bool = False) -> nn.Module:
    """A copy of `model` in which every normalization of channel-first maps is another one.

    Gains and biases are kept where both norms have them, as are eps, device, dtype and a fused activation. LayerNorms
    over the last dimension (transformers) stay what they are.

    Args:
        model: any network.
        norm: "batch", "group" (Wu & He, 2018), "layer" (one group over all channels and pixels, as in the papers'
            tables), "instance", or "none".
        groups: of "group"; where the channels are fewer than twice as many, groups of two channels or more.
        inplace: change `model` itself.

    Returns:
        The rewritten model.

    Raises:
        UnknownName: for another `norm`.
        NothingToConvert: when the model has no such normalization.

    Example:
        >>> model = knport.replace_norm(torchvision.models.resnet18(), "group")
    """
    if norm not in _FACTORIES:
        raise UnknownName("norm", norm, _FACTORIES)
    model = model if inplace else copy.deepcopy(model)
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, CHANNEL_NORMS)]
    if not found:
        raise NothingToConvert(
            f"{type(model).__name__}: found no BatchNorm, GroupNorm or InstanceNorm to replace by {norm!r}"
        )
    new = {module: _replacement(module, norm, groups) for _, module in found}
    if model in new:
        return new[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():  # not named_children: it hides the second name of a shared module
            if child in new:
                parent._modules[name] = new[child]
    if norm == "none":  # an activation in place would now edit what a skip connection still reads
        for module in model.modules():
            if getattr(module, "inplace", False):
                module.inplace = False
    return model


def _replacement(old: nn.Module, norm: str, groups: int) -> nn.Module:
    channels = old.num_channels if isinstance(old, nn.GroupNorm) else old.num_features
    new = _FACTORIES[norm](channels, old, groups)
    if getattr(old, "weight", None) is not None:
        new = new.to(old.weight.device)
    for name in ("weight", "bias"):
        value = getattr(old, name, None)
        if value is not None and getattr(new, name, None) is not None:
            setattr(new, name, value)  # the parameter itself: device, dtype and requires_grad stay
    fused = [module for name in ("drop", "act") if isinstance(module := getattr(old, name, None), nn.Module)]
    fused = [module for module in fused if not isinstance(module, nn.Identity)]
    return (nn.Sequential(new, *fused) if fused else new).train(old.training)


def _group(channels: int, old: nn.Module, groups: int) -> nn.Module:
    most = max(1, min(groups, channels // 2))  # a group of one channel would be an InstanceNorm
    count = max(g for g in range(1, most + 1) if channels % g == 0)
    return nn.GroupNorm(count, channels, eps=old.eps)


def _by_dimension(kind: str, **options) -> Callable[[int, nn.Module, int], nn.Module]:
    def factory(channels: int, old: nn.Module, groups: int) -> nn.Module:
        ndim = next((d for d in "123" if f"{d}d" in type(old).__name__), "2")  # GroupNorm does not say: maps are 2D
        return getattr(nn, f"{kind}{ndim}d")(channels, eps=old.eps, **options)

    return factory


_FACTORIES: dict[str, Callable[[int, nn.Module, int], nn.Module]] = {
    "batch": _by_dimension("BatchNorm"),
    "group": _group,
    "layer": lambda channels, old, groups: nn.GroupNorm(1, channels, eps=old.eps),
    "instance": _by_dimension("InstanceNorm", affine=True),
    "none": lambda channels, old, groups: nn.Identity(),
}

NORMS = tuple(_FACTORIES)
