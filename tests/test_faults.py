"""The executors for tests do what they say, and a cache survives the one that does everything badly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from rig import Rig, make_cache

from tiertree import FULL, Inserted, NoRoom, Tier
from tiertree.storage.memory import KeyStorage
from tiertree.testing.faults import JUNK, Clock, FaultyExecutor, ManualExecutor
from tiertree.tree.actions import Completion, Copy, Get, Move, Put, Query, Span
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST
OTHER = Kind("other")


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


def several_kinds() -> ManualExecutor:
    """Two pages of FULL and two of another kind on storage, nothing on host."""
    executor = ManualExecutor(4, 4, Clock(), {OTHER: (2, 3)})
    executor.attach(KeyStorage(99))
    for kind in (FULL, OTHER):
        executor.of(kind)[HOST][:2] = [f"{kind} 0", f"{kind} 1"]
    executor.submit(Put(1, (some(FULL, 0, 1), some(OTHER, 0, 1))))
    executor.complete()
    assert executor.poll() == [Completion(1, 2, stored=(bytes(32), b"\1" * 32), others=(2,))]
    executor.submit(Get(2, (some(FULL, 0, 1), some(OTHER, 0, 1))))
    return executor


def some(kind: Kind, *slots: int) -> Span:
    """Pages in these slots, each with a hash of its slot's number."""
    return Span(kind, tuple(bytes([slot]) * 32 for slot in slots), np.array(slots, np.int64))


def test_each_kind_has_contents_of_its_own() -> None:
    executor = several_kinds()
    assert executor.contents is executor.of(FULL)
    assert [len(executor.of(OTHER)[tier]) for tier in (DEVICE, HOST)] == [2, 3]
    assert executor.contents[HOST] == executor.of(OTHER)[HOST] + [None] == [JUNK, JUNK, None, None]
    executor.complete()
    assert executor.contents[HOST][:2] == ["full 0", "full 1"]
    assert executor.of(OTHER)[HOST] == ["other 0", "other 1", None]
    assert executor.stored[OTHER, bytes(32)] == "other 0"
    assert executor.poll() == [Completion(2, 2, others=(2,))]
    slots = np.array([0], np.int64)
    executor.submit(Copy(3, HOST, DEVICE, (Move(FULL, slots, slots), Move(OTHER, slots, slots + 1))))
    assert (executor.contents[DEVICE][0], executor.of(OTHER)[DEVICE]) == (JUNK, [None, JUNK])
    executor.complete()
    assert (executor.contents[DEVICE][0], executor.of(OTHER)[DEVICE]) == ("full 0", [None, "other 0"])
    executor.clone(OTHER, slots + 1, slots)
    assert executor.of(OTHER)[DEVICE] == ["other 0", "other 0"]


def test_a_query_is_answered_kind_by_kind() -> None:
    executor = several_kinds()
    hashes = tuple(bytes([each]) * 32 for each in (0, 7, 1))
    executor.submit(Query(3, ((FULL, hashes), (OTHER, hashes))))
    executor.complete(3)
    assert executor.poll() == [Completion(3, 1, held=(b"\1\0\1",))]


def test_a_failed_get_brings_what_it_says_of_each_kind() -> None:
    executor = several_kinds()
    executor.fail(2, 2, others=[1])
    assert executor.poll() == [Completion(2, 2, "failed", others=(1,), broken=True)]
    assert executor.contents[HOST][:2] == ["full 0", "full 1"]
    assert executor.of(OTHER)[HOST] == ["other 0", JUNK, None]
    for pages, others in ((0, 0), (1, 2)):
        executor.submit(Get(3, (some(FULL, 0, 1), some(OTHER, 0, 1))))
        executor.fail(3, pages)
        assert executor.poll() == [Completion(3, pages, "failed", others=(others,), broken=True)]


def test_pages_told_of_by_a_progress_are_not_touched_again() -> None:
    executor = several_kinds()
    executor.progress(2, 1)
    assert executor.of(OTHER)[HOST][:2] == ["other 0", "other 1"]
    for kind in (FULL, OTHER):
        executor.of(kind)[HOST][0] = "the next owner's"
    executor.progress(2, 0)
    executor.complete(2)
    assert executor.contents[HOST][:2] == ["the next owner's", "full 1"]
    assert executor.of(OTHER)[HOST][:2] == ["the next owner's", "other 1"]
    first, second, last = executor.poll()
    assert first == second == Completion(2, 1, final=False, others=(2,))
    assert last == Completion(2, 2, others=(2,))


@pytest.mark.parametrize("failed", [False, True])
def test_what_a_progress_said_of_the_other_kinds_stays(failed: bool) -> None:
    executor = several_kinds()
    executor.progress(2, 1, [1])
    if failed:
        executor.fail(2)
    else:
        executor.complete(2)
    assert executor.of(OTHER)[HOST][:2] == ["other 0", JUNK]
    assert [(each.pages, each.others) for each in executor.poll()] == [(1, (1,)), (1 if failed else 2, (1,))]


def test_a_faulty_executor_answers_several_kinds_and_the_same_seed_repeats_it() -> None:
    def run(seed: int) -> tuple[list[Completion], list[object]]:
        executor = FaultyExecutor(4, 4, Clock(), seed, failing=0.5, kinds={OTHER: (2, 3)})
        executor.attach(KeyStorage(3))
        for op in range(0, 90, 3):
            spans = (some(FULL, 0, 1, 2), some(OTHER, 0, 1))
            executor.submit(Put(op, spans))
            executor.submit(Query(op + 1, tuple((each.kind, each.hashes) for each in spans)))
            executor.submit(Get(op + 2, spans))
            executor.step()
        while executor.pending:
            executor.step()
        return executor.poll(), executor.of(OTHER)[HOST]

    runs = [run(seed) for seed in range(20)]
    assert runs == [run(seed) for seed in range(20)]
    answers = [each for done, _ in runs for each in done]
    assert {each.others for each in answers if each.others and not each.final} >= {(0,), (1,), (2,)}
    assert {each.held for each in answers} >= {(), (b"\1\1",)}
