"""Storage keys and pages by number, for checks and tests of storage backends."""

from __future__ import annotations

import functools
import hashlib

from ...storage.base import HASH_BYTES, Got, Storage, Wrote, storage_key

PAGE_BYTES = 4096


def page_key(number: int, descriptor: bytes = b"conformance") -> bytes:
    """A storage key as the cache makes them: those of one number share their page hash."""
    return storage_key(hashlib.sha256(number.to_bytes(HASH_BYTES, "little")).digest(), descriptor)


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
