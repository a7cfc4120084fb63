"""Checks a directory of the disk tier that nobody has open, and repairs it if asked to.

    survey    names, headers, footers, tails ──▶ which row is where
    verify    every record of every file, front to back, against its row and its digest
    repair    headers that can be proven are written anew; then the directory is opened, which does the rest,
              and each damaged page is read: the cache's own quarantine writes its tombstone

Without repair not a byte, name or time of modification changes. Nothing good is lost in a repair: a header
is written anew only where a digest proves its page, and what is removed holds no page that a cache could
serve. Memory: about 250 bytes per page, and one window of a file; a repair also holds one page.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import xxhash

from ..types import StorageError
from . import format as fmt
from .base import Got
from .disk import SEGMENT_BYTES_MAX, DiskStorage
from .faults import Finding
from .files import Files, read_fully, write_fully
from .page import page_digest
from .segment import DEAD, Segment
from .survey import Found, Standing, Survey, Tail, claimed, survey
from .writer import Durability

WINDOW_BYTES = 1 << 20
BOUNDLESS = 1 << 62
"""A capacity that reclaims nothing: a repair must not evict."""

Watcher = Callable[[int, int], None]
"""Told how many bytes of how many were checked; must be quick."""


@dataclass(frozen=True, slots=True)
class Totals:
    """What a directory, or one segment of it, holds. `live` pages are the newest of their keys, and a cache
    would not serve the `damaged` of them; `superseded` ones are hidden by later records. `garbage_bytes` hold
    no live page: they go when their segment is reclaimed."""

    segments: int = 0
    bytes: int = 0
    live: int = 0
    superseded: int = 0
    tombstones: int = 0
    damaged: int = 0
    garbage_bytes: int = 0


@dataclass(slots=True)
class FsckReport:
    """What `fsck` has found, all of it as it was before any repair."""

    path: str
    totals: Totals
    findings: list[Finding]
    repaired: bool = False

    @property
    def sound(self) -> bool:
        """Whether nothing is damaged. What a killed process leaves is no damage."""
        return not any(each.damage for each in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "path": self.path,
            "sound": self.sound,
            "repaired": self.repaired,
            **asdict(self.totals),
            "findings": [each.as_dict() for each in self.findings],
        }


def fsck(
    path: str | os.PathLike[str],
    repair: bool = False,
    files: Files | None = None,
    watch: Watcher | None = None,
) -> FsckReport:
    """Check every file, record and page in `path`, O(bytes); with `repair` mend what can be mended, and see
    to it that no damaged page is served again. Raises `StorageLocked` if somebody has it open, `StorageError`
    if it is not tiertree's, of another version, cannot be read at all, or could not be repaired."""
    where, files = os.path.abspath(os.fspath(path)), files or Files()
    with claimed(where, files):
        check = _Check(survey(where, files), files, watch)
        check.run()
        if repair:
            for name, why in check.survey.unread.items():
                raise StorageError(f"{where}: cannot be repaired: {name} cannot be read: {why}")
            _mend(check, files)
    report = FsckReport(where, totals(check.survey, check.damaged), check.findings)
    if repair:
        report.findings = _quarantine(check, files)
        report.repaired = True
    return report


def totals(found: Survey, damaged: int = 0) -> Totals:
    """The sums over all segments. O(records)."""
    each = [segment_totals(found, one) for one in found.found]
    return Totals(
        segments=len(each),
        bytes=sum(one.bytes for one in each) + sum(found.fixed_bytes.values()),
        live=sum(one.live for one in each),
        superseded=sum(one.superseded for one in each),
        tombstones=sum(one.tombstones for one in each),
        damaged=damaged,
        garbage_bytes=sum(one.garbage_bytes for one in each),
    )


def segment_totals(found: Survey, one: Found) -> Totals:
    """What one segment holds; its damaged pages are not counted here. O(records)."""
    segment = one.segment
    tombstones = segment.lengths.count(DEAD)
    live = [row for row in range(len(segment.keys)) if found.is_live(segment, row)]
    entry = fmt.ENTRY_BYTES if one.standing is Standing.SEALED else 0
    used = sum(fmt.RECORD_HEADER_BYTES + segment.lengths[row] + entry for row in live)
    frame = fmt.SEGMENT_HEADER_BYTES + (fmt.TRAILER_BYTES if entry else 0)
    return Totals(
        segments=1,
        bytes=segment.size,
        live=len(live),
        superseded=len(segment.keys) - tombstones - len(live),
        tombstones=tombstones,
        garbage_bytes=max(0, segment.size - frame - used) if live else segment.size,
    )


