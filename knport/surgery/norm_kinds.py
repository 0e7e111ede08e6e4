"""The norms that `knport.replace_norm` can put in: how each is built, what it needs, and what its options are."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import nn

from knport.errors import KNPortError, UnknownName
from knport.layers import LocalContextNorm, PositionalNorm


@dataclass(frozen=True, kw_only=True)
class NormOptions:
    """Options of the new norms; None for the default of the norm.

    Args:
        groups: how many groups of channels; 32 where channels suffice for two per group.
        group_size: channels per group, in the place of `groups`; 2 for "local_context".
        window_size: pixels (height, width) around a position that "local_context" takes its statistics of; 227 each.
    """

    groups: int | None = None
    group_size: int | None = None
    window_size: int | tuple[int, int] | None = None


@dataclass(frozen=True)
class NormKind:
    """One choice of `replace_norm`.

    Args:
        title: class of the new norm, for the plan.
        build: (channels, spatial dimensions, eps, options, with an activation of its own) -> the norm.
        options: names of the `NormOptions` that it reads.
        ndims: spatial dimensions that it works for; 0 is flat features (N, C).
        needs_map: whether one position per image would leave it nothing to measure.
        activation: "any" where it takes the place of norm and activation, "ReLU" where of that one only, else "".
    """

    title: str
    build: Callable[[int, int, float, NormOptions, bool], nn.Module]
    options: tuple[str, ...] = ()
    ndims: tuple[int, ...] = (0, 1, 2, 3)
    needs_map: bool = False
    activation: str = ""


def kind_of(norm: str, options: NormOptions) -> NormKind:
    """The kind called `norm`.

    Raises:
        UnknownName: there is none.
        KNPortError: an option that it does not have, or a value that it cannot take.
    """
    if norm not in KINDS:
        raise UnknownName("norm", norm, KINDS)
    for field in fields(options):
        value = getattr(options, field.name)
        if value is None:
            continue
        if field.name not in KINDS[norm].options:
            takers = ", ".join(repr(name) for name, kind in KINDS.items() if field.name in kind.options)
            raise KNPortError(f"{field.name}={value!r} is no option of norm {norm!r}; it is one of {takers}")
        if not all(isinstance(v, int) and v > 0 for v in (value if isinstance(value, tuple) else (value,))):
            raise KNPortError(f"{field.name}={value!r}; expected a positive int")
    if options.groups and options.group_size:
        raise KNPortError(f"groups={options.groups} and group_size={options.group_size} are two ways to say one thing")
    return KINDS[norm]


def group_count(channels: int, options: NormOptions) -> int:
    """Groups of equal size: as many as asked for, but none of a single channel, which would be an InstanceNorm."""
    wanted = channels // options.group_size if options.group_size else options.groups or 32
    most = max(1, min(wanted, channels // min(2, options.group_size or 2)))
    return max(g for g in range(1, most + 1) if channels % g == 0)


def _by_dimension(name: str, **more) -> Callable[..., nn.Module]:
    def build(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
        return getattr(nn, f"{name}{max(ndim, 1)}d")(channels, eps=eps, **more)

    return build


def _group(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
    return nn.GroupNorm(group_count(channels, options), channels, eps=eps)


def _local_context(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
    size = channels // group_count(channels, NormOptions(group_size=options.group_size or 2))
    window = options.window_size or 227
    return LocalContextNorm(channels, size, window if isinstance(window, tuple) else (window, window), eps=eps)


def _positional(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
    return PositionalNorm(channels, eps=eps)


def _frn(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
    return timm_layer("FilterResponseNormTlu2d")(channels, apply_act=act, eps=eps)


def _evonorm(channels: int, ndim: int, eps: float, options: NormOptions, act: bool) -> nn.Module:
    return timm_layer("EvoNorm2dS0")(channels, groups=group_count(channels, options), apply_act=act, eps=eps)


def timm_layer(name: str) -> type[nn.Module]:
    """A class of `timm.layers`.

    Raises:
        ImportError: timm is not installed.
    """
    try:
        return getattr(importlib.import_module("timm.layers"), name)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name} is taken from timm: pip install timm") from error


KINDS: dict[str, NormKind] = {
    "batch": NormKind("BatchNorm", _by_dimension("BatchNorm")),
    "group": NormKind("GroupNorm", _group, options=("groups", "group_size")),
    "layer": NormKind("GroupNorm", lambda channels, ndim, eps, options, act: nn.GroupNorm(1, channels, eps=eps)),
    "instance": NormKind("InstanceNorm", _by_dimension("InstanceNorm", affine=True), ndims=(1, 2, 3), needs_map=True),
    "local_context": NormKind(
        "LocalContextNorm", _local_context, options=("group_size", "window_size"), ndims=(2,), needs_map=True
    ),
    "positional": NormKind("PositionalNorm", _positional),
    "group_ws": NormKind("GroupNorm", _group, options=("groups", "group_size")),
    "frn": NormKind("FilterResponseNorm", _frn, ndims=(2,), needs_map=True, activation="ReLU"),
    "evonorm_s0": NormKind("EvoNorm2dS0", _evonorm, options=("groups", "group_size"), ndims=(2,), activation="any"),
    "none": NormKind("nothing", lambda channels, ndim, eps, options, act: nn.Identity()),
}
NORMS = tuple(KINDS)
