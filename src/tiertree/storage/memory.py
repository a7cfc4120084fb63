"""Storage in memory: pages, for tests and small caches, or keys alone, for replays that move no bytes.

Least recently used goes first; a put, a `PRESENT` and a hit are uses. Nothing outlives `close`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ..types import ConfigError, StorageError
from .base import Buffer, Got, PutResult, StorageStats, Wrote
from .page import checked_call, page_digest


@dataclass(frozen=True, slots=True)
class _Page:
    """One page and the digest that it had, with its key, when it was put."""

    data: bytearray
    digest: bytes


class _Lru(ABC):
    """The books of both: present keys in the order of their use, within a capacity."""

    def __init__(self, capacity: int, unit: str) -> None:
        if capacity < 0:
            raise ConfigError(f"capacity_{unit} is {capacity}; it must be at least 0")
        self._capacity = capacity
        self._used = 0
        self._mutex = threading.Lock()
        self._present: OrderedDict[bytes, _Page | None] = OrderedDict()
        self._puts = self._hits = self._misses = self._evicted = self._failures = self._refused = 0
        self._closed = False

    @abstractmethod
    def _cost(self, length: int) -> int:
        """What a page of `length` bytes takes of the capacity."""

    @abstractmethod
    def _copy(self, key: bytes, payload: Buffer) -> _Page | None:
        """What is kept of a page."""

    @abstractmethod
    def _fill(self, key: bytes, page: _Page | None, into: Buffer) -> Got:
        """Give a kept page back."""

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        """Keep pages in order, evicting the least recently used, but nothing this call brought or touched.

        What then finds no room is REFUSED.
        """
        views = checked_call(keys, pages)
        outcomes: list[Wrote] = []
        evicted: list[bytes] = []
        mine: set[bytes] = set()
        with self._mutex:
            self._require_open()
            for key, view in zip(keys, views, strict=True):
                outcomes.append(self._put_one(key, view, mine, evicted))
            self._puts += outcomes.count(Wrote.STORED)
            self._refused += outcomes.count(Wrote.REFUSED)
            self._evicted += len(evicted)
        return PutResult(tuple(outcomes), tuple(evicted))

    def _put_one(self, key: bytes, view: Buffer, mine: set[bytes], evicted: list[bytes]) -> Wrote:
        if key in self._present:
            self._present.move_to_end(key)
            mine.add(key)
            return Wrote.PRESENT
        cost = self._cost(len(view))
        if cost > self._capacity:
            return Wrote.REFUSED
        while self._used + cost > self._capacity:
            oldest = next(iter(self._present))
            if oldest in mine:
                return Wrote.REFUSED
            self._drop(oldest)
            evicted.append(oldest)
        self._present[key] = self._copy(key, view)
        self._used += cost
        mine.add(key)
        return Wrote.STORED

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        """Fill the buffers of those present. A page that is not what was put is CORRUPT, and is gone then."""
        views = checked_call(keys, into)
        self._require_open()
        results = []
        for key, view in zip(keys, views, strict=True):
            with self._mutex:
                present = key in self._present
                page = self._present.get(key)
            got = self._fill(key, page, view) if present else Got.MISS
            with self._mutex:
                self._account(key, page, got)
            results.append(got)
        return results

    def _account(self, key: bytes, page: _Page | None, got: Got) -> None:
        self._hits += got is Got.HIT
        self._misses += got is Got.MISS
        self._failures += got is Got.CORRUPT
        if key in self._present and self._present[key] is page:
            if got is Got.HIT:
                self._present.move_to_end(key)
            elif got is Got.CORRUPT:
                self._drop(key)

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` are present; no use of them."""
        with self._mutex:
            self._require_open()
            return [key in self._present for key in keys]

    def keys(self) -> list[bytes]:
        """Every key present, least recently used first."""
        with self._mutex:
            self._require_open()
            return list(self._present)

    def clear(self) -> None:
        """Forget every page."""
        with self._mutex:
            self._require_open()
            self._present.clear()
            self._used = 0

    def stats(self) -> StorageStats:
        """Counters; `bytes` and `capacity_bytes` are 0 where no bytes are kept."""
        with self._mutex:
            return StorageStats(
                pages=len(self._present),
                bytes=self._bytes(self._used),
                capacity_bytes=self._bytes(self._capacity),
                puts=self._puts,
                hits=self._hits,
                misses=self._misses,
                evicted=self._evicted,
                checksum_failures=self._failures,
                refused=self._refused,
            )

    def close(self) -> None:
        """Forget everything. Idempotent."""
        with self._mutex:
            self._closed = True
            self._present.clear()
            self._used = 0

    @abstractmethod
    def _bytes(self, amount: int) -> int:
        """An amount of the capacity in bytes."""

    def _drop(self, key: bytes) -> None:
        page = self._present.pop(key)
        self._used -= self._cost(0 if page is None else len(page.data))

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(f"{type(self).__name__}: used after close")


class MemoryStorage(_Lru):
    """`Storage` that keeps copies of at most `capacity_bytes` of pages, each verified when it is read."""

    def __init__(self, capacity_bytes: int) -> None:
        super().__init__(capacity_bytes, "bytes")

    def page(self, key: bytes) -> memoryview | None:
        """The bytes kept under `key`, writable, for tools that look at, or tamper with, them."""
        with self._mutex:
            page = self._present.get(key)
        return None if page is None else memoryview(page.data)

    def _cost(self, length: int) -> int:
        return length

    def _bytes(self, amount: int) -> int:
        return amount

    def _copy(self, key: bytes, payload: Buffer) -> _Page:
        return _Page(bytearray(payload), page_digest(key, payload))

    def _fill(self, key: bytes, page: _Page | None, into: Buffer) -> Got:
        assert page is not None, "a memory storage keeps the bytes of every key"
        if len(page.data) != len(into):
            return Got.MISS
        into[:] = page.data
        return Got.HIT if page_digest(key, into) == page.digest else Got.CORRUPT


class KeyStorage(_Lru):
    """`Storage` of at most `capacity_pages` keys, no bytes: a present key is a HIT, buffers stay as they are.

    For replays of metadata, where nobody looks at a page's content.
    """

    def __init__(self, capacity_pages: int) -> None:
        super().__init__(capacity_pages, "pages")

    def _cost(self, length: int) -> int:
        return 1

    def _bytes(self, amount: int) -> int:
        return 0

    def _copy(self, key: bytes, payload: Buffer) -> None:
        return None

    def _fill(self, key: bytes, page: _Page | None, into: Buffer) -> Got:
        return Got.HIT
