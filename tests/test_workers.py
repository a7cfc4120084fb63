"""Pages of several kinds between real pools and a backend, by real threads: all of it, parts of it, none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from workers_support import LATENT, LAYOUT, MADE_UP, WIDE, Desk, hashes, page_hash, span, stored

from tiertree.storage import jobs
from tiertree.storage.base import HASH_BYTES, Buffer, Got, PutResult, Wrote
from tiertree.storage.jobs import bare_way, pool_way
from tiertree.storage.memory import KeyStorage, MemoryStorage
from tiertree.storage.tamper import flip_byte
from tiertree.storage.workers import answer
from tiertree.tree.actions import Completion, Get, Put, Query
from tiertree.types import FULL, MAMBA, SWA, Kind


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(MemoryStorage(1 << 20))
    yield made
    assert made.workers.close(10.0) == ()


@pytest.fixture
def two_pages_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = LAYOUT.page_bytes + LATENT.page_bytes
    assert WIDE.page_bytes + LATENT.page_bytes <= page_bytes
    monkeypatch.setattr(jobs, "BATCH_BYTES", 2 * page_bytes)


def test_all_spans_arrive_byte_for_byte(desk: Desk) -> None:
    desk.write(MAMBA, [2])
    desk.put(span(FULL, []), span(MAMBA, [2]))
    stored(desk)
    (done,) = desk.get(span(FULL, range(5)), span(SWA, [3, 4]), span(MADE_UP, [4]), span(MAMBA, [2]))
    assert (done.pages, done.others, done.error) == (5, (2, 1, 1), None)
    assert desk.right(FULL, range(6)) == [True] * 5 + [False]
    assert desk.right(SWA, range(6)) == [False] * 3 + [True, True, False]
    assert desk.right(MADE_UP, [3, 4]) == [False, True]
    assert desk.right(MAMBA, [1, 2, 3]) == [False, True, False]


def test_a_span_of_full_may_be_empty(desk: Desk) -> None:
    stored(desk)
    (done,) = desk.get(span(FULL, []), span(SWA, [3]))
    assert (done.pages, done.others, done.error) == (0, (1,), None)
    desk.write(SWA, [5])
    done = desk.put(span(FULL, []), span(SWA, [5]))
    assert (done.pages, done.others, done.stored) == (0, (1,), ())
    done = desk.query((FULL, []), (SWA, [5]))
    assert (done.pages, done.held) == (0, (b"\1",))


@pytest.mark.parametrize("storage", [None, KeyStorage(99)], ids=["pools", "bare"])
def test_a_query_counts_leading_pages_of_full_and_looks_at_each_of_the_others(
    desk: Desk, storage: KeyStorage | None
) -> None:
    asked: tuple[tuple[Kind, Sequence[int]], ...] = ((FULL, range(6)), (SWA, range(6)), (MADE_UP, [4, 3, 4]))
    put = Put(98, (span(FULL, [0, 1, 2, 4]), span(SWA, [1, 3, 4]), span(MADE_UP, [4])))
    query = Query(99, tuple((kind, hashes(pages)) for kind, pages in asked))
    if storage is None:
        desk.ask(put)
        (done,) = desk.ask(query)
    else:
        answer(put, storage)
        done = answer(query, storage)
    assert done == Completion(99, 3, held=(b"\0\1\0\1\1\0", b"\1\0\1"))


def test_a_page_without_its_sidecar_is_not_held(desk: Desk) -> None:
    stored(desk)
    for kind, page in ((FULL, 2), (SWA, 4)):
        key = desk.key(kind, page, pool=1)
        desk.storage._drop(key)
    done = desk.query((FULL, range(5)), (SWA, [3, 4]))
    assert (done.pages, done.held) == (2, (b"\1\0",))
    (done,) = desk.get(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others) == (2, (1,))


def test_every_pool_of_every_kind_has_a_storage_key_of_its_own(desk: Desk) -> None:
    keys = [desk.key(kind, 1, pool) for kind in desk.host.kinds for pool in range(len([*desk.host[kind]]))]
    assert len(keys) == len(set(keys)) == 6
    assert (
        len({pool.layout.descriptor(pool.order) for kind in (SWA, MADE_UP) for pool in desk.host[kind]}) == 2
    )
    assert {key[:HASH_BYTES] for key in keys} == {page_hash(1)}
    other = pool_way(SWA, desk.host[SWA], "tp1/2").keys.of([page_hash(1)])
    assert not set(other) & set(keys)
    stored(desk)
    assert len(desk.storage.keys()) == 5 * 2 + 2 * 2 + 1


def test_bare_keys_tell_kinds_apart_and_leave_those_of_full_as_they_were() -> None:
    keys = [bare_way(kind).keys.of([page_hash(1)]) for kind in (FULL, SWA, MADE_UP)]
    assert keys[0] == [page_hash(1) + bytes(16)]
    assert len({key for (key,) in keys}) == 3
    storage = KeyStorage(99)
    answer(Put(1, (span(FULL, []), span(SWA, [1, 2]))), storage)
    done = answer(Get(2, (span(FULL, [1]), span(SWA, [1, 2]), span(MADE_UP, [1]))), storage)
    assert (done.pages, done.others) == (0, (2, 0))


def test_a_missing_page_in_a_further_span_costs_that_span_alone(desk: Desk) -> None:
    stored(desk)
    (done,) = desk.get(span(FULL, range(5)), span(SWA, [3, 2, 4]), span(MADE_UP, [4]))
    assert (done.pages, done.others) == (5, (1, 1))
    assert done.error == "swa: page 1 is not there"
    assert desk.right(SWA, [3, 4]) == [True, False]


def test_what_is_there_of_full_arrives_though_the_rest_is_not(desk: Desk) -> None:
    stored(desk)
    (done,) = desk.get(span(FULL, range(7)), span(SWA, [3, 4]))
    assert (done.pages, done.others, done.error) == (5, (2,), "full: page 5 is not there")
    assert desk.right(FULL, range(6)) == [True] * 5 + [False]


@pytest.mark.parametrize(("kind", "pool"), [(FULL, 0), (FULL, 1), (SWA, 0), (SWA, 1)])
def test_a_corrupted_page_of_any_pool_is_not_there(desk: Desk, kind: Kind, pool: int) -> None:
    stored(desk)
    assert flip_byte(desk.storage, desk.key(kind, 4, pool), 3)
    (done,) = desk.get(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others) == ((4, (2,)) if kind == FULL else (5, (1,)))
    assert done.error == f"{kind}: page {4 if kind == FULL else 1} is not there"
    assert desk.storage.stats().checksum_failures == 1
    desk.write(kind, [4])
    put = desk.put(*([span(FULL, [4])] if kind == FULL else [span(FULL, []), span(SWA, [4])]))
    assert put.error is None
    (done,) = desk.get(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others, done.error) == (5, (2,), None)


class Watched(MemoryStorage):
    """Does something before the n-th call of put or get, and remembers whose keys came when."""

    def __init__(self, capacity_bytes: int = 1 << 20) -> None:
        super().__init__(capacity_bytes)
        self.calls: list[bytes] = []
        self.before: Callable[[int], None] = lambda call: None

    def _called(self, keys: Sequence[bytes]) -> None:
        self.calls.append(keys[0])
        self.before(len(self.calls))

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        self._called(keys)
        return super().put(keys, pages)

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        self._called(keys)
        return super().get(keys, into)


@pytest.fixture
def watched(two_pages_a_batch: None) -> Iterator[tuple[Desk, Watched]]:
    """A desk whose storage has five pages of FULL, two of SWA and one of the third kind."""
    storage = Watched()
    made = stored(Desk(storage))
    yield made, storage
    assert made.workers.close(10.0) == ()


def test_full_goes_last_both_ways(watched: tuple[Desk, Watched]) -> None:
    desk, storage = watched
    order = [desk.key(SWA, 3), desk.key(MADE_UP, 4), *(desk.key(FULL, page) for page in (0, 2, 4))]
    assert storage.calls == order
    storage.calls.clear()
    desk.get(span(FULL, range(5)), span(SWA, [3, 4]), span(MADE_UP, [4]))
    assert storage.calls == order


def test_progress_is_told_of_full_when_all_else_has_been_read(watched: tuple[Desk, Watched]) -> None:
    desk, _ = watched
    told = desk.get(span(FULL, range(5)), span(SWA, [3, 4, 3], [3, 4, 5]), span(MADE_UP, [3]))
    assert [(each.pages, each.others, each.final) for each in told] == [
        (2, (3, 0), False),
        (4, (3, 0), False),
        (5, (3, 0), True),
    ]
    assert [each.error for each in told] == [None, None, "made-up: page 0 is not there"]


@pytest.mark.parametrize(
    ("call", "full", "others"), [(1, 0, (2, 0)), (2, 0, (2, 1)), (3, 2, (2, 1)), (4, 4, (2, 1))]
)
def test_a_cancelled_get_says_what_had_arrived(
    watched: tuple[Desk, Watched], call: int, full: int, others: tuple[int, ...]
) -> None:
    desk, storage = watched
    storage.calls.clear()
    storage.before = lambda number: desk.workers.cancel(2) if number == call else None
    told = desk.get(span(FULL, range(5)), span(SWA, [3, 4]), span(MADE_UP, [4]))
    assert (told[-1].pages, told[-1].others, told[-1].error) == (full, others, "cancelled")
    assert len(storage.calls) == call
    assert desk.right(FULL, range(full)) == [True] * full


def test_a_cancelled_put_says_what_is_stored(watched: tuple[Desk, Watched]) -> None:
    desk, storage = watched
    storage.clear()
    storage.calls.clear()
    storage.before = lambda number: desk.workers.cancel(2) if number == 2 else None
    done = desk.put(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others, done.stored, done.error) == (2, (2,), hashes([0, 1]), "cancelled")
    storage.before = lambda number: None
    assert desk.query((FULL, range(5)), (SWA, [3, 4])).pages == 2


def test_a_queued_job_that_is_cancelled_or_refused_answers_for_each_span(desk: Desk) -> None:
    storage, started, go_on = Watched(), threading.Event(), threading.Event()

    def hold(number: int) -> None:
        started.set()
        go_on.wait(30)

    storage.before = hold
    desk.workers.storage = storage
    desk.workers.submit(Put(1, (span(FULL, [0]),)))
    assert started.wait(30)
    for op in range(2, 7):
        desk.workers.submit(Get(op, (span(FULL, [0]), span(SWA, [3]), span(MADE_UP, [4]))))
    assert desk.told.get(timeout=30) == Completion(
        6, 0, "the storage queue is full", others=(0, 0), declined=True
    )
    desk.workers.cancel(3)
    assert desk.told.get(timeout=30) == Completion(3, 0, "cancelled", others=(0, 0))
    go_on.set()
    assert {desk.told.get(timeout=30).op for _ in range(4)} == {1, 2, 4, 5}
    desk.workers.storage = None
    refused = desk.query((FULL, [0, 1]), (SWA, [3, 4]))
    assert refused == replace(refused, pages=0, error="no storage is attached", held=(b"\0\0",))


def test_a_backend_that_raises_loses_nothing_of_what_was_done_before(watched: tuple[Desk, Watched]) -> None:
    desk, storage = watched

    def fail(number: int) -> None:
        if number == 3:
            raise OSError("the disk is on fire")

    storage.before = fail
    storage.calls.clear()
    told = desk.get(span(FULL, range(5)), span(SWA, [3, 4]))
    assert [(each.pages, each.others) for each in told] == [(2, (2,)), (2, (2,))]
    assert told[-1].error == "OSError: the disk is on fire"
    storage.clear()
    storage.calls.clear()
    done = desk.put(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others, done.stored) == (2, (2,), hashes([0, 1]))
    assert done.error == "OSError: the disk is on fire"


class Liar(MemoryStorage):
    """Answers for `more` pages more than it was asked about, from its n-th call on."""

    more = 0
    honest = 0

    def _lies(self) -> bool:
        self.honest -= 1
        return self.honest < 0

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        result = super().put(keys, pages)
        if not self._lies():
            return result
        return replace(
            result, outcomes=(*result.outcomes, Wrote.STORED, Wrote.STORED)[: len(keys) + self.more]
        )

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        got = super().get(keys, into)
        return [*got, Got.HIT, Got.HIT][: len(keys) + self.more] if self._lies() else got

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        held = super().holds(keys)
        return [*held, True, True][: len(keys) + self.more] if self._lies() else held


@pytest.mark.parametrize("more", [-1, 1, 2])
@pytest.mark.parametrize("honest", [0, 1])
def test_an_answer_for_another_number_of_pages_fails_the_operation(
    two_pages_a_batch: None, more: int, honest: int
) -> None:
    storage = Liar(1 << 20)
    storage.honest = 99
    desk = stored(Desk(storage))
    storage.more = more
    said = "StorageError: the storage backend answered for "
    for ask in (
        lambda: desk.get(span(FULL, range(5)), span(SWA, [3, 4]))[-1],
        lambda: desk.put(span(FULL, range(5)), span(SWA, [3, 4])),
        lambda: desk.query((FULL, range(5)), (SWA, [3, 4])),
    ):
        storage.honest = honest
        done = ask()
        assert done.error is not None
        assert done.error.startswith(said)
        assert done.pages == 0
        assert done.others in ((), (2 * honest,))
        assert not any(map(any, done.held))
    assert not any(desk.right(FULL, [2, 3, 4])), "a batch that was not answered for has been brought in"
    storage.honest = 99
    assert desk.workers.close(10.0) == ()


def test_a_backend_without_an_answer_fails_the_operation(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk.storage, "holds", lambda keys: 3)
    done = desk.query((FULL, [0]), (SWA, [3]))
    assert (done.pages, done.held) == (0, (b"\0",))
    assert done.error is not None
    assert done.error.startswith("TypeError")


def test_what_is_refused_is_counted_for_each_span(desk: Desk) -> None:
    for kind in (FULL, SWA):
        desk.write(kind, range(5))
    page_bytes = LAYOUT.page_bytes + LATENT.page_bytes
    desk.workers.storage = MemoryStorage(3 * page_bytes + 5)
    done = desk.put(span(FULL, range(5)), span(SWA, [3, 4]))
    assert (done.pages, done.others, done.error) == (3, (2,), None)
    assert done.stored == hashes([0, 1, 2])
    query = desk.query((FULL, range(5)), (SWA, [3, 4]))
    assert (query.pages, query.held) == (3, (b"\0\0",)), "short of room, storage gives up the other kinds"


def test_only_evicted_pages_of_full_are_named(desk: Desk) -> None:
    for kind in (FULL, SWA):
        desk.write(kind, range(5))
    desk.workers.storage = MemoryStorage(2 * (LAYOUT.page_bytes + LATENT.page_bytes) + 5)
    desk.put(span(FULL, []), span(SWA, [2]))
    assert desk.put(span(FULL, [0, 1])).evicted == (), "the page of the other kind went"
    done = desk.put(span(FULL, []), span(SWA, [3]))
    assert (done.evicted, done.stored) == (hashes([0]), ())
    done = desk.put(span(FULL, [0]), span(SWA, [4]))
    assert done.stored == hashes([0])
    assert page_hash(0) not in done.evicted


def test_what_a_later_batch_pushed_out_is_not_called_stored(desk: Desk, two_pages_a_batch: None) -> None:
    desk.write(FULL, range(5))
    desk.workers.storage = MemoryStorage(3 * (LAYOUT.page_bytes + LATENT.page_bytes))
    done = desk.put(span(FULL, range(5)))
    assert (done.stored, done.evicted) == (hashes([2, 3, 4]), hashes([0, 1]))


def test_metadata_names_only_evicted_pages_of_full() -> None:
    storage = KeyStorage(3)
    done = answer(Put(1, (span(FULL, [0, 1]), span(SWA, [1]))), storage)
    assert (done.pages, done.others, done.stored, done.evicted) == (2, (1,), hashes([0, 1]), ())
    done = answer(Put(2, (span(FULL, [2]), span(SWA, [2]))), storage)
    assert (done.pages, done.others, done.stored, done.evicted) == (1, (1,), hashes([2]), hashes([0]))
