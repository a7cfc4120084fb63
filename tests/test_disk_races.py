"""Reads of the disk tier while what they read moves, goes, or cannot be read: right bytes or a plain miss."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from disk_support import CAPACITY, assert_served

from tiertree.storage import segment as segment_module
from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.testing.conformance import held, page_content, page_key, read, write


def test_a_segment_reclaimed_during_a_read_is_read_to_its_end(tmp_path: Path) -> None:
    class Meanwhile(Files):
        action = staticmethod(lambda: None)

        def preadv(self, fd, buffers, offset):  # type: ignore[no-untyped-def]
            action, self.action = self.action, lambda: None
            action()
            return super().preadv(fd, buffers, offset)

    files = Meanwhile()
    storage = DiskStorage(tmp_path / "d", 64 << 10, segment_bytes=16 << 10, files=files)
    write(storage, 0)
    files.action = lambda: [write(storage, n) for n in range(1, 40)]
    assert read(storage, 0) == (Got.HIT, bytes(page_content(0)))
    assert held(storage, 0) == [False]
    assert read(storage, 0)[0] is Got.MISS
    storage.close()


@pytest.mark.parametrize("hit", [True, False])
def test_a_segment_reclaimed_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hit: bool
) -> None:
    """The page is looked for again: found where it was written anew, or a miss; not called corrupt."""
    monkeypatch.setattr(segment_module, "HANDLES_MAX", 0)

    class Meanwhile(Files):
        action = staticmethod(lambda: None)

        def open(self, path: str, flags: int) -> int:
            action, self.action = self.action, lambda: None
            action()
            return super().open(path, flags)

    files = Meanwhile()
    storage = DiskStorage(tmp_path / "d", 64 << 10, segment_bytes=16 << 10, files=files)
    write(storage, 0, 1, 2, 3)
    if hit:
        assert_served(storage, [0])
    first = storage.locate(page_key(0))
    assert first is not None

    def until_it_is_gone() -> None:
        number = 10
        while os.path.exists(first[0]):
            write(storage, number)
            number += 1

    files.action = until_it_is_gone
    assert read(storage, 0)[0] is (Got.HIT if hit else Got.MISS)
    assert storage.stats().checksum_failures == 0
    assert storage.stats().reinserted == hit
    storage.close()


@pytest.mark.parametrize(("fails", "hit"), [(True, False), (False, True), (False, False)])
def test_a_read_at_the_instant_of_unlinking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool, hit: bool
) -> None:
    """A page of a file that is just going is a miss, or a hit while the file is held for its survivors."""
    monkeypatch.setattr(segment_module, "HANDLES_MAX", 0)
    seen: list[tuple[Got, Got]] = []

    class Watched(Files):
        def unlink(self, path: str) -> None:
            if not fails:
                super().unlink(path)
            seen.append((read(storage, 0)[0], read(storage, 1)[0]))
            if fails:
                raise PermissionError(13, "will not go")

    storage = DiskStorage(tmp_path / "d", 64 << 10, segment_bytes=16 << 10, files=Watched())
    write(storage, 0, 1, 2)
    if hit:
        assert_served(storage, [0])
    outcomes = [write(storage, n)[0] for n in range(10, 30)]
    assert (Wrote.REFUSED in outcomes) == fails
    assert storage.stats().checksum_failures == 0
    if fails:
        assert_served(storage, [0, 1, 2])
    expected = Got.HIT if fails or hit else Got.MISS
    assert seen[0] == (expected, expected)
    storage.close()


def test_an_unreadable_record_takes_no_neighbour_along(tmp_path: Path) -> None:
    class BadSector(Files):
        bad = 64 + 128 + 4096 + 500

        def preadv(self, fd, buffers, offset):  # type: ignore[no-untyped-def]
            if offset <= self.bad < offset + sum(map(len, buffers)):
                raise OSError(5, "input/output error")
            return super().preadv(fd, buffers, offset)

    storage = DiskStorage(tmp_path / "d", CAPACITY, files=BadSector())
    write(storage, 0, 1, 2)
    into = [memoryview(bytearray(4096)) for _ in range(3)]
    results = storage.get([page_key(n) for n in range(3)], into)
    assert results == [Got.HIT, Got.CORRUPT, Got.HIT]
    assert bytes(into[2]) == bytes(page_content(2))
    storage.close()