@dataclass(slots=True)
class _Check:
    """One pass over a directory. `headers` are to be written anew: number, offset, bytes. `victims` are live
    pages to be quarantined, by the place of their finding."""

    survey: Survey
    files: Files
    watch: Watcher | None
    findings: list[Finding] = field(default_factory=list)
    headers: list[tuple[Segment, int, bytes]] = field(default_factory=list)
    victims: dict[int, tuple[Segment, int]] = field(default_factory=dict)
    damaged: int = 0
    _done: int = 0
    _whole: int = 0

    def run(self) -> None:
        """Find everything there is to find."""
        found = self.survey
        self._whole = sum(one.segment.size for one in found.found)
        if found.fixed_bytes.get(fmt.LOCK_NAME, fmt.LOCK_BYTES) != fmt.LOCK_BYTES:
            self._say("lock", fmt.LOCK_NAME)
        for fault, names in (("temporary", found.temporaries), ("foreign", found.foreign)):
            for name in names:
                self._say(fault, name)
        for name, why in found.unread.items():
            self._say("segment-unreadable", name, detail=why)
        for one in found.found:
            self._file(one)
            if one.segment.keys:
                self._records(one)
        self._advanced(self._whole - self._done)

    def _say(
        self, fault: str, file: str, offset: int | None = None, key: bytes | None = None, detail: str = ""
    ) -> None:
        self.findings.append(Finding(fault, file, offset, key, detail))

    def _file(self, one: Found) -> None:
        """What is to be said of a file as a whole."""
        segment, name = one.segment, one.name
        if one.standing is Standing.UNUSABLE:
            own = int.from_bytes(one.header[16:24], "little")
            moved = len(one.header) == fmt.SEGMENT_HEADER_BYTES and own != segment.number
            if moved and fmt.decode_segment_header(one.header, own, segment.path):
                self._say("segment-renamed", name, detail=fmt.segment_name(own))
            else:
                self._say("segment-unusable", name)
            return
        if one.standing is Standing.EMPTY:
            self._say("empty", name)
            return
        if one.standing is Standing.HEADLESS:
            pages = sum(self.survey.is_live(segment, row) for row in range(len(segment.keys)))
            self.damaged += pages
            self._say("segment-header", name, 0, detail=f"{pages:,} live pages")
            self.headers.append((segment, 0, fmt.encode_segment_header(segment.number)))
        rest = segment.size - segment.end
        if one.tail is Tail.FOOTER:
            self._say("footer", name, segment.end)
        elif one.tail is Tail.RUBBISH:
            self._say("tail", name, segment.end, detail=f"{rest:,} bytes")
        elif one.standing is Standing.UNSEALED:
            self._say("unsealed", name)
            if one.tail is Tail.UNFINISHED:
                self._say("unfinished", name, segment.end, detail=f"{rest:,} bytes")

    def _records(self, one: Found) -> None:
        segment = one.segment
        try:
            fd = self.files.open(segment.path, os.O_RDONLY)
        except OSError as error:
            raise StorageError(f"{segment.path}: cannot be opened: {error.strerror}") from error
        try:
            stream = _Stream(self.files, fd, segment.size, self._advanced)
            for row in range(len(segment.keys)):
                self._record(one, row, stream)
        finally:
            self.files.close(fd)

    def _advanced(self, count: int) -> None:
        self._done += count
        if self.watch is not None:
            self.watch(self._done, self._whole)

    def _record(self, one: Found, row: int, stream: _Stream) -> None:
        """Hold one record against its row."""
        segment = one.segment
        key, offset, length = segment.keys[row], segment.offsets[row], segment.lengths[row]
        kind, length = (fmt.TOMBSTONE, 0) if length == DEAD else (fmt.PAGE, length)
        try:
            head, digest = stream.record(key, offset, length)
        except OSError as error:
            self._bad(one, row, "page-unreadable", error.strerror or str(error))
            return
        expected = fmt.encode_record(kind, key, length, digest, segment.number, offset)
        if head == expected:
            return
        stored = fmt.decode_record(head, segment.number, offset)
        if kind == fmt.TOMBSTONE or head[64:80] == digest:
            self.headers.append((segment, offset, expected))
            served = (
                kind == fmt.TOMBSTONE or head[: fmt.RECORD_BODY_BYTES] == expected[: fmt.RECORD_BODY_BYTES]
            )
            self._say("record-check" if served else "record-header", one.name, offset, key)
            self._count(one, row, not served)
        elif stored is None:
            self._bad(one, row, "page", "its header is damaged too")
        elif (stored.kind, stored.key, stored.length) != (kind, key, length):
            self._bad(one, row, "page", "the footer names another one here")
        else:
            self._bad(one, row, "page", "")

    def _bad(self, one: Found, row: int, fault: str, detail: str) -> None:
        segment = one.segment
        if self.survey.is_live(segment, row):
            self.victims[len(self.findings)] = (segment, row)
            self._count(one, row, True)
        else:
            fault = "page-hidden"
        self._say(fault, one.name, segment.offsets[row], segment.keys[row], detail)

    def _count(self, one: Found, row: int, damaged: bool) -> None:
        if damaged and one.standing is not Standing.HEADLESS and self.survey.is_live(one.segment, row):
            self.damaged += 1


