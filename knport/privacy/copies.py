"""Norms whose output may be edited in place while Opacus watches them, as `out += identity` of ResNets does.

A full backward hook returns a view that must not be edited. The layers of knport return copies themselves; norms of
torch become one of the classes here, which are theirs in all else.
"""

from __future__ import annotations

from torch import Tensor, nn


class _Copies:
    def __call__(self, *args, **kwargs) -> Tensor:
        y = super().__call__(*args, **kwargs)
        return y.clone() if self._backward_hooks else y


class CopyingGroupNorm(_Copies, nn.GroupNorm):
    """`torch.nn.GroupNorm` for private training."""


class CopyingLayerNorm(_Copies, nn.LayerNorm):
    """`torch.nn.LayerNorm` for private training."""


class CopyingInstanceNorm1d(_Copies, nn.InstanceNorm1d):
    """`torch.nn.InstanceNorm1d` for private training."""


class CopyingInstanceNorm2d(_Copies, nn.InstanceNorm2d):
    """`torch.nn.InstanceNorm2d` for private training."""


class CopyingInstanceNorm3d(_Copies, nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` for private training."""


COPYING: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: CopyingGroupNorm,
    nn.LayerNorm: CopyingLayerNorm,
    nn.InstanceNorm1d: CopyingInstanceNorm1d,
    nn.InstanceNorm2d: CopyingInstanceNorm2d,
    nn.InstanceNorm3d: CopyingInstanceNorm3d,
}


def let_be_edited(model: nn.Module, *rules: dict[type, object]) -> None:
    """Make the norms of `model` return copies while they are watched, in place.

    Args:
        model: the network.
        rules: what Opacus knows by exact class: the new classes get the entries of theirs.
    """
    for known in rules:
        for kind, copying in COPYING.items():
            if kind in known:
                known.setdefault(copying, known[kind])
    for module in model.modules():
        module.__class__ = COPYING.get(type(module), type(module))
