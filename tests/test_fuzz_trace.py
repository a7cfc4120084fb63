"""No trace makes its reader fail in any way but with a TraceError that names the file and the line."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from fuzz_support import EXAMPLES, Odd, refusal, soak, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from tiertree import TraceError
from tiertree.replay.trace import LINE_BYTES_MAX, read_trace

BLOCK = 4
GOOD = {"timestamp": "0", "input_length": "7", "output_length": "1", "hash_ids": "[3, 4]"}
VALUES = [
    "1e999",
    "-0",
    "NaN",
    "-Infinity",
    "9" * 5000,
    "-" + "9" * 4299,
    "9" * 4299,
    f"[{'9' * 4299}, 1]",
    "[" * 900 + "]" * 900,
    "[" * 100_000,
    '{"a":' * 900 + "1" + "}" * 900,
    '"\\ud800"',
    '"\\u0000"',
    "\0",
    "[1.0, 2.0]",
    "[[], []]",
    "[true, false]",
    f"[{'1,' * 10_000} 1]",
    f'"{"x" * 100_000}"',
]
"""What JSON can say and nobody should, and what only looks like JSON."""


def printable(value: Any) -> bool:
    if isinstance(value, Odd):
        return False
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(printable, inner))


values = st.sampled_from(VALUES) | tables.filter(printable).map(json.dumps)
fields = st.lists(st.tuples(st.sampled_from([*GOOD, "other"]), values), max_size=3)
any_line: dict[str, Any] = {
    "more": fields,
    "twice": st.booleans(),
    "junk": st.binary(max_size=6),
    "at": st.integers(0, 200),
}


def read_line(file: Path, more: list[tuple[str, str]], twice: bool, junk: bytes, at: int) -> None:
    """A good line with some fields changed, or there `twice`, and bytes of any sort thrown in."""
    named = dict(more)
    kept = [(name, value) for name, value in GOOD.items() if twice or name not in named]
    line = ("{" + ", ".join(f'"{name}": {value}' for name, value in [*kept, *more]) + "}").encode()
    file.write_bytes(b"\n" + line[:at] + junk + line[at:] + b"\n")
    refused = refusal(read_trace, file, BLOCK)
    if refused is None:
        for request in read_trace(file, BLOCK):
            assert all(type(block) is int and block >= 0 for block in request.blocks)
            assert 0 < request.last_tokens <= BLOCK if request.blocks else request.last_tokens == 0
    else:
        assert isinstance(refused, TraceError)
        assert str(refused).startswith(str(file))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "trace.jsonl"


@settings(EXAMPLES, max_examples=400)
@given(**any_line)
def test_any_line_is_a_request_or_an_error(file: Path, **line: Any) -> None:
    read_line(file, **line)


def test_a_line_that_never_ends_is_not_read_to_its_end(file: Path) -> None:
    with file.open("wb") as out:
        out.write(b"\n\n")
        out.truncate(1 << 40)
    tracemalloc.start()
    try:
        assert f"{file}:3: is longer" in str(refusal(read_trace, file, BLOCK))
        assert tracemalloc.get_traced_memory()[1] < 3 * LINE_BYTES_MAX
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["a\0b", "\ud800"], ids=["NUL", "surrogate"])
def test_a_name_that_no_file_can_have(name: str) -> None:
    assert "cannot be read" in str(refusal(read_trace, name, BLOCK))


@pytest.mark.soak
def test_soak(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read_any_line(**line: Any) -> None:
        read_line(file, **line)

    done = soak(read_any_line, 0.03, **any_line)
    with capsys.disabled():
        print(f"\n{done}")
