"""What every implementation of a seam must do, as functions that raise `AssertionError` when it does not.

def test_my_backend_conforms(tmp_path):
    check_storage(lambda capacity: MyStorage(tmp_path / uuid4().hex, capacity))


def test_my_kind_conforms():
    check_component(MyRules(), page_size=16)
"""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable

import numpy as np

from ..components import Component
from ..config import CacheConfig, DeviceConfig, KindConfig
from ..storage.base import HASH_BYTES, Got, Storage, Wrote, storage_key
from ..types import ConfigError, StorageError

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
        _holds_each,
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


def check_component(rules: Component, page_size: int) -> None:
    """Run every check of the rules of a kind, for pages of `page_size` token units, which they must fit."""
    try:
        kinds = (KindConfig(rules=rules, device=1 << 21),)
        CacheConfig(device=DeviceConfig(size=1), page_size=page_size, kinds=kinds)
        hash(rules)
    except (ConfigError, TypeError) as error:
        raise AssertionError(f"no cache can have this kind: {error}") from error
    assert rules.per_path is None or rules.per_path >= 1, "per_path must be None or at least 1"
    grid = rules.grid(page_size)
    assert isinstance(grid, int), "a grid is an int"
    assert grid >= 1, "a grid is at least one page"
    ends = sorted({*range(1, 65), *(most * grid + off for most in (1, 2, 3) for off in (0, 1))})
    _since_never_falls(rules, page_size, ends)
    for end in ends:
        _keeps_page_by_page(rules, page_size, end)
        _goes_in_order(rules, page_size, end)


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


def held(storage: Storage, *numbers: int) -> list[bool]:
    """Which pages are present, in one call."""
    return storage.holds([page_key(n) for n in numbers])


def _since_never_falls(rules: Component, page_size: int, ends: list[int]) -> None:
    since = {end: rules.since(end, page_size) for end in ends}
    for end, first in since.items():
        assert isinstance(first, int), "since is an int"
        assert 0 <= first < end, f"since({end}) = {first} is not in [0, {end})"
    assert list(since.values()) == sorted(since.values()), "since is smaller for a larger boundary"
    again = {end: rules.since(end, page_size) for end in reversed(ends)}
    assert since == again, "since depends on what was asked before"


def _keeps_page_by_page(rules: Component, page_size: int, end: int) -> None:
    pages = np.arange(end, dtype=np.int64)
    kept = rules.kept(pages, end, page_size)
    assert isinstance(kept, np.ndarray), "kept is an array"
    assert kept.dtype == np.bool_, "kept is of bools"
    assert np.array_equal(pages, np.arange(end)), "kept has changed the pages it was asked about"
    for part in (slice(None), slice(None, None, 2), slice(end // 2, None), slice(0)):
        answer = rules.kept(pages[part].copy(), end, page_size)
        assert answer.shape == pages[part].shape, "kept has one entry per page"
        assert np.array_equal(answer, kept[part]), "whether a page is kept depends on the others asked about"
    if end % rules.grid(page_size) == 0:
        needed = kept[rules.since(end, page_size) :]
        assert needed.all(), f"pages that continuing at {end} needs are not kept in a node that ends there"


def _goes_in_order(rules: Component, page_size: int, end: int) -> None:
    for pages in (
        np.arange(end, dtype=np.int64),
        np.arange(0, end, 2, dtype=np.int64),
        np.empty(0, np.int64),
    ):
        asked = pages.copy()
        cold = rules.cold(pages, end, page_size)
        assert isinstance(cold, np.ndarray), "cold is an array"
        assert cold.dtype == np.bool_, "cold is of bools"
        assert cold.shape == pages.shape, "cold has one entry per page"
        assert np.array_equal(pages, asked), "cold has changed the pages it was asked about"
        assert cold[~rules.kept(pages, end, page_size)].all(), "a page that is not kept is not cold"
    if end % rules.grid(page_size) == 0:
        needed = np.arange(rules.since(end, page_size), end, dtype=np.int64)
        assert not rules.cold(needed, end, page_size).any(), "what continuing at a node's end needs is cold"


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


def _holds_each(storage: Storage) -> None:
    write(storage, 0, 1, 3)
    assert held(storage, 0, 1, 2, 3, 4) == [True, True, False, True, False]
    assert held(storage, 3, 5, 0, 3, 5) == [True, False, True, True, False]
    assert held(storage, 5) == [False]
    assert held(storage) == []
    stats = storage.stats()
    assert (stats.hits, stats.misses) == (0, 0), "asking whether a page is present counts as reading it"


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
        assert held(storage, number) == [number in alive]
        got, content = read(storage, number)
        assert got is (Got.HIT if number in alive else Got.MISS)
        assert got is Got.MISS or content == bytes(page_content(number))


def _refuses_oversized(storage: Storage) -> None:
    write(storage, 1)
    capacity = storage.stats().capacity_bytes or ROOMY_BYTES
    assert write(storage, 2, length=2 * capacity) == (Wrote.REFUSED,)
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1))), "a refusal has evicted something"
    assert held(storage, 1, 2) == [True, False]


def _keeps_the_head(storage: Storage) -> None:
    numbers = range(2 * (storage.stats().capacity_bytes or ROOMY_BYTES) // PAGE_BYTES)
    result = storage.put([page_key(n) for n in numbers], [page_content(n) for n in numbers])
    assert result.evicted == (), "a put has evicted what it stored itself"
    kept = result.outcomes.count(Wrote.STORED)
    assert 0 < kept < len(numbers)
    assert result.outcomes[:kept] == (Wrote.STORED,) * kept
    assert held(storage, *numbers) == [number < kept for number in numbers]


def _other_length_misses(storage: Storage) -> None:
    write(storage, 1)
    assert read(storage, 1, PAGE_BYTES - 1)[0] is Got.MISS
    assert read(storage, 1, PAGE_BYTES + 1)[0] is Got.MISS
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1)))


def _clears(storage: Storage) -> None:
    write(storage, *range(_PAGES))
    storage.clear()
    assert storage.stats().pages == 0
    assert held(storage, *range(_PAGES)) == [False] * _PAGES
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
    assert all(held(storage, *range(31)))


def _closes(storage: Storage) -> None:
    write(storage, 1)
    storage.close()
    storage.close()
    into = memoryview(bytearray(PAGE_BYTES))
    _raises(lambda: storage.put([page_key(1)], [page_content(1)]))
    _raises(lambda: storage.get([page_key(1)], [into]))
    _raises(lambda: held(storage, 1))
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
