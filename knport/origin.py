"""Where a network comes from: ``timm/NAME``, ``torchvision/NAME``, ``architectures/NAME`` or a function of the user."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from knport.errors import KNPortError, UnknownName

# Arguments that load weights from elsewhere: the weights of a saved model are in its own file.
_LOADING = ("pretrained", "weights", "weights_backbone", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How a network is built.

    Args:
        name: ``library/NAME``, or ``module:function`` of the user's own factory.
        kwargs: its arguments.
    """

    name: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        """Whether a function of the user builds it."""
        return ":" in self.name and "/" not in self.name


def build(origin: Origin, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """The network, freshly initialized; the global random state stays as it is.

    Args:
        origin: what to build.
        factory: the user's function, where it is one; a name in a file is never imported.

    Raises:
        UnknownName: the library has no such network.
        KNPortError: the library is not installed, or refuses the arguments.
    """
    for name in _LOADING:
        if origin.kwargs.get(name):
            raise KNPortError(
                f"{origin.name} with {name}={origin.kwargs[name]!r}: weights come from the saved file only"
            )
    make = factory if origin.own else named(origin.name)
    with torch.random.fork_rng(devices=[]):
        try:
            model = make(**origin.kwargs)
        except KNPortError:
            raise
        except Exception as error:  # whatever a constructor may raise
            raise KNPortError(f"could not build {_call(origin)} ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise KNPortError(f"{_call(origin)} gave a {type(model).__name__}; expected a torch.nn.Module")
    return model


def skeleton(origin: Origin, factory: Callable[..., nn.Module] | None = None) -> nn.Module:
    """As `build`, on the meta device where the network can be built there: for its structure only."""
    try:
        with torch.device("meta"):
            return build(origin, factory)
    except KNPortError:
        return build(origin, factory)


def named(name: str) -> Callable[..., nn.Module]:
    """The constructor of ``library/NAME``.

    Raises:
        UnknownName: there is none; the message lists near names.
        KNPortError: the library is not installed.
    """
    library, _, rest = name.partition("/")
    if library not in _LIBRARIES:
        everywhere = list_names()
        raise UnknownName("model", name, [n for n in everywhere if n.endswith(f"/{rest or name}")] or everywhere)
    names, create = _LIBRARIES[library]
    known = names()
    if rest not in known:
        raise UnknownName("model", name, [f"{library}/{other}" for other in known])
    return lambda **kwargs: create(rest, **kwargs)


def list_names() -> list[str]:
    """Every name of every library that is installed."""
    found = []
    for library, (names, _) in _LIBRARIES.items():
        try:
            found += [f"{library}/{name}" for name in names()]
        except KNPortError:
            continue
    return found


def origin_of(model: nn.Module) -> Origin | None:
    """What a network of timm says about itself; None for others. That it is all is for the caller to verify."""
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    config = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
    name = config.get("architecture")
    if not name or not type(model).__module__.startswith("timm."):
        return None
    kwargs = {}
    classes = getattr(model, "num_classes", None)
    if isinstance(classes, int) and classes != config.get("num_classes"):
        kwargs["num_classes"] = classes
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if first is not None and first.groups == 1 and first.in_channels != (config.get("input_size") or (3,))[0]:
        kwargs["in_chans"] = first.in_channels
    return Origin(name=f"timm/{name}", kwargs=kwargs)


def given_origin(base: str | Callable[..., nn.Module], kwargs: Mapping[str, Any] | None) -> Origin:
    """The origin that a caller states: a name, or an importable function."""
    kwargs = dict(kwargs or {})
    if isinstance(base, str):
        named(base)
        return Origin(name=base, kwargs=kwargs)
    name = getattr(base, "__qualname__", "<")
    if not callable(base) or "<" in name:
        raise KNPortError(f"base={base!r}; expected a name such as 'timm/resnet50' or a function of a module")
    return Origin(name=f"{base.__module__}:{name}", kwargs=kwargs)


def _call(origin: Origin) -> str:
    return f"{origin.name}({', '.join(f'{key}={value!r}' for key, value in origin.kwargs.items())})"


def _library(name: str):
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        hint = "run from the checkout of knport" if name == "architectures" else f"pip install {name}"
        raise KNPortError(f"{name} is not installed here; {hint}") from error


def _timm_names() -> list[str]:
    """Its own: the networks of architectures are registered there too once they are imported."""
    timm = _library("timm")
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__.startswith("timm.")]


def _create_torchvision(name: str, **kwargs) -> nn.Module:
    models = _library("torchvision").models
    builder = models.get_model_builder(name)
    # Segmentation and detection networks fetch a trained backbone unless they are told not to.
    extra = {"weights_backbone": None} if "weights_backbone" in inspect.signature(builder).parameters else {}
    return builder(**{"weights": None, **extra, **kwargs})


_LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[..., nn.Module]]] = {
    "architectures": (
        lambda: _library("architectures").list_models(),
        lambda name, **kwargs: _library("architectures").create_model(name, **kwargs),
    ),
    "timm": (
        _timm_names,
        lambda name, **kwargs: _library("timm").create_model(name, **kwargs),
    ),
    "torchvision": (lambda: _library("torchvision").models.list_models(), _create_torchvision),
}
