"""docs/disk-format.md and the code agree.

A directory is built here from the document's tables, with `struct` and `xxhash` alone, and opened; one
that the code wrote is taken apart the same way. Nothing is imported from `tiertree.storage.format`.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash

from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.testing.conformance import page_content, page_key, read, write
from tiertree.types import StorageError

CAPACITY = 1 << 20


@dataclass(frozen=True)
class Row:
    """One record as the document describes it."""

    kind: int
    key: bytes
    payload: bytes
    offset: int


def put_at(size: int, *fields: tuple[int, bytes]) -> bytes:
    """`size` zero bytes with `fields` at their offsets."""
    block = bytearray(size)
    for offset, data in fields:
        block[offset : offset + len(data)] = data
    return bytes(block)


def u(size: int, value: int) -> bytes:
    return value.to_bytes(size, "little")


def xxh64(data: bytes, seed: int = 0) -> bytes:
    return u(8, xxhash.xxh3_64_intdigest(data, seed=seed))


def header(number: int, version: int = 1) -> bytes:
    block = put_at(56, (0, b"TTSEGMT\n"), (8, u(4, version)), (12, u(4, 64)), (16, u(8, number)))
    return block + xxh64(block)


def record(kind: int, key: bytes, payload: bytes, number: int, offset: int) -> bytes:
    digest = xxhash.xxh3_128_digest(key + payload)
    block = put_at(
        120,
        (0, b"TTrc"),
        (4, u(2, 1)),
        (6, u(2, kind)),
        (8, u(4, len(payload))),
        (16, key),
        (64, digest),
        (80, u(8, number)),
    )
    return block + xxh64(block, seed=offset) + payload


def entry(row: Row) -> bytes:
    return put_at(
        64, (0, row.key), (48, u(8, row.offset)), (56, u(4, len(row.payload))), (60, u(2, row.kind))
    )


def trailer(number: int, count: int, data_end: int, entries: bytes) -> bytes:
    block = put_at(
        56,
        (0, b"TTFOOTR\n"),
        (8, u(4, 1)),
        (12, u(4, count)),
        (16, u(8, number)),
        (24, u(8, data_end)),
        (32, xxh64(entries)),
    )
    return block + xxh64(block)


def segment(number: int, records: list[tuple[int, bytes, bytes]], sealed: bool = True) -> bytes:
    """A whole segment file of (kind, key, payload)."""
    data = header(number)
    rows = []
    for kind, key, payload in records:
        rows.append(Row(kind, key, payload, len(data)))
        data += record(kind, key, payload, number, len(data))
    if not sealed:
        return data
    entries = b"".join(map(entry, rows))
    return data + entries + trailer(number, len(rows), len(data), entries)


def directory(path: Path, **segments: bytes) -> Path:
    """A directory with `s<number>=content` segments."""
    path.mkdir()
    (path / "FORMAT").write_bytes(b"tiertree-disk 1\n")
    for name, content in segments.items():
        (path / f"seg-{int(name[1:]):016x}.tts").write_bytes(content)
    return path


def pages(*numbers: int, length: int = 300) -> list[tuple[int, bytes, bytes]]:
    return [(1, page_key(n), bytes(page_content(n, length))) for n in numbers]


@pytest.mark.parametrize("sealed", [True, False])
def test_a_directory_built_from_the_document_opens(tmp_path: Path, sealed: bool) -> None:
    path = directory(
        tmp_path / "d", s3=segment(3, pages(1, 2, 3)), s10=segment(10, pages(4, 5), sealed=sealed)
    )
    storage = DiskStorage(path, CAPACITY)
    assert storage.stats().pages == 5
    for number in range(1, 6):
        assert read(storage, number, 300) == (Got.HIT, bytes(page_content(number, 300)))
    assert write(storage, 6, length=300) == (Wrote.STORED,)
    assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
    storage.close()


@pytest.mark.parametrize("sealed", [True, False])
def test_later_records_win_and_tombstones_hide(tmp_path: Path, sealed: bool) -> None:
    old, new = bytes(page_content(100, 300)), bytes(page_content(101, 300))
    first = [(1, page_key(1), old), (1, page_key(2), old), (1, page_key(3), old), (2, page_key(3), b"")]
    second = [(2, page_key(2), b""), (1, page_key(1), new), (1, page_key(3), new)]
    path = directory(tmp_path / "d", s1=segment(1, first, sealed), s2=segment(2, second, sealed))
    storage = DiskStorage(path, CAPACITY)
    assert read(storage, 1, 300) == (Got.HIT, new)
    assert read(storage, 2, 300)[0] is Got.MISS
    assert read(storage, 3, 300) == (Got.HIT, new)
    storage.close()


def test_what_the_code_writes_can_be_taken_apart(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY, segment_bytes=4096)
    for number in range(10):
        write(storage, number, length=700 + number)
    lock = (path / "LOCK").read_bytes()
    storage.close()
    assert (path / "FORMAT").read_bytes() == b"tiertree-disk 1\n"
    assert lock == str(os.getpid()).encode().ljust(31) + b"\n"
    found = {}
    names = sorted(p.name for p in path.iterdir() if p.name.startswith("seg-"))
    assert names == [f"seg-{n:016x}.tts" for n in range(1, len(names) + 1)]
    assert len(names) > 1
    for number, name in enumerate(names, start=1):
        for row in parse((path / name).read_bytes(), number):
            assert row.kind == 1
            found[row.key] = row.payload
    assert found == {page_key(n): bytes(page_content(n, 700 + n)) for n in range(10)}


def parse(data: bytes, number: int) -> list[Row]:
    """The rows of a sealed segment; every byte of it must be what the document says."""
    assert data[:64] == header(number)
    count = struct.unpack_from("<I", data, len(data) - 64 + 12)[0]
    data_end = struct.unpack_from("<Q", data, len(data) - 64 + 24)[0]
    rows, offset = [], 64
    while offset < data_end:
        kind, length = struct.unpack_from("<HI", data, offset + 6)
        row = Row(kind, data[offset + 16 : offset + 64], data[offset + 128 : offset + 128 + length], offset)
        assert data[offset : offset + 128 + length] == record(kind, row.key, row.payload, number, offset)
        rows.append(row)
        offset += 128 + length
    entries = b"".join(map(entry, rows))
    assert (offset, len(rows)) == (data_end, count)
    assert data[data_end:] == entries + trailer(number, count, data_end, entries)
    return rows


def test_a_tombstone_is_written_as_documented(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY)
    write(storage, 1, 2, length=200)
    file = path / "seg-0000000000000001.tts"
    damaged = bytearray(file.read_bytes())
    damaged[64 + 128] ^= 1
    file.write_bytes(damaged)
    assert read(storage, 1, 200)[0] is Got.CORRUPT
    storage.close()
    data = file.read_bytes()
    offset = 64 + 2 * (128 + 200)
    assert data[offset : offset + 128] == record(2, page_key(1), b"", 1, offset)


def snapshot(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "LOCK"}


def test_newer_versions_are_refused_untouched(tmp_path: Path) -> None:
    newer_format = directory(tmp_path / "a", s1=segment(1, pages(1)))
    (newer_format / "FORMAT").write_bytes(b"tiertree-disk 2\n")
    torn = segment(1, pages(1), sealed=False)[:-10]
    newer_segment = directory(tmp_path / "b", s1=torn, s2=header(2, version=9) + b"something new")
    (newer_segment / "left.tmp").write_bytes(b"")
    for path, version in ((newer_format, 2), (newer_segment, 9)):
        before = snapshot(path)
        with pytest.raises(StorageError, match=f"format {version}, this tiertree reads 1"):
            DiskStorage(path, CAPACITY)
        assert snapshot(path) == before


def test_foreign_directories_are_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.mkdir()
    (path / "notes.tmp").write_bytes(b"precious")
    with pytest.raises(StorageError, match="not a tiertree directory"):
        DiskStorage(path, CAPACITY)
    assert os.listdir(path) == ["notes.tmp"]
    (path / "FORMAT").write_bytes(b"a disk of some other program")
    with pytest.raises(StorageError, match="FORMAT file is not one of tiertree's"):
        DiskStorage(path, CAPACITY)
    assert sorted(os.listdir(path)) == ["FORMAT", "notes.tmp"]
    with pytest.raises(StorageError, match="cannot be opened"):
        DiskStorage(path / "notes.tmp", CAPACITY)


def test_sizes_that_lie_are_not_believed(tmp_path: Path) -> None:
    """Valid checksums over impossible sizes: a footer that does not tile, a count beyond the file."""
    data = segment(1, pages(1, 2))
    rows = parse(data, 1)
    end = rows[-1].offset + 128 + 300
    overlapping = entry(rows[0]) + entry(Row(1, rows[1].key, rows[1].payload, rows[0].offset + 8))
    huge = entry(rows[0]) + put_at(64, (0, rows[1].key), (48, u(8, rows[1].offset)), (56, u(4, 2**32 - 2)))
    for i, entries in enumerate((overlapping, huge)):
        path = directory(tmp_path / str(i), s1=data[:end] + entries + trailer(1, 2, end, entries))
        storage = DiskStorage(path, CAPACITY)
        assert read(storage, 2, 300) == (Got.HIT, bytes(page_content(2, 300))), "the scan found less"
        storage.close()
    lying = directory(tmp_path / "count", s1=data[:end] + trailer(1, 2**31, end, b""))
    storage = DiskStorage(lying, CAPACITY)
    assert storage.stats().pages == 2
    storage.close()


def test_temporaries_are_removed(tmp_path: Path) -> None:
    path = directory(tmp_path / "d", s1=segment(1, pages(1)))
    (path / "FORMAT.tmp").write_bytes(b"tier")
    (path / "seg-0000000000000009.tts.tmp").write_bytes(b"")
    storage = DiskStorage(path, CAPACITY)
    assert sorted(os.listdir(path)) == ["FORMAT", "LOCK", "seg-0000000000000001.tts"]
    storage.close()


def test_modes(tmp_path: Path) -> None:
    path = tmp_path / "new" / "d"
    storage = DiskStorage(path, CAPACITY)
    write(storage, 1)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}
    storage.close()


def test_a_record_is_one_at_its_own_place_only(tmp_path: Path) -> None:
    """Bytes of a whole record that lie elsewhere, or are of another segment, end the walk."""
    for number, shift in ((1, 8), (2, 0)):
        first = segment(1, pages(1), sealed=False)
        key, payload = page_key(2), bytes(page_content(2, 300))
        stray = record(1, key, payload, number, len(first) + shift)
        path = directory(tmp_path / f"{number}", s1=first + stray)
        storage = DiskStorage(path, CAPACITY)
        assert read(storage, 1, 300) == (Got.HIT, bytes(page_content(1, 300)))
        assert read(storage, 2, 300)[0] is Got.MISS
        assert storage.stats().pages == 1
        storage.close()
