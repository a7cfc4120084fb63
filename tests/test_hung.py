"""A backend that hangs, on real threads: its worker is replaced, its statistics grow old, nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from workers_support import Desk, page_hash, span

from tiertree import (
    CacheClosed,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    InvalidDeadline,
    KVLayout,
    NoRoom,
    PrefetchConfig,
    PrefixCache,
    Refused,
    StopRule,
    StorageConfig,
    StorageError,
    Tier,
)
from tiertree.driver import Aside
from tiertree.storage import gauge, workers
from tiertree.storage.base import Buffer, PutResult, StorageStats
from tiertree.storage.gauge import Gauge
from tiertree.storage.memory import KeyStorage, MemoryStorage
from tiertree.storage.workers import StorageWorkers
from tiertree.testing.faults import Clock
from tiertree.tree.actions import Put, Query
from tiertree.types import FULL

WAIT_SECONDS = 30.0


class Hanging(MemoryStorage):
    """A put that stores under a key in `gates` hangs in there until its gate is opened; `inside` counts."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.gates: dict[bytes, threading.Event] = {}
        self.inside = threading.Semaphore(0)

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        gate = self.gates.get(keys[0][:32])
        if gate is not None:
            self.inside.release()
            assert gate.wait(WAIT_SECONDS)
        return super().put(keys, pages)


def hang(desk: Desk, storage: Hanging, page: int) -> threading.Event:
    """Start a put of `page` that hangs; returns its gate once it does."""
    gate = storage.gates[page_hash(page)] = threading.Event()
    desk.workers.submit(Put(100 + page, (span(FULL, [page], [0]),)))
    assert storage.inside.acquire(timeout=WAIT_SECONDS)
    return gate


def ended(count: int, desk: Desk) -> None:
    """So many workers are there, at the latest soon."""
    for _ in range(3000):
        if len(desk.workers._threads) == count:
            return
        threading.Event().wait(0.01)
    raise AssertionError(f"{len(desk.workers._threads)} threads, not {count}")


def test_a_stuck_worker_is_replaced_and_ends_when_its_call_returns() -> None:
    storage = Hanging()
    desk = Desk(storage)
    gate = hang(desk, storage, 1)
    desk.workers.submit(Query(7, ((FULL, (page_hash(2),)),)))
    desk.workers.cancel(101)
    assert desk.workers.stuck == 0, "cancelled, but not late"
    desk.workers.cancel(101, late=True)
    assert desk.workers.stuck == 1
    assert desk.told.get(timeout=WAIT_SECONDS).op == 7, "a replacement has taken the next job"
    desk.workers.cancel(101, late=True)
    assert (desk.workers.stuck, len(desk.workers._threads)) == (1, 2)
    gate.set()
    assert desk.told.get(timeout=WAIT_SECONDS).op == 101
    ended(1, desk)
    assert desk.workers.stuck == 0
    assert desk.put(span(FULL, [3])).pages == 1
    assert desk.workers.close(WAIT_SECONDS) == ()
    ended(0, desk)


def test_stuck_workers_are_replaced_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "LOST_MAX", 3)
    monkeypatch.setattr(StorageWorkers, "_barred", lambda self, job, storage: False)
    storage = Hanging()
    desk = Desk(storage)
    gates = []
    for page in range(4):
        gates.append(hang(desk, storage, page))
        desk.workers.cancel(100 + page, late=True)
    assert (desk.workers.stuck, len(desk.workers._threads)) == (4, 4)
    desk.workers.submit(Query(7, ((FULL, (page_hash(2),)),)))
    desk.workers.cancel(7, late=True)
    done = desk.told.get(timeout=WAIT_SECONDS)
    assert (done.op, done.error, done.broken) == (7, "cancelled", False), "nobody has it, so it comes home"
    assert desk.workers.stuck == 4
    gates.pop().set()
    assert desk.told.get(timeout=WAIT_SECONDS).op == 103
    assert desk.put(span(FULL, [5])).pages == 1, "the one that came back goes on"
    ended(4, desk)
    for gate in gates:
        gate.set()
    ended(1, desk)
    assert desk.workers.close(WAIT_SECONDS) == ()


