"""Checks that frozen dataclasses make of their own fields, and how one is built from nested tables.

Every check raises `ConfigError` with a message of one form: `field: value is not …; allowed: …`.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, TypeVar

from .types import ConfigError

T = TypeVar("T")

LARGEST: Final = (1 << 63) - 1
"""The largest integer that any field takes: counts end up in int64 arrays."""

Reader = Callable[[object, str], object]
"""Makes the value of a field from what a table has there: `reader(value, path of the field)`. Raises
ConfigError that starts with that path."""

_NAME: Final = re.compile(r"[a-z0-9_-]{1,64}")
_SHOWN_MAX: Final = 200


def shown(value: object) -> str:
    """`value` as a message says it, in 200 characters at most. Python itself refuses to print an integer of
    thousands of digits, or lists a thousand deep, and a stranger's `__repr__` may do anything: of those only
    the type is said."""
    try:
        text = repr(value)
    except Exception:
        text = f"this {type(value).__name__}"
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 3]}..."


def refused(name: str, value: object, allowed: str) -> ConfigError:
    """The error for a `value` of field `name` that is not `allowed`."""
    return ConfigError(f"{name}: {shown(value)} is not allowed; allowed: {allowed}")


def an_integer(owner: object, name: str, low: int, allowed: str = "", high: int = LARGEST) -> None:
    """Refuse field `name` unless it is an int (no bool, no float) in [low, high]."""
    value = getattr(owner, name)
    if type(value) is not int or not low <= value <= high:
        most = "" if high == LARGEST else f" and at most {high}"
        raise refused(name, value, allowed or f"an integer of at least {low}{most}")


def seconds(owner: object, name: str, above_zero: bool = False) -> None:
    """Refuse field `name` unless it is a finite number of at least (or above) zero."""
    value = getattr(owner, name)
    number = type(value) in (int, float) and -math.inf < value <= sys.float_info.max
    if not number or value < 0 or (above_zero and value == 0):
        raise refused(name, value, f"finite seconds {'above' if above_zero else 'of at least'} 0")


def a_text(owner: object, name: str, shortest: int = 0) -> None:
    """Refuse field `name` unless it is a str of at least `shortest` characters, none of them NUL."""
    value = getattr(owner, name)
    if not isinstance(value, str) or len(value) < shortest or "\0" in value:
        raise refused(name, value, "text" if shortest == 0 else "text that is not empty")


def a_name(owner: object, name: str) -> None:
    """Refuse field `name` unless it is 1 to 64 lower-case letters, digits, '_' and '-'."""
    value = getattr(owner, name)
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise refused(name, value, "1 to 64 lower-case letters, digits, '_' and '-'")


def one_of(owner: object, name: str, choices: Sequence[object]) -> None:
    """Refuse field `name` unless it is one of `choices`, of the same type too (1 is not True)."""
    value = getattr(owner, name)
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise refused(name, value, ", ".join(map(str, choices)) + suggestion(value, map(str, choices)))


def as_enum(owner: object, name: str, kind: type[StrEnum]) -> None:
    """Make field `name` a member of `kind` (its text will do), or refuse it."""
    value = getattr(owner, name)
    if not isinstance(value, kind):
        choices = [member.value for member in kind]
        if not isinstance(value, str) or value not in choices:
            raise refused(name, value, ", ".join(choices) + suggestion(value, choices))
        object.__setattr__(owner, name, kind(value))


def an_instance(owner: object, name: str, *kinds: type) -> None:
    """Refuse field `name` unless it is one of `kinds`."""
    value = getattr(owner, name)
    if not isinstance(value, kinds):
        raise refused(name, value, f"a {' or a '.join(kind.__name__ for kind in kinds)} (in TOML: a table)")


def suggestion(value: object, known: Iterable[str]) -> str:
    """Ask whether the nearest of `known` was meant; nothing when none is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1) if isinstance(value, str) else []
    return f" (did you mean {near[0]!r}?)" if near else ""


def from_table(
    make: Callable[..., T], values: object, readers: Mapping[str, Reader] | None = None, where: str = ""
) -> T:
    """What `make`, a dataclass or any function, makes of a mapping of its arguments; those named in
    `readers` are read by these first.

    Errors start with the path of the field from the top: `storage.size: …`, `sidecars[1].layout.dtype: …`.
    """
    if not isinstance(values, Mapping):
        raise refused(where or "configuration", values, "a table")
    parameters = inspect.signature(make).parameters
    arguments: dict[str, Any] = {}
    for key, value in values.items():
        if key not in parameters:
            near = f"{suggestion(key, parameters)}; allowed: {', '.join(parameters)}"
            name = key if isinstance(key, str) else shown(key)
            raise ConfigError(f"{_path(where, name[:_SHOWN_MAX])}: is not a known key{near}")
        reader = (readers or {}).get(key)
        arguments[key] = value if reader is None else reader(value, _path(where, key))
    empty = inspect.Parameter.empty
    missing = [each for each in parameters if each not in arguments and parameters[each].default is empty]
    if missing:
        raise ConfigError(f"{_path(where, missing[0])}: is missing; required: {', '.join(missing)}")
    try:
        return make(**arguments)
    except ConfigError as error:
        raise ConfigError(_path(where, str(error))) from None


def table(kind: type[Any], readers: Mapping[str, Reader] | None = None) -> Reader:
    """Reads one table as a dataclass; what is one already stays, and so does None."""

    def read(value: object, where: str) -> object:
        if value is None or isinstance(value, kind):
            return value
        return from_table(kind, value, readers, where)

    return read


def list_of(read: Reader) -> Reader:
    """Reads a list of tables as a tuple."""

    def read_all(value: object, where: str) -> object:
        if not isinstance(value, list | tuple):
            raise refused(where, value, f"a list of tables ([[{where}]])")
        return tuple(read(each, f"{where}[{index}]") for index, each in enumerate(value))

    return read_all


def _path(where: str, rest: str) -> str:
    return f"{where}.{rest}" if where else rest
