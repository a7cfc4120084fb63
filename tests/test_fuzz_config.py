"""No table and no text makes a configuration fail in any way but with a ConfigError that names the field."""

from __future__ import annotations

import copy
import dataclasses
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzz_support import EXAMPLES, Odd, anything, real, refusal, soak, tables, texts
from hypothesis import given, settings
from hypothesis import strategies as st

from tiertree import (
    CacheConfig,
    ConfigError,
    DeviceConfig,
    HostConfig,
    KindConfig,
    KVLayout,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    SidecarConfig,
    SlidingWindow,
    StateLayout,
    StorageConfig,
)
from tiertree.config import parse_bytes
from tiertree.tierconfig import BreakerConfig

PAGE = {"layers": 1, "kv_heads": 1, "head_size": 8}
GOOD: dict[str, Any] = {
    "device": {"size": 10},
    "host": {"size": 20},
    "storage": {"path": "x", "size": "1GiB"},
    "layout": PAGE,
    "kinds": [{"rules": {"kind": "swa", "window": 32}, "device": 5, "host": 5, "layout": PAGE}],
    "sidecars": [{"name": "draft", "layout": PAGE}],
    "prefetch": {},
    "load_back": {},
    "breaker": {},
}
"""Tables with nothing wrong in them."""

LAYOUT = KVLayout(layers=1, kv_heads=1, head_size=8)
NEEDED: dict[type, dict[str, Any]] = {
    CacheConfig: {"device": DeviceConfig(size=10)},
    DeviceConfig: {"size": 10},
    HostConfig: {"size": 10},
    StorageConfig: {"path": "x", "size": "1GiB"},
    PrefetchConfig: {},
    LoadBackConfig: {},
    BreakerConfig: {},
    KVLayout: PAGE,
    StateLayout: {"layers": 1, "elements": 1},
    SidecarConfig: {"name": "draft", "layout": LAYOUT},
    KindConfig: {"rules": Mamba(), "device": 5},
    SlidingWindow: {"window": 4},
    Mamba: {},
}
"""Every part of a configuration, and what it cannot do without."""
FIELDS = [(part, field.name) for part in NEEDED for field in dataclasses.fields(part)]


def paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a table of tables."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        yield from paths(each, (*path, key))


PLACES = [path for path in paths(GOOD) if path]


def changed(path: tuple[Any, ...], extra: Any, value: Any) -> dict[str, Any]:
    """Good tables with `value` at `path`, or, if there is a table, at `extra` in it (None: in its place)."""
    found = inner = copy.deepcopy(GOOD)
    for key in path[:-1]:
        inner = inner[key]
    if extra is not None and isinstance(inner[path[-1]], dict):
        inner[path[-1]][extra] = value
    else:
        inner[path[-1]] = value
    return found


def quietly(call: Any, *arguments: Any) -> Exception | None:
    """A configuration may warn. It may not fail with anything but a ConfigError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused = refusal(call, *arguments)
    assert refused is None or isinstance(refused, ConfigError)
    return refused


def read_tables(path: tuple[Any, ...], extra: Any, value: Any) -> None:
    quietly(CacheConfig.from_mapping, changed(path, real(extra), real(value)))


def set_field(field: tuple[type, str], value: Any) -> None:
    part, name = field
    quietly(lambda: part(**{**NEEDED[part], name: real(value)}))


def read_size(text: str) -> None:
    refused = quietly(parse_bytes, text)
    assert refused is not None or 1 <= parse_bytes(text) <= 2**63 - 1


extras = st.none() | texts | st.integers() | st.sampled_from([Odd("10**5000"), Odd("int64")])
any_place: dict[str, Any] = {"path": st.sampled_from(PLACES), "extra": extras, "value": tables | anything}
any_field: dict[str, Any] = {"field": st.sampled_from(FIELDS), "value": anything}
near_sizes = st.from_regex(r"\s?\d*\.?\d*(e\d)? ?([KMGTkmgt]i?)?B?\s?")
any_size: dict[str, Any] = {"text": near_sizes | st.from_regex(r"[0-9]{20,40}(\.[0-9]+)?TiB")}


@settings(EXAMPLES, max_examples=200)
@given(**any_place)
def test_any_table_is_a_configuration_or_an_error(path: tuple[Any, ...], extra: Any, value: Any) -> None:
    read_tables(path, extra, value)


@settings(EXAMPLES, max_examples=300)
@given(**any_field)
def test_any_value_of_any_field_is_taken_or_refused(field: tuple[type, str], value: Any) -> None:
    set_field(field, value)


@settings(EXAMPLES, max_examples=100)
@given(**any_size)
def test_any_text_is_a_size_or_an_error(text: str) -> None:
    read_size(text)


NO_SIZES = ["٣GiB", "１２MiB", "²B", "1e9B", "+1B", "-1B", "1_0B", "0x10B", "9" * 5000 + "GiB", "inf GiB"]


@pytest.mark.parametrize("size", NO_SIZES)
def test_a_size_is_written_in_plain_digits(size: str) -> None:
    assert quietly(parse_bytes, size) is not None


@pytest.mark.parametrize(
    "value",
    [10**400, 10**5000, -(10**400), float("inf"), float("nan")],
    ids=["10**400", "10**5000", "-10**400", "inf", "nan"],
)
def test_seconds_are_finite(value: Any) -> None:
    assert "base_seconds" in str(quietly(lambda: PrefetchConfig(base_seconds=value)))


# -- files -----------------------------------------------------------------------------------------

BOMBS = {
    "brackets": b"a = " + b"[" * 60_000,
    "closed brackets": b"a = " + b"[" * 5000 + b"]" * 5000,
    "braces": b"a = " + b"{a=" * 20_000,
    "dots": b"a" + b".a" * 30_000 + b" = 1",
    "headings": b"[a" + b".a" * 30_000 + b"]",
    "dots on many lines": b"".join(b"a%d" % at + b".a" * 64 + b" = 1\n" for at in range(450)),
    "many headings": b"".join(b"[a%d" % at + b".a" * 64 + b"]\n" for at in range(450)),
    "digits": b"page_size = " + b"9" * 5000,
    "a float": b"op_deadline_seconds = 1e999",
    "hexadecimal": b"page_size = 0x" + b"f" * 5000,
    "not UTF-8": b'model = "\xff"',
    "a lone surrogate": b'model = "\\ud800"',
    "NUL": b"model = '\0'",
    "the same key twice": b"page_size = 1\npage_size = 2",
    "a date": b"page_size = 1979-05-27",
    "nothing": b"",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_file_full_of_malice_is_refused_by_name(tmp_path: Path, bomb: str) -> None:
    path = tmp_path / "cache.toml"
    path.write_bytes(BOMBS[bomb])
    assert str(quietly(CacheConfig.from_toml, path)).startswith(str(path))


starts = st.sampled_from([b"", b"device = ", b"[device]\nsize = 1\n", b"[[kinds]]\n"])


@settings(EXAMPLES, max_examples=100)
@given(start=starts, more=st.binary(max_size=30))
def test_any_bytes_are_a_file_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, start: bytes, more: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(start + more)
    quietly(CacheConfig.from_toml, path)


def test_a_file_that_never_ends_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "cache.toml"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        assert "is too long" in str(quietly(CacheConfig.from_toml, path))
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "surrogate"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    assert "cannot be read" in str(quietly(CacheConfig.from_toml, name))


@pytest.mark.soak
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    done = [soak(read_tables, 0.02, **any_place), soak(set_field, 0.02, **any_field)]
    done.append(soak(read_size, 0.01, **any_size))
    with capsys.disabled():
        print("\n" + "\n".join(done))