def test_where_many_writes_are_stuck_no_more_are_begun_but_reads_are() -> None:
    storage = Hanging()
    desk = Desk(storage)
    gates = [hang(desk, storage, 0)]
    for page in range(1, 8):
        desk.workers.cancel(99 + page, late=True)
        gates.append(hang(desk, storage, page))
    desk.workers.submit(Put(200, (span(FULL, [9], [0]),)))  # there is room for it in the queue
    desk.workers.cancel(107, late=True)
    assert desk.workers.stuck == 8
    for op in (200, 201):  # neither what was queued before, nor what comes now
        if op == 201:
            desk.workers.submit(Put(201, (span(FULL, [9], [0]),)))
        done = desk.told.get(timeout=WAIT_SECONDS)
        assert (done.op, done.error, done.declined, done.broken) == (op, workers.BARRED, True, False)
    assert desk.query((FULL, [9])).error is None
    assert desk.get(span(FULL, [9], [0]))[-1].error == "full: page 0 is not there"
    desk.workers.storage = MemoryStorage(1 << 20)
    assert desk.put(span(FULL, [9], [0])).pages == 1, "another storage is another matter"
    desk.workers.storage = storage
    gates.pop().set()
    assert desk.told.get(timeout=WAIT_SECONDS).op == 107
    assert desk.put(span(FULL, [9], [0])).pages == 1
    for gate in gates:
        gate.set()
    ended(1, desk)
    assert desk.workers.stuck == 0
    assert desk.workers.close(WAIT_SECONDS) == ()


def test_calls_that_are_stuck_for_long_are_written_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that is well again, and never answers what it was asked before, is used again."""
    monkeypatch.setattr(workers, "STUCK_MAX", 4)
    storage = Hanging()
    desk = Desk(storage)
    gates = []
    for page in range(2):
        gates.append(hang(desk, storage, page))
        desk.workers.cancel(100 + page, late=True)
    assert desk.put(span(FULL, [5])).error == workers.BARRED
    monkeypatch.setattr(workers, "WRITTEN_OFF_SECONDS", 0.0)
    assert desk.put(span(FULL, [5])).pages == 1
    monkeypatch.setattr(workers, "LOST_MAX", 2)
    assert desk.put(span(FULL, [6])).error == workers.BARRED, "but not for ever"
    for gate in gates:
        gate.set()
    ended(1, desk)
    assert desk.workers.close(WAIT_SECONDS) == ()


def test_a_storage_that_hangs_takes_only_the_workers_that_were_in_it() -> None:
    """What was queued behind them is called back, so that no replacement begins with it."""
    storage = Hanging()
    layout = KVLayout(layers=1, kv_heads=1, head_size=4, dtype="float32", page_size=4)
    config = CacheConfig(
        layout=layout,
        page_size=4,
        device=DeviceConfig(size=64),
        host=HostConfig(size=64),
        op_deadline_seconds=1.0,
        storage_threads=2,
    )
    clock = Clock()
    gate = threading.Event()
    with PrefixCache(config, clock=clock) as cache:
        cache.attach_storage(storage)
        keys = [cache.key([number] * 4) for number in range(12)]
        hashes = [cache._core.radix.hashes.of_key(key)[0] for key in keys]
        storage.gates = dict.fromkeys(hashes, gate)
        for key in keys:
            slots = cache.allocate(1)
            assert not isinstance(slots, NoRoom)
            cache.insert(key, slots)
            while not cache.stats().persists_dropped and cache.stats().backed_up < 1 + keys.index(key):
                cache.poll()
            clock.advance(0.01)
        for _ in range(2):
            assert storage.inside.acquire(timeout=WAIT_SECONDS)
        for _ in range(30):
            clock.advance(0.05)
            cache.poll()
        stats = cache.stats()
        assert stats.breakers["storage_writes"].opened == 1
        assert stats.stuck_threads == 2
        assert stats.persists_dropped + stats.persists_refused == 10, "two are in the storage"
        gate.set()


def test_a_machine_without_threads_to_spare_does_not_hurt_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Hanging()
    desk = Desk(storage)
    gate = hang(desk, storage, 1)

    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        desk.workers.cancel(101, late=True)
    assert (desk.workers.stuck, len(desk.workers._threads)) == (1, 1)
    monkeypatch.setattr(workers, "STUCK_MAX", 2)
    desk.workers.submit(Put(200, (span(FULL, [9], [0]),)))
    done = desk.told.get(timeout=WAIT_SECONDS)
    assert (done.op, done.error, done.declined) == (200, workers.BARRED, True), "at once, without a worker"
    gate.set()
    assert desk.told.get(timeout=WAIT_SECONDS).op == 101
    assert desk.put(span(FULL, [5])).pages == 1
    assert desk.workers.close(WAIT_SECONDS) == ()


def test_a_backend_that_raises_is_broken_and_one_without_the_page_is_not() -> None:
    desk = Desk(MemoryStorage(1 << 20))
    missing = desk.get(span(FULL, [1]))[-1]
    assert (missing.error, missing.broken, missing.declined) == ("full: page 0 is not there", False, False)
    desk.storage.close()
    for done in (desk.get(span(FULL, [1]))[-1], desk.put(span(FULL, [1])), desk.query((FULL, [1]))):
        assert done.error is not None
        assert done.error.startswith("StorageError")
        assert (done.broken, done.declined) == (True, False)
    assert desk.workers.close(WAIT_SECONDS) == ()


# -- through the whole cache ------------------------------------------------------------------------------


class HangingOnce(MemoryStorage):
    """The first question is never answered until the gate opens; all others are, at once."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.gate = threading.Event()
        self.asked = 0

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        self.asked += 1
        if self.asked == 1:
            assert self.gate.wait(WAIT_SECONDS)
        return super().holds(keys)


