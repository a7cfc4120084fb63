"""Reads the Mooncake trace format: one JSON object per line, in the order of arrival.

    {"timestamp": 0, "input_length": 1300, "output_length": 12, "hash_ids": [0, 7, 9]}

Each id stands for one block of tokens, the last one perhaps for a partial block: equal id <=> equal
block after an equal prefix. `input_length` says how much of the last block there is, so it must agree
with the number of ids. Other fields are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from os import PathLike, fspath
from typing import Any, Final

from ..types import TraceError

NUMBER_MAX: Final = 2**63 - 1
LINE_BYTES_MAX: Final = 16 << 20
"""A line that is longer is no request: it would have millions of blocks."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the ids of its input blocks, and how many tokens of the last one there are."""

    blocks: tuple[int, ...]
    last_tokens: int


def read_trace(path: str | PathLike[str], block_tokens: int, limit: int | None = None) -> list[Request]:
    """The first `limit` requests of `path` (None: all), in file order. Empty lines do not count.

    Raises TraceError naming file, line and field for whatever cannot be read, and for a file without a
    request. Lines after the limit are not looked at. O(bytes read).
    """
    name = fspath(path)
    requests: list[Request] = []
    try:
        with open(path, "rb") as file:
            lines = iter(partial(file.readline, LINE_BYTES_MAX + 1), b"")
            for number, line in enumerate(lines, 1):
                if limit is not None and len(requests) >= limit:
                    break
                if len(line) > LINE_BYTES_MAX:
                    raise TraceError(f"{name}:{number}: is longer than {LINE_BYTES_MAX} bytes")
                if line.strip():
                    requests.append(_request(line, f"{name}:{number}", block_tokens))
    except TraceError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no file can have this name"
        raise TraceError(f"{name}: cannot be read: {reason}") from error
    if not requests:
        raise TraceError(f"{name}: holds no request")
    return requests


def _request(line: bytes, where: str, block_tokens: int) -> Request:
    fields = _fields(line, where)
    for name in ("timestamp", "output_length"):
        _number(fields, name, where, whole=name != "timestamp")
    length = int(_number(fields, "input_length", where))
    ids = _value(fields, "hash_ids", where)
    if type(ids) is not list:
        raise TraceError(f"{where}: hash_ids: {_short(ids)} is not a list of block ids")
    for at, each in _oddities(ids):
        raise TraceError(f"{where}: hash_ids[{at}]: {_short(each)} is not an integer of at least 0")
    needed = -(-length // block_tokens)
    if len(ids) != needed:
        raise TraceError(
            f"{where}: hash_ids: {len(ids)} ids, but input_length {length} is {needed} blocks of "
            f"{block_tokens} tokens"
        )
    return Request(tuple(ids), length - block_tokens * (len(ids) - 1) if ids else 0)


def _fields(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it cannot be decoded"
        raise TraceError(f"{where}: is not JSON: {reason}") from None
    if not isinstance(found, dict):
        raise TraceError(f"{where}: {_short(found)} is not a JSON object")
    return found


def _value(fields: dict[str, Any], name: str, where: str) -> Any:
    if name not in fields:
        raise TraceError(f"{where}: {name}: is missing")
    return fields[name]


def _number(fields: dict[str, Any], name: str, where: str, whole: bool = True) -> float:
    value = _value(fields, name, where)
    fits = type(value) is int or (not whole and type(value) is float and math.isfinite(value))
    if not fits or not 0 <= value <= NUMBER_MAX:
        kind = "an integer" if whole else "a number"
        raise TraceError(f"{where}: {name}: {_short(value)} is not {kind} of at least 0")
    number: float = value
    return number


def _oddities(ids: list[Any]) -> Iterator[tuple[int, Any]]:
    """Positions and values of ids that are not block ids; usually none, and then this is quick."""
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0):
        return
    for at, each in enumerate(ids):
        if type(each) is not int or each < 0:
            yield at, each


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."
