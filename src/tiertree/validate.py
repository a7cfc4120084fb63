"""Checks that frozen dataclasses make of their own fields, and how one is built from nested tables.

Every check raises `ConfigError` with a message of one form: `field: value is not …; allowed: …`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, TypeVar

from .types import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    D = TypeVar("D", bound=DataclassInstance)

LARGEST: Final = (1 << 63) - 1
"""The largest integer that any field takes: counts end up in int64 arrays."""

Tables = Mapping[str, "type[DataclassInstance] | tuple[type[DataclassInstance]]"]
"""Which fields are tables of their own, by name, with the dataclass of each; (dataclass,): a list of them."""


def refused(name: str, value: object, allowed: str) -> ConfigError:
    """The error for a `value` of field `name` that is not `allowed`."""
    return ConfigError(f"{name}: {value!r} is not allowed; allowed: {allowed}")


def an_integer(owner: object, name: str, low: int, allowed: str = "", high: int = LARGEST) -> None:
    """Refuse field `name` unless it is an int (no bool, no float) in [low, high]."""
    value = getattr(owner, name)
    if type(value) is not int or not low <= value <= high:
        most = "" if high == LARGEST else f" and at most {high}"
        raise refused(name, value, allowed or f"an integer of at least {low}{most}")


def seconds(owner: object, name: str, above_zero: bool = False) -> None:
    """Refuse field `name` unless it is a finite number of at least (or above) zero."""
    value = getattr(owner, name)
    number = type(value) in (int, float) and math.isfinite(value)
    if not number or value < 0 or (above_zero and value == 0):
        raise refused(name, value, f"finite seconds {'above' if above_zero else 'of at least'} 0")


def a_text(owner: object, name: str, shortest: int = 0) -> None:
    """Refuse field `name` unless it is a str of at least `shortest` characters, none of them NUL."""
    value = getattr(owner, name)
    if not isinstance(value, str) or len(value) < shortest or "\0" in value:
        raise refused(name, value, "text" if shortest == 0 else "text that is not empty")


def one_of(owner: object, name: str, choices: Sequence[object]) -> None:
    """Refuse field `name` unless it is one of `choices`, of the same type too (1 is not True)."""
    value = getattr(owner, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        near = _suggestion(value, [str(choice) for choice in choices])
        raise refused(name, value, ", ".join(map(str, choices)) + near)


def as_enum(owner: object, name: str, kind: type[StrEnum]) -> None:
    """Make field `name` a member of `kind` (its text will do), or refuse it."""
    value = getattr(owner, name)
    if not isinstance(value, kind):
        choices = [member.value for member in kind]
        if not isinstance(value, str) or value not in choices:
            raise refused(name, value, ", ".join(choices) + _suggestion(value, choices))
        object.__setattr__(owner, name, kind(value))


def an_instance(owner: object, name: str, kind: type) -> None:
    """Refuse field `name` unless it is a `kind`."""
    value = getattr(owner, name)
    if not isinstance(value, kind):
        raise refused(name, value, f"a {kind.__name__} (in TOML: a table)")


def from_table(kind: type[D], values: object, tables: Tables, where: str = "") -> D:
    """A `kind` from a mapping of its fields, those named in `tables` nested.

    Errors start with the path of the field from the top: `storage.size: …`, `sidecars[1].layout.dtype: …`.
    """
    if not isinstance(values, Mapping):
        raise refused(where or "configuration", values, "a table")
    known = {each.name: each for each in fields(kind)}
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            allowed = ", ".join(known)
            near = _suggestion(key, list(known))
            raise ConfigError(f"{_path(where, str(key))}: is not a known key{near}; allowed: {allowed}")
        arguments[key] = _nested(tables[key], value, tables, _path(where, key)) if key in tables else value
    missing = [name for name, each in known.items() if name not in arguments and _required(each)]
    if missing:
        raise ConfigError(f"{_path(where, missing[0])}: is missing; required: {', '.join(missing)}")
    try:
        return kind(**arguments)
    except ConfigError as error:
        raise ConfigError(_path(where, str(error))) from None


def _nested(
    kind: type[DataclassInstance] | tuple[type[DataclassInstance]], value: object, tables: Tables, where: str
) -> object:
    """The dataclass of one nested table, or the tuple of them; what is built already stays."""
    if isinstance(kind, tuple):
        if not isinstance(value, list | tuple):
            raise refused(where, value, f"a list of tables ([[{where}]])")
        return tuple(_nested(kind[0], each, tables, f"{where}[{i}]") for i, each in enumerate(value))
    if value is None or isinstance(value, kind):
        return value
    return from_table(kind, value, tables, where)


def _required(each: Field[Any]) -> bool:
    return each.default is MISSING and each.default_factory is MISSING


def _path(where: str, rest: str) -> str:
    return f"{where}.{rest}" if where else rest


def _suggestion(value: object, known: list[str]) -> str:
    """Ask whether the nearest of `known` was meant; nothing when none is near."""
    near = difflib.get_close_matches(str(value), known, n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
