"""What a storage backend must do for several threads at once. Its worker threads call it so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from ...storage.base import Got, Storage, Wrote
from ...types import StorageError
from .pages import PAGE_BYTES, held, page_content, page_key, read, write

_ROUNDS = 30
_CAPACITY_BYTES = 1 << 19
"""Of a storage that does not tell its own."""
_PAUSE_S = 0.0002
"""Between two looks, so that whoever only looks leaves the processor to the others."""


def _together(jobs: Sequence[Callable[[], None]]) -> None:
    """Run `jobs` at the same time, and raise what one of them raises."""
    raised: list[BaseException] = []
    start = threading.Barrier(len(jobs))

    def run(job: Callable[[], None]) -> None:
        try:
            start.wait()
            job()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def _absent_or_right(storage: Storage, numbers: Sequence[int], lengths: Callable[[int], int]) -> None:
    """A get of `numbers` gives for each a MISS, or exactly its bytes."""
    into = [memoryview(bytearray(lengths(n))) for n in numbers]
    results = storage.get([page_key(n) for n in numbers], into)
    for number, got, buffer in zip(numbers, results, into, strict=True):
        right = got is Got.MISS or (got is Got.HIT and buffer == page_content(number, lengths(number)))
        assert right, f"a page that is read while others are put is a MISS or right: page {number} is {got}"


def _one_length(number: int) -> int:
    return PAGE_BYTES


def _put_while_get(storage: Storage) -> None:
    def writer() -> None:
        for number in range(_ROUNDS):
            write(storage, number, number + 1)
            _absent_or_right(storage, [number], _one_length)

    def reader() -> None:
        for number in range(_ROUNDS):
            _absent_or_right(storage, [number, (7 * number) % _ROUNDS, number], _one_length)

    _together([writer, writer, reader, reader])
    assert all(held(storage, *range(_ROUNDS + 1))), "what several threads put at once is all there"
    assert storage.stats().pages == _ROUNDS + 1, "a page that several threads put at once is stored once"


def _evict_while_get(storage: Storage) -> None:
    """Two writers of pages of their own, in room for a third of them, two readers of both's, and one that
    looks at the capacity all the time."""
    capacity = storage.stats().capacity_bytes or _CAPACITY_BYTES
    per_writer = 3 * capacity // PAGE_BYTES // 2
    ended = threading.Event()
    told: list[list[bytes]] = [[], []]
    stored: list[set[int]] = [set(), set()]
    writing = [True, True]

    def writer(which: int) -> None:
        try:
            for number in range(which, 2 * per_writer, 4):
                pair = [number, number + 2]
                result = storage.put([page_key(n) for n in pair], [page_content(n) for n in pair])
                stored[which].update(
                    n for n, wrote in zip(pair, result.outcomes, strict=True) if wrote is Wrote.STORED
                )
                told[which] += result.evicted
        finally:
            writing[which] = False
            if not any(writing):
                ended.set()

    def reader() -> None:
        at = 0
        while not ended.wait(_PAUSE_S):
            at = (at + 5) % (2 * per_writer)
            _absent_or_right(storage, range(at, at + 4), _one_length)

    def watcher() -> None:
        while not ended.wait(_PAUSE_S):
            stats = storage.stats()
            assert stats.bytes <= capacity, "the capacity holds at every moment"

    _together([lambda: writer(0), lambda: writer(1), reader, reader, watcher])
    gone = [*told[0], *told[1]]
    assert len(gone) == len(set(gone)), "a page that is evicted is told once"
    numbers = range(2 * per_writer + 4)
    there = {n for n, present in zip(numbers, held(storage, *numbers), strict=True) if present}
    kept = {n for n in stored[0] | stored[1] if page_key(n) not in set(gone)}
    assert there == kept, "exactly what was STORED and not told as evicted is there"
    assert storage.stats().pages == len(there), "stats: pages are those that are there"


def _clear_while_put(storage: Storage) -> None:
    def writer() -> None:
        for number in range(_ROUNDS):
            write(storage, number, number + 1)

    def clearer() -> None:
        for number in range(_ROUNDS):
            storage.clear()
            assert write(storage, 100 + number) == (Wrote.STORED,), "after clear a page may be put again"
            assert held(storage, 100 + number) == [True], "what is put after clear has returned is there"

    _together([writer, writer, clearer])
    numbers = [*range(_ROUNDS + 1), *range(100, 100 + _ROUNDS)]
    there = [n for n, present in zip(numbers, held(storage, *numbers), strict=True) if present]
    assert storage.stats().pages == len(there), "stats: pages are those that are there"
    assert all(read(storage, n) == (Got.HIT, bytes(page_content(n))) for n in there), "what is there is right"
    storage.clear()
    assert not any(held(storage, *numbers)), "after clear there is no page"


def _close_while_busy(storage: Storage) -> None:
    busy = threading.Semaphore(0)

    def user() -> None:
        try:
            for number in range(10_000):
                write(storage, number % 50)
                _absent_or_right(storage, [number % 50, 1], _one_length)
                busy.release()
        except StorageError:
            return
        finally:
            busy.release(9)

    def closer() -> None:
        for _ in range(9):
            busy.acquire()
        storage.close()

    _together([user, user, user, closer])
    try:
        read(storage, 1)
    except StorageError:
        return
    raise AssertionError("a call after close should have raised StorageError and did not")


CHECKS: tuple[Callable[[Storage], None], ...] = (
    _put_while_get,
    _evict_while_get,
    _clear_while_put,
    _close_while_busy,
)
