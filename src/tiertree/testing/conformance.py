"""What every implementation of a seam must do, as functions that raise `AssertionError` when it does not.

def test_my_backend_conforms(tmp_path):
    check_storage(lambda capacity: MyStorage(tmp_path / uuid4().hex, capacity))
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable

from ..storage.base import HASH_BYTES, Got, Storage, Wrote, storage_key
from ..types import StorageError

MakeStorage = Callable[[int], Storage]
"""A fresh, empty storage with (about) this capacity in bytes. It is closed by the check that asked for it."""

Tamper = Callable[[Storage, bytes], None]
"""Change a byte of the page kept under a key, behind the backend's back."""

PAGE_BYTES = 4096
ROOMY_BYTES = 1 << 19
_PAGES = 24


def check_storage(make: MakeStorage, tamper: Tamper | None = None) -> None:
    """Run every check of the storage seam, each on a fresh storage; with `tamper`, corruption as well."""
    checks = [
        _round_trip,
        _misses,
        _present_and_repeated,
        _holds_leading,
        _evicts_within_capacity,
        _refuses_oversized,
        _keeps_the_head,
        _other_length_misses,
        _clears,
        _bad_calls,
        _threads,
        _closes,
    ]
    for check in checks:
        _with_storage(make, check)
    if tamper is not None:
        _with_storage(make, lambda storage: _quarantines(storage, tamper))


def page_key(number: int) -> bytes:
    """A storage key as the cache makes them."""
    return storage_key(hashlib.sha256(number.to_bytes(HASH_BYTES, "little")).digest(), b"conformance")


@functools.lru_cache(maxsize=2048)
def page_content(number: int, length: int = PAGE_BYTES) -> memoryview:
    """Bytes that no other number has."""
    return memoryview(hashlib.shake_128(number.to_bytes(8, "little")).digest(length))


def read(storage: Storage, number: int, length: int = PAGE_BYTES) -> tuple[Got, bytes]:
    """One page."""
    into = memoryview(bytearray(length))
    (got,) = storage.get([page_key(number)], [into])
    return got, bytes(into)


def write(storage: Storage, *numbers: int, length: int = PAGE_BYTES) -> tuple[Wrote, ...]:
    """Some pages in one call."""
    return storage.put([page_key(n) for n in numbers], [page_content(n, length) for n in numbers]).outcomes


def _with_storage(make: MakeStorage, check: Callable[[Storage], None]) -> None:
    storage = make(ROOMY_BYTES)
    try:
        check(storage)
    finally:
        storage.close()


def _round_trip(storage: Storage) -> None:
    numbers = range(_PAGES)
    assert write(storage, *numbers) == (Wrote.STORED,) * _PAGES
    backwards = [memoryview(bytearray(PAGE_BYTES)) for _ in numbers]
    results = storage.get([page_key(n) for n in reversed(numbers)], backwards)
    assert results == [Got.HIT] * _PAGES
    assert [bytes(b) for b in backwards] == [bytes(page_content(n)) for n in reversed(numbers)]
    stats = storage.stats()
    assert (stats.pages, stats.puts, stats.hits) == (_PAGES, _PAGES, _PAGES)


def _misses(storage: Storage) -> None:
    assert storage.get([], []) == []
    assert storage.put([], []).outcomes == ()
    write(storage, 1)
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in range(3)]
    results = storage.get([page_key(0), page_key(1), page_key(2)], into)
    assert results == [Got.MISS, Got.HIT, Got.MISS]
    assert bytes(into[1]) == bytes(page_content(1))
    assert storage.stats().misses == 2


def _present_and_repeated(storage: Storage) -> None:
    assert write(storage, 1, 2, 1) == (Wrote.STORED, Wrote.STORED, Wrote.PRESENT)
    assert write(storage, 2, 3) == (Wrote.PRESENT, Wrote.STORED)
    assert storage.stats().puts == 3
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in range(2)]
    assert storage.get([page_key(1), page_key(1)], into) == [Got.HIT, Got.HIT]
    assert bytes(into[0]) == bytes(into[1]) == bytes(page_content(1))


def _holds_leading(storage: Storage) -> None:
    write(storage, 0, 1, 3)
    assert storage.holds([page_key(n) for n in range(4)]) == 2
    assert storage.holds([page_key(n) for n in (5, 0)]) == 0
    assert storage.holds([]) == 0