class _Stream:
    """One pass over a file through a window; what is asked for comes mostly front to back."""

    def __init__(self, files: Files, fd: int, size: int, advanced: Callable[[int], None]) -> None:
        self._files = files
        self._fd = fd
        self._size = size
        self._advanced = advanced
        self._window = memoryview(bytearray(min(WINDOW_BYTES, size)))
        self._start = self._stop = 0

    def record(self, key: bytes, offset: int, length: int) -> tuple[bytes, bytes]:
        """The header of the record at `offset`, and the digest of `key` and the page in it. Raises
        `OSError`."""
        size = fmt.RECORD_HEADER_BYTES + length
        if size > len(self._window):
            return self._long(key, offset, size)
        if not self._start <= offset <= offset + size <= self._stop:
            self._fill(offset, size)
        at = offset - self._start
        page = at + fmt.RECORD_HEADER_BYTES
        return bytes(self._window[at:page]), page_digest(key, self._window[page : at + size])

    def _long(self, key: bytes, offset: int, size: int) -> tuple[bytes, bytes]:
        """A record that does not fit into the window, piece by piece."""
        self._fill(offset, size)
        head = bytes(self._window[: fmt.RECORD_HEADER_BYTES])
        state = xxhash.xxh3_128(key)
        at, end = offset + fmt.RECORD_HEADER_BYTES, offset + size
        while at < end:
            if at == self._stop:
                self._fill(at, end - at)
            piece = self._window[at - self._start : min(end, self._stop) - self._start]
            state.update(piece)
            at += len(piece)
        return head, state.digest()

    def _fill(self, offset: int, need: int) -> None:
        """Move the window to `offset`. A window that cannot be read must not take its good pages along: then
        it holds what is needed and no more."""
        room = min(len(self._window), self._size - offset)
        before = self._stop
        for length in (room, min(room, need)):
            self._start = self._stop = offset
            try:
                whole = read_fully(self._files, self._fd, [self._window[:length]], offset)
            except OSError:
                if length <= need:
                    raise
                continue
            if not whole or not length:
                raise OSError("the file ends before its records do")
            self._stop = offset + length
            break
        self._advanced(max(0, self._stop - max(before, self._start)))


def _mend(check: _Check, files: Files) -> None:
    """Write headers anew; the lock is held."""
    try:
        for segment, offset, header in check.headers:
            fd = files.open(segment.path, os.O_RDWR)
            try:
                write_fully(files, fd, [header], offset)
                files.fdatasync(fd)
            finally:
                files.close(fd)
    except OSError as error:
        raise StorageError(f"{check.survey.path}: cannot be repaired: {error}") from error


def _quarantine(check: _Check, files: Files) -> list[Finding]:
    """Let the disk tier itself open the directory, meet the damaged pages, and close it. Returns the
    findings: a page that is right when it is read again is none."""
    path, right = check.survey.path, set()
    with_room = DiskStorage(path, BOUNDLESS, SEGMENT_BYTES_MAX, Durability.BATCH, files)
    try:
        for place, (segment, row) in check.victims.items():
            page = memoryview(bytearray(segment.lengths[row]))
            if with_room.get([segment.keys[row]], [page]) == [Got.HIT]:
                right.add(place)
    finally:
        with_room.close()
    after = survey(path, files)
    left = [
        segment.keys[row]
        for place, (segment, row) in check.victims.items()
        if place not in right and after.is_live(segment, row)
    ]
    if left:
        raise StorageError(f"{path}: {len(left)} damaged pages could not be quarantined: is the disk full?")
    return [
        replace(each, fault="page-again", detail="") if i in right else each
        for i, each in enumerate(check.findings)
    ]
