"""What every storage backend must do: exact bytes or a miss, within its capacity, from many threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ...storage.base import Got, Storage, Wrote
from ...types import StorageError
from . import storage_life, storage_threads
from .hang import ends
from .pages import PAGE_BYTES, held, page_content, page_key, read, write

MakeStorage = Callable[[int], Storage]
"""A fresh, empty storage with (about) this capacity in bytes. It is closed by the check that asked for it."""

Tamper = Callable[[Storage, bytes], None]
"""Change a byte of the page kept under a key, behind the backend's back."""

Reopen = Callable[[Storage], Storage]
"""A storage on what this one, closed already, has left behind, with the same capacity."""

ROOMY_BYTES = 1 << 19
LARGE_BYTES = 1 << 23
_LONG_BYTES = (1 << 20) + 1
_PAGES = 24
_MANY, _MANY_BYTES = 3000, 16
_GUARD = 32


def check_storage(make: MakeStorage, tamper: Tamper | None = None, reopen: Reopen | None = None) -> None:
    """Run every check of the storage seam, each on a fresh storage. With `tamper` corruption as well, and
    with `reopen`, for a backend that outlives its process, what must be there and gone after reopening."""
    for check in CHECKS:
        _with_storage(make, check)
    for check in (_long_pages, _many_keys):
        _with_storage(make, check, LARGE_BYTES)
    if tamper is not None:
        _with_storage(make, lambda storage: _quarantines(storage, tamper))
    if reopen is not None:
        for life in storage_life.CHECKS:
            ends(life.__name__.strip("_"), partial(life, make(ROOMY_BYTES), reopen))
    if reopen is not None and tamper is not None:
        storage_life.buries(make(ROOMY_BYTES), reopen, tamper)


def _with_storage(make: MakeStorage, check: Callable[[Storage], None], capacity: int = ROOMY_BYTES) -> None:
    storage = make(capacity)
    try:
        ends(check.__name__.strip("_"), lambda: check(storage))
    finally:
        ends("close", storage.close)


def _round_trip(storage: Storage) -> None:
    numbers = range(_PAGES)
    assert write(storage, *numbers) == (Wrote.STORED,) * _PAGES, "new pages that fit are STORED"
    backwards = [memoryview(bytearray(PAGE_BYTES)) for _ in numbers]
    results = storage.get([page_key(n) for n in reversed(numbers)], backwards)
    assert results == [Got.HIT] * _PAGES, "a page that was STORED is a HIT"
    expected = [bytes(page_content(n)) for n in reversed(numbers)]
    assert [bytes(b) for b in backwards] == expected, "a HIT has exactly the bytes that were put"
    stats = storage.stats()
    counted = (stats.pages, stats.puts, stats.hits)
    assert counted == (_PAGES, _PAGES, _PAGES), f"stats: pages, puts, hits are {_PAGES} each, not {counted}"


def _copies(storage: Storage) -> None:
    source = bytearray(page_content(1))
    storage.put([page_key(1)], [memoryview(source)])
    assert source == page_content(1), "put leaves its buffers as they were: others read them"
    source[:] = bytes(PAGE_BYTES)
    assert read(storage, 1)[1] == bytes(page_content(1)), (
        "once put has returned, its buffers are the caller's"
    )
    into = memoryview(bytearray(PAGE_BYTES))
    assert storage.get([page_key(1)], [into]) == [Got.HIT], "a page that was STORED is a HIT"
    into[:] = bytes(PAGE_BYTES)
    assert read(storage, 1)[1] == bytes(page_content(1)), (
        "once get has returned, its buffers are the caller's"
    )


def _tells_descriptors_apart(storage: Storage) -> None:
    """Pages of several kinds, sidecars and shards share their page hash."""
    apart = "keys that differ in their last bytes alone are keys of different pages"
    keys = [page_key(1, descriptor) for descriptor in (b"full", b"window", b"full/draft")]
    assert storage.put(keys[:2], [page_content(1), page_content(2)]).outcomes == (Wrote.STORED,) * 2, apart
    assert storage.holds(keys) == [True, True, False], apart
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in keys]
    assert storage.get(keys, into) == [Got.HIT, Got.HIT, Got.MISS], apart
    assert [into[0], into[1]] == [page_content(1), page_content(2)], apart


def _long_pages(storage: Storage) -> None:
    for number in (1, 2):
        assert write(storage, number, length=_LONG_BYTES) == (Wrote.STORED,), "a page of 1 MiB is STORED"
    for number in (1, 2):
        got, content = read(storage, number, _LONG_BYTES)
        assert got is Got.HIT, "a page of 1 MiB is a HIT"
        assert content == page_content(number, _LONG_BYTES), "a page of 1 MiB comes back exactly"


