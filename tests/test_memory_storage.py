"""Storage in memory: the conformance suite, LRU order, checksums, and the mode that keeps keys alone."""

from __future__ import annotations

import pytest

from tiertree.storage.base import Got, Wrote
from tiertree.storage.memory import KeyStorage, MemoryStorage
from tiertree.storage.tamper import flip_byte
from tiertree.testing.conformance import check_storage, held, page_content, page_key, read, write
from tiertree.types import ConfigError, StorageError


def test_memory_storage_conforms() -> None:
    check_storage(MemoryStorage, lambda storage, key: _flip(storage, key))


def _flip(storage: object, key: bytes) -> None:
    assert isinstance(storage, MemoryStorage)
    assert flip_byte(storage, key, 7)


def test_least_recently_used_goes_first() -> None:
    storage = MemoryStorage(3 * 4096)
    write(storage, 0, 1, 2)
    assert read(storage, 0)[0] is Got.HIT
    assert write(storage, 1) == (Wrote.PRESENT,)
    assert storage.put([page_key(3)], [page_content(3)]).evicted == (page_key(2),)
    assert storage.put([page_key(4)], [page_content(4)]).evicted == (page_key(0),)
    assert storage.keys() == [page_key(1), page_key(3), page_key(4)]


def test_a_page_is_a_copy_bound_to_its_key() -> None:
    storage = MemoryStorage(1 << 20)
    source = bytearray(page_content(1))
    storage.put([page_key(1)], [memoryview(source)])
    source[0] ^= 1
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1)))
    storage._present[page_key(2)] = storage._present[page_key(1)]
    assert read(storage, 2)[0] is Got.CORRUPT, "another key's page passed for this one's"


def test_keys_alone() -> None:
    storage = KeyStorage(2)
    nothing = memoryview(b"")
    result = storage.put([page_key(n) for n in range(3)], [nothing] * 3)
    assert result.outcomes == (Wrote.STORED, Wrote.STORED, Wrote.REFUSED)
    untouched = memoryview(bytearray(b"as it was"))
    assert storage.get([page_key(0), page_key(2)], [untouched] * 2) == [Got.HIT, Got.MISS]
    assert bytes(untouched) == b"as it was"
    assert storage.put([page_key(3)], [nothing]).evicted == (page_key(1),)
    assert held(storage, 1, 3, 0, 3) == [False, True, True, True]
    assert (storage.stats().pages, storage.stats().bytes) == (2, 0)
    storage.close()
    with pytest.raises(StorageError, match="KeyStorage: used after close"):
        storage.holds([])


def test_negative_capacity_is_refused() -> None:
    with pytest.raises(ConfigError, match="capacity_pages"):
        KeyStorage(-1)
