"""Looks at a directory of the disk tier without changing a byte of it: what each file is, and what opening
it would make of it.

    good footer ────────────────────────────────▶ its rows                       SEALED
    none: walk from record to record ───────────▶ rows up to the first that      UNSEALED
                                                  is not intact, and a tail
    neither gives a row ────────────────────────▶ a cache removes the file       EMPTY, UNUSABLE
    rows, but the file's own header is damaged ─▶ a cache removes it all the     HEADLESS
                                                  same

It follows `recover`, but is written by itself, so that the two can be held against each other. Memory:
about 250 bytes per page.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from ..types import StorageError, StorageLocked
from . import format as fmt
from .files import Files, read_fully
from .segment import DEAD, Segment

_OPEN = os.O_RDONLY | os.O_NONBLOCK
"""Reading must not wait for a writer, should a name of ours be a pipe."""
_SMALL_BYTES_MAX = 64
_ROW_BITS = 32


class Standing(StrEnum):
    """What opening the directory would make of one segment file."""

    SEALED = "sealed"
    UNSEALED = "unsealed"
    """Without a good footer: being written, left by a process that was killed, or damaged (see `Tail`)."""
    EMPTY = "empty"
    """No record in it yet."""
    HEADLESS = "headless"
    """Its own header is damaged, but what is behind it proves which segment it is."""
    UNUSABLE = "unusable"


class Tail(StrEnum):
    """What follows the last record of a file that has no good footer."""

    NOTHING = "nothing"
    UNFINISHED = "unfinished"
    """The beginning of a record or of the footer, as a process leaves it that dies while it writes."""
    FOOTER = "footer"
    """A footer that is damaged."""
    RUBBISH = "rubbish"


@dataclass(slots=True)
class Found:
    """One segment file. `segment` has its rows; `end` there is where its last record ends."""

    segment: Segment
    standing: Standing
    tail: Tail = Tail.NOTHING
    header: bytes = b""

    @property
    def name(self) -> str:
        """The file's name in the directory."""
        return fmt.segment_name(self.segment.number)


@dataclass(slots=True)
class Survey:
    """A whole directory. `unread` are segments that cannot be read, by name, and why. `live` says for each
    key which row is its page: segment number << 32 | row, headless segments included."""

    path: str
    found: list[Found] = field(default_factory=list)
    temporaries: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    unread: dict[str, str] = field(default_factory=dict)
    fixed_bytes: dict[str, int] = field(default_factory=dict)
    """Sizes of FORMAT and LOCK."""
    live: dict[bytes, int] = field(default_factory=dict)

    def is_live(self, segment: Segment, row: int) -> bool:
        """Whether that row is where the page of its key is. O(1)."""
        return self.live.get(segment.keys[row]) == segment.number << _ROW_BITS | row


def survey(path: str, files: Files) -> Survey:
    """Look at every file in `path`, read no payload. O(pages). A directory that is being written may change
    meanwhile: what has gone is left out. Raises `StorageError` if it is not tiertree's or of another
    version."""
    names = _names(path, files)
    found = Survey(path)
    for name in (fmt.FORMAT_NAME, fmt.LOCK_NAME):
        if name in names:
            found.fixed_bytes[name] = len(_small(path, name, files))
    numbers = {number: name for name in names if (number := fmt.segment_number(name)) is not None}
    for number in sorted(numbers):
        try:
            found.found.append(look_at(path, number, files))
        except FileNotFoundError:
            continue
        except OSError as error:
            found.unread[numbers[number]] = error.strerror or str(error)
    others = sorted(names - set(numbers.values()) - {fmt.FORMAT_NAME, fmt.LOCK_NAME})
    found.temporaries = [name for name in others if name.endswith(fmt.TEMPORARY_SUFFIX)]
    found.foreign = [name for name in others if not name.endswith(fmt.TEMPORARY_SUFFIX)]
    for each in found.found:
        _apply(each.segment, found.live)
    return found


@contextmanager
def claimed(path: str, files: Files) -> Iterator[None]:
    """Nobody has the directory open, and nobody may open it, for as long as this lasts; nothing is written.
    (One without LOCK has never been open: it is not kept from being opened.) Raises `StorageLocked`,
    `StorageError`."""
    if fmt.LOCK_NAME not in _names(path, files):
        yield
        return
    try:
        fd = files.open(os.path.join(path, fmt.LOCK_NAME), _OPEN)
    except OSError as error:
        raise StorageError(f"{path}: cannot be locked: {error.strerror}") from error
    try:
        if not files.lock(fd):
            pid = holder(path, files)
            raise StorageLocked(
                f"{path}: already open in the process with pid {pid}; one at a time may use it"
            )
        yield
    finally:
        files.close(fd)


def holder(path: str, files: Files) -> str:
    """The pid that LOCK names, of whoever opened the directory last; "unknown" if it names none."""
    pid, _ = fmt.decode_lock(_small(path, fmt.LOCK_NAME, files))
    return pid


