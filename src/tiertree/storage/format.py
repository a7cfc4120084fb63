"""The bytes on disk: encodes and decodes every structure of docs/disk-format.md, and nothing else.

    segment file   ┌────────┬────────┬─────────┬────────┬─────────┬─ ─ ┬─────────┬─────────┐
    (sealed)       │ header │ record │ payload │ record │ payload │    │ entries │ trailer │
                   │   64   │ header │         │ header │         │    │  64 · n │   64    │
                   └────────┴──128───┴─────────┴────────┴─────────┴─ ─ ┴─────────┴─────────┘
                   0        64                                    data_end        size − 64

A file that was being written when its process died has no footer (entries and trailer); its records
are found by walking from header to header. Decoders answer None for bytes that are not valid, so a
damaged file is never an exception; only a *newer* version is, because it must not be touched.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..types import StorageError
from .base import KEY_BYTES

VERSION = 1

FORMAT_NAME = "FORMAT"
LOCK_NAME = "LOCK"
TEMPORARY_SUFFIX = ".tmp"
FORMAT_TEXT = b"tiertree-disk %d\n"
LOCK_BYTES = 32
EPOCH_NUMBERS = 1 << 32
"""Segment numbers of one epoch; a clear begins the next, so no number of before is ever used again."""

EPOCH_MAX = (1 << 32) - 1
SEGMENT_NUMBER_MAX = (1 << 64) - 1

SEGMENT_MAGIC = b"TTSEGMT\n"
RECORD_MAGIC = b"TTrc"
TRAILER_MAGIC = b"TTFOOTR\n"

PAGE = 1
TOMBSTONE = 2

_CHECK = struct.Struct("<Q")
_SEGMENT = struct.Struct("<8sIIQ32x")
_RECORD = struct.Struct("<4sHHII48s16sQ32x")
_TRAILER = struct.Struct("<8sIIQQQ16x")

RECORD_BODY_BYTES = _RECORD.size
_RECORD_USED_BYTES = RECORD_BODY_BYTES - 32
SEGMENT_HEADER_BYTES = _SEGMENT.size + _CHECK.size
RECORD_HEADER_BYTES = _RECORD.size + _CHECK.size
TRAILER_BYTES = _TRAILER.size + _CHECK.size
SEGMENT_OVERHEAD_BYTES = SEGMENT_HEADER_BYTES + TRAILER_BYTES
"""What a segment costs before it holds anything, its footer included."""

ENTRY = np.dtype(
    [("key", f"V{KEY_BYTES}"), ("offset", "<u8"), ("length", "<u4"), ("kind", "<u2"), ("reserved", "<u2")]
)
ENTRY_BYTES = ENTRY.itemsize

PAGE_BYTES_MAX = 2**32 - 2
"""Longest payload: its length is a 32-bit field, and the largest value stays free."""

_LOCK = re.compile(rb"(\d{1,15}) *(?:([0-9a-f]{8})([0-9a-f]{8}))?\n")
_SEGMENT_NAME = re.compile(r"seg-([0-9a-f]{16})\.tts")


@dataclass(frozen=True, slots=True)
class Record:
    """A record header. A tombstone has no payload."""

    kind: int
    key: bytes
    length: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Trailer:
    """The last 64 bytes of a sealed segment."""

    count: int
    data_end: int
    entries_check: int


def segment_name(number: int) -> str:
    """File name of segment `number`, 0 ≤ number < 2**64."""
    return f"seg-{number:016x}.tts"


def segment_number(name: str) -> int | None:
    """The number in a segment's file name, or None for any other name."""
    found = _SEGMENT_NAME.fullmatch(name)
    return int(found[1], 16) if found else None


def encode_directory() -> bytes:
    """Content of FORMAT."""
    return FORMAT_TEXT % VERSION


def check_directory(content: bytes, path: str) -> None:
    """Raise `StorageError` unless `content` of FORMAT is this version's."""
    if content == encode_directory():
        return
    found = re.fullmatch(rb"tiertree-disk (\d{1,9})\n", content)
    if found is None:
        raise StorageError(f"{path}: its {FORMAT_NAME} file is not one of tiertree's; nothing was changed")
    raise StorageError(
        f"{path}: written in disk format {int(found[1])}, this tiertree reads {VERSION}; nothing was changed"
    )


def encode_lock(pid: int, epoch: int) -> bytes:
    """Content of LOCK: who holds it, and how often the directory has been cleared."""
    count = b"%08x" % epoch
    return b"%-15d%s\n" % (pid, count + _lock_check(count) if epoch else b" " * 16)


def decode_lock(content: bytes) -> tuple[str, int]:
    """Pid ("unknown" if there is none) and epoch (0 if there is none) in the content of LOCK."""
    found = _LOCK.fullmatch(content) if len(content) == LOCK_BYTES else None
    if found is None:
        return "unknown", 0
    pid, count, check = found.groups()
    sound = count is not None and check == _lock_check(count)
    return pid.decode("ascii"), int(count, 16) if sound else 0