def until(cache: PrefixCache, so: Callable[[], bool]) -> None:
    """Poll until it is so."""
    for _ in range(3000):
        cache.poll()
        if so():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it does not come to be so")


def open_cache(clock: Callable[[], float]) -> PrefixCache:
    layout = KVLayout(layers=1, kv_heads=1, head_size=4, dtype="float32", page_size=4)
    config = CacheConfig(
        page_size=4,
        layout=layout,
        device=DeviceConfig(size=8),
        host=HostConfig(size=8),
        storage_threads=1,
        prefetch=PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        op_deadline_seconds=5.0,
    )
    return PrefixCache(config, clock=clock).open()


def test_storage_is_used_again_by_another_worker_while_the_first_call_still_hangs() -> None:
    now, storage = [0.0], HangingOnce()
    cache = open_cache(lambda: now[0])
    cache.attach_storage(storage)
    key = cache.key(range(16))
    slots = cache.allocate(4)
    assert not isinstance(slots, NoRoom)
    cache.insert(key, slots)
    until(cache, lambda: cache.stats().persisted == 4)
    cache.clear()
    first = cache.prefetch(key)
    assert not isinstance(first, Refused)
    until(cache, lambda: storage.asked == 1)
    now[0] = 5.0
    cache.poll()
    assert cache.settle(first) == 0
    stats = cache.stats()
    assert (stats.stuck, stats.stuck_threads, stats.late_operations) == (1, 1, 1)
    assert stats.breakers["storage_reads"].state == "open"
    assert isinstance(cache.prefetch(key), Refused)
    (stuck,) = cache.stuck()
    assert (stuck.purpose, stuck.owner, stuck.age_seconds, stuck.lost) == ("query", "prefetch", 5.0, 0)
    now[0] = 6.0
    second = cache.prefetch(key)
    assert not isinstance(second, Refused)
    until(cache, lambda: cache.settle(second) is not None)
    assert cache.settle(second) == 4, "on a replacement thread"
    assert cache.stats().breakers["storage_reads"].state == "closed"
    assert cache.stats().stuck_threads == 1
    storage.gate.set()
    until(cache, lambda: not cache.stuck())
    assert cache.stats().stuck_threads == 0
    cache.check()
    assert cache.close(WAIT_SECONDS) == ()


class Mute(KeyStorage):
    """Its statistics, and its clear, hang while `open` is not set, or raise."""

    def __init__(self) -> None:
        super().__init__(10)
        self.open = threading.Event()
        self.open.set()
        self.raising = False
        self.calls = 0

    def _pass(self) -> None:
        self.calls += 1
        assert self.open.wait(WAIT_SECONDS)
        if self.raising:
            raise RuntimeError("it cannot say")

    def stats(self) -> StorageStats:
        self._pass()
        return super().stats()

    def clear(self) -> None:
        self._pass()
        super().clear()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_the_statistics_of_a_storage_that_hangs_grow_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "WAIT_SECONDS", 0.05)
    storage = Mute()
    seen = Gauge(storage)
    assert seen.read(0.0) == (KeyStorage.stats(storage), 0.0)
    storage.open.clear()
    for now in (3.0, 4.0, 5.0):
        assert seen.read(now) == (KeyStorage.stats(storage), now)
    assert storage.calls == 2, "one question at a time"
    storage.open.set()
    assert seen._asking is not None
    seen._asking.join(WAIT_SECONDS)
    storage.raising = True
    assert seen.read(6.0) == (KeyStorage.stats(storage), 3.0), "what was asked at 3 has been answered since"
    storage.raising = False
    assert seen.read(7.0)[1] == 0.0


def test_a_storage_that_never_says_anything_has_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauge, "WAIT_SECONDS", 0.05)
    storage = Mute()
    storage.open.clear()
    with PrefixCache(CacheConfig(device=DeviceConfig(size=4), host=HostConfig(size=4))) as cache:
        assert (cache.stats().storage, cache.stats().storage_age_seconds) == (None, None)
        cache.attach_storage(storage)
        assert (cache.stats().storage, cache.stats().storage_age_seconds) == (None, None)
        storage.open.set()
        cache.detach_storage()
        cache.attach_storage(KeyStorage(7))
        assert cache.stats().storage == KeyStorage(7).stats()
        assert cache.stats().storage_age_seconds == 0.0


