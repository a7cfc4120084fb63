"""What is where: storage key → segment and row, and the segments in the order they were written.

    where     key ──▶ segment number << 32 | row          one dict entry and one int per page
    segments  number ──▶ Segment, oldest first            the order in which they are reclaimed

A row of a segment is *live* if `where` points at it; a newer record of its key, a tombstone or a
quarantine has made every other row dead. The mutex guards both maps and all rows; it is held for
look-ups and edits in memory only, never across a file operation.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from . import format as fmt
from .segment import DEAD, Segment

_ROW_BITS = 32
_ROW_MASK = (1 << _ROW_BITS) - 1


class Run(NamedTuple):
    """Neighbours in a file: row `row + i` of `segment` is the page of `keys[positions[i]]` of one call."""

    segment: Segment
    row: int
    positions: Sequence[int]

    def offset(self) -> int:
        """Where its first record begins."""
        return self.segment.offsets[self.row]

    def lengths(self) -> Sequence[int]:
        """Payload bytes of each."""
        return self.segment.lengths[self.row : self.row + len(self.positions)]


class Appended(NamedTuple):
    """A record that is written, but not yet visible."""

    kind: int
    key: bytes
    offset: int
    length: int


class Index:
    """Thread-safe. `locate`, `present` and `publish` are O(keys)."""

    def __init__(self) -> None:
        self.mutex = threading.Lock()
        self.segments: dict[int, Segment] = {}
        self._where: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._where)

    def keys(self) -> list[bytes]:
        """All keys present, oldest first insertion."""
        with self.mutex:
            return list(self._where)

    def locate(self, keys: Sequence[bytes], positions: Iterable[int]) -> list[Run]:
        """Where those of `keys[p]` are that are present, in file order, neighbours together."""
        where = self._where
        with self.mutex:
            found = [(value, p) for p in positions if (value := where.get(keys[p])) is not None]
            segments = {number: self.segments[number] for number in {v >> _ROW_BITS for v, _ in found}}
        found.sort()
        runs: list[Run] = []
        expected = -1
        together: list[int] = []
        for value, position in found:
            if value != expected:
                together = []
                runs.append(Run(segments[value >> _ROW_BITS], value & _ROW_MASK, together))
            together.append(position)
            expected = value + 1
        return runs

    def present(self, keys: Sequence[bytes]) -> list[bool]:
        """Which of `keys` are present, all at one moment."""
        with self.mutex:
            return [key in self._where for key in keys]

    def missing(self, keys: Iterable[bytes]) -> set[bytes]:
        """Those of `keys` that are not present."""
        with self.mutex:
            return {key for key in keys if key not in self._where}

    def touch(self, keys: Sequence[bytes]) -> list[bool]:
        """Which keys are present; those count as hit."""
        present = []
        with self.mutex:
            for key in keys:
                value = self._where.get(key)
                present.append(value is not None)
                if value is not None:
                    self.segments[value >> _ROW_BITS].hits[value & _ROW_MASK] = 1
        return present

    def mark_hit(self, segment: Segment, first: int, count: int) -> None:
        """Rows `first` to `first + count` were read."""
        with self.mutex:
            segment.hits[first : first + count] = b"\1" * count

    def quarantine(self, key: bytes, segment: Segment, row: int) -> bool:
        """Forget `key` if that row is still where it is."""
        with self.mutex:
            if self._where.get(key) != _pack(segment.number, row):
                return False
            del self._where[key]
            return True

    def publish(self, segment: Segment, records: Sequence[Appended]) -> None:
        """Make records, in file order, visible all at once."""
        kinds, keys, offsets, lengths = zip(*records, strict=True)
        with self.mutex:
            first = _pack(segment.number, len(segment.keys))
            segment.add(kinds, keys, offsets, lengths)
            self._apply(keys, first, fmt.TOMBSTONE in kinds, segment)

    def restore(self, segment: Segment) -> None:
        """Add a recovered segment with all its rows; call in the order of their numbers."""
        with self.mutex:
            self.segments[segment.number] = segment
            self._apply(segment.keys, _pack(segment.number, 0), DEAD in segment.lengths, segment)

    def _apply(self, keys: Sequence[bytes], first: int, tombstones: bool, segment: Segment) -> None:
        """Let rows from `first` on take over their keys."""
        if not tombstones:
            self._where.update(zip(keys, range(first, first + len(keys)), strict=True))
            return
        for value, key in enumerate(keys, first):
            if segment.lengths[value & _ROW_MASK] == DEAD:
                self._where.pop(key, None)
            else:
                self._where[key] = value

    def hit_rows(self, segment: Segment) -> list[int]:
        """Live rows of `segment` that were hit since they were written, in file order. O(rows)."""
        base = _pack(segment.number, 0)
        with self.mutex:
            return [
                row
                for row, hit in enumerate(segment.hits)
                if hit and self._where.get(segment.keys[row]) == base + row
            ]

    def forget(self, segment: Segment) -> list[bytes]:
        """Remove all live rows of `segment` and the segment itself; returns their keys. O(rows)."""
        base = _pack(segment.number, 0)
        gone = []
        with self.mutex:
            for row, key in enumerate(segment.keys):
                if self._where.get(key) == base + row:
                    del self._where[key]
                    gone.append(key)
            del self.segments[segment.number]
        return gone

    def forget_all(self) -> None:
        """Remove every key; the segments stay until each is forgotten."""
        with self.mutex:
            self._where.clear()


def _pack(number: int, row: int) -> int:
    return number << _ROW_BITS | row