def _misses(storage: Storage) -> None:
    assert storage.get([], []) == [], "a get of nothing gives nothing"
    assert storage.put([], []).outcomes == (), "a put of nothing does nothing"
    write(storage, 1)
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in range(3)]
    results = storage.get([page_key(0), page_key(1), page_key(2)], into)
    assert results == [Got.MISS, Got.HIT, Got.MISS], "what was never put is a MISS"
    assert bytes(into[1]) == bytes(page_content(1)), "a HIT has exactly the bytes that were put"
    assert storage.stats().misses == 2, "stats: misses are counted"


def _present_and_repeated(storage: Storage) -> None:
    once = "a key that repeats in one call is stored once, and PRESENT the second time"
    assert write(storage, 1, 2, 1) == (Wrote.STORED, Wrote.STORED, Wrote.PRESENT), once
    assert write(storage, 2, 3) == (Wrote.PRESENT, Wrote.STORED), "a page that is there already is PRESENT"
    assert storage.stats().puts == 3, "stats: puts counts pages that were STORED"
    into = [memoryview(bytearray(PAGE_BYTES)) for _ in range(5)]
    results = storage.get([page_key(n) for n in (1, 9, 1, 2, 9)], into)
    each = "keys that repeat in one get are answered each"
    assert results == [Got.HIT, Got.MISS, Got.HIT, Got.HIT, Got.MISS], each
    assert bytes(into[0]) == bytes(into[2]) == bytes(page_content(1)), each


def _holds_each(storage: Storage) -> None:
    write(storage, 0, 1, 3)
    each = "holds answers for each key by itself"
    assert held(storage, 0, 1, 2, 3, 4) == [True, True, False, True, False], each
    assert held(storage, 3, 5, 0, 3, 5) == [True, False, True, True, False], each
    assert held(storage, 5) == [False], each
    assert held(storage) == [], each
    stats = storage.stats()
    assert (stats.hits, stats.misses) == (0, 0), "asking whether a page is present counts as reading it"


def _any_length(storage: Storage) -> None:
    lengths = [0, 1, 2, 63, PAGE_BYTES - 1, PAGE_BYTES + 1, 3 * PAGE_BYTES + 5]
    for number, length in enumerate(lengths):
        assert write(storage, number, length=length) == (Wrote.STORED,), f"a page of {length} bytes is STORED"
    for number, length in enumerate(lengths):
        got, content = read(storage, number, length)
        assert got is Got.HIT, f"a page of {length} bytes is a HIT, an empty one too"
        assert content == bytes(page_content(number, length)), f"a page of {length} bytes comes back exactly"
    assert held(storage, *range(len(lengths))) == [True] * len(lengths), "pages of any length are present"


def _other_length_misses(storage: Storage) -> None:
    write(storage, 0, 1, 2)
    other = "a page whose length is not that of the buffer is a MISS"
    for length in (0, 1, PAGE_BYTES // 2, PAGE_BYTES - 1, PAGE_BYTES + 1, 2 * PAGE_BYTES):
        area = bytearray(b"\xaa") * (length + 2 * _GUARD)
        between = memoryview(area)[_GUARD : _GUARD + length]
        into = [memoryview(bytearray(PAGE_BYTES)), between, memoryview(bytearray(PAGE_BYTES))]
        results = storage.get([page_key(n) for n in range(3)], into)
        assert results == [Got.HIT, Got.MISS, Got.HIT], other
        assert bytes(into[0]) == bytes(page_content(0)), "a MISS leaves the other pages of its call alone"
        assert bytes(into[2]) == bytes(page_content(2)), "a MISS leaves the other pages of its call alone"
        around = bytes(area[:_GUARD] + area[_GUARD + length :])
        assert around == b"\xaa" * (2 * _GUARD), "nothing is written outside the buffer"
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1))), "a MISS for its length takes no page away"


def _many_keys(storage: Storage) -> None:
    numbers = range(_MANY)
    outcomes = write(storage, *numbers, length=_MANY_BYTES)
    assert outcomes == (Wrote.STORED,) * _MANY, f"{_MANY} small pages of one call are STORED"
    asked = [*range(2 * _MANY - 1, -1, -3)]
    into = [memoryview(bytearray(_MANY_BYTES)) for _ in asked]
    results = storage.get([page_key(n) for n in asked], into)
    expected = [Got.HIT if n < _MANY else Got.MISS for n in asked]
    assert results == expected, f"{len(asked)} keys of one get are answered each, in order"
    right = all(
        bytes(b) == bytes(page_content(n, _MANY_BYTES)) for n, b in zip(asked, into, strict=True) if n < _MANY
    )
    assert right, "a HIT has exactly the bytes that were put"
    assert held(storage, *asked) == [n < _MANY for n in asked], "holds answers for each key by itself"


