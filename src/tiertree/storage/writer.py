"""Appends records to the active segment; one thread at a time, the holder of the writer's lock.

    file      ┌────────┬──────────────┬───────────┬ ─ ─ ─ ─ ┐
              │ header │  published   │ unsynced  │ footer  │
              └────────┴──────────────┴───────────┴ ─ ─ ─ ─ ┘
                                  end ▲      tail ▲  reserve: counted as used from the first record on

`append` writes behind `tail`; `commit` makes what lies between `end` and `tail` durable if that was
asked for, and then visible. A failed write is cut off again. After a failed sync the kernel may hold
pages as clean that never reached the disk, so that file is never written or synced again: what was
not published is cut off and forgotten, what was published stays, verified as ever when it is read.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, NamedTuple

from . import format as fmt
from .base import Buffer
from .files import Files, read_fully, write_fully
from .index import Appended, Index
from .page import page_digest
from .segment import Handles, Segment, State

GROUP_BYTES = 2 << 20
GROUP_RECORDS = 256


class Durability(StrEnum):
    """When a put is acknowledged: the kernel has it, or stable storage has."""

    NONE = "none"
    BATCH = "batch"


class Item(NamedTuple):
    """One record to append."""

    kind: int
    key: bytes
    payload: Buffer


class Room:
    """The byte account of the directory: files as they are, and footers that are still to come."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.bytes = 0
        self.reserved = 0

    @property
    def free(self) -> int:
        """Bytes that may still be written or set aside; negative if the capacity has shrunk."""
        return self.capacity - self.bytes - self.reserved

    def settle(self, segment: Segment, size: int, reserve: int) -> None:
        """`segment`'s file now has `size` bytes and will need `reserve` more."""
        self.bytes += size - segment.size
        self.reserved += reserve - segment.reserve
        segment.size, segment.reserve = size, reserve


