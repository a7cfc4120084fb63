"""Tiers that are slow, hang, or break: what they may cost, and what they must not."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
from rig import Rig

from tiertree import (
    AllBlocksCleared,
    BlockStored,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    NoRoom,
    PrefetchConfig,
    PrefixCache,
    StopRule,
    StorageError,
    Tier,
    WritePolicy,
)
from tiertree.storage.base import Buffer, Got, PutResult
from tiertree.storage.memory import KeyStorage
from tiertree.tree.actions import Completion, Copy, Get, Put, Query
from tiertree.tree.arrivals import Arrivals
from tiertree.tree.operation import Operation


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_BACK, WritePolicy.WRITE_THROUGH])
def test_a_storage_that_hangs_does_not_keep_pages_from_leaving_the_device(policy: WritePolicy) -> None:
    rig = Rig(device=16, host=256, storage=1000, write_policy=policy, max_operations=8)

    def copies() -> None:
        for op in rig.running(Copy):
            rig.executor.complete(op)

    rig.executor.on_wait = copies
    for index in range(40):
        key = rig.cache.key(range(1000 * index, 1000 * index + 8))
        slots = rig.cache.allocate(8, deadline_s=1.0)
        assert not isinstance(slots, NoRoom), f"request {index}: {slots}"
        rig.cache.insert(key, slots)
        copies()
        rig.cache.poll()
    assert rig.running(Put)
    assert rig.cache.stats().persists_crowded
    assert not rig.cache.stats().persists_refused
    rig.executor.on_wait = rig.executor.complete_all
    rig.settle()
    rig.empty_out()


def test_nobody_waits_for_a_copy_that_is_late_already() -> None:
    rig = Rig(device=2, host=4, op_deadline_seconds=5.0)
    rig.put([1, 2])
    with rig.lease([1, 2]):
        rig.clock.advance(6.0)
        rig.cache.poll()
        assert rig.cache.stats().late_operations == 1
        before = rig.clock.now
        assert isinstance(rig.cache.allocate(1), NoRoom)
        assert rig.clock.now == before
    rig.settle()
    rig.empty_out()


@pytest.mark.parametrize("rule", [StopRule.TIMEOUT, StopRule.BEST_EFFORT])
def test_a_stop_rule_counts_while_a_parcel_waits_for_its_parent(rule: StopRule) -> None:
    rules = PrefetchConfig(min_tokens=0, stop_rule=rule, base_seconds=0.5, per_1024_tokens_seconds=0)
    rig = Rig(device=8, host=8, storage=100, prefetch=rules)
    rig.put([1, 2, 3, 4])
    rig.settle()
    rig.cache.evict(8, Tier.HOST)
    rig.cache.evict(2)
    prefetch = rig.fetch([1, 2, 3, 4])
    rig.done(rig.running(Query)[0])
    rig.done(rig.running(Get)[0])
    assert rig.running(Copy)  # the backup of the two pages before it
    rig.clock.advance(0.6)
    assert rig.cache.settle(prefetch) == 0
    rig.settle()
    assert rig.where([1, 2, 3, 4]) == (2, 4)  # it landed all the same, for whoever comes next
    rig.empty_out()


class Raising(KeyStorage):
    """Raises where the protocol does not foresee it."""

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        raise RuntimeError("no")

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        raise RuntimeError("no")


class Short(KeyStorage):
    """Answers for fewer pages than it was asked about."""

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        return PutResult(())

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        return []


@pytest.mark.parametrize("storage", [Raising(100), Short(100)], ids=["raising", "short"])
def test_a_metadata_cache_survives_a_storage_that_misbehaves(storage: KeyStorage) -> None:
    sizes = {"device": DeviceConfig(size=4), "host": HostConfig(size=8)}
    rules = PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE)
    with PrefixCache(CacheConfig(page_size=1, prefetch=rules, **sizes)) as cache:  # type: ignore[arg-type]
        cache.attach_storage(storage)
        key = cache.key([1, 2, 3])
        slots = cache.allocate(3)
        assert not isinstance(slots, NoRoom)
        cache.insert(key, slots)
        assert cache.drain()
        assert cache.stats().persists_refused == 3
        cache.clear()
        prefetch = cache.prefetch(key)
        assert cache.drain()
        assert cache.settle(prefetch) == 0  # type: ignore[arg-type]
        assert cache.stats().operations_in_flight == 0
        cache.check()


def test_answers_out_of_range_change_nothing() -> None:
    rig = Rig(device=8, host=8, storage=100)
    rig.put([1, 2, 3, 4])
    rig.done(rig.running(Copy)[0])
    (put,) = rig.running(Put)
    rig.executor.fail(put, pages=99)
    rig.cache.poll()
    assert rig.cache.stats().persists_refused == 0
    rig.cache.clear()
    rig.put([1, 2, 3, 4])
    rig.settle()
    rig.cache.clear()
    prefetch = rig.fetch([1, 2, 3, 4])
    rig.done(rig.running(Query)[0])
    (get,) = rig.running(Get)
    rig.core.complete(Completion(get, -1, "negative"), rig.clock())
    assert (rig.cache.settle(prefetch), rig.where([1, 2, 3, 4])) == (0, (0, 0))
    rig.executor.fail(get)  # it has answered, so it must not write any more
    rig.executor.complete_all()
    rig.cache.poll()
    rig.empty_out()
    assert rig.cache.stats().stray_completions


def test_a_long_life_of_small_allocations_leaves_no_trail() -> None:
    rig = Rig(device=8)
    lease = rig.lease([])
    for _ in range(1000):
        rig.cache.free(rig.cache.allocate(2, lease), lease)
    assert len(lease.allocated) < 200
    kept = rig.cache.allocate(3, lease)
    assert len(kept) == 3
    lease.release()
    assert rig.free() == 8


@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
def test_a_host_that_is_broken_does_not_keep_requests_from_the_device(hangs: bool) -> None:
    rig = Rig(device=8, host=64, write_policy=WritePolicy.WRITE_BACK, op_deadline_seconds=5.0)

    def copies() -> None:
        for op in rig.running(Copy) if not hangs else []:
            rig.executor.fail(op)

    rig.executor.on_wait = copies
    refused = 0
    for index in range(20):
        key = rig.cache.key(range(1000 * index, 1000 * index + 4))
        slots = rig.cache.allocate(4)
        if isinstance(slots, NoRoom):
            refused += 1
        else:
            rig.cache.insert(key, slots)
        rig.cache.poll()
    assert refused <= 2
    assert rig.clock.now <= 15.0
    assert rig.cache.stats().dropped
    rig.executor.on_wait = rig.executor.complete_all
    rig.settle()
    rig.clock.advance(100.0)
    rig.put([1, 2, 3, 4])
    rig.cache.evict(8)
    assert rig.where([1, 2, 3, 4]) == (0, 4)
    rig.empty_out()


class Stuck(KeyStorage):
    """Neither clears nor closes until it is let go."""

    def __init__(self, capacity_pages: int) -> None:
        super().__init__(capacity_pages)
        self.let_go = threading.Event()

    def clear(self) -> None:
        self.let_go.wait(60.0)

    def close(self) -> None:
        self.let_go.wait(60.0)


def test_a_dead_disk_holds_up_neither_clear_nor_close(monkeypatch: pytest.MonkeyPatch) -> None:
    stuck = Stuck(10)
    monkeypatch.setattr("tiertree.lifecycle.open_storage", lambda config: stuck)
    cache = PrefixCache(CacheConfig(device=DeviceConfig(size=4), host=HostConfig(size=4))).open()
    with pytest.raises(StorageError, match="not cleared within"):
        cache.clear_storage(deadline_s=0.05)
    cache.close(deadline_s=0.05)
    assert not stuck.let_go.is_set()
    stuck.let_go.set()


def test_a_long_chain_leaves_the_device_in_one_copy() -> None:
    rig = Rig(device=64, host=64, write_policy=WritePolicy.WRITE_BACK)
    tokens = list(range(64))
    rig.put(tokens)
    for length in range(1, 64):
        rig.look_at(tokens[:length])
    rig.look_at(tokens)
    assert rig.cache.stats().nodes == 64
    rig.cache.evict(40, deadline_s=0)
    assert len(rig.running(Copy)) == 1
    rig.settle()
    assert rig.where(tokens) == (24, 64)
    rig.look_at(tokens)
    rig.empty_out()


def test_copies_that_wait_for_the_one_before_are_looked_at_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(device=200, host=200)
    rig.put([0])
    first = rig.running(Copy)
    lease = rig.lease([0])
    for length in range(2, 151):
        rig.cache.match(rig.cache.key(range(length - 1)))  # so that each page becomes a node
        rig.grow(lease, range(length))
    for op in rig.running(Copy)[1:]:
        rig.executor.complete(op)
    rig.cache.poll()
    looked: list[Operation] = []
    original = Arrivals._page_before

    def look(self: Arrivals, operation: Operation) -> tuple[int, int] | None:
        looked.append(operation)
        return original(self, operation)

    monkeypatch.setattr(Arrivals, "_page_before", look)
    rig.done(first[0])
    assert rig.where(range(150)) == (150, 150)
    assert rig.cache.stats().backed_up == 150
    assert len(looked) <= 150
    lease.release()
    rig.settle()
    rig.empty_out()


def test_an_answer_from_before_storage_was_cleared_is_not_announced() -> None:
    rig = Rig(device=4, host=4, storage=100)
    rig.put([1, 2])
    rig.done(rig.running(Copy)[0])
    (put,) = rig.running(Put)
    rig.cache.take_events()
    rig.cache.clear_storage()
    rig.done(put)
    events = [event for event in rig.cache.take_events() if getattr(event, "medium", None) == Tier.STORAGE]
    assert [type(event) for event in events] == [AllBlocksCleared]
    rig.put([1, 2, 3])
    rig.settle()
    stored = [event for event in rig.cache.take_events() if isinstance(event, BlockStored)]
    assert {event.medium for event in stored} == {Tier.DEVICE, Tier.HOST, Tier.STORAGE}
