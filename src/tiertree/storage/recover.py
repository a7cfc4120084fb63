"""Opens what an earlier session left, whether it closed, was killed or lost power.

1. Look at every segment's header; a newer version stops everything before a byte is changed. Then
   remove temporaries.
2. For each segment, oldest first: take its rows from the footer, no payload is read. Without a good
   footer walk from record header to record header, and cut the file off at the first one that is not
   intact. A file without a good segment header, or without records, is removed.
3. Reclaim from the oldest until all of it fits the capacity, which may have shrunk.
4. Give the cut ones their footer.

Payloads are verified when they are read, as always, so a page that never reached the disk is a miss.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..types import StorageError
from . import format as fmt
from .files import Files, read_fully
from .index import Index
from .segment import Handles, Segment, State
from .writer import Durability, Room, write_footer


class Recovery:
    """Fills an empty index from a directory. `damaged` counts files that could not be used."""

    def __init__(
        self, directory: str, durability: Durability, files: Files, index: Index, handles: Handles, room: Room
    ) -> None:
        self._directory = directory
        self._durability = durability
        self._files = files
        self._index = index
        self._handles = handles
        self._room = room
        self.damaged = 0
        self.last_number = 0

    def run(self, reclaim: Callable[[], bool]) -> None:
        """Do the four steps; `reclaim` frees the oldest segment. Raises `StorageError`, `OSError`."""
        names = self._files.listdir(self._directory)
        found = map(fmt.segment_number, names)
        numbers = sorted(number for number in found if number is not None)
        sound = {number: self._header_is_sound(number) for number in numbers}
        self.last_number = max((number for number in numbers if sound[number]), default=0)
        for name in names:
            if name.endswith(fmt.TEMPORARY_SUFFIX):
                with contextlib.suppress(IsADirectoryError):  # not ours: a folder is left alone
                    self._files.unlink(os.path.join(self._directory, name))
        for number in numbers:
            self._open_segment(number, sound[number])
        if self._durability is Durability.BATCH:
            self._files.fsync_directory(self._directory)
        while self._room.free < 0 and reclaim():
            pass
        if self._room.free < 0:
            raise StorageError(f"{self._directory}: cannot be brought within its capacity")
        for segment in list(self._index.segments.values()):
            if segment.state is State.ACTIVE:
                self._finish(segment)

    def _header_is_sound(self, number: int) -> bool:
        segment = Segment(self._directory, number)
        fd = self._files.open(segment.path, os.O_RDONLY)
        try:
            data = self._read(fd, 0, fmt.SEGMENT_HEADER_BYTES)
        finally:
            self._files.close(fd)
        return fmt.decode_segment_header(data, number, segment.path)

    def _open_segment(self, number: int, sound: bool) -> None:
        segment = Segment(self._directory, number)
        fd = self._handles.acquire(segment)
        if fd is None:
            raise FileNotFoundError(segment.path)
        try:
            kept = sound and self._load(segment, fd)
            if kept and self._durability is Durability.BATCH:
                self._sync(segment, fd)
        finally:
            self._handles.release(segment)
        if kept:
            self._index.restore(segment)
            return
        self.damaged += not sound
        self._files.unlink(segment.path)
        segment.turn("retire")
        self._handles.drop(segment)

    def _load(self, segment: Segment, fd: int) -> bool:
        """Rows from the footer, or from a scan. False: it holds nothing."""
        size = self._files.size(fd)
        entries = self._footer(segment, fd, size)
        if entries is not None:
            segment.load(entries)
            segment.end = size - segment.footer_bytes()
            self._room.settle(segment, size, 0)
            segment.turn("seal")
            return bool(len(entries))
        self._scan(segment, fd, size)
        if not segment.keys:
            return False
        if segment.end < size:
            self._files.truncate(fd, segment.end)
        self._room.settle(segment, segment.end, segment.footer_bytes())
        return True

    def _footer(self, segment: Segment, fd: int, size: int) -> NDArray[np.void] | None:
        if size < fmt.SEGMENT_OVERHEAD_BYTES:
            return None
        data = self._read(fd, size - fmt.TRAILER_BYTES, fmt.TRAILER_BYTES)
        trailer = fmt.decode_trailer(data, segment.number, size)
        if trailer is None:
            return None
        data = self._read(fd, trailer.data_end, trailer.count * fmt.ENTRY_BYTES)
        return fmt.decode_entries(data, trailer)

    def _scan(self, segment: Segment, fd: int, size: int) -> None:
        """Rows of all records up to the first that is not intact or not all there. One read per record."""
        offset = fmt.SEGMENT_HEADER_BYTES
        while offset + fmt.RECORD_HEADER_BYTES <= size:
            data = self._read(fd, offset, fmt.RECORD_HEADER_BYTES)
            record = fmt.decode_record(data, segment.number, offset)
            if record is None or offset + fmt.RECORD_HEADER_BYTES + record.length > size:
                break
            segment.add([record.kind], [record.key], [offset], [record.length])
            offset += fmt.RECORD_HEADER_BYTES + record.length
        segment.end = offset

    def _sync(self, segment: Segment, fd: int) -> None:
        """What an earlier session left unsynced must be durable before a put may call it PRESENT."""
        try:
            self._files.fdatasync(fd)
        except OSError:
            segment.turn("abandon")

    def _finish(self, segment: Segment) -> None:
        fd = self._handles.acquire(segment)
        if fd is None:
            raise FileNotFoundError(segment.path)
        try:
            sealed = write_footer(self._files, fd, segment)
            segment.turn("seal" if sealed else "abandon")
            self._room.settle(segment, self._files.size(fd), 0 if sealed else segment.reserve)
        finally:
            self._handles.release(segment)

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, both within the file; fewer than that is b""."""
        data = bytearray(length)
        return bytes(data) if read_fully(self._files, fd, [data], offset) else b""
