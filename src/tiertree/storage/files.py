"""Every file operation of the disk tier, in one narrow class.

Nothing else in the disk tier calls the operating system for a file. A test that wants a full disk, a
failing sync or a crash after the n-th operation subclasses `Files` and hands it to `DiskStorage`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from typing import Any

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600

Vector = Sequence[Any]
"""Buffers of one vectored read or write, in file order."""


class Files:
    """The operating system's files. All methods raise `OSError` and release the GIL while they wait."""

    def mkdir(self, path: str) -> None:
        """Make `path` (and missing parents) for its owner only; an existing directory is narrowed to that."""
        os.makedirs(path, mode=DIRECTORY_MODE, exist_ok=True)
        os.chmod(path, DIRECTORY_MODE)

    def listdir(self, path: str) -> list[str]:
        """Names in a directory, in no order."""
        return os.listdir(path)

    def open(self, path: str, flags: int) -> int:
        """A descriptor that is not inherited and does not follow a symbolic link. New files are 0600.

        Does not wait: a pipe of that name opens at once, and no read of it succeeds.
        """
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, FILE_MODE)

    def close(self, fd: int) -> None:
        """Let go of a descriptor, and of any lock taken through it."""
        _LOCKED.discard(fd)
        os.close(fd)

    def size(self, fd: int) -> int:
        """Bytes of an open file."""
        return os.fstat(fd).st_size

    def preadv(self, fd: int, buffers: Vector, offset: int) -> int:
        """Fill `buffers` from `offset`; returns the bytes read, which may be fewer. 0 is end of file."""
        return os.preadv(fd, buffers, offset)

    def pwritev(self, fd: int, buffers: Vector, offset: int) -> int:
        """Write `buffers` at `offset`; returns the bytes written, which may be fewer."""
        return os.pwritev(fd, buffers, offset)

    def truncate(self, fd: int, size: int) -> None:
        """Cut an open file to `size` bytes."""
        os.ftruncate(fd, size)

    def fdatasync(self, fd: int) -> None:
        """Returns when the file's data and size are on stable storage."""
        os.fdatasync(fd)

    def fsync_directory(self, path: str) -> None:
        """Returns when the names in a directory are on stable storage."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: str, target: str) -> None:
        """Give a file another name, replacing what had it, in one step."""
        os.rename(source, target)

    def unlink(self, path: str) -> None:
        """Remove a name; what has the file open may go on reading it."""
        os.unlink(path)

    def lock(self, fd: int) -> bool:
        """Lock an open file exclusively, for its descriptor, without waiting. False: held elsewhere."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        _LOCKED.add(fd)
        return True


def _unlock_in_child() -> None:
    """A child made by fork shares the locks of its parent, and would keep them when the parent is gone."""
    for fd in _LOCKED:
        os.close(fd)
    _LOCKED.clear()


_LOCKED: set[int] = set()
"""Descriptors that hold a lock."""
os.register_at_fork(after_in_child=_unlock_in_child)


def read_fully(files: Files, fd: int, buffers: Vector, offset: int) -> bool:
    """Fill all of `buffers` from `offset`. False if the file ends first. At most IOV_MAX buffers."""
    total = sum(len(b) for b in buffers)
    done = files.preadv(fd, buffers, offset)
    while done < total:
        step = files.preadv(fd, _after(buffers, done), offset + done)
        if step == 0:
            return False
        done += step
    return True


def write_fully(files: Files, fd: int, buffers: Vector, offset: int) -> int:
    """Write all of `buffers` at `offset`, going on after short writes. Returns the bytes written."""
    total = sum(len(b) for b in buffers)
    done = files.pwritev(fd, buffers, offset)
    while done < total:
        step = files.pwritev(fd, _after(buffers, done), offset + done)
        if step == 0:
            raise OSError("the file system wrote nothing and reported no error")
        done += step
    return total


def _after(buffers: Vector, skip: int) -> list[memoryview]:
    """`buffers` without their first `skip` bytes. Each is a flat buffer of bytes."""
    rest: list[memoryview] = []
    for buffer in buffers:
        if skip >= len(buffer):
            skip -= len(buffer)
            continue
        rest.append(memoryview(buffer)[skip:])
        skip = 0
    return rest
