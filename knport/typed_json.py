"""Frozen dataclasses as JSON and back, checked against their type annotations: no file can slip in another type."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from knport.errors import KNPortError


def encode(value: Any) -> Any:
    """Dictionaries, lists, strings, numbers, booleans and None for a dataclass or a value inside one."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [encode(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise KNPortError(f"{value!r} cannot be written as JSON")


def decode(kind: Any, data: Any, where: str) -> Any:
    """The value of type `kind` that `encode` made `data` of.

    Args:
        kind: a dataclass, or what stands in the annotation of a field.
        data: parsed JSON.
        where: name of the value, for messages.

    Raises:
        KNPortError: `data` is not of that type, or a field is missing or unknown.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, data, where)
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        return _union(args, data, where)
    if kind in (None, type(None)):
        return data if data is None else _wrong(data, where, "nothing")
    if origin in (tuple, list, frozenset):
        return _sequence(origin, args, data, where)
    if origin in (dict, Mapping):
        if not isinstance(data, dict):
            _wrong(data, where, "an object")
        return {key: decode(args[1], item, f"{where}.{key}") for key, item in data.items()}
    return _plain(kind, data, where)


def _dataclass(kind: type, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        _wrong(data, where, "an object")
    hints = get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for name in data.keys() - fields.keys():
        raise KNPortError(f"{where}.{name} is unknown to this version of knport")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in data:
            raise KNPortError(f"{where}.{name} is missing")
    return kind(**{name: decode(hints[name], item, f"{where}.{name}") for name, item in data.items()})


def _union(args: tuple, data: Any, where: str) -> Any:
    for arg in args:
        try:
            return decode(arg, data, where)
        except KNPortError:
            continue
    return _wrong(data, where, " or ".join(getattr(arg, "__name__", str(arg)) for arg in args))


def _sequence(origin: type, args: tuple, data: Any, where: str) -> Any:
    if not isinstance(data, list):
        _wrong(data, where, "a list")
    if origin is tuple and args[-1] is not Ellipsis:
        if len(args) != len(data):
            _wrong(data, where, f"a list of {len(args)}")
        kinds = args
    else:
        kinds = (args[0],) * len(data)
    return origin(decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, data, strict=True)))


def _plain(kind: type, data: Any, where: str) -> Any:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    return data if right else _wrong(data, where, kind.__name__)


def _wrong(data: Any, where: str, expected: str) -> Any:
    raise KNPortError(f"{where} is {str(data)[:40]!r}; expected {expected}")
