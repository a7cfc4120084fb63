"""Rules of the disk tier that hold anyhow in most runs: each is seen here where breaking it shows."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tiertree.storage import format as fmt
from tiertree.storage import segment as segments
from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.lock import FIXED_BYTES
from tiertree.storage.page import flat
from tiertree.storage.segment import State
from tiertree.testing.conformance import held, page_content, page_key, read, write
from tiertree.testing.fakedisk import FakeDisk, FakeFiles, Op
from tiertree.types import ConfigError, StorageError, StorageLocked

PATH = "/d"


def open_storage(disk: FakeDisk, capacity: int = 1 << 16, segment: int | None = 4096) -> DiskStorage:
    return DiskStorage(PATH, capacity, segment, files=FakeFiles(disk))


def rot(disk: FakeDisk, storage: DiskStorage, number: int) -> None:
    """One bit of a page flips."""
    place = storage.locate(page_key(number))
    assert place is not None
    content = bytearray(disk.content(place[0]))
    content[place[1]] ^= 1
    disk.replace(place[0], bytes(content))


# -- what fits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [4096, 8192, 10_000])
def test_the_longest_page_fills_the_capacity_to_the_byte_and_one_more_byte_is_refused(capacity: int) -> None:
    record = fmt.RECORD_HEADER_BYTES + fmt.ENTRY_BYTES
    longest = capacity - FIXED_BYTES - fmt.SEGMENT_OVERHEAD_BYTES - record
    disk = FakeDisk()
    storage = open_storage(disk, capacity, 4096)
    assert write(storage, 1, length=9) == (Wrote.STORED,)
    for length in (longest + 1, longest + record, longest + fmt.SEGMENT_OVERHEAD_BYTES):
        assert write(storage, 2, length=length) == (Wrote.REFUSED,)
        assert held(storage, 1, 2) == [True, False], "a page that fits nowhere has evicted something"
    assert write(storage, 2, length=longest) == (Wrote.STORED,)
    assert held(storage, 1, 2) == [False, True]
    storage.close()
    assert sum(disk.listing(PATH).values()) == capacity
    storage = open_storage(disk, capacity, 4096)
    assert read(storage, 2, longest) == (Got.HIT, bytes(page_content(2, longest)))
    storage.close()


def test_a_capacity_of_a_block_is_the_least() -> None:
    with pytest.raises(ConfigError, match="at least 4096"):
        open_storage(FakeDisk(), 4095, None)
    storage = open_storage(FakeDisk(), 4096, None)
    assert write(storage, 1, length=300) == (Wrote.STORED,)
    storage.close()
    for segment in (4095, 8193):
        with pytest.raises(ConfigError, match="must be 4096 to 8192"):
            open_storage(FakeDisk(), 8192, segment)


def test_counters_start_at_nothing_and_count_what_happened() -> None:
    disk = FakeDisk()
    storage = open_storage(disk, 8192)
    first = storage.stats()
    assert (first.pages, first.puts, first.hits, first.misses) == (0, 0, 0, 0)
    assert (first.evicted, first.checksum_failures, first.refused, first.reinserted) == (0, 0, 0, 0)
    write(storage, *range(6), length=700)
    assert storage.stats().evicted == 0
    write(storage, *range(6, 12), length=700)
    after = storage.stats()
    assert (after.puts, after.evicted) == (12, 12 - after.pages)
    storage.close()
    storage = open_storage(disk, 8192)
    again = storage.stats()
    assert (again.pages, again.evicted, again.puts, again.checksum_failures) == (after.pages, 0, 0, 0)
    storage.close()


def test_keys_are_those_of_the_pages_that_are_there() -> None:
    disk = FakeDisk()
    storage = open_storage(disk)
    assert storage.keys() == []
    write(storage, 1, 2, 3, length=300)
    rot(disk, storage, 2)
    assert read(storage, 2, 300)[0] is Got.CORRUPT
    assert sorted(storage.keys()) == sorted([page_key(1), page_key(3)])
    storage.close()
    storage = open_storage(disk)
    assert sorted(storage.keys()) == sorted([page_key(1), page_key(3)])
    storage.close()


# -- headers ---------------------------------------------------------------------------------------


def header(magic: bytes, version: int, size: int, number: int) -> bytes:
    """A segment header whose checksum is right."""
    body = struct.pack("<8sIIQ32x", magic, version, size, number)
    return body + struct.pack("<Q", xxhash.xxh3_64_intdigest(body))


def test_a_header_that_is_intact_is_still_of_something_else() -> None:
    assert fmt.decode_segment_header(header(fmt.SEGMENT_MAGIC, 1, 64, 7), 7, PATH)
    assert not fmt.decode_segment_header(header(b"TTSEGMT\0", 1, 64, 7), 7, PATH)
    assert not fmt.decode_segment_header(header(b"TTSEGMT\0", 2, 64, 7), 7, PATH)
    assert not fmt.decode_segment_header(header(fmt.SEGMENT_MAGIC, 1, 65, 7), 7, PATH)
    assert not fmt.decode_segment_header(header(fmt.SEGMENT_MAGIC, 1, 64, 8), 7, PATH)
    with pytest.raises(StorageError, match="disk format 2"):
        fmt.decode_segment_header(header(fmt.SEGMENT_MAGIC, 2, 64, 7), 7, PATH)


# -- descriptors -----------------------------------------------------------------------------------


class CountedFiles(FakeFiles):
    """Knows how many descriptors are open."""

    def __init__(self, disk: FakeDisk) -> None:
        super().__init__(disk)
        self.opened: set[int] = set()

    def open(self, path: str, flags: int) -> int:
        fd = super().open(path, flags)
        self.opened.add(fd)
        return fd

    def close(self, fd: int) -> None:
        super().close(fd)
        self.opened.discard(fd)


def test_descriptors_stay_bounded_and_all_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "HANDLES_MAX", 3)
    files = CountedFiles(FakeDisk())
    storage = DiskStorage(PATH, 1 << 16, 4096, files=files)
    for number in range(200):
        assert write(storage, number) == (Wrote.STORED,)
        read(storage, number // 2)
        assert len(files.opened) <= 3 + 2, "the lock, and the segment being written, come on top"
    assert storage.stats().evicted > 50
    for number in range(200):
        read(storage, number)
    assert len(files.opened) == 3 + 1, "descriptors that fit are kept"
    storage.close()
    assert not files.opened


def test_an_open_that_is_refused_leaves_no_descriptor_behind() -> None:
    disk = FakeDisk()
    storage = open_storage(disk)
    files = CountedFiles(disk)
    with pytest.raises(StorageLocked):
        DiskStorage(PATH, 1 << 16, files=files)
    assert not files.opened
    storage.close()
    disk.replace(f"{PATH}/{fmt.FORMAT_NAME}", b"something else")
    with pytest.raises(StorageError, match="not one of tiertree's"):
        DiskStorage(PATH, 1 << 16, files=files)
    assert not files.opened


def test_a_page_that_no_descriptor_is_left_for_is_a_miss_and_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "HANDLES_MAX", 0)
    disk = FakeDisk()
    storage = open_storage(disk)
    write(storage, *range(8), length=1500)
    disk.fail(Op.OPEN, times=100)
    into = [memoryview(bytearray(1500)) for _ in range(2)]
    assert storage.get([page_key(0), page_key(1)], into) == [Got.MISS, Got.MISS]
    disk.heal()
    assert storage.stats().checksum_failures == 0
    assert storage.get([page_key(0), page_key(1)], into) == [Got.HIT, Got.HIT]
    storage.close()


def test_more_neighbours_than_the_system_takes_at_once_are_read_in_one_get(tmp_path: Path) -> None:
    count = 2 * os.sysconf("SC_IOV_MAX") + 1
    storage = DiskStorage(tmp_path / "d", 1 << 20, segment_bytes=1 << 20)
    keys = [page_key(number) for number in range(count)]
    assert set(storage.put(keys, [bytes([number % 251]) for number in range(count)]).outcomes) == {
        Wrote.STORED
    }
    into = [memoryview(bytearray(1)) for _ in keys]
    assert storage.get(keys, into) == [Got.HIT] * count
    assert [view[0] for view in into] == [number % 251 for number in range(count)]
    storage.close()


# -- quarantine ------------------------------------------------------------------------------------


def test_a_quarantine_that_waited_for_the_writer_is_written_at_close() -> None:
    disk = FakeDisk()
    storage = open_storage(disk)
    write(storage, 1, 2, length=300)
    rot(disk, storage, 1)
    with storage._writing:
        assert read(storage, 1, 300)[0] is Got.CORRUPT
    storage.close()
    storage = open_storage(disk)
    assert held(storage, 1, 2) == [False, True]
    storage.close()


def test_a_page_that_rots_before_another_round_is_counted_and_goes() -> None:
    disk = FakeDisk()
    storage = open_storage(disk, 8192)
    write(storage, 0, 1, length=700)
    assert read(storage, 0, 700)[0] is Got.HIT
    rot(disk, storage, 0)
    for number in range(2, 12):
        write(storage, number, length=700)
    assert held(storage, 0) == [False]
    assert storage.stats().checksum_failures == 1
    assert storage.stats().reinserted == 0
    storage.close()


# -- buffers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "buffer",
    [
        b"abcd",
        bytearray(b"abcd"),
        memoryview(b"abcd"),
        memoryview(b"abcd").cast("b"),
        memoryview(b"abcd").cast("I"),
        memoryview(b"abcd").cast("B", (2, 2)),
        memoryview(b"abcd").cast("c"),
    ],
    ids=lambda each: getattr(each, "format", type(each).__name__),
)
def test_any_buffer_is_seen_as_its_bytes(buffer: Any) -> None:
    view = flat(buffer)
    assert (view.format, view.ndim, len(view), bytes(view)) == ("B", 1, 4, b"abcd")


# -- segments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [700, 784, 785, 1000])
def test_a_segment_is_no_longer_than_it_may_be_however_often_it_is_reopened(length: int) -> None:
    """Records up to the limit, and the footer behind it: whether one session wrote them, or one each."""
    shapes = []
    for sessions in (1, 9):
        disk = FakeDisk()
        for session in range(sessions):
            storage = open_storage(disk)
            for number in range(9):
                if sessions == 1 or number == session:
                    assert write(storage, number, length=length) == (Wrote.STORED,)
            storage.close()
        sizes = [size for name, size in sorted(disk.listing(PATH).items()) if fmt.segment_number(name)]
        shapes.append(sizes)
        records = [(size - fmt.SEGMENT_OVERHEAD_BYTES) // (128 + length + 64) for size in sizes]
        assert all(64 + count * (128 + length) <= 4096 for count in records)
        assert sum(records) == 9
    assert shapes[0] == shapes[1]


def test_only_the_last_segment_is_being_written() -> None:
    storage = open_storage(FakeDisk())
    write(storage, *range(9), length=700)
    states = [segment.state for segment in storage._index.segments.values()]
    assert states == [State.SEALED] * (len(states) - 1) + [State.ACTIVE]
    assert len(states) > 1
    storage.close()
    assert {segment.state for segment in storage._index.segments.values()} == {State.SEALED}


@pytest.mark.parametrize("most", [1, 7, 63, 129, 1000])
def test_short_reads_and_writes_are_gone_on_with(most: int) -> None:
    disk = FakeDisk()
    disk.io_bytes_max = most
    storage = open_storage(disk)
    assert set(write(storage, *range(6), length=300)) == {Wrote.STORED}
    storage.close()
    disk.io_bytes_max = None
    for limit in (None, most):
        disk.io_bytes_max = limit
        storage = open_storage(disk)
        for number in range(6):
            assert read(storage, number, 300) == (Got.HIT, bytes(page_content(number, 300)))
        storage.close()
