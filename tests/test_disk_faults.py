"""Torn files, full disks, failing syncs: exact bytes or a miss, nothing lost.

Rot is in test_disk_rot.py, crashes are in test_disk_crash.py, real kills in test_disk_kill.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from disk_support import CAPACITY, CountedFiles, FullFiles, UnsyncedFiles, abandon, assert_served

from tiertree.storage import format as fmt
from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.storage.page import page_digest
from tiertree.testing.conformance import held, page_content, page_key, read, write
from tiertree.types import StorageError


def test_a_segment_cut_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY)
    write(storage, *range(3), length=70)
    abandon(storage)
    name = "seg-0000000000000001.tts"
    unsealed = (path / name).read_bytes()
    DiskStorage(path, CAPACITY).close()
    sealed = (path / name).read_bytes()
    assert sealed[: len(unsealed)] == unsealed
    for size in range(len(sealed) + 1):
        (path / name).write_bytes(sealed[:size])
        storage = DiskStorage(path, CAPACITY)
        file = path / name
        whole = min(3, max(0, size - 64) // (128 + 70))
        assert held(storage, *range(3)) == [number < whole for number in range(3)]
        assert storage.stats().pages == whole
        assert file.stat().st_size == 64 + whole * (128 + 70 + 64) + 64 if whole else not file.exists()
        for number in range(whole):
            assert read(storage, number, 70) == (Got.HIT, bytes(page_content(number, 70)))
        assert write(storage, 9, length=70) == (Wrote.STORED,)
        used = storage.stats().bytes
        storage.close()
        assert used < sum(f.stat().st_size for f in path.iterdir())
        for segment in path.glob("seg-*"):
            segment.unlink()


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("durability", ["none", "batch"])
def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, truncates: bool, durability: str) -> None:
    for extra in (0, 1, 63, 64, 100, 4095, 4096 + 128, 5000, 9000):
        path = tmp_path / str(extra)
        files = FullFiles(1 << 20)
        storage = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, durability=durability, files=files)
        write(storage, 0, 1)
        files.room, files.truncates = extra, truncates
        outcomes = write(storage, 2, 3, 4)
        assert outcomes[-1] is Wrote.REFUSED
        kept = [0, 1, *(n for n, o in zip((2, 3, 4), outcomes, strict=True) if o is Wrote.STORED)]
        assert_served(storage, kept)
        assert storage.stats().pages == len(kept)
        assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
        files.room = 1 << 20
        assert write(storage, 5) == (Wrote.STORED,)
        storage.close()
        storage = DiskStorage(path, CAPACITY)
        assert_served(storage, [*kept, 5])
        storage.close()


def test_a_file_whose_sync_failed_is_never_trusted_again(tmp_path: Path) -> None:
    files = UnsyncedFiles()
    storage = DiskStorage(tmp_path / "d", CAPACITY, durability="batch", files=files)
    write(storage, 0, 1)
    files.broken = True
    for number in (2, 3, 4):
        assert write(storage, number) == (Wrote.REFUSED,)
    files.broken = False
    assert len(list((tmp_path / "d").glob("seg-*"))) == 1, "files that hold nothing pile up"
    assert write(storage, 5) == (Wrote.STORED,)
    assert_served(storage, [0, 1, 5])
    storage.close()
    assert len(files.failed) == 3
    storage = DiskStorage(tmp_path / "d", CAPACITY, durability="batch")
    assert_served(storage, [0, 1, 5])
    assert storage.stats().pages == 3, "a refused page came back"
    storage.close()


def test_batch_syncs_before_it_acknowledges(tmp_path: Path) -> None:
    """Every byte that a put wrote is followed by a sync of that file before the put returns."""
    dirty: set[int] = set()
    synced: set[int] = set()
    synced_directories: list[str] = []

    class Tracked(Files):
        def pwritev(self, fd, buffers, offset):  # type: ignore[no-untyped-def]
            dirty.add(os.fstat(fd).st_ino)
            return super().pwritev(fd, buffers, offset)

        def fdatasync(self, fd: int) -> None:
            super().fdatasync(fd)
            dirty.discard(os.fstat(fd).st_ino)
            synced.add(os.fstat(fd).st_ino)

        def fsync_directory(self, path: str) -> None:
            super().fsync_directory(path)
            synced_directories.append(path)

    path = tmp_path / "d"
    unsynced = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, files=Tracked())
    write(unsynced, *range(100, 110))
    unsynced.close()
    assert len(dirty) >= 3, "durability none has synced"
    dirty.clear()
    synced.clear()
    synced_directories.clear()
    storage = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, durability="batch", files=Tracked())
    assert synced_directories == [str(path)], "what was there before is not durable yet"
    assert synced == {file.stat().st_ino for file in path.glob("seg-*")}
    storage.clear()
    opened = len(synced_directories)
    sealed = 0
    for number in range(0, 60, 6):
        dirty.clear()
        write(storage, *range(number, number + 6))
        names = sorted(path.glob("seg-*"))
        # A segment sealed on the way has got its footer after its sync: that may be lost, its records not.
        assert dirty <= {name.stat().st_ino for name in names[sealed:-1]}
        sealed = len(names) - 1
        assert len(synced_directories) - opened == len(names)
    storage.close()


def test_a_child_after_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DiskStorage(tmp_path / "d", CAPACITY)
    monkeypatch.setattr(os, "getpid", lambda: storage._pid + 1)
    with pytest.raises(StorageError, match="before a fork"):
        write(storage, 1)
    monkeypatch.undo()
    storage.close()


@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_child_after_fork_holds_neither_the_lock_nor_the_files(tmp_path: Path, end: str) -> None:
    """Another process opens a directory and forks; it ends, and its child does not."""
    path = tmp_path / "d"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", FORKING, str(path), end]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "forked\n"
        storage = DiskStorage(path, CAPACITY)
        assert_served(storage, [0, 1])
        storage.close()
        child.stdin.close()


FORKING = """
import os, signal, sys, time
from tiertree.storage.disk import DiskStorage
from tiertree.testing.conformance import write
storage = DiskStorage(sys.argv[1], 1 << 20)
write(storage, 0)
ready, told = os.pipe()
if os.fork():
    os.read(ready, 1)
    write(storage, 1)
    if sys.argv[2] == "close":
        storage.close()
    else:
        os.kill(os.getpid(), signal.SIGKILL)
