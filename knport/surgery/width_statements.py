"""Numbers in a model that state its widths: `in_features` of a head, `num_features`, the channels of `feature_info`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from knport.surgery.channel_groups import Flow
from knport.surgery.resizing import feature_rows
from knport.surgery.widths import Axis

_READ = ("in_channels", "in_chs", "in_features", "in_dim")
_MADE = ("out_channels", "out_chs", "out_features", "out_dim")
_OF_CLASSIFIER = ("num_features", "hidden_size")
_Tensors = list[tuple[tuple[int, ...], list[Axis]]]


def container_attributes(flow: Flow, model: nn.Module) -> dict[tuple[str, str], Axis]:
    """(path, attribute) -> axis, for modules around layers: what they read, what they make, what their `fc` reads."""
    found = {}
    for path, module in model.named_modules():
        if path in flow.layers or (path, "in_channels") in flow.attributes:
            continue
        for names, tensors in ((_READ, flow.inputs.get(path)), (_MADE, flow.outputs.get(path))):
            for name in names:
                axis = _channels(tensors, vars(module).get(name))
                if axis is not None:
                    found[path, name] = axis
        classifier = flow.attributes.get((f"{path}.fc", "in_features"))
        for name in _OF_CLASSIFIER if path and classifier else ():
            if vars(module).get(name) == flow.widths.total(classifier):
                found[path, name] = classifier
    return found


def _channels(tensors: _Tensors | None, size: Any) -> Axis | None:
    """The axis of `size` channels of the first tensor: its second dimension or its last."""
    if not tensors or type(size) is not int:
        return None
    shape, axes = tensors[0]
    places = [dim for dim in (1, -1) if len(shape) > 1 and shape[dim] == size]
    return axes[places[0]] if places else None


def feature_axes(flow: Flow, model: nn.Module) -> tuple[list[tuple[int, Axis]], list[str]]:
    """(index, axis) of the rows of `feature_info`, and a note for each whose module was not called."""
    found, notes = [], []
    for index, row in enumerate(feature_rows(model)):
        before = "pre" in (row.get("hook_type") or "")
        axis = _channels((flow.inputs if before else flow.outputs).get(row.get("module")), row.get("num_chs"))
        if axis is None:
            notes.append(f"feature_info[{index}] ({row.get('module')}) could not be brought up to date")
        else:
            found.append((index, axis))
    return found, notes


def head_sizes(model: nn.Module, args: Sequence[Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of what timm's `num_features` and `head_hidden_size` are the widths of; empty for other models."""
    shapes: dict[str, tuple[int, ...]] = {}
    if not hasattr(model, "forward_features"):
        return shapes
    with torch.no_grad():
        features = model.forward_features(*args)
        if isinstance(features, torch.Tensor):
            shapes["num_features"] = tuple(features.shape)
            if hasattr(model, "head_hidden_size"):
                shapes["head_hidden_size"] = tuple(model.forward_head(features, pre_logits=True).shape)
    return shapes


def head_attributes(
    model: nn.Module, before: dict[str, tuple[int, ...]], after: dict[str, tuple[int, ...]]
) -> list[tuple[str, str, int]]:
    """("", attribute, new value) of what `head_sizes` measured before and after resizing."""
    rows = []
    for name, shape in before.items():
        size = getattr(model, name, None)
        place = next((dim for dim in (1, -1) if len(shape) > 1 and shape[dim] == size), None)
        if place is not None and after[name][place] != size and isinstance(vars(model).get(name), int):
            rows.append(("", name, after[name][place]))
    return rows
