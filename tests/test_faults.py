"""The executors for tests do what they say, and a cache survives the one that does everything badly."""

from __future__ import annotations

import random

import pytest
from rig import Rig, make_cache

from tiertree import Inserted, NoRoom, Tier
from tiertree.storage.memory import KeyStorage
from tiertree.testing.faults import JUNK, Clock, FaultyExecutor
from tiertree.tree.actions import Copy, Get

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def test_a_target_is_junk_until_its_transfer_is_completed() -> None:
    rig = Rig(device=2, host=2)
    rig.put([1])
    (op,) = rig.running(Copy)
    copy = rig.executor.pending[op]
    assert isinstance(copy, Copy)
    slot = int(copy.moves[0].target[0])
    assert rig.executor.contents[HOST][slot] == JUNK
    rig.executor.complete(op)
    assert rig.executor.contents[HOST][slot] == rig.page([1], "", 0)


def test_a_source_that_changes_before_the_transfer_is_done_shows() -> None:
    rig = Rig(device=2, host=2)
    rig.put([1])
    rig.executor.contents[DEVICE][0] = "something else"
    rig.settle()
    rig.cache.evict(1)
    with pytest.raises(AssertionError):
        rig.look_at([1])


def test_a_failed_get_brings_as_many_pages_as_it_says_and_junk_behind_them() -> None:
    rig = Rig(device=4, host=4, storage=9)
    rig.put([1, 2])
    rig.settle()
    rig.cache.clear()
    rig.fetch([1, 2])
    rig.done()
    (op,) = rig.running(Get)
    get = rig.executor.pending[op]
    assert isinstance(get, Get)
    rig.executor.fail(op, pages=1)
    first, second = (rig.executor.contents[HOST][slot] for slot in get.spans[0].slots)
    assert (first, second) == (rig.page([1, 2], "", 0), JUNK)


def test_an_answer_given_twice_is_counted_and_changes_nothing() -> None:
    rig = Rig(device=2, host=2)
    rig.put([1])
    (op,) = rig.running(Copy)
    rig.done(op)
    before = rig.cache.stats()
    rig.executor.duplicate(op)
    rig.cache.poll()
    after = rig.cache.stats()
    assert after.stray_completions == before.stray_completions + 1
    assert after.device == before.device
    assert after.host == before.host
    rig.cache.check()


def faulty_run(seed: int) -> tuple[list[str], object]:
    """A cache over an executor that fails, reorders and repeats: what it was asked, and what came of it."""
    clock, rng = Clock(), random.Random(seed)
    executor = FaultyExecutor(6, 8, clock, seed, failing=0.3, repeating=0.2)
    cache = make_cache(executor, clock, 6, 8)
    cache.attach_storage(KeyStorage(20))
    for _ in range(60):
        key = cache.key([rng.randrange(3) for _ in range(rng.randrange(1, 5))])
        with cache.acquire(cache.match(key)) as lease:
            cache.load_back(lease, deadline_s=0.2)
            slots = cache.allocate(key.pages - lease.device_boundary, lease, deadline_s=1.0)
            if not isinstance(slots, NoRoom) and len(slots) == key.pages - lease.device_boundary:
                assert isinstance(cache.insert(key, slots, lease), Inserted)
        executor.step()
        cache.poll()
        cache.check()
    assert cache.drain(60.0)
    for tier in (DEVICE, HOST):
        cache.evict(8, tier)
    assert cache.drain(60.0)
    stats = cache.stats()
    assert (stats.device.free, stats.host.free) == (6, 8)
    return [type(each).__name__ for each in executor.submitted], stats


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_over_a_faulty_executor_stays_right_and_the_same_seed_repeats_it(seed: int) -> None:
    asked, stats = faulty_run(seed)
    assert (asked, stats) == faulty_run(seed)
    assert asked