else:
    storage.close()
    os.write(told, b"x")
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.01)
    print("forked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("name", ["FORMAT", "LOCK", "seg-0000000000000001.tts"])
def test_what_is_no_file_is_a_named_error(tmp_path: Path, name: str) -> None:
    """A pipe, which nobody writes to, and a directory, where there should be a file."""
    for make in (os.mkfifo, os.mkdir):
        path = tmp_path / make.__name__
        DiskStorage(path, CAPACITY).close()
        (path / name).unlink(missing_ok=True)
        make(path / name)
        with pytest.raises(StorageError, match="cannot be"):
            DiskStorage(path, CAPACITY)


def test_a_lock_file_that_has_grown_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "d"
    DiskStorage(path, 8192).close()
    (path / "LOCK").write_bytes(b"9" * 5000)
    storage = DiskStorage(path, 8192, files=CountedFiles(path, 8192))
    for number in range(20):
        assert write(storage, number, length=1000) == (Wrote.STORED,)
    assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
    storage.close()


def test_numbers_that_are_used_up_refuse(tmp_path: Path) -> None:
    """A name with the highest number and no header is no segment; with one it is the last there can be."""
    path = tmp_path / "d"
    DiskStorage(path, CAPACITY).close()
    last = path / fmt.segment_name(fmt.SEGMENT_NUMBER_MAX)
    last.write_bytes(b"not a segment")
    storage = DiskStorage(path, CAPACITY)
    assert write(storage, 1) == (Wrote.STORED,)
    storage.close()
    key, page = page_key(2), page_content(2)
    digest = page_digest(key, page)
    record = fmt.encode_record(fmt.PAGE, key, len(page), digest, fmt.SEGMENT_NUMBER_MAX, 64)
    last.write_bytes(fmt.encode_segment_header(fmt.SEGMENT_NUMBER_MAX) + record + page)
    storage = DiskStorage(path, CAPACITY, segment_bytes=4096)
    assert write(storage, 3) == (Wrote.REFUSED,)
    assert_served(storage, [1, 2])
    storage.clear()
    assert write(storage, 3) == (Wrote.STORED,)
    storage.close()
    storage = DiskStorage(path, CAPACITY)
    assert_served(storage, [3])
    storage.close()


def test_no_page_goes_for_the_footer_of_a_failed_segment(tmp_path: Path) -> None:
    """A segment whose disk failed gets its footer at the next open: room for it is kept until then."""
    files = UnsyncedFiles()
    path = tmp_path / "d"
    for last in range(1, 2200, 150):
        storage = DiskStorage(path, 8192, segment_bytes=8192, durability="batch", files=files)
        storage.clear()
        assert write(storage, *range(20), length=40) == (Wrote.STORED,) * 20
        files.broken = True
        assert write(storage, 20, length=40) == (Wrote.REFUSED,)
        files.broken = False
        files.failed.clear()
        write(storage, 21, length=2000)
        write(storage, 22, length=last)
        there = held(storage, *range(23))
        storage.close()
        storage = DiskStorage(path, 8192, segment_bytes=8192)
        assert held(storage, *range(23)) == there
        storage.close()
