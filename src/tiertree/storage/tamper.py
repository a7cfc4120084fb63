"""Flips bytes of resident pages behind a backend's back, to show that its checksums notice."""

from __future__ import annotations

from .disk import DiskStorage
from .memory import MemoryStorage


def flip_byte(storage: DiskStorage | MemoryStorage, key: bytes, position: int, mask: int = 0xFF) -> bool:
    """XOR byte `position` of the page of `key` with `mask`, where it lies. False: it is not there.

    On disk the file changes, so with the next read of that page the backend meets it as it would meet rot.
    """
    assert 0 < mask < 256, "a mask of 0 flips nothing"
    if isinstance(storage, MemoryStorage):
        page = storage.page(key)
        if page is None:
            return False
        page[position] ^= mask
        return True
    place = storage.locate(key)
    if place is None:
        return False
    path, offset, length = place
    assert 0 <= position < length, f"position {position} is outside of a page of {length} bytes"
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset + position)
        old = file.read(1)
        file.seek(offset + position)
        file.write(bytes([old[0] ^ mask]))
    return True
