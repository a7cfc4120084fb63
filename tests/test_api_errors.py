"""Bad input raises a named error and changes nothing: not a counter, not a slot, not a node."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from rig import Rig, books

from tiertree import (
    CacheConfig,
    ConfigError,
    DeviceConfig,
    ForeignObject,
    InvalidNamespace,
    InvalidSlots,
    InvalidTokens,
    LeaseReleased,
    PrefixCache,
    Refused,
    StaleMatch,
    StorageError,
    Tier,
)
from tiertree.storage.memory import KeyStorage

PROMPT = [1, 2, 3]


@pytest.fixture
def rig() -> Rig:
    """Three pages on device and host, and a storage that has them."""
    rig = Rig(device=6, host=6, storage=100)
    rig.put(PROMPT)
    rig.settle()
    return rig


@pytest.fixture
def other() -> Rig:
    """Another cache with the same pages."""
    other = Rig(device=6, host=6, storage=100)
    other.put(PROMPT)
    other.settle()
    return other


class refuses:
    """The body raises `error`, and the caches are as they were."""

    def __init__(self, error: type[Exception], *rigs: Rig) -> None:
        self.raises = pytest.raises(error)
        self.rigs = rigs

    def __enter__(self) -> None:
        self.before = [books(rig) for rig in self.rigs]
        self.raises.__enter__()

    def __exit__(self, *error: Any) -> bool:
        caught = self.raises.__exit__(*error)
        assert [books(rig) for rig in self.rigs] == self.before
        for rig in self.rigs:
            rig.cache.check()
        return bool(caught)


# -- tokens and namespaces --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        [1, -1, 2],
        [2**32],
        [2**70],
        np.array([1, 2**40]),
        np.array([-5], np.int8),
        [1.0, 2.0],
        np.array([1.5]),
        [True, False],
        np.array([True]),
        ["1", "2"],
        "123",
        b"123",
        [[1, 2], [3, 4]],
        [[1], [2, 3]],
        [1, None],
        [None],
        [object()],
        5,
        None,
        {1, 2},
        {1: 2},
    ],
    ids=lambda tokens: re.sub(" at 0x[0-9a-f]+", "", repr(tokens)),  # workers must agree on names
)
def test_tokens_that_are_no_token_ids_are_refused(rig: Rig, tokens: Any) -> None:
    with refuses(InvalidTokens, rig):
        rig.cache.key(tokens)


def test_the_error_names_the_token_and_its_position(rig: Rig) -> None:
    with pytest.raises(InvalidTokens, match="-7 at position 2"):
        rig.cache.key([1, 2, -7])


@pytest.mark.parametrize(
    "tokens", [[], (), np.array([]), range(3), (1, 2), np.array([1], np.uint8)], ids=repr
)
def test_any_flat_sequence_of_integers_makes_a_key(rig: Rig, tokens: Any) -> None:
    assert rig.cache.key(tokens).pages == len(tokens)


def test_the_largest_token_fits_and_one_more_does_not() -> None:
    narrow, wide = Rig(device=2), Rig(device=2, unit_bits=64)
    assert narrow.cache.key([2**32 - 1]).pages == 1
    assert wide.cache.key([2**63 - 1]).pages == 1
    for rig, token in ((narrow, 2**32), (wide, 2**63)):
        with refuses(InvalidTokens, rig):
            rig.cache.key([token])


@pytest.mark.parametrize("namespace", [None, 5, b"tenant", "x" * 1025, "é" * 600, ("a",)], ids=repr)
def test_a_namespace_that_is_not_a_short_text_is_refused(rig: Rig, namespace: Any) -> None:
    with refuses(InvalidNamespace, rig):
        rig.cache.key([1], namespace)


# -- slots ------------------------------------------------------------------------------------------------

BAD_SLOTS: dict[str, Callable[[Any], Any]] = {
    "a list": lambda slots: slots.tolist(),
    "int32": lambda slots: slots.astype(np.int32),
    "uint64": lambda slots: slots.astype(np.uint64),
    "float": lambda slots: slots.astype(float),
    "bool": lambda slots: slots.astype(bool),
    "two dimensions": lambda slots: slots[None],
    "a scalar": lambda slots: np.int64(slots[0]),
    "None": lambda slots: None,
    "too few": lambda slots: slots[:-1],
    "too many": lambda slots: np.append(slots, 0),
    "repeated": lambda slots: slots[[0, 0]],
    "negative": lambda slots: np.array([slots[0], -1]),
    "out of range": lambda slots: np.array([slots[0], 6]),
    "far out of range": lambda slots: np.array([slots[0], 2**62]),
    "a free slot": lambda slots: np.array([slots[0], 5]),
}


@pytest.mark.parametrize("bad", BAD_SLOTS)
def test_slots_that_are_not_the_callers_are_refused_by_insert(rig: Rig, bad: str) -> None:
    slots = rig.cache.allocate(2)
    assert 5 in rig.core.radix.ledgers[Tier.DEVICE].free_slots()
    with refuses(InvalidSlots, rig):
        rig.cache.insert(rig.cache.key([8, 9]), BAD_SLOTS[bad](slots))
    rig.cache.free(slots)


@pytest.mark.parametrize("bad", [name for name in BAD_SLOTS if not name.startswith("too")])
def test_slots_that_are_not_the_callers_are_refused_by_free(rig: Rig, bad: str) -> None:
    slots = rig.cache.allocate(2)
    with refuses(InvalidSlots, rig):
        rig.cache.free(BAD_SLOTS[bad](slots))
    rig.cache.free(slots)


def test_slots_in_the_tree_cannot_be_inserted_or_freed_again(rig: Rig) -> None:
    with rig.lease(PROMPT) as lease:
        for call in (
            lambda: rig.cache.insert(rig.cache.key(PROMPT), lease.slots),
            lambda: rig.cache.free(lease.slots),
            lambda: rig.cache.free(lease.slots, lease),
        ):
            with refuses(InvalidSlots, rig):
                call()


def test_slots_of_another_request_are_refused(rig: Rig) -> None:
    with rig.lease([7]) as mine, rig.lease([8]) as theirs:
        slots, anonymous = rig.cache.allocate(1, theirs), rig.cache.allocate(1)
        for call in (
            lambda: rig.cache.insert(rig.cache.key([7]), slots, mine),
            lambda: rig.cache.insert(rig.cache.key([7]), anonymous, mine),
            lambda: rig.cache.insert(rig.cache.key([7]), slots),
            lambda: rig.cache.free(slots, mine),
            lambda: rig.cache.free(slots),
            lambda: rig.cache.free(anonymous, mine),
        ):
            with refuses(InvalidSlots, rig):
                call()
        rig.cache.free(anonymous)


def test_slots_that_went_back_with_their_lease_are_refused(rig: Rig) -> None:
    with rig.lease([7]) as lease:
        slots = rig.cache.allocate(1, lease)
    with refuses(InvalidSlots, rig):
        rig.cache.insert(rig.cache.key([7]), slots)


def test_the_slots_of_a_lease_cannot_be_written_to(rig: Rig) -> None:
    with rig.lease(PROMPT) as lease, pytest.raises(ValueError, match="read-only"):
        lease.slots[0] = 5


# -- counts, tiers, policies ------------------------------------------------------------------------------


@pytest.mark.parametrize("pages", [-1, 1.0, "1", None, True, np.float64(1), np.int64(-1)], ids=repr)
def test_a_number_of_pages_that_is_none_is_refused(rig: Rig, pages: Any) -> None:
    for call in (rig.cache.allocate, rig.cache.evict):
        with refuses(InvalidSlots, rig):
            call(pages)


@pytest.mark.parametrize("tier", [Tier.STORAGE, 7, "device", None], ids=repr)
def test_a_tier_that_cannot_be_evicted_from_is_refused(rig: Rig, tier: Any) -> None:
    with refuses(InvalidSlots, rig):
        rig.cache.evict(1, tier)


def test_an_eviction_policy_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"'magic'.*lru"):
        PrefixCache(CacheConfig(device=DeviceConfig(size=4), eviction="magic"))


# -- objects of another cache, or of none -----------------------------------------------------------------


def test_keys_matches_and_leases_of_another_cache_are_refused(rig: Rig, other: Rig) -> None:
    key = other.cache.key(PROMPT)
    with other.lease(PROMPT) as lease:
        for call in (
            lambda: rig.cache.match(key),
            lambda: rig.cache.peek(key),
            lambda: rig.cache.acquire(other.cache.match(key)),
            lambda: rig.cache.prefetch(key),
            lambda: rig.cache.extend_key(key, [1]),
            lambda: rig.cache.insert(key, np.empty(0, np.int64)),
            lambda: rig.cache.allocate(1, lease),
            lambda: rig.cache.load_back(lease),
            lambda: rig.cache.insert(rig.cache.key(PROMPT), np.empty(0, np.int64), lease),
            lambda: rig.cache.free(np.empty(0, np.int64), lease),
            lambda: rig.cache.cancel(lease),
        ):
            with refuses(ForeignObject, rig, other):
                call()


def test_a_prefetch_of_another_cache_is_refused(rig: Rig, other: Rig) -> None:
    mine, theirs = rig.fetch([9, 9]), other.fetch([9, 9])
    for call in (lambda: rig.cache.cancel(theirs), lambda: rig.cache.settle(theirs)):
        with refuses(ForeignObject, rig, other):
            call()
    for each, prefetch in ((rig, mine), (other, theirs)):
        each.cache.cancel(prefetch)
        each.empty_out()


def test_a_load_back_of_another_cache_is_refused(rig: Rig, other: Rig) -> None:
    other.cache.evict(6)
    with other.lease(PROMPT) as lease:
        load = other.load(lease)
        for call in (lambda: rig.cache.cancel(load), lambda: rig.cache.layers_ready(load)):
            with refuses(ForeignObject, rig, other):
                call()
        other.settle()
        assert lease.device_boundary == 3


@pytest.mark.parametrize("thing", [None, 5, "key", [1, 2]], ids=repr)
def test_things_that_are_no_keys_matches_or_leases_are_refused(rig: Rig, thing: Any) -> None:
    nothing = np.empty(0, np.int64)
    calls: list[Callable[[], object]] = [
        lambda: rig.cache.match(thing),
        lambda: rig.cache.peek(thing),
        lambda: rig.cache.acquire(thing),
        lambda: rig.cache.prefetch(thing),
        lambda: rig.cache.settle(thing),
        lambda: rig.cache.cancel(thing),
        lambda: rig.cache.insert(thing, nothing),
        lambda: rig.cache.load_back(thing),
        lambda: rig.cache.layers_ready(thing),
    ]
    if thing is not None:
        calls += [lambda: rig.cache.allocate(1, thing), lambda: rig.cache.free(nothing, thing)]
    for call in calls:
        with refuses(ForeignObject, rig):
            call()


def test_a_key_that_does_not_begin_with_the_leased_pages_is_refused(rig: Rig) -> None:
    with rig.lease(PROMPT) as lease:
        slots = rig.cache.allocate(1, lease)
        for tokens, namespace in (([1, 2, 9, 4], ""), ([1, 2], ""), ([1, 2, 3, 4], "tenant")):
            with refuses(ForeignObject, rig):
                rig.cache.insert(rig.cache.key(tokens, namespace), slots, lease)


# -- what is over -----------------------------------------------------------------------------------------


def test_a_lease_is_released_exactly_once(rig: Rig) -> None:
    lease = rig.lease(PROMPT)
    lease.release()
    for call in (
        lease.release,
        lambda: rig.cache.cancel(lease),
        lambda: lease.slots,
        lambda: rig.cache.allocate(1, lease),
        lambda: rig.cache.load_back(lease),
        lambda: rig.cache.insert(rig.cache.key(PROMPT), np.empty(0, np.int64), lease),
    ):
        with refuses(LeaseReleased, rig):
            call()


def changes() -> Iterator[tuple[str, Callable[[Rig], object]]]:
    """What makes an older match stale."""
    yield "insert", lambda rig: rig.put([5])
    yield "evict device", lambda rig: rig.cache.evict(6)
    yield "evict host", lambda rig: rig.cache.evict(6, Tier.HOST)
    yield "clear", lambda rig: rig.cache.clear()
    yield "clear namespace", lambda rig: rig.cache.clear("")
    yield "invalidate", lambda rig: rig.cache.invalidate("new weights")


@pytest.mark.parametrize("change", [pytest.param(call, id=name) for name, call in changes()])
def test_a_match_from_before_a_change_is_stale(rig: Rig, change: Callable[[Rig], object]) -> None:
    found = rig.cache.match(rig.cache.key(PROMPT))
    change(rig)
    with refuses(StaleMatch, rig):
        rig.cache.acquire(found)


def test_a_match_stays_good_until_something_changes(rig: Rig) -> None:
    found = rig.cache.match(rig.cache.key(PROMPT))
    rig.cache.match(rig.cache.key([1, 2]))  # splits the node it ends in
    rig.cache.peek(rig.cache.key([9]))
    rig.cache.poll()
    with rig.cache.acquire(found) as lease:
        rig.verify(lease, PROMPT)
        assert lease.device_boundary == 3


def test_storage_is_attached_once_and_cleared_only_when_there_is_one(rig: Rig) -> None:
    with refuses(ConfigError, rig):
        rig.cache.attach_storage(KeyStorage(1))
    rig.cache.detach_storage()
    with refuses(StorageError, rig):
        rig.cache.clear_storage()
    without_host = Rig(device=2)
    with refuses(ConfigError, without_host):
        without_host.cache.attach_storage(KeyStorage(1))


def test_a_refusal_is_a_value_and_says_why(rig: Rig) -> None:
    rig.cache.detach_storage()
    for refusal in (rig.cache.prefetch(rig.cache.key([9])), rig.cache.load_back(rig.lease([9]))):
        assert isinstance(refusal, Refused)
        assert refusal.reason
