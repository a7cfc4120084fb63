"""What the tests of the disk tier share: files that count, files that fail, and a way to die."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiertree.storage.base import Got, Storage
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.storage.tamper import flip_byte
from tiertree.testing.conformance import page_content, read

CAPACITY = 1 << 20


class CountedFiles(Files):
    """Real files; after every operation that can change them, the directory must be within its capacity."""

    def __init__(self, path: Path, capacity: int) -> None:
        self.path = path
        self.capacity = capacity

    def used(self) -> int:
        return sum(entry.stat().st_size for entry in os.scandir(self.path))

    def check(self) -> None:
        assert self.used() <= self.capacity

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        done = super().pwritev(fd, buffers, offset)
        self.check()
        return done

    def open(self, path: str, flags: int) -> int:
        fd = super().open(path, flags)
        self.check()
        return fd

    def truncate(self, fd: int, size: int) -> None:
        super().truncate(fd, size)
        self.check()

    def rename(self, source: str, target: str) -> None:
        super().rename(source, target)
        self.check()


def abandon(storage: DiskStorage) -> None:
    """Let go of the directory as a killed process does: nothing is sealed, nothing flushed."""
    os.close(storage._lock)


def flipped(storage: Storage, key: bytes) -> None:
    """Change one byte of a page on disk."""
    assert isinstance(storage, DiskStorage)
    assert flip_byte(storage, key, 11)


def assert_served(storage: DiskStorage, numbers: Sequence[int]) -> None:
    """Pages of the default length are there, with the right bytes."""
    for number in numbers:
        assert read(storage, number) == (Got.HIT, bytes(page_content(number)))


class FullFiles(Files):
    """A file system with `room` bytes left, which writes what fits and then says that it is full."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.truncates = True

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        data = b"".join(buffers)[: self.room]
        if not data and any(map(len, buffers)):
            raise OSError(errno.ENOSPC, "no space left")
        self.room -= max(0, offset + len(data) - self.size(fd))
        return os.pwrite(fd, data, offset)

    def truncate(self, fd: int, size: int) -> None:
        if not self.truncates:
            raise OSError(errno.EIO, "will not shrink")
        self.room += self.size(fd) - size
        super().truncate(fd, size)

    def unlink(self, path: str) -> None:
        self.room += os.path.getsize(path)
        super().unlink(path)


class UnsyncedFiles(Files):
    """Syncs fail while `broken`; remembers which files failed, and forbids to touch those again."""

    def __init__(self) -> None:
        self.broken = False
        self.failed: set[str] = set()

    def fdatasync(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        assert path not in self.failed, "a file whose sync had failed was synced again"
        if self.broken:
            self.failed.add(path)
            raise OSError(errno.EIO, "sync failed")
        super().fdatasync(fd)

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        path = os.readlink(f"/proc/self/fd/{fd}")
        assert path not in self.failed, "a file whose sync had failed was written again"
        return super().pwritev(fd, buffers, offset)
