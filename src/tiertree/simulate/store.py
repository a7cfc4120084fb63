"""The storage of a simulation: a real backend, and everything that real ones do to their users.

    cache ──put, get, holds──▶ FaultyStore ──▶ MemoryStorage, or DiskStorage over a disk in memory
                                   └── raises, answers too little, lies, forgets, refuses, flips bits

What it does not do is to hand out wrong bytes as a hit: verifying is what a backend promises, and the
flipped bits here are for the real backends to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from ..storage.base import Buffer, Got, PutResult, Storage, StorageStats, Wrote
from ..storage.disk import DiskStorage
from ..storage.memory import MemoryStorage
from ..testing.fakedisk import After, FakeDisk, FakeFiles
from ..types import StorageError
from .faults import Faults
from .loop import Loop

DIRECTORY = "/store"
Answer = TypeVar("Answer")


class Backend:
    """What the storage of one run is made of, and what of it outlives a process."""

    def __init__(self, kind: str, capacity_bytes: int, durable: bool) -> None:
        self._kind = kind
        self._capacity = capacity_bytes
        self._durability = "batch" if durable else "none"
        self.disk = FakeDisk() if kind == "disk" else None
        self.storage = self._open()

    @property
    def used_bytes(self) -> int:
        """What the backend takes: of a disk, all files together."""
        return self.storage.stats().bytes if self.disk is None else self.disk.used_bytes

    def _open(self) -> MemoryStorage | DiskStorage:
        if self.disk is None:
            return MemoryStorage(self._capacity)
        return DiskStorage(DIRECTORY, self._capacity, 4096, self._durability, files=FakeFiles(self.disk))

    def reopen(self, after: After | None, seed: int) -> None:
        """A new process opens what the one before has left, which has closed it (None) or died. A memory
        store is somebody else's process: it goes on."""
        if self.disk is None:
            return
        if after is None:
            self.storage.close()
        else:
            self.disk.crash()
            self.disk = self.disk.after_crash(after, seed)
        self.storage = self._open()

    def flip(self, key: bytes, bit: int) -> bool:
        """Flip one bit of a stored page. False: it is not there."""
        if isinstance(self.storage, MemoryStorage):
            page = self.storage.page(key)
            if page is None or not len(page):
                return False
            page[bit // 8 % len(page)] ^= 1 << bit % 8
            return True
        place = self.storage.locate(key)
        if place is None or self.disk is None:
            return False
        path, offset, length = place
        content = bytearray(self.disk.content(path))
        content[offset + bit // 8 % length] ^= 1 << bit % 8
        self.disk.replace(path, bytes(content))
        return True


class FaultyStore:
    """`Storage` over a backend that misbehaves as `faults` says."""

    def __init__(self, backend: Backend, faults: Faults, clock: Loop) -> None:
        self._backend = backend
        self._faults = faults
        self._clock = clock
        self._calls = 0
        self._forgotten: set[bytes] = set()

    @property
    def _inner(self) -> Storage:
        return self._backend.storage

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        """See `Storage.put`."""
        call, faults = self._call("put"), self._faults
        if faults.spell("store_full", self._clock.now):
            faults.injected["store_full"] += 1
            return PutResult((Wrote.REFUSED,) * len(keys))
        result = self._inner.put(keys, pages)
        self._forgotten.difference_update(keys)
        for at, key in enumerate(keys):
            if faults.strikes("store_forgets", "put", call, at):
                self._forgotten.add(key)
        return PutResult(tuple(self._short(result.outcomes, call)), result.evicted)

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        """See `Storage.get`."""
        call = self._call("get")
        got = self._inner.get(keys, into)
        for at, key in enumerate(keys):
            if key in self._forgotten and got[at] is Got.HIT:
                into[at][:] = bytes(len(into[at]))
                got[at] = Got.MISS
        return self._short(got, call)

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """See `Storage.holds`."""
        call = self._call("holds")
        held = [
            there and key not in self._forgotten
            for key, there in zip(keys, self._inner.holds(keys), strict=True)
        ]
        lied = [each != self._faults.strikes("store_liar", call, at) for at, each in enumerate(held)]
        return self._short(lied, call)

    def clear(self) -> None:
        """See `Storage.clear`."""
        self._inner.clear()
        self._forgotten.clear()

    def stats(self) -> StorageStats:
        """See `Storage.stats`."""
        return self._inner.stats()

    def close(self) -> None:
        """Nothing: the backend is the simulation's to close."""

    def _call(self, what: str) -> int:
        """A call begins; it may raise."""
        self._calls += 1
        faults = self._faults
        if (keys := self._backend.storage.keys()) and faults.strikes("store_flips", self._calls):
            key = keys[faults.below(len(keys), "rots", self._calls)]
            self._backend.flip(key, faults.below(1 << 12, "bit", self._calls))
        if faults.spell("store_outage", self._clock.now):
            faults.injected["store_outage"] += 1
            raise ConnectionResetError(f"made up: the storage is out of order, {what}")
        if faults.strikes("store_error", self._calls):
            raised: tuple[Callable[[str], Exception], ...] = (StorageError, OSError, RuntimeError, KeyError)
            raise raised[faults.below(len(raised), "error", self._calls)]("made up")
        return self._calls

    def _short(self, answers: Sequence[Answer], call: int) -> list[Answer]:
        if answers and self._faults.strikes("store_short", call):
            return list(answers[: self._faults.below(len(answers), "short", call)])
        return list(answers)
