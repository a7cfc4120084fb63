"""Whatever is passed to a cache comes out as an answer or as a named error that has changed nothing."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fuzz_support import EXAMPLES, Odd, anything, integers, real, refusal, soak
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import rules
from rig import Rig, books

from tiertree import (
    SWA,
    ConfigError,
    ForeignObject,
    InvalidDeadline,
    InvalidNamespace,
    InvalidSlots,
    InvalidTokens,
    PrefixCache,
    Tier,
)

AGES = 1e9
"""Seconds, as many as the longest deadline has."""


class World:
    """A cache with pages on device, on host and in storage, and one good object of every sort. Whoever waits
    there waits for ages at a time: nothing of what is in flight is ever answered."""

    def __init__(self) -> None:
        self.rig = Rig(6, 6, 100, kinds=[rules(window=2)[SWA]])
        self.cache = cache = self.rig.cache
        self.rig.put([1, 2, 3])
        self.rig.settle()
        self.rig.evict(1)
        self.rig.executor.wait = lambda _: self.rig.clock.advance(AGES)  # type: ignore[method-assign]
        key = cache.key([1, 2, 3, 9])
        lease = cache.acquire(cache.match(key))
        self.load = cache.load_back(lease)
        self.fetch = cache.prefetch(cache.key([7, 8, 9]))
        self.good: dict[str, Any] = {
            "tokens": [1, 2],
            "namespace": "",
            "key": key,
            "lease": lease,
            "kind": SWA,
            "pages": 1,
            "tier": Tier.DEVICE,
            "deadline_s": 0.0,
            "slots": cache.allocate(1),
            "partial": {SWA: np.array([-1], np.int64)},
            "revision": "",
            "load_back": self.load,
            "prefetch": self.fetch,
            "what": self.load,
        }
        self.good["match"] = cache.match(key)

    def call(self, name: str, argument: str, value: Any) -> str:
        """Call `name` with good arguments but for one. Whatever comes out, the books are right; says what."""
        call, names = CALLS[name]
        arguments = [value if each == argument else self.good.get(each) for each in names]
        before = books(self.rig)
        refused = refusal(call, self.cache, *arguments)
        self.cache.check()
        if refused is None:
            return "an answer"
        assert books(self.rig) == before
        return type(refused).__name__


CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "key": (PrefixCache.key, ("tokens", "namespace")),
    "extend_key": (PrefixCache.extend_key, ("key", "tokens")),
    "match": (PrefixCache.match, ("key",)),
    "peek": (PrefixCache.peek, ("key",)),
    "acquire": (PrefixCache.acquire, ("match",)),
    "release_window": (PrefixCache.release_window, ("lease", "kind")),
    "allocate": (PrefixCache.allocate, ("pages", "lease", "deadline_s", "kind")),
    "copy_on_write": (PrefixCache.copy_on_write, ("lease", "kind", "deadline_s")),
    "free": (PrefixCache.free, ("slots", "lease", "kind")),
    "insert": (PrefixCache.insert, ("key", "slots", "lease", "partial")),
    "load_back": (PrefixCache.load_back, ("lease", "deadline_s")),
    "layers_ready": (PrefixCache.layers_ready, ("load_back",)),
    "prefetch": (PrefixCache.prefetch, ("key",)),
    "settle": (PrefixCache.settle, ("prefetch",)),
    "evict": (PrefixCache.evict, ("pages", "tier", "deadline_s", "kind")),
    "drain": (PrefixCache.drain, ("deadline_s",)),
    "cancel": (PrefixCache.cancel, ("what",)),
    "clear": (PrefixCache.clear, ("namespace",)),
    "invalidate": (PrefixCache.invalidate, ("revision",)),
    "clear_storage": (PrefixCache.clear_storage, ("deadline_s",)),
    "detach_storage": (PrefixCache.detach_storage, ("deadline_s",)),
    "close": (lambda _, deadline_s: Rig(2).cache.close(deadline_s), ("deadline_s",)),
}
"""What can be called, and with which arguments."""

WAYS = [(name, argument) for name, (_, names) in CALLS.items() for argument in names]


def pass_it(way: tuple[str, str], value: Any) -> None:
    World().call(*way, real(value))


def make_key(tokens: Any, wide: bool) -> None:
    """A key is what numpy says the tokens are, or there is none."""
    rig = Rig(2, unit_bits=64 if wide else 32)
    if refusal(rig.cache.key, real(tokens)) is None:
        units = np.frombuffer(rig.cache.key(real(tokens)).units, "<u8" if wide else "<u4")
        assert units.tolist() == np.asarray(real(tokens)).tolist()


@settings(EXAMPLES, max_examples=250)
@given(way=st.sampled_from(WAYS), value=anything)
def test_any_argument_gives_an_answer_or_a_named_error(way: tuple[str, str], value: Any) -> None:
    pass_it(way, value)


@settings(EXAMPLES, max_examples=200)
@given(tokens=anything | st.lists(integers, max_size=6), wide=st.booleans())
def test_tokens_are_taken_as_they_are_or_not_at_all(tokens: Any, wide: bool) -> None:
    make_key(tokens, wide)


@pytest.mark.parametrize(
    ("name", "argument", "value", "error"),
    [
        ("extend_key", "key", None, ForeignObject),
        ("key", "tokens", Odd("a tensor with a gradient"), InvalidTokens),
        ("key", "tokens", Odd("a range without end"), InvalidTokens),
        ("key", "tokens", Odd("itself"), InvalidTokens),
        ("allocate", "pages", Odd("-10**5000"), InvalidSlots),
        ("allocate", "kind", Odd("5000 lists deep"), ForeignObject),
        ("allocate", "kind", "x" * 5000, ForeignObject),
        ("copy_on_write", "kind", Odd("5000 lists deep"), ForeignObject),
        ("insert", "partial", np.zeros(0), InvalidSlots),
        ("insert", "partial", [], InvalidSlots),
        ("insert", "partial", Odd("a table of 10**5000"), ForeignObject),
        ("evict", "tier", np.array([0, 1]), InvalidSlots),
        ("evict", "tier", Tier.STORAGE, InvalidSlots),
        ("clear", "namespace", ["tenant"], InvalidNamespace),
        ("clear", "namespace", 5, InvalidNamespace),
        ("invalidate", "revision", None, ConfigError),
        ("invalidate", "revision", b"v2", ConfigError),
        ("clear_storage", "deadline_s", None, InvalidDeadline),
        ("detach_storage", "deadline_s", None, InvalidDeadline),
        ("drain", "deadline_s", None, InvalidDeadline),
        ("close", "deadline_s", None, InvalidDeadline),
        ("drain", "deadline_s", Odd("10**5000"), None),
        ("drain", "deadline_s", float("nan"), InvalidDeadline),
    ],
    ids=lambda each: getattr(each, "__name__", str(each))[:40],
)
def test_what_is_wrong_has_a_name(name: str, argument: str, value: Any, error: type | None) -> None:
    assert World().call(name, argument, real(value)) == (error.__name__ if error else "an answer")


def test_a_sequence_that_says_it_is_endless_costs_nothing() -> None:
    rig = Rig(2)
    tracemalloc.start()
    try:
        for tokens in (range(1 << 31), range(10**18)):
            with pytest.raises(InvalidTokens):
                rig.cache.key(tokens)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.soak
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    done = soak(pass_it, 0.03, way=st.sampled_from(WAYS), value=anything)
    done += "\n" + soak(make_key, 0.02, tokens=anything | st.lists(integers), wide=st.booleans())
    with capsys.disabled():
        print(f"\n{done}")