def look_at(path: str, number: int, files: Files) -> Found:
    """One segment file. O(its records). Raises `OSError`, and `StorageError` if it is of another version."""
    segment = Segment(path, number)
    fd = files.open(segment.path, _OPEN)
    try:
        files.preadv(fd, [bytearray(1)], 0)  # fails for what has our name and is no file: a pipe, a folder
        segment.size = files.size(fd)
        header = read(files, fd, 0, fmt.SEGMENT_HEADER_BYTES)
        sound = fmt.decode_segment_header(header, number, segment.path)
        if _load_footer(files, fd, segment):
            standing, tail = Standing.SEALED, Tail.NOTHING
        else:
            _walk(files, fd, segment)
            standing, tail = Standing.UNSEALED, _tail(files, fd, segment)
    finally:
        files.close(fd)
    if not sound:
        begun = fmt.encode_segment_header(number)[: len(header)] == header
        standing = Standing.EMPTY if begun else Standing.HEADLESS if segment.keys else Standing.UNUSABLE
    elif not segment.keys:
        standing = Standing.UNUSABLE if tail in (Tail.RUBBISH, Tail.FOOTER) else Standing.EMPTY
    return Found(segment, standing, tail, header)


def read(files: Files, fd: int, offset: int, length: int) -> bytes:
    """What the file has of these bytes; fewer, or none, where it ends before. Raises `OSError`."""
    length = max(0, min(length, files.size(fd) - offset))
    data = bytearray(length)
    return bytes(data) if not length or read_fully(files, fd, [data], offset) else b""


def _names(path: str, files: Files) -> set[str]:
    """The names in a directory that is tiertree's."""
    try:
        names = set(files.listdir(path))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror}") from error
    if fmt.FORMAT_NAME not in names:
        raise StorageError(f"{path}: has no {fmt.FORMAT_NAME} file, so it is not a directory of tiertree's")
    fmt.check_directory(_small(path, fmt.FORMAT_NAME, files), path)
    return names


def _small(path: str, name: str, files: Files) -> bytes:
    """A small file, or as much of it as shows that it is not one."""
    try:
        fd = files.open(os.path.join(path, name), _OPEN)
        try:
            return read(files, fd, 0, _SMALL_BYTES_MAX)
        finally:
            files.close(fd)
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise StorageError(f"{path}: its {name} file cannot be read: {error.strerror}") from error


def _load_footer(files: Files, fd: int, segment: Segment) -> bool:
    size = segment.size
    data = read(files, fd, size - fmt.TRAILER_BYTES, fmt.TRAILER_BYTES) if size > fmt.TRAILER_BYTES else b""
    trailer = fmt.decode_trailer(data, segment.number, size)
    if trailer is None:
        return False
    data = read(files, fd, trailer.data_end, trailer.count * fmt.ENTRY_BYTES)
    entries = fmt.decode_entries(data, trailer) if len(data) == trailer.count * fmt.ENTRY_BYTES else None
    if entries is None:
        return False
    segment.load(entries)
    segment.end = trailer.data_end
    return True


def _walk(files: Files, fd: int, segment: Segment) -> None:
    offset = fmt.SEGMENT_HEADER_BYTES
    while offset + fmt.RECORD_HEADER_BYTES <= segment.size:
        record = fmt.decode_record(read(files, fd, offset, fmt.RECORD_HEADER_BYTES), segment.number, offset)
        if record is None or offset + fmt.RECORD_HEADER_BYTES + record.length > segment.size:
            break
        segment.add([record.kind], [record.key], [offset], [record.length])
        offset += fmt.RECORD_HEADER_BYTES + record.length
    segment.end = offset


def _tail(files: Files, fd: int, segment: Segment) -> Tail:
    end, rest = segment.end, segment.size - segment.end
    if rest <= 0:
        return Tail.NOTHING
    entries, trailer = fmt.encode_footer(segment.entries(), segment.number, end)
    footer = entries + trailer
    if rest <= len(footer):
        data = read(files, fd, end, rest)
        if footer.startswith(data):
            return Tail.UNFINISHED
        if rest == len(footer) and (data.startswith(entries) or data.endswith(trailer)):
            return Tail.FOOTER
    head = read(files, fd, end, fmt.RECORD_HEADER_BYTES)
    if len(head) < fmt.RECORD_HEADER_BYTES:
        begun = fmt.RECORD_MAGIC.startswith(head[: len(fmt.RECORD_MAGIC)])
    else:
        begun = fmt.decode_record(head, segment.number, end) is not None
    return Tail.UNFINISHED if begun else Tail.RUBBISH


def _apply(segment: Segment, live: dict[bytes, int]) -> None:
    """Let the rows of the next segment take over their keys."""
    first = segment.number << _ROW_BITS
    for row, (key, length) in enumerate(zip(segment.keys, segment.lengths, strict=True)):
        if length == DEAD:
            live.pop(key, None)
        else:
            live[key] = first | row
