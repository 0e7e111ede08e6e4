"""What the commands are asked: which network, how it is built, how it is converted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

import knport
from knport.errors import KNPortError, UnknownName
from knport.origin import Origin, build, named
from knport.surgery.replace import NORMS, NormPlan

CHOICES = ("kernel", "original", *NORMS)


@dataclass(frozen=True, kw_only=True)
class Network:
    """Which network.

    Args:
        model: timm/NAME, torchvision/NAME, architectures/NAME, or a folder that `knport convert` made.
        num_classes: size of the last layer.
        in_chans: channels of the images.
        set: further arguments of the constructor, as name=value.
        image_size: pixels per side to read the network with, where it takes several.
        pretrained: with the weights that its library offers; they are downloaded.
    """

    model: tyro.conf.Positional[str]
    num_classes: int | None = None
    in_chans: int | None = None
    set: tuple[str, ...] = ()
    image_size: int | None = None
    pretrained: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder that it is; None when it is a name."""
        return Path(self.model) if Path(self.model).is_dir() else None

    def build(self) -> nn.Module:
        """The network as its library makes it."""
        origin = self.origin()
        if not self.pretrained:
            return build(origin)
        weights = {"timm": {"pretrained": True}, "torchvision": {"weights": "DEFAULT"}}
        library = self.model.partition("/")[0]
        if library not in weights:
            raise KNPortError(f"--pretrained: {library} offers no weights")
        try:
            return named(self.model)(**origin.kwargs, **weights[library])
        except KNPortError:
            raise
        except Exception as error:  # of a download, of any kind, or of a network without weights
            raise KNPortError(f"no trained weights for {self.model}: {type(error).__name__}: {error}") from error

    def origin(self) -> Origin:
        """How the network is built."""
        kwargs = {key: _value(text) for key, text in map(_pair, self.set)}
        given = {"num_classes": self.num_classes, "in_chans": self.in_chans}
        return Origin(name=self.model, kwargs={**{k: v for k, v in given.items() if v is not None}, **kwargs})

    def example_inputs(self, model: nn.Module) -> torch.Tensor | None:
        """Two images of the size asked for; None to leave it to the network."""
        if self.image_size is None:
            return None
        first = next((m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)), None)
        channels, ndim = (3, 2) if first is None else (first.in_channels, first.weight.dim() - 2)
        return torch.zeros(2, channels, *(self.image_size,) * ndim)


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How it is converted.

    Args:
        norm: kernel, or a norm of `knport list` to compare with; original for none.
        config: settings of kernel normalization.
        include: names, globs or re:... of the norms to convert.
        exclude: names, globs or re:... of what to leave alone.
        match_params: "model", for as many as it has now, or a number: resize the network to so many parameters.
        match_macs: likewise, multiply-accumulates per image.
        strategy: width resizes every width that can be, inner those that no residual sum, concatenation or classifier
            sees.
    """

    norm: str = "kernel"
    config: knport.KNConfig = field(default_factory=knport.KNConfig)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    match_params: str | None = None
    match_macs: str | None = None
    strategy: str = "width"

    def plan(self, model: nn.Module, example_inputs: Any) -> knport.surgery.Plan | NormPlan:
        """The plan for `model`."""
        if self._norm() == "original":
            raise KNPortError("norm original: nothing is converted, so there is no plan")
        if self.norm == "kernel":
            return knport.plan(model, self.config, **self._filters(example_inputs), **self._matching())
        return knport.plan_norm(model, self.norm, **self._filters(example_inputs))

    def apply(self, model: nn.Module, example_inputs: Any) -> nn.Module:
        """The converted model."""
        if self._norm() == "original":
            return model
        if self.norm == "kernel":
            return knport.convert(model, self.config, **self._filters(example_inputs), **self._matching())
        return knport.replace_norm(model, self.norm, **self._filters(example_inputs))

    def _norm(self) -> str:
        if self.norm not in CHOICES:
            raise UnknownName("norm", self.norm, CHOICES)
        if self.norm != "kernel" and (self.match_params or self.match_macs):
            raise KNPortError(f"norm {self.norm} keeps the widths; match_params and match_macs go with norm kernel")
        return self.norm

    def _filters(self, example_inputs: Any) -> dict[str, Any]:
        return {
            "include": self.include or None,
            "exclude": self.exclude or None,
            "example_inputs": example_inputs,
        }

    def _matching(self) -> dict[str, Any]:
        asked = {"match_params": self.match_params, "match_macs": self.match_macs}
        return {"strategy": self.strategy, **{name: _value(text) for name, text in asked.items() if text is not None}}


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise KNPortError(f"--set {text}; expected name=value")
    return name, value


def _value(text: str) -> Any:
    """A number, true, false, null or a list where the text is one, else the text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
