"""The seam between the cache and anything that keeps pages outside memory (L3).

A backend maps a *storage key* (48 bytes: 32 of page hash, 16 of descriptor digest) to the bytes of
one page. Calls block; the executor makes them from its own worker threads, one call at a time per
worker, several workers at once. A backend never sees tokens, slots or tiers.

What every backend promises (`tiertree.testing.conformance` checks it):
  * `get` gives back exactly the bytes that `put` was given under that key, or `MISS`/`CORRUPT`.
  * a `put` that failed or was interrupted is never visible.
  * it stays within its capacity at every moment, making room by evicting on its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

HASH_BYTES = 32
KEY_BYTES = 48

Buffer = memoryview
"""Bytes of one page: contiguous, format 'B'. Writable where a backend is to fill it."""


class Got(Enum):
    """What became of one page of a `get`."""

    HIT = "hit"
    MISS = "miss"
    CORRUPT = "corrupt"
    """Present but failed its checksum: quarantined by the backend, the buffer's content is void."""


class Wrote(Enum):
    """What became of one page of a `put`."""

    STORED = "stored"
    PRESENT = "present"
    """Already there: nothing was written. Counts as a use of the page."""
    REFUSED = "refused"
    """Not stored: larger than the capacity, or the backend is out of room."""


@dataclass(frozen=True, slots=True)
class PutResult:
    """Outcome per page, in order, and the storage keys evicted to make room."""

    outcomes: tuple[Wrote, ...]
    evicted: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class StorageStats:
    """Counters of pages since open; `pages` and `bytes` are current.

    `puts` counts pages stored, `evicted` pages pushed out for room, `reinserted` pages written again
    because they had been hit. `bytes` is what the backend occupies, its own overhead included.
    """

    pages: int = 0
    bytes: int = 0
    capacity_bytes: int = 0
    puts: int = 0
    hits: int = 0
    misses: int = 0
    evicted: int = 0
    checksum_failures: int = 0
    refused: int = 0
    reinserted: int = 0


class Storage(Protocol):
    """One L3 backend. Thread-safe. Raises `StorageError` for what it cannot do at all, and, with nothing
    changed, for lists of unequal length and keys that have not KEY_BYTES bytes."""

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        """Store `pages[i]` under `keys[i]`; returns when the backend's durability policy is met.

        A put never evicts what it stored itself: what then finds no room is REFUSED, so that of a prefix
        too long to keep, the head is kept. A key that repeats in one call is stored once.
        """
        ...

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        """Fill `into[i]` with the page of `keys[i]`, each verified before it is reported a HIT.

        A page whose length is not that of `into[i]` is a MISS. The buffer of anything but a HIT is void.
        """
        ...

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` are present, one answer for each. Reads no page; refreshes nothing."""
        ...

    def clear(self) -> None:
        """Forget every page, durably."""
        ...

    def stats(self) -> StorageStats:
        """Counters and sizes at this moment."""
        ...

    def close(self) -> None:
        """Flush and release the backend. Idempotent; all calls but `stats` then raise StorageError."""
        ...


def storage_key(page_hash: bytes, descriptor: bytes) -> bytes:
    """`page_hash` (32 bytes) followed by the 16-byte digest of everything else that makes bytes differ:
    kind or sidecar, shard, layout and dtype."""
    return page_hash + hashlib.blake2b(descriptor, digest_size=16).digest()
