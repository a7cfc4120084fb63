"""What the fuzz tests share: values that nobody should pass, and how to run them for a while."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from tiertree import TiertreeError

EXAMPLES = settings(max_examples=100, suppress_health_check=list(HealthCheck))


@dataclass(frozen=True)
class Odd:
    """Stands for a value that is too large or too deep to be printed: see `real`."""

    name: str


ODDITIES: dict[str, Callable[[], Any]] = {
    "10**400": lambda: 10**400,
    "10**5000": lambda: 10**5000,
    "-10**5000": lambda: -(10**5000),
    "50 lists deep": lambda: nested(50),
    "5000 lists deep": lambda: nested(5000),
    "a table of 10**5000": lambda: {10**5000: None},
    "itself": lambda: round_and_round(),
    "a generator": lambda: (each for each in [1, 2]),
    "an object": object,
    "a class": lambda: object,
    "a function": lambda: nested,
    "an ellipsis": lambda: ...,
    "bytes": lambda: b"123",
    "a bytearray": lambda: bytearray(b"12"),
    "a memoryview": lambda: memoryview(b"12"),
    "a range": lambda: range(3),
    "a range from -2": lambda: range(-2, 2),
    "a range without end": lambda: range(10**18),
    "a set": lambda: {1, 2},
    "a frozenset": lambda: frozenset([1]),
    "a complex": lambda: 1j,
    "int64": lambda: np.int64(2),
    "uint64": lambda: np.uint64(2**64 - 1),
    "float32": lambda: np.float32(2),
    "bool": lambda: np.bool_(True),
    "not a time": lambda: np.datetime64("nat"),
    "a masked array": lambda: np.ma.masked_array([1, 2], [True, False]),
    "backwards": lambda: np.arange(12, dtype=np.int64)[::-3],
    "big-endian": lambda: np.arange(6, dtype=">i8"),
    "records": lambda: np.zeros(0, [("a", "<i8")]),
    "voids": lambda: np.zeros(0, "V4"),
    "a tensor": lambda: torch.tensor([1, 2]),
    "a tensor with a gradient": lambda: torch.tensor([1.0, 2.0], requires_grad=True),
    "a tensor of bfloat16": lambda: torch.tensor([1, 2], dtype=torch.bfloat16),
    "a tensor without dimensions": lambda: torch.tensor(3),
}


MESSAGE_MAX = 700
"""Characters of an error, whatever it is about."""


def refusal(call: Callable[..., Any], *arguments: Any) -> TiertreeError | None:
    """The named error that a call ends with, of bearable length; None if it ends well."""
    refused = None
    try:
        call(*arguments)
    except TiertreeError as error:
        refused = error
    assert len(str(refused)) <= MESSAGE_MAX
    return refused


def nested(size: int) -> list[Any]:
    """A list in a list in a list …, `size` deep."""
    deep: list[Any] = []
    for _ in range(size):
        deep = [deep]
    return deep


def round_and_round() -> list[Any]:
    """A list that holds itself."""
    own: list[Any] = []
    own.append(own)
    return own


def real(value: Any) -> Any:
    """`value` with every `Odd` in it made."""
    if isinstance(value, Odd):
        return ODDITIES[value.name]()
    if isinstance(value, list):
        return [real(each) for each in value]
    if isinstance(value, dict):
        return {key: real(each) for key, each in value.items()}
    return value


oddities = st.sampled_from(sorted(ODDITIES)).map(Odd)
edges = st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 2**70, 10**30])
integers = st.one_of(st.integers(-3, 40), edges, edges.map(lambda each: -each), st.integers(), oddities)
"""Small ones, those at the edges of machine words, and some that Python itself refuses to print."""

texts = st.one_of(
    st.sampled_from(
        ["", "\0", "\ud800", "٣", "１２", "²", "9" * 5000, "9" * 5000 + "GiB", "x" * 5000, "1e9999"]
    ),
    st.text(st.characters(exclude_categories=()), max_size=12),
)
"""Lone surrogates, NUL, digits of other scripts, and too much of a good thing."""

scalars = st.one_of(st.none(), st.booleans(), integers, st.floats(), texts)


tables: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
"""What JSON or TOML could hold."""

arrays = npst.arrays(
    dtype=npst.scalar_dtypes() | npst.array_dtypes(max_size=2),
    shape=npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
)

anything: st.SearchStrategy[Any] = st.one_of(
    scalars, tables, arrays, oddities, st.lists(integers, max_size=5)
)
"""Any object at all, once it is `real`."""


def soak(test: Callable[..., None], part: float, **strategies: st.SearchStrategy[Any]) -> str:
    """Give `test` further examples for its `part` of SOAK_SECONDS; a failure says with which seed. Returns
    what was done."""
    end = time.monotonic() + part * float(os.environ.get("SOAK_SECONDS", "600"))
    first = number = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    while time.monotonic() < end:
        again = seed(number)(settings(EXAMPLES, max_examples=500, database=None)(given(**strategies)(test)))
        try:
            again()
        except BaseException as error:
            error.add_note(f"repeat with SOAK_SEED={number}")
            raise
        number += 1
    return f"{test.__name__}: SOAK_SEED={first}, {number - first} times 500 examples"