def _evicts_within_capacity(storage: Storage) -> None:
    capacity = storage.stats().capacity_bytes or ROOMY_BYTES
    alive: set[int] = set()
    by_key = {page_key(n): n for n in range(4 * ROOMY_BYTES // PAGE_BYTES)}
    for number in by_key.values():
        result = storage.put([page_key(number)], [page_content(number)])
        assert result.outcomes == (Wrote.STORED,)
        alive.add(number)
        gone = {by_key[key] for key in result.evicted}
        assert gone <= alive, "a page was evicted that was not there, or evicted twice"
        alive -= gone
        stats = storage.stats()
        assert stats.bytes <= capacity
        assert stats.pages == len(alive)
    assert len(alive) < len(by_key), "nothing was ever evicted"
    for number in by_key.values():
        assert (storage.holds([page_key(number)]) == 1) == (number in alive)
        got, content = read(storage, number)
        assert got is (Got.HIT if number in alive else Got.MISS)
        assert got is Got.MISS or content == bytes(page_content(number))


def _refuses_oversized(storage: Storage) -> None:
    write(storage, 1)
    capacity = storage.stats().capacity_bytes or ROOMY_BYTES
    assert write(storage, 2, length=2 * capacity) == (Wrote.REFUSED,)
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1))), "a refusal has evicted something"
    assert storage.holds([page_key(2)]) == 0


def _keeps_the_head(storage: Storage) -> None:
    numbers = range(2 * (storage.stats().capacity_bytes or ROOMY_BYTES) // PAGE_BYTES)
    result = storage.put([page_key(n) for n in numbers], [page_content(n) for n in numbers])
    assert result.evicted == (), "a put has evicted what it stored itself"
    kept = result.outcomes.count(Wrote.STORED)
    assert 0 < kept < len(numbers)
    assert result.outcomes[:kept] == (Wrote.STORED,) * kept
    assert storage.holds([page_key(n) for n in numbers]) == kept


def _other_length_misses(storage: Storage) -> None:
    write(storage, 1)
    assert read(storage, 1, PAGE_BYTES - 1)[0] is Got.MISS
    assert read(storage, 1, PAGE_BYTES + 1)[0] is Got.MISS
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1)))


def _clears(storage: Storage) -> None:
    write(storage, *range(_PAGES))
    storage.clear()
    assert storage.stats().pages == 0
    assert storage.holds([page_key(0)]) == 0
    assert read(storage, 0)[0] is Got.MISS
    assert write(storage, 0) == (Wrote.STORED,)
    assert read(storage, 0) == (Got.HIT, bytes(page_content(0)))


def _bad_calls(storage: Storage) -> None:
    _raises(lambda: storage.put([page_key(1)], []))
    _raises(lambda: storage.get([page_key(1)], []))
    _raises(lambda: storage.put([b"short"], [page_content(1)]))
    _raises(lambda: storage.get([b"short"], [memoryview(bytearray(PAGE_BYTES))]))
    assert storage.stats().pages == 0


def _threads(storage: Storage) -> None:
    """Two writers and two readers; every page read is either absent or right."""
    failures: list[str] = []

    def run(worker: int) -> None:
        for number in range(30):
            if worker % 2:
                write(storage, number, number + 1)
            got, content = read(storage, number)
            if got is Got.CORRUPT or (got is Got.HIT and content != bytes(page_content(number))):
                failures.append(f"page {number}: {got}")

    threads = [threading.Thread(target=run, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert storage.holds([page_key(n) for n in range(31)]) == 31


def _closes(storage: Storage) -> None:
    write(storage, 1)
    storage.close()
    storage.close()
    into = memoryview(bytearray(PAGE_BYTES))
    _raises(lambda: storage.put([page_key(1)], [page_content(1)]))
    _raises(lambda: storage.get([page_key(1)], [into]))
    _raises(lambda: storage.holds([page_key(1)]))
    _raises(storage.clear)


def _quarantines(storage: Storage, tamper: Tamper) -> None:
    write(storage, 1, 2, 3)
    tamper(storage, page_key(2))
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in range(3)]
    results = storage.get([page_key(n) for n in (1, 2, 3)], into)
    assert results == [Got.HIT, Got.CORRUPT, Got.HIT]
    assert read(storage, 2)[0] is Got.MISS
    assert storage.stats().checksum_failures == 1
    assert write(storage, 2) == (Wrote.STORED,)
    assert read(storage, 2) == (Got.HIT, bytes(page_content(2)))


def _raises(call: Callable[[], object]) -> None:
    try:
        call()
    except StorageError:
        return
    raise AssertionError("a call that should have raised StorageError did not")
