"""What a storage backend that outlives its process must have after it was closed and opened again."""

from __future__ import annotations

from collections.abc import Callable

from ...storage.base import Got, Storage, Wrote
from .pages import PAGE_BYTES, held, page_content, page_key, read, write

_PAGES = 24


def _again(storage: Storage, reopen: Callable[[Storage], Storage]) -> Storage:
    storage.close()
    return reopen(storage)


def _kept_pages_come_back(storage: Storage, reopen: Callable[[Storage], Storage]) -> None:
    storage = _again(storage, reopen)
    assert storage.stats().pages == 0, "an empty storage is empty after reopening"
    for number in range(_PAGES):
        write(storage, number, length=number * 100)
    for _ in range(2):
        storage = _again(storage, reopen)
        kept = "what was STORED is a HIT after reopening, byte for byte"
        assert storage.stats().pages == _PAGES, kept
        for number in range(_PAGES):
            content = bytes(page_content(number, number * 100))
            assert read(storage, number, number * 100) == (Got.HIT, content), kept
    assert write(storage, 3, length=300) == (Wrote.PRESENT,), "after reopening a page is PRESENT"
    storage.close()


def _cleared_pages_stay_away(storage: Storage, reopen: Callable[[Storage], Storage]) -> None:
    write(storage, *range(_PAGES))
    storage.clear()
    write(storage, 1)
    storage = _again(storage, reopen)
    cleared = "what was cleared stays away after reopening"
    assert held(storage, *range(_PAGES)) == [number == 1 for number in range(_PAGES)], cleared
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1))), "what was put after clear is kept"
    storage.close()


def _evicted_pages_stay_away(storage: Storage, reopen: Callable[[Storage], Storage]) -> None:
    numbers = range(storage.stats().capacity_bytes // PAGE_BYTES // 8 * 32)
    gone: set[bytes] = set()
    for first in numbers[::8]:
        few = range(first, first + 8)
        gone.update(storage.put([page_key(n) for n in few], [page_content(n) for n in few]).evicted)
    storage = _again(storage, reopen)
    stats = storage.stats()
    assert stats.bytes <= stats.capacity_bytes, "the capacity holds after reopening"
    present = [page_key(number) not in gone for number in numbers]
    assert held(storage, *numbers) == present, "exactly what was not evicted is there after reopening"
    for number in (number for number, there in enumerate(present) if there):
        assert read(storage, number) == (Got.HIT, bytes(page_content(number))), "what is there is a HIT"
    storage.close()


def _refused_pages_stay_away(storage: Storage, reopen: Callable[[Storage], Storage]) -> None:
    write(storage, 1, 2)
    write(storage, 3, length=2 * storage.stats().capacity_bytes)
    storage = _again(storage, reopen)
    assert held(storage, 1, 2, 3) == [True, True, False], "what was REFUSED stays away after reopening"
    storage.close()


def buries(
    storage: Storage, reopen: Callable[[Storage], Storage], tamper: Callable[[Storage, bytes], None]
) -> None:
    """A page that was CORRUPT does not come back by reopening."""
    write(storage, 1, 2, 3)
    tamper(storage, page_key(2))
    assert read(storage, 2)[0] is Got.CORRUPT, "a page that has changed is CORRUPT"
    storage = _again(storage, reopen)
    corrupt = "a page that was CORRUPT stays away after reopening"
    assert held(storage, 1, 2, 3) == [True, False, True], corrupt
    storage.close()


CHECKS: tuple[Callable[[Storage, Callable[[Storage], Storage]], None], ...] = (
    _kept_pages_come_back,
    _cleared_pages_stay_away,
    _evicted_pages_stay_away,
    _refused_pages_stay_away,
)
