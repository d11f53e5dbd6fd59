"""From plain data (a YAML file, JSON) to frozen dataclasses, strictly, and back.

Unknown keys, wrong types and missing fields are refused with an error that names the field's path. Written here rather
than taken from cattrs, whose import alone costs more than a whole `polyvisor run` may (docs/design/spec-parsing.md).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from enum import Enum
from typing import Any, TypeVar

from polyvisor.errors import InvalidInput

T = TypeVar("T")

_NAMES = {str: "text", int: "a whole number", bool: "true or false", float: "a number"}


def structure(raw: object, kind: type[T], path: str = "") -> T:
    """An instance of dataclass `kind` from the mapping `raw`.

    `path` is where `raw` stands, for error messages. Raises InvalidInput.
    """
    if not isinstance(raw, Mapping):
        raise InvalidInput(path or "spec", raw, "is not a mapping of keys to values")
    known = _fields(typing.cast("Any", kind))
    for key in raw:
        if key not in known:
            raise InvalidInput(
                _join(path, str(key)), raw[key], "is an unknown key", hint=_nearest(str(key), list(known))
            )
    for name, required in _required(typing.cast("Any", kind)).items():
        if required and name not in raw:
            raise InvalidInput(_join(path, name), None, "is missing", hint=f"add '{name}: …'")
    values = {key: convert(value, known[key], _join(path, key)) for key, value in raw.items()}
    try:
        return kind(**values)
    except InvalidInput as error:
        raise _prefixed(error, path) from None


def unstructure(value: Any) -> Any:
    """Plain data (dict, list, str, int …) from a dataclass instance; fields that have their default are left out."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: unstructure(item)
            for field in dataclasses.fields(value)
            if (item := getattr(value, field.name)) != _default(field)
        }
    if isinstance(value, (list, tuple)):
        return [unstructure(item) for item in value]
    if isinstance(value, dict):
        return {key: unstructure(item) for key, item in value.items()}
    return value.value if isinstance(value, Enum) else value


def convert(value: object, kind: Any, path: str) -> Any:
    """`value`, plain data, as a value of type `kind`: a dataclass, an Enum, a tuple, list, dict or plain value of those.

    `path` is where it stands, for error messages. Raises InvalidInput.
    """
    if type(value) is kind and kind in _NAMES:  # most values: `ls` reads thousands
        return value
    if kind is types.NoneType and value is None:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else convert(value, next(a for a in arguments if a is not type(None)), path)
    if origin in (tuple, list, Sequence):
        origin = list if origin is list else tuple
        if not isinstance(value, (list, tuple)):
            raise InvalidInput(path, value, "is not a list", hint=f"write {path}: [ … ]")
        return origin(convert(item, arguments[0], f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        return _convert_dict(value, arguments[1], path)
    if dataclasses.is_dataclass(kind):
        return structure(value, typing.cast("type[Any]", kind), path)
    if issubclass(kind, Enum):
        return _convert_enum(value, kind, path)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise InvalidInput(path, value, f"is not {_NAMES[kind]}", hint=_type_hint(value, kind, path))
    return value


def _convert_dict(value: object, kind: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InvalidInput(path, value, "is not a mapping of keys to values")
    for key in value:
        if not isinstance(key, str):
            raise InvalidInput(path, key, "is a key that is not text", hint="put it in quotes")
    return {key: convert(item, kind, f"{path}.{key}") for key, item in value.items()}


def _convert_enum(value: object, kind: type[Enum], path: str) -> Enum:
    choices = [str(member.value) for member in kind]
    if value not in choices:
        raise InvalidInput(path, value, "is not a choice here", hint=f"use {', '.join(choices[:-1])} or {choices[-1]}")
    return kind(value)


def _type_hint(value: object, kind: type, path: str) -> str | None:
    if kind is str and isinstance(value, (int, float)) and abs(value) < 1e15 and len(path) < 100:
        return f'put it in quotes: {path.rpartition(".")[2]}: "{value}"'
    if kind is int and isinstance(value, str) and value[:1].isdigit():
        return "write the number alone: the field's name has its unit"
    return None


@functools.cache
def _fields(kind: Hashable) -> dict[str, Any]:
    """Name → type of the fields of dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(typing.cast("Any", kind))}


@functools.cache
def _required(kind: Hashable) -> dict[str, bool]:
    return {
        field.name: _default(field) is dataclasses.MISSING for field in dataclasses.fields(typing.cast("Any", kind))
    }


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _prefixed(error: InvalidInput, path: str) -> InvalidInput:
    if not path:
        return error
    return InvalidInput(_join(path, error.field), error.value, error.problem, hint=error.hint)


def _nearest(key: str, known: list[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(key[:100], known, 1)
    return f"did you mean '{near[0]}'?" if near else f"known here: {', '.join(known)}"