def test_clearing_a_storage_that_hangs_costs_one_thread_however_often() -> None:
    storage = Mute()
    storage.open.clear()
    with PrefixCache(CacheConfig(device=DeviceConfig(size=4), host=HostConfig(size=4))) as cache:
        cache.attach_storage(storage)
        for _ in range(3):
            with pytest.raises(StorageError, match="not cleared within"):
                cache.clear_storage(deadline_s=0.02)
        assert storage.calls == 1
        storage.open.set()
        assert cache._clearing._thread is not None
        cache._clearing._thread.join(WAIT_SECONDS)
        cache.clear_storage()
        assert storage.calls == 2


def test_a_storage_that_hangs_in_clear_leaves_the_next_one_alone() -> None:
    hung, well = Mute(), KeyStorage(4)
    hung.open.clear()
    with PrefixCache(CacheConfig(device=DeviceConfig(size=4), host=HostConfig(size=4))) as cache:
        cache.attach_storage(hung)
        with pytest.raises(StorageError, match="not cleared within"):
            cache.clear_storage(deadline_s=0.02)
        cache.detach_storage()
        cache.attach_storage(well)
        well.put([bytes(48)], [memoryview(b"")])
        cache.clear_storage()
        assert well.keys() == []
        hung.open.set()


def test_a_storage_that_cannot_be_closed_or_cleared_leaves_nothing_half_done(tmp_path: Path) -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_size=4, dtype="float32", page_size=4)
    disk = StorageConfig(path=str(tmp_path / "d"), size="1MiB")
    config = CacheConfig(
        layout=layout,
        page_size=4,
        device=DeviceConfig(size=4),
        host=HostConfig(size=4),
        storage=disk,
        events=True,
    )
    cache = PrefixCache(config).open()
    storage = cache._storage
    assert storage is not None
    assert cache.stats().storage_error is None

    def fail() -> None:
        raise OSError("the disk is gone")

    storage.clear = fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="OSError: the disk is gone"):
        cache.clear_storage()
    assert [event.medium for event in cache.take_events()] == [Tier.STORAGE]
    storage.put = lambda keys, pages: fail()  # type: ignore[method-assign,assignment]
    slots = cache.allocate(1)
    assert not isinstance(slots, NoRoom)
    cache.insert(cache.key([1, 2, 3, 4]), slots)
    assert cache.drain(WAIT_SECONDS)
    assert cache.stats().storage_error == "OSError: the disk is gone"
    close, storage.close = storage.close, fail  # type: ignore[method-assign]
    with pytest.raises(StorageError, match="OSError: the disk is gone"):
        cache.close()
    close()
    assert cache.device_pools is cache.host_pools is None
    assert cache.close() == ()
    with pytest.raises(CacheClosed):
        cache.match(cache.key([1, 2, 3, 4]))


def test_what_is_run_aside_raises_here_what_it_raises_in_time() -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (ValueError("no"), OSError("no"), SystemExit("no"), StorageError("no")):
        with pytest.raises(StorageError, match="no"):
            Aside().run(WAIT_SECONDS, partial(fail, error))
    assert Aside().run(WAIT_SECONDS, lambda: None)


# -- deadlines ---------------------------------------------------------------------------------------------


BAD = ["1", float("nan"), float("inf"), -float("inf"), True, 1j, [1], b"1", ...]


@pytest.mark.parametrize("deadline", BAD, ids=repr)
def test_a_deadline_that_is_no_number_of_seconds_is_refused(deadline: float) -> None:
    cache = PrefixCache(CacheConfig(page_size=1, device=DeviceConfig(size=4), host=HostConfig(size=4))).open()
    cache.attach_storage(KeyStorage(10))
    lease = cache.acquire(cache.match(cache.key([1])))
    before = cache.stats()
    for call in (
        lambda: cache.allocate(1, deadline_s=deadline),
        lambda: cache.evict(1, deadline_s=deadline),
        lambda: cache.load_back(lease, deadline_s=deadline),
        lambda: cache.drain(deadline),
        lambda: cache.clear_storage(deadline),
        lambda: cache.detach_storage(deadline),
        lambda: cache.close(deadline),
    ):
        with pytest.raises(InvalidDeadline):
            call()
        assert cache.stats() == before
    cache.close()


@pytest.mark.parametrize("deadline", [0, -5.0, 1e300, 10**400])
def test_a_deadline_may_be_long_over_or_far_away(deadline: float) -> None:
    with PrefixCache(CacheConfig(device=DeviceConfig(size=4))) as cache:
        assert cache.drain(deadline)
        assert not isinstance(cache.allocate(4, deadline_s=deadline), NoRoom)
        assert isinstance(cache.allocate(1, deadline_s=deadline), NoRoom)