def _evicts_within_capacity(storage: Storage) -> None:
    capacity = storage.stats().capacity_bytes or ROOMY_BYTES
    alive: set[int] = set()
    by_key = {page_key(n): n for n in range(4 * ROOMY_BYTES // PAGE_BYTES)}
    for number in by_key.values():
        result = storage.put([page_key(number)], [page_content(number)])
        assert result.outcomes == (Wrote.STORED,), "a put evicts what it needs room for"
        alive.add(number)
        gone = {by_key[key] for key in result.evicted}
        assert gone <= alive, "a page was evicted that was not there, or evicted twice"
        alive -= gone
        stats = storage.stats()
        assert stats.bytes <= capacity, f"{stats.bytes} bytes are more than the capacity, {capacity}"
        assert stats.pages == len(alive), "every page that is evicted is told"
    assert len(alive) < len(by_key), "nothing was ever evicted"
    for number in by_key.values():
        assert held(storage, number) == [number in alive], "exactly the pages told as evicted are gone"
        got, content = read(storage, number)
        assert got is (Got.HIT if number in alive else Got.MISS), "exactly the pages told as evicted are gone"
        assert got is Got.MISS or content == bytes(page_content(number)), "a HIT has exactly the bytes"
    assert storage.stats().evicted == len(by_key) - len(alive), "stats: evicted counts the pages told"


def _refuses_oversized(storage: Storage) -> None:
    write(storage, 1)
    capacity = storage.stats().capacity_bytes or ROOMY_BYTES
    too_large = "a page larger than the capacity is REFUSED"
    assert write(storage, 2, length=2 * capacity) == (Wrote.REFUSED,), too_large
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1))), "a refusal has evicted something"
    assert held(storage, 1, 2) == [True, False], "what was REFUSED is not there"
    outcomes = storage.put(
        [page_key(n) for n in (3, 4, 5)], [page_content(n, 2 * capacity if n == 4 else 9) for n in (3, 4, 5)]
    ).outcomes
    assert outcomes[:2] == (Wrote.STORED, Wrote.REFUSED), too_large
    present = [outcome is Wrote.STORED for outcome in outcomes]
    assert held(storage, 3, 4, 5) == present, "what a put says of each page is so"


def _keeps_the_head(storage: Storage) -> None:
    numbers = range(2 * (storage.stats().capacity_bytes or ROOMY_BYTES) // PAGE_BYTES)
    result = storage.put([page_key(n) for n in numbers], [page_content(n) for n in numbers])
    assert result.evicted == (), "a put has evicted what it stored itself"
    kept = result.outcomes.count(Wrote.STORED)
    assert 0 < kept < len(numbers), "of a put that does not fit, some pages are STORED and some REFUSED"
    head = "of a put that does not fit, the head is kept"
    assert result.outcomes[:kept] == (Wrote.STORED,) * kept, head
    assert held(storage, *numbers) == [number < kept for number in numbers], head


def _clears(storage: Storage) -> None:
    write(storage, *range(_PAGES))
    storage.clear()
    assert storage.stats().pages == 0, "after clear there is no page"
    assert held(storage, *range(_PAGES)) == [False] * _PAGES, "after clear there is no page"
    assert read(storage, 0)[0] is Got.MISS, "after clear there is no page"
    assert write(storage, 0) == (Wrote.STORED,), "after clear a page may be put again"
    assert read(storage, 0) == (Got.HIT, bytes(page_content(0))), "after clear a page may be put again"
    cleared = {page_key(n) for n in range(1, _PAGES)}
    for first in range(100, 100 + 2 * ROOMY_BYTES // PAGE_BYTES, 8):
        few = range(first, first + 8)
        gone = storage.put([page_key(n) for n in few], [page_content(n) for n in few]).evicted
        assert not cleared & set(gone), "a page was evicted that was not there, or evicted twice"


def _bad_calls(storage: Storage) -> None:
    _raises(lambda: storage.put([page_key(1)], []))
    _raises(lambda: storage.get([page_key(1)], []))
    _raises(lambda: storage.put([b"short"], [page_content(1)]))
    _raises(lambda: storage.put([page_key(1), b"short"], [page_content(1), page_content(2)]))
    _raises(lambda: storage.get([b"short"], [memoryview(bytearray(PAGE_BYTES))]))
    assert storage.stats().pages == 0, "a call that raises StorageError changes nothing"


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
    assert results == [Got.HIT, Got.CORRUPT, Got.HIT], (
        "a page that has changed is CORRUPT, its neighbours are HITs"
    )
    assert read(storage, 2)[0] is Got.MISS, "a page that was CORRUPT is gone"
    assert storage.stats().checksum_failures == 1, "stats: checksum_failures are counted"
    again = "a page that was CORRUPT may be put again"
    assert write(storage, 2) == (Wrote.STORED,), again
    assert read(storage, 2) == (Got.HIT, bytes(page_content(2))), again


def _raises(call: Callable[[], object]) -> None:
    try:
        call()
    except StorageError:
        return
    raise AssertionError("a call that should have raised StorageError did not")


CHECKS: tuple[Callable[[Storage], None], ...] = (
    _round_trip,
    _copies,
    _tells_descriptors_apart,
    _misses,
    _present_and_repeated,
    _holds_each,
    _any_length,
    _other_length_misses,
    _evicts_within_capacity,
    _refuses_oversized,
    _keeps_the_head,
    _clears,
    _bad_calls,
    _closes,
    *storage_threads.CHECKS,
)
