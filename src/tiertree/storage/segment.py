"""One segment file in memory, and the descriptors through which segments are read.

    NEXT    ACTIVE ──seal──▶ SEALED ──resume──▶ ACTIVE      written at its end by the one writer
            ACTIVE, SEALED ──abandon──▶ ABANDONED           a sync or a truncate failed: not written again
            any of these ──retire──▶ RETIRED                being unlinked; readers that hold it may finish
            RETIRED ──abandon──▶ ABANDONED                  it could not be unlinked

A state is changed under the index's mutex, and whatever is not in the table is a bug.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from . import format as fmt
from .files import Files

HANDLES_MAX = 256
"""Descriptors kept open at most, beyond those in use at the moment."""

DEAD = 0xFFFFFFFF
"""In `Segment.lengths`: this row is a tombstone."""


class State(Enum):
    """What may be done with a segment's file; see `NEXT`."""

    ACTIVE = "active"
    SEALED = "sealed"
    ABANDONED = "abandoned"
    RETIRED = "retired"


NEXT = {
    (State.ACTIVE, "seal"): State.SEALED,
    (State.ACTIVE, "abandon"): State.ABANDONED,
    (State.SEALED, "abandon"): State.ABANDONED,
    (State.SEALED, "resume"): State.ACTIVE,
    (State.ACTIVE, "retire"): State.RETIRED,
    (State.SEALED, "retire"): State.RETIRED,
    (State.ABANDONED, "retire"): State.RETIRED,
    (State.RETIRED, "abandon"): State.ABANDONED,
}


class Segment:
    """Rows of a segment in file order: key, offset, payload length, hit since written.

    `end` is where its last published record ends, `size` the bytes of its file, `reserve` the bytes
    its footer will take. Rows and state change under the catalog's mutex, sizes by the writer alone.
    """

    __slots__ = (
        "end",
        "fd",
        "hits",
        "keys",
        "lengths",
        "number",
        "offsets",
        "path",
        "reserve",
        "size",
        "state",
        "users",
        "walkable",
    )

    def __init__(self, directory: str, number: int) -> None:
        self.number = number
        self.path = os.path.join(directory, fmt.segment_name(number))
        self.state = State.ACTIVE
        self.end = fmt.SEGMENT_HEADER_BYTES
        self.size = 0
        self.reserve = 0
        self.keys: list[bytes] = []
        self.offsets = array("Q")
        self.lengths = array("I")
        self.hits = bytearray()
        self.fd: int | None = None
        self.users = 0
        self.walkable: bool | None = None
        """Whether all rows could be found without the footer; None: not looked at since it was written."""

    def turn(self, event: str) -> None:
        """Change state; an event that is not in `NEXT` is a bug."""
        self.state = NEXT[self.state, event]

    def add(
        self, kinds: Sequence[int], keys: Sequence[bytes], offsets: Sequence[int], lengths: Sequence[int]
    ) -> None:
        """Append rows."""
        self.keys.extend(keys)
        self.offsets.extend(offsets)
        self.lengths.extend(
            length if kind == fmt.PAGE else DEAD for kind, length in zip(kinds, lengths, strict=True)
        )
        self.hits.extend(bytes(len(keys)))

    def load(self, entries: NDArray[np.void]) -> None:
        """Take all rows from a checked footer. O(rows), without a Python loop."""
        self.keys = entries["key"].tolist()
        self.offsets = array("Q", entries["offset"].astype(np.uint64).tobytes())
        lengths = entries["length"].astype(np.uint32)
        lengths[entries["kind"] == fmt.TOMBSTONE] = DEAD
        self.lengths = array("I", lengths.tobytes())
        self.hits = bytearray(len(entries))

    def entries(self) -> NDArray[np.void]:
        """All rows as footer entries."""
        entries = np.zeros(len(self.keys), dtype=fmt.ENTRY)
        if self.keys:
            lengths = np.frombuffer(self.lengths, dtype=np.uint32)
            dead = lengths == DEAD
            entries["key"] = np.frombuffer(b"".join(self.keys), dtype=fmt.ENTRY["key"])
            entries["offset"] = np.frombuffer(self.offsets, dtype=np.uint64)
            entries["length"] = np.where(dead, 0, lengths)
            entries["kind"] = np.where(dead, fmt.TOMBSTONE, fmt.PAGE)
        return entries

    def footer_bytes(self) -> int:
        """Size of the footer that the present rows would get."""
        return len(self.keys) * fmt.ENTRY_BYTES + fmt.TRAILER_BYTES


class Handles:
    """Descriptors of segments, counted while in use; idle ones are kept up to a limit, oldest use first out.

    A retired segment keeps its descriptor until its last user lets go, so a read that has begun ends well.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._limit = HANDLES_MAX
        self._mutex = threading.Lock()
        self._open: OrderedDict[int, Segment] = OrderedDict()

    def acquire(self, segment: Segment) -> int | None:
        """A descriptor to read (and, for the writer, write) `segment`; None if its file is gone."""
        with self._mutex:
            fd = self._share(segment)
        if fd is not None:
            return fd
        try:
            fresh = self._files.open(segment.path, os.O_RDWR)
        except OSError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return self.adopt(segment, fresh)

    def adopt(self, segment: Segment, fresh: int) -> int:
        """Take over a descriptor just opened, in use by the caller; the one in use already wins over it."""
        with self._mutex:
            fd = self._share(segment)
            if fd is None:
                segment.fd = fd = fresh
                segment.users = 1
                self._open[segment.number] = segment
                idle = self._trim()
            else:
                idle = [fresh]
        self._close(idle)
        return fd

    def release(self, segment: Segment) -> None:
        """Undo one `acquire` or `adopt`."""
        with self._mutex:
            assert segment.users > 0, "descriptor released more often than acquired"
            segment.users -= 1
            idle = self._detach(segment) if segment.state is State.RETIRED else self._trim()
        self._close(idle)

    def drop(self, segment: Segment) -> None:
        """Close the descriptor of a segment that has been retired, now or when its last user lets go."""
        with self._mutex:
            idle = self._detach(segment)
        self._close(idle)

    def close(self) -> None:
        """Close every descriptor, those in use as soon as they are let go."""
        with self._mutex:
            self._limit = 0
            idle = self._trim()
        self._close(idle)

    def _share(self, segment: Segment) -> int | None:
        if segment.fd is not None:
            segment.users += 1
            if segment.number in self._open:
                self._open.move_to_end(segment.number)
        return segment.fd

    def _detach(self, segment: Segment) -> list[int]:
        if segment.users or segment.fd is None:
            return []
        if self._open.get(segment.number) is segment:
            del self._open[segment.number]
        fd, segment.fd = segment.fd, None
        return [fd]

    def _trim(self) -> list[int]:
        idle: list[int] = []
        if len(self._open) > self._limit:
            for segment in [s for s in self._open.values() if not s.users][: len(self._open) - self._limit]:
                idle += self._detach(segment)
        return idle

    def _close(self, descriptors: list[int]) -> None:
        for fd in descriptors:
            self._files.close(fd)
