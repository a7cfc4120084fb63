"""Makes room: retires the oldest segment, after giving the pages in it that were hit another round.

FIFO with reinsertion, the one-bit CLOCK of Corbató, "A Paging Experiment with the Multics System"
(1968); Yang et al., "FIFO can be Better than LRU" (HotOS 2023) measure how close it comes to LRU.
It suits a log: writes stay sequential, a hit costs one bit in memory, and there is nothing to compact.

When not to use it: where most pages are hit once, soon after they are written, and never again, each
of them is written twice; and where the pages hit are more than the half of a segment that may be
written again, it is plain FIFO for the rest. A cache smaller than a few segments is plain FIFO, too.

    oldest                                   newest
    ┌─────────┐ ┌─────────┐     ┌─────────┐ ┌────────┐
    │ a  B  c │ │ d  e  F │ ... │         │ │ x  B   │     B and F were hit: B is read, verified, the
    └────┬────┘ └─────────┘     └─────────┘ └────▲───┘     file unlinked, B written behind x
         └───────────────────────────────────────┘

At most half of a segment's bytes go another round, so each reclaim frees at least the other half. The
file goes before its survivors are written, because until then there may be no room for them: a crash in
between loses pages of the segment being reclaimed, and no others.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import format as fmt
from .base import Buffer
from .files import Files
from .index import Index, Run
from .reader import Read, Reader
from .segment import DEAD, Handles, Segment
from .writer import Item, Room, Writer


class Reclaimer:
    """Frees whole segments, oldest first. Used under the writer's lock."""

    def __init__(
        self, files: Files, index: Index, handles: Handles, reader: Reader, writer: Writer, room: Room
    ) -> None:
        self._files = files
        self._index = index
        self._handles = handles
        self._reader = reader
        self._writer = writer
        self._room = room
        self.evicted: list[bytes] = []
        """Keys that went and that no put has reported yet: a tombstone needs room as well."""
        self.evictions = 0
        self.reinserted = 0
        self.damaged = 0

    def reclaim(self, before: int | None = None) -> bool:
        """Free the oldest segment, if its number is below `before`. False: none such, or it will not go."""
        segments = self._index.segments
        victim = next(iter(segments.values()), None)
        if victim is None or (before is not None and victim.number >= before):
            return False
        keys, survivors, held = self._survivors(victim)
        try:
            if not self._retire(victim):
                return False
            self._reinsert(keys, survivors)
        finally:
            if held:
                self._handles.release(victim)
        gone = self._index.forget(victim)
        self.evicted += gone
        self.evictions += len(gone)
        self._handles.drop(victim)
        return True

    def _survivors(self, victim: Segment) -> tuple[list[bytes], list[Buffer], bool]:
        """Verified pages that go another round, and whether a descriptor is held for readers meanwhile."""
        rows = self._affordable(victim, self._index.hit_rows(victim))
        if not rows:
            return [], [], False
        try:
            held = self._handles.acquire(victim) is not None
        except OSError:
            held = False
        memory = memoryview(bytearray(sum(victim.lengths[row] for row in rows)))
        keys, pages, start = [], [], 0
        for row in rows:
            keys.append(victim.keys[row])
            pages.append(memory[start : start + victim.lengths[row]])
            start += victim.lengths[row]
        results = [self._reader.read(Run(victim, row, [i]), keys, pages)[0] for i, row in enumerate(rows)]
        good = [i for i, result in enumerate(results) if result is Read.GOOD]
        self.damaged += results.count(Read.BAD)
        return [keys[i] for i in good], [pages[i] for i in good], held

    def _affordable(self, victim: Segment, rows: Sequence[int]) -> list[int]:
        """Leading `rows` whose records take at most half of the victim, however many segments they start."""
        budget = victim.size // 2
        chosen: list[int] = []
        for row in rows:
            each = fmt.RECORD_HEADER_BYTES + fmt.ENTRY_BYTES + fmt.SEGMENT_OVERHEAD_BYTES
            budget -= each + victim.lengths[row]
            if budget < 0:
                break
            chosen.append(row)
        return chosen

    def _retire(self, victim: Segment) -> bool:
        # A power loss may undo any unlink: pages must be gone for good before their tombstone goes.
        if DEAD in victim.lengths and not self._writer.names_synced():
            return False
        if victim is self._writer.active:
            self._writer.forget_active()
        # Before the file goes: a reader that cannot open it any more must know that it is not lost.
        with self._index.mutex:
            victim.turn("retire")
        try:
            self._files.unlink(victim.path)
        except FileNotFoundError:
            pass
        except OSError:
            with self._index.mutex:
                victim.turn("abandon")
            return False
        self._room.settle(victim, 0, 0)
        return True

    def _reinsert(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> None:
        lengths = [len(page) for page in pages]
        start = 0
        while start < len(pages):
            count = self._writer.group(lengths, start)
            items = [Item(fmt.PAGE, keys[i], pages[i]) for i in range(start, start + count)]
            if not count or not self._writer.append(items):
                break
            start += count
        if self._writer.commit():
            self.reinserted += start