def encode_segment_header(number: int) -> bytes:
    """The first 64 bytes of segment `number`."""
    return _sealed(_SEGMENT.pack(SEGMENT_MAGIC, VERSION, SEGMENT_HEADER_BYTES, number))


def decode_segment_header(data: bytes, number: int, path: str) -> bool:
    """Is `data` the header of segment `number`? `StorageError` if it is intact, but of another version."""
    body = _opened(data, SEGMENT_HEADER_BYTES)
    if body is None:
        return False
    magic, version, header_bytes, own = _SEGMENT.unpack(body)
    if magic != SEGMENT_MAGIC:
        return False
    if version != VERSION:
        raise StorageError(
            f"{path}: a segment of disk format {version}, this tiertree reads {VERSION}; nothing was changed"
        )
    return bool(header_bytes == SEGMENT_HEADER_BYTES and own == number)


def record_body(kind: int, key: bytes, length: int, digest: bytes, number: int) -> bytes:
    """A record's header up to its own checksum, the same wherever in segment `number` the record lies."""
    return _RECORD.pack(RECORD_MAGIC, VERSION, kind, length, 0, key, digest, number)


def encode_record(kind: int, key: bytes, length: int, digest: bytes, number: int, offset: int) -> bytes:
    """Header of a record that lies at `offset` of segment `number`, and is valid nowhere else."""
    body = _RECORD.pack(RECORD_MAGIC, VERSION, kind, length, 0, key, digest, number)
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body, seed=offset))


def decode_record(data: bytes, number: int, offset: int) -> Record | None:
    """The record header at `offset` of segment `number`, or None if it is not intact."""
    if len(data) != RECORD_HEADER_BYTES:
        return None
    body = data[: _RECORD.size]
    if _CHECK.pack(xxhash.xxh3_64_intdigest(body, seed=offset)) != data[_RECORD.size :]:
        return None
    magic, version, kind, length, reserved, key, digest, own = _RECORD.unpack(body)
    if magic != RECORD_MAGIC or version != VERSION or own != number:
        return None
    if reserved or any(body[_RECORD_USED_BYTES:]) or length > PAGE_BYTES_MAX:
        return None
    if kind != PAGE and (kind != TOMBSTONE or length):
        return None
    return Record(kind, key, length, digest)


def encode_footer(entries: NDArray[np.void], number: int, data_end: int) -> tuple[bytes, bytes]:
    """Entries (dtype `ENTRY`, in file order) and trailer of a segment whose records end at `data_end`."""
    body = entries.tobytes()
    check = xxhash.xxh3_64_intdigest(body)
    return body, _sealed(_TRAILER.pack(TRAILER_MAGIC, VERSION, len(entries), number, data_end, check))


def decode_trailer(data: bytes, number: int, size: int) -> Trailer | None:
    """The trailer of a file of `size` bytes, or None unless it is intact and its sizes add up to `size`."""
    body = _opened(data, TRAILER_BYTES)
    if body is None:
        return None
    magic, version, count, own, data_end, check = _TRAILER.unpack(body)
    if magic != TRAILER_MAGIC or version != VERSION or own != number:
        return None
    if (
        data_end < SEGMENT_HEADER_BYTES + count * RECORD_HEADER_BYTES
        or data_end + count * ENTRY_BYTES + TRAILER_BYTES != size
    ):
        return None
    return Trailer(count, data_end, check)


def decode_entries(data: bytes, trailer: Trailer) -> NDArray[np.void] | None:
    """A footer's entries, or None unless they are intact and tile the file's records without a gap."""
    if xxhash.xxh3_64_intdigest(data) != trailer.entries_check:
        return None
    entries = np.frombuffer(data, dtype=ENTRY)
    ends = np.cumsum(entries["length"].astype(np.uint64) + np.uint64(RECORD_HEADER_BYTES))
    ends += np.uint64(SEGMENT_HEADER_BYTES)
    last = int(ends[-1]) if len(ends) else SEGMENT_HEADER_BYTES
    if last != trailer.data_end or not np.array_equal(entries["offset"][1:], ends[:-1]):
        return None
    if len(entries) and int(entries["offset"][0]) != SEGMENT_HEADER_BYTES:
        return None
    tombstones = entries["kind"] == TOMBSTONE
    if not np.all(tombstones | (entries["kind"] == PAGE)) or np.any(entries["length"][tombstones]):
        return None
    return entries


def _lock_check(count: bytes) -> bytes:
    return b"%08x" % (xxhash.xxh3_64_intdigest(count) & 0xFFFFFFFF)


def _sealed(body: bytes) -> bytes:
    return body + _CHECK.pack(xxhash.xxh3_64_intdigest(body))


def _opened(data: bytes, size: int) -> bytes | None:
    if len(data) != size:
        return None
    body = data[: -_CHECK.size]
    return body if _CHECK.pack(xxhash.xxh3_64_intdigest(body)) == data[-_CHECK.size :] else None
