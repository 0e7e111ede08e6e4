"""The names of all networks here, shared with timm."""

from __future__ import annotations

import functools
from collections.abc import Callable

import timm
from torch import nn

from knport.errors import KNPortError, UnknownName

Constructor = Callable[..., nn.Module]

_CONSTRUCTORS: dict[str, Constructor] = {}
_ORIGINALS: dict[str, str] = {}


def register(constructor: Constructor | None = None, *, original: str | None = None) -> Callable:
    """Make a constructor available to `create_model`, `list_models` and `timm.create_model` under its own name.

    A constructor takes ``num_classes``, ``in_chans`` and ``low_resolution`` by keyword.

    Args:
        constructor: the function; None for ``@register(original=...)``.
        original: the network that this one is the kernel normalized form of: a name here, or ``timm/NAME``.
    """
    if constructor is None:
        return functools.partial(register, original=original)
    _CONSTRUCTORS[constructor.__name__] = constructor
    if original:
        _ORIGINALS[constructor.__name__] = original

    @functools.wraps(constructor)
    def for_timm(pretrained=False, pretrained_cfg=None, pretrained_cfg_overlay=None, cache_dir=None, **kwargs):
        if pretrained:
            raise KNPortError(
                f"{constructor.__name__}: no weights are published on a model hub; build the network and load a "
                "checkpoint of the authors with architectures.load_published(model, path)"
            )
        return constructor(**kwargs)

    timm.models.register_model(for_timm)
    return constructor


def create_model(
    name: str, num_classes: int = 1000, in_chans: int = 3, low_resolution: bool = False, **kwargs
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of `list_models()`.
        num_classes: size of the last layer.
        in_chans: channels of the input images.
        low_resolution: the stem for small images (about 32 x 32) in place of the one for 224 x 224.
        kwargs: what else the constructor takes, e.g. ``dropout``.

    Example:
        >>> model = architectures.create_model("knresnet18", num_classes=100, low_resolution=True)
        >>> model(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """
    if name not in _CONSTRUCTORS:
        raise UnknownName("architecture", name, _CONSTRUCTORS)
    return _CONSTRUCTORS[name](num_classes=num_classes, in_chans=in_chans, low_resolution=low_resolution, **kwargs)


def list_models() -> list[str]:
    """The names that `create_model` takes, sorted."""
    return sorted(_CONSTRUCTORS)


def original_of(name: str) -> str | None:
    """The network that `name` is the kernel normalized form of (a name here, or ``timm/NAME``), or None."""
    if name not in _CONSTRUCTORS:
        raise UnknownName("architecture", name, _CONSTRUCTORS)
    return _ORIGINALS.get(name)
