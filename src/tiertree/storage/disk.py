"""Pages in one directory: append-only segment files, an index in memory, a checksum on every page.

                    put                                   get
                     │ writer's lock                       │ no lock while it reads
    ┌────────────────▼───────┐   published   ┌─────────────▼──────┐
    │ reclaimer    writer    │ ────────────▶ │ index     reader   │
    │ room first,  then the  │               │ where?    preadv,  │
    │ old go       new bytes │               │           verify   │
    └────────────┬───────────┘               └─────────┬──────────┘
                 ▼            seg-…01 seg-…02 seg-…03  ▼

What an acknowledged put (`STORED`, or `PRESENT`) means, until the page is evicted or cleared:
  * `durability="none"`: the kernel has it. It survives the death of this process at any instant, not
    that of the machine; after a power loss it may be a miss.
  * `durability="batch"`: stable storage has it, synced once per put call (and per segment filled).
Either way a page is visible only when it is whole, and is verified against its key at every `get`.

The bytes of all files together never exceed the capacity, not even between two writes. (A power loss may
bring files back whose removal was not synced; opening then removes the oldest until all fits.) A segment
that is unlinked while a reader still reads from it keeps its disk blocks until that read returns.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence

from ..types import ConfigError, StorageError
from . import format as fmt
from .base import Buffer, Got, PutResult, StorageStats, Wrote
from .files import Files
from .index import Index, Run
from .lock import FIXED_BYTES, claim, write_lock
from .page import checked_call
from .reader import Read, Reader
from .reclaimer import Reclaimer
from .recover import Recovery
from .segment import Handles, Segment, State
from .writer import Durability, Item, Room, Writer

CAPACITY_BYTES_MIN = 4096
SEGMENT_BYTES_MIN = 4096
SEGMENT_BYTES_MAX = 64 << 20
SEGMENTS_PER_CAPACITY = 32
"""By default a reclaim gives up at most this fraction of the capacity at a time."""

LOOKUPS_MAX = 4
"""How often a page that moves while it is read is looked for again before it counts as a miss."""


class DiskStorage:
    """`Storage` in the directory `path`, at most `capacity_bytes` of files.

    Opening is O(pages) and reads footers only. `segment_bytes` defaults to a 32nd of the capacity, 64 MiB
    at most; a longer page gets a segment of its own. Raises `StorageLocked` if the directory is open
    already, `StorageError` if it is not tiertree's or cannot be used, `ConfigError` for impossible
    arguments. Memory: about 250 bytes per page.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        capacity_bytes: int,
        segment_bytes: int | None = None,
        durability: str = Durability.NONE,
        files: Files | None = None,
    ) -> None:
        self.path = os.path.abspath(os.fspath(path))
        segment_bytes = _segment_bytes(capacity_bytes, segment_bytes)
        policy = _durability(durability)
        self._files = files or Files()
        self._pid = os.getpid()
        self._closed = False
        self._writing = threading.Lock()
        self._counting = threading.Lock()
        self._quarantined: deque[tuple[bytes, Segment]] = deque()
        self._puts = self._hits = self._misses = self._failures = self._refused = 0
        self._index = Index()
        self._room = Room(capacity_bytes)
        self._handles = Handles(self._files)
        self._reader = Reader(self._files, self._handles)
        self._writer = Writer(
            self.path, segment_bytes, policy, self._files, self._index, self._handles, self._room
        )
        self._reclaimer = Reclaimer(
            self._files, self._index, self._handles, self._reader, self._writer, self._room
        )
        try:
            self._lock, self._epoch = claim(self.path, self._files)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be opened: {error}") from error
        try:
            self._recover(policy)
        except BaseException:
            self._handles.close()
            self._files.close(self._lock)
            raise

    def _recover(self, policy: Durability) -> None:
        recovery = Recovery(self.path, policy, self._files, self._index, self._handles, self._room)
        self._room.bytes += FIXED_BYTES
        try:
            recovery.run(self._reclaimer.reclaim)
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be recovered: {error}") from error
        self._writer.next_number = max(recovery.last_number + 1, self._epoch * fmt.EPOCH_NUMBERS)
        self._reclaimer.evicted.clear()
        self._reclaimer.evictions = 0

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        """Store pages, in order, each once; acknowledged as the durability says.

        Evicts the oldest segments to make room, but never what this call stored: what then finds no room,
        or meets a full or failing disk, is REFUSED, and so is everything after it. `evicted` also names the
        pages that went since the last put, when a quarantine needed room; never one that this call stored,
        but perhaps one that it found PRESENT.
        """
        views = checked_call(keys, pages)
        with self._writing:
            self._require_open()
            present = self._index.touch(keys)
            fresh: dict[bytes, int] = {}
            for i, key in enumerate(keys):
                if not present[i]:
                    fresh.setdefault(key, i)
            self._store([Item(fmt.PAGE, key, views[i]) for key, i in fresh.items()])
            gone = self._index.missing([*fresh, *self._reclaimer.evicted])
            refused = gone & fresh.keys()
            evicted = tuple(key for key in self._reclaimer.evicted if key in gone)
            self._reclaimer.evicted.clear()
            self._puts += len(fresh) - len(refused)
            self._refused += sum(key in refused for key in keys)
        outcomes = []
        for i, key in enumerate(keys):
            if key in refused:
                outcomes.append(Wrote.REFUSED)
            else:
                outcomes.append(Wrote.STORED if fresh.get(key) == i else Wrote.PRESENT)
        self._bury()
        return PutResult(tuple(outcomes), evicted)

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        """Read pages, neighbours in one call, and verify each. A page of another length is a MISS.

        A page that fails its checksum, or cannot be read, is CORRUPT: forgotten for good, and counted.
        """
        views = checked_call(keys, into)
        self._require_open()
        results = [Got.MISS] * len(keys)
        wanted: Sequence[int] = range(len(keys))
        for _ in range(LOOKUPS_MAX):
            runs = self._index.locate(keys, wanted)
            wanted = []
            for run in runs:
                wanted += self._get_run(run, keys, views, results)
            if not wanted:
                break
        with self._counting:
            self._hits += results.count(Got.HIT)
            self._misses += results.count(Got.MISS)
            self._failures += results.count(Got.CORRUPT)
        self._bury()
        return results

    def _get_run(
        self, run: Run, keys: Sequence[bytes], views: Sequence[Buffer], results: list[Got]
    ) -> list[int]:
        """Read one run; returns the positions that have to be looked up again."""
        reads = self._reader.read(run, keys, views)
        if reads.count(Read.GOOD) == len(reads):
            for position in run.positions:
                results[position] = Got.HIT
            self._index.mark_hit(run.segment, run.row, len(reads))
            return []
        again = []
        for i, (position, read) in enumerate(zip(run.positions, reads, strict=True)):
            if read is Read.GOOD:
                results[position] = Got.HIT
                self._index.mark_hit(run.segment, run.row + i, 1)
            elif read is Read.BAD:
                results[position] = Got.CORRUPT
                self._quarantine(keys[position], run.segment, run.row + i)
            elif read is Read.GONE:
                again.append(position)
        return again

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` are present, by the index alone."""
        self._require_open()
        return self._index.present(keys)

    def keys(self) -> list[bytes]:
        """Every key present."""
        self._require_open()
        return self._index.keys()

    def locate(self, key: bytes) -> tuple[str, int, int] | None:
        """File, offset and length of the payload of `key`, for tools that look at, or tamper with, bytes."""
        for run in self._index.locate([key], [0]):
            return run.segment.path, run.offset() + fmt.RECORD_HEADER_BYTES, run.lengths()[0]
        return None

    def clear(self) -> None:
        """Forget every page; when this returns, no file holds one, and that is on stable storage."""
        with self._writing:
            self._require_open()
            self._index.forget_all()
            self._quarantined.clear()
            self._reclaimer.evicted.clear()
            try:
                while self._index.segments:
                    if not self._reclaimer.reclaim():
                        raise StorageError(f"{self.path}: a segment could not be removed; clear it again")
                self._begin_epoch()
                self._files.fsync_directory(self.path)
            except OSError as error:
                raise StorageError(f"{self.path}: cleared, but not durably: {error}") from error

    def _begin_epoch(self) -> None:
        """Never use a segment number of before a clear again, or a file system that lets old blocks show
        through after a power loss could bring a cleared page back, valid at the same place."""
        self._epoch = min(self._writer.next_number // fmt.EPOCH_NUMBERS + 1, fmt.EPOCH_MAX)
        write_lock(self._files, self._lock, self._epoch)
        self._files.fdatasync(self._lock)
        self._writer.next_number = self._epoch * fmt.EPOCH_NUMBERS

    def stats(self) -> StorageStats:
        """Counters; `bytes` is the size of all files together."""
        return StorageStats(
            pages=len(self._index),
            bytes=self._room.bytes,
            capacity_bytes=self._room.capacity,
            puts=self._puts,
            hits=self._hits,
            misses=self._misses,
            evicted=self._reclaimer.evictions,
            checksum_failures=self._failures + self._reclaimer.damaged,
            refused=self._refused,
            reinserted=self._reclaimer.reinserted,
        )

    def close(self) -> None:
        """Seal the active segment and unlock the directory. Idempotent. Reads under way end well. In a child
        made by fork it does nothing: the files are the parent's."""
        if os.getpid() != self._pid:
            return
        with self._writing:
            if self._closed:
                return
            self._closed = True
            try:
                self._write_tombstones()
                self._writer.seal()
                self._handles.close()
            except OSError as error:
                raise StorageError(f"{self.path}: not closed cleanly: {error}") from error
            finally:
                self._files.close(self._lock)

    def _store(self, items: Sequence[Item]) -> None:
        """Write `items` in order until one is refused; what fits nowhere is skipped."""
        largest = self._room.capacity - FIXED_BYTES - fmt.SEGMENT_OVERHEAD_BYTES
        largest = min(largest - fmt.RECORD_HEADER_BYTES - fmt.ENTRY_BYTES, fmt.PAGE_BYTES_MAX)
        items = [item for item in items if len(item.payload) <= largest]
        lengths = [len(item.payload) for item in items]
        start = 0
        first: int | None = None
        while start < len(items):
            count = self._writer.group(lengths, start)
            if not count:
                if not self._reclaimer.reclaim(before=first):
                    break
                continue
            if not self._writer.append(items[start : start + count]):
                break
            if first is None and self._writer.active is not None:
                first = self._writer.active.number
            start += count
        self._writer.commit()

    def _quarantine(self, key: bytes, segment: Segment, row: int) -> None:
        if self._index.quarantine(key, segment, row):
            self._quarantined.append((key, segment))

    def _bury(self) -> None:
        """Write the tombstones that wait, unless a writer is at work: it does so when it is done."""
        while self._quarantined and self._writing.acquire(blocking=False):
            try:
                if self._closed:
                    return
                self._write_tombstones()
            finally:
                self._writing.release()

    def _write_tombstones(self) -> None:
        """A quarantined page must not come back by reopening. One that cannot be written is let go:
        the page may come back then, and fails its checksum again.

        The segment being written gets its footer when a page of it is damaged: if that is the header, what is
        behind it could not be found without one."""
        dead: dict[bytes, Item] = {}
        while self._quarantined:
            key, segment = self._quarantined.popleft()
            if segment is self._writer.active:
                self._writer.seal(durably=True)
            if segment.state is not State.RETIRED:
                dead[key] = Item(fmt.TOMBSTONE, key, memoryview(b""))
        gone = self._index.missing(dead)
        self._store([item for key, item in dead.items() if key in gone])

    def _require_open(self) -> None:
        if self._closed:
            raise StorageError(f"{self.path}: used after close")
        if os.getpid() != self._pid:
            raise StorageError(f"{self.path}: opened before a fork; open it again in the child")


def _segment_bytes(capacity: int, asked: int | None) -> int:
    if capacity < CAPACITY_BYTES_MIN:
        raise ConfigError(f"capacity_bytes is {capacity}; at least {CAPACITY_BYTES_MIN} are needed")
    if asked is None:
        return max(min(capacity // SEGMENTS_PER_CAPACITY, SEGMENT_BYTES_MAX), SEGMENT_BYTES_MIN)
    if not SEGMENT_BYTES_MIN <= asked <= capacity:
        raise ConfigError(f"segment_bytes is {asked}; it must be {SEGMENT_BYTES_MIN} to {capacity}")
    return asked


def _durability(asked: str) -> Durability:
    try:
        return Durability(asked)
    except ValueError:
        allowed = ", ".join(repr(str(d)) for d in Durability)
        raise ConfigError(f"durability is {asked!r}; it must be one of {allowed}") from None