class Writer:
    """Writes, syncs, seals. Never makes room: callers ask `group` first, and reclaim if it answers 0."""

    def __init__(
        self,
        directory: str,
        segment_bytes: int,
        durability: Durability,
        files: Files,
        index: Index,
        handles: Handles,
        room: Room,
    ) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._durability = durability
        self._files = files
        self._index = index
        self._handles = handles
        self._room = room
        self.active: Segment | None = None
        self._fd = -1
        self._tail = 0
        self._unpublished: list[Appended] = []
        self._name_unsynced = False
        self.next_number = 1

    def group(self, lengths: Sequence[int], start: int) -> int:
        """How many records of `lengths[start:]` the next `append` can take within the free room; 0: none.

        They share a segment and are few enough for one vectored write.
        """
        space, overhead = self._target(lengths[start])
        free = self._room.free - overhead
        count = total = 0
        for length in lengths[start : start + GROUP_RECORDS]:
            total += fmt.RECORD_HEADER_BYTES + length
            cost = total + (count + 1) * fmt.ENTRY_BYTES
            if cost > free or total > space or (count and total > GROUP_BYTES):
                break
            count += 1
        return count

    def _target(self, length: int) -> tuple[int, int]:
        """Bytes of records that fit where the next one goes, and what a segment made for it costs."""
        segment, end = self.active, self._tail
        if segment is None:
            segment = self._resumable(length)
            end = segment.end if segment else 0
        record = fmt.RECORD_HEADER_BYTES + length
        if segment is not None and end + record <= self._segment_bytes:
            return self._segment_bytes - end, 0
        return max(self._segment_bytes - fmt.SEGMENT_HEADER_BYTES, record), fmt.SEGMENT_OVERHEAD_BYTES

    def append(self, items: Sequence[Item]) -> bool:
        """Write `items`, as many as `group` allowed, behind the others. False: refused, nothing changed."""
        total = sum(fmt.RECORD_HEADER_BYTES + len(item.payload) for item in items)
        if not self._prepare(total - fmt.RECORD_HEADER_BYTES):
            return False
        segment = self.active
        assert segment is not None
        offset = self._tail
        vector: list[Any] = []
        written = []
        for kind, key, payload in items:
            length = len(payload)
            digest = page_digest(key, payload)
            vector.append(fmt.encode_record(kind, key, length, digest, segment.number, offset))
            vector.append(payload)
            written.append(Appended(kind, key, offset, length))
            offset += fmt.RECORD_HEADER_BYTES + length
        try:
            write_fully(self._files, self._fd, vector, self._tail)
        except OSError:
            self._cut_back()
            return False
        self._tail = offset
        self._unpublished += written
        reserve = segment.footer_bytes() + len(self._unpublished) * fmt.ENTRY_BYTES
        self._room.settle(segment, offset, reserve)
        return True

    def commit(self) -> bool:
        """Make everything appended durable (if so configured) and visible. False: it was lost."""
        segment = self.active
        if segment is None or not self._unpublished:
            return True
        if self._durability is Durability.BATCH and not self._synced():
            return False
        self._index.publish(segment, self._unpublished)
        self._unpublished = []
        segment.end = self._tail
        return True

    def seal(self, durably: bool = False) -> None:
        """Give the active segment its footer, synced if what it holds is and it is to be as durable. Should
        that fail, it is scanned when it is opened again."""
        if not self.commit() or self.active is None:
            return
        segment = self.active
        if write_footer(self._files, self._fd, segment):
            self._room.settle(segment, segment.end + segment.footer_bytes(), 0)
            if durably and self._durability is Durability.BATCH:
                with contextlib.suppress(OSError):
                    self._files.fdatasync(self._fd)
            self._leave("seal")
        else:
            self._abandon()

    def names_synced(self) -> bool:
        """Make what was created and unlinked so far durable, if that is asked for. False: it failed."""
        if self._durability is Durability.BATCH:
            try:
                self._files.fsync_directory(self._directory)
            except OSError:
                return False
            self._name_unsynced = False
        return True

    def forget_active(self) -> None:
        """The active segment is about to be retired: stop writing to it."""
        assert not self._unpublished, "a segment with unpublished records was about to be retired"
        if self.active is not None:
            self._leave("seal")

    def _prepare(self, length: int) -> bool:
        """Have an active segment with space for a record of `length`."""
        if self.active is not None:
            if self._tail + fmt.RECORD_HEADER_BYTES + length <= self._segment_bytes:
                return True
            self.seal()
        last = self._resumable(length)
        try:
            if last is not None:
                self._resume(last)
            else:
                self._create()
        except OSError:
            return False
        return True

    def _resumable(self, length: int) -> Segment | None:
        """The last segment, sealed earlier, if a record of `length` still fits into it, and if its rows can
        be found without the footer that resuming it cuts off."""
        segments = self._index.segments
        if not segments:
            return None
        last = segments[next(reversed(segments))]
        fits = last.end + fmt.RECORD_HEADER_BYTES + length <= self._segment_bytes
        return last if fits and last.state is State.SEALED and self._walkable(last) else None

    def _walkable(self, segment: Segment) -> bool:
        """Whether every record header is intact. O(records), once until it is resumed."""
        if segment.walkable is None:
            header = bytearray(fmt.RECORD_HEADER_BYTES)
            try:
                fd = self._handles.acquire(segment)
                if fd is None:
                    raise FileNotFoundError(segment.path)
                try:
                    segment.walkable = all(
                        read_fully(self._files, fd, [header], offset)
                        and fmt.decode_record(bytes(header), segment.number, offset) is not None
                        for offset in segment.offsets
                    )
                finally:
                    self._handles.release(segment)
            except OSError:
                segment.walkable = False
        return segment.walkable

    def _resume(self, segment: Segment) -> None:
        fd = self._handles.acquire(segment)
        if fd is None:
            raise FileNotFoundError(segment.path)
        try:
            self._files.truncate(fd, segment.end)
        except OSError:
            self._handles.release(segment)
            raise
        with self._index.mutex:
            segment.turn("resume")
        segment.walkable = None
        self._room.settle(segment, segment.end, segment.footer_bytes())
        self.active, self._fd, self._tail = segment, fd, segment.end

    def _create(self) -> None:
        if self.next_number > fmt.SEGMENT_NUMBER_MAX:
            raise OSError(errno.EOVERFLOW, "segment numbers are used up")
        segment = Segment(self._directory, self.next_number)
        fd = self._files.open(segment.path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        self.next_number += 1
        with self._index.mutex:
            self._index.segments[segment.number] = segment
        self._handles.adopt(segment, fd)
        self.active, self._fd, self._tail = segment, fd, segment.end
        self._name_unsynced = True
        try:
            write_fully(self._files, fd, [fmt.encode_segment_header(segment.number)], 0)
        except OSError:
            self._abandon()
            raise
        self._room.settle(segment, fmt.SEGMENT_HEADER_BYTES, segment.footer_bytes())

    def _synced(self) -> bool:
        try:
            self._files.fdatasync(self._fd)
        except OSError:
            self._abandon()
            return False
        # The name comes last, because on most file systems the sync before has done it by then.
        if self._name_unsynced and not self.names_synced():
            self._abandon()
            return False
        return True

    def _cut_back(self) -> None:
        """Undo a write that failed part way."""
        try:
            self._files.truncate(self._fd, self._tail)
        except OSError:
            if self.commit():
                self._abandon()

    def _abandon(self) -> None:
        """Never write to the active segment again; drop what was not published."""
        segment = self.active
        assert segment is not None
        self._unpublished = []
        with contextlib.suppress(OSError):
            self._files.truncate(self._fd, segment.end)
        # Its footer is written when it is opened again, and must find room then without a page going for it.
        self._room.settle(segment, self._measure(self._tail), segment.footer_bytes())
        if not segment.keys and self._removed(segment):
            return
        self._leave("abandon")

    def _removed(self, segment: Segment) -> bool:
        """A failing disk must not collect segments that hold nothing."""
        try:
            self._files.unlink(segment.path)
        except OSError:
            return False
        self._room.settle(segment, 0, 0)
        self._leave("retire")
        self._index.forget(segment)
        return True

    def _measure(self, otherwise: int) -> int:
        try:
            return self._files.size(self._fd)
        except OSError:
            return otherwise

    def _leave(self, event: str) -> None:
        segment = self.active
        assert segment is not None
        with self._index.mutex:
            segment.turn(event)
        self.active = None
        self._handles.release(segment)


def write_footer(files: Files, fd: int, segment: Segment) -> bool:
    """Append the footer of `segment` behind its last record. False: it failed and was cut off again."""
    entries, trailer = fmt.encode_footer(segment.entries(), segment.number, segment.end)
    try:
        write_fully(files, fd, [entries, trailer], segment.end)
    except OSError:
        with contextlib.suppress(OSError):
            files.truncate(fd, segment.end)
        return False
    return True
