"""A file system in memory that can lose power, fill up and fail: `FakeDisk`, and `FakeFiles` to use it.

    disk = FakeDisk()
    disk.crash(at=17)                                  operation 17 is never done: Crashed
    try:
        storage = DiskStorage("/d", 1 << 20, files=FakeFiles(disk))
        ...
    except Crashed:
        disk = disk.after_crash(After.MIXED, seed=3)   the machine is back; `disk` is all that is left
    storage = DiskStorage("/d", 1 << 20, files=FakeFiles(disk))

What is assumed of a file system is what POSIX lets a program rely on, and nothing that ext4 adds to it:
  * fdatasync makes a file's content and size stable, not its name; a name that was made, moved or removed
    is stable when its directory was synced, a directory's own name when its parent was.
  * What is not synced may be stable or not, each sector and each name by itself and in any order: a name
    without its content, content without its name, the second write without the first, a size without either.
  * A sector of 512 bytes is written whole or not at all, a rename is done or not done, and what is stable
    stays as it was until it is overwritten.
  * After an fdatasync that failed, what it was for is never made stable by another.
  * The death of a process alone loses nothing. Locks and descriptors go with it.
Not modelled: links, owners, modes, times, holes that take no room, renames from one directory to another.

The same calls and seeds give the same disk, byte for byte. Not for several threads at once.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

from ..storage.files import Files, Vector
from .faketree import FakeTree, Opened, error
from .inode import FakeFile, noise, remains, zeros

_SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""How much of what was unsynced a power loss leaves."""


class Crashed(BaseException):
    """The process, or the machine, is dead; whatever is asked of the disk says so from now on."""


class After(Enum):
    """What a machine comes back with."""

    KILLED = "killed"
    """Only the process died: everything that was written."""
    LOST = "lost"
    """Power was lost: what was synced, and nothing else."""
    MIXED = "mixed"
    """Power was lost: what was synced, and a random part of the rest."""


class Op(Enum):
    """Kinds of operations. All but the last two change something and are counted."""

    MKDIR = "mkdir"
    CREATE = "create"
    """An open that makes the file, or empties it."""
    WRITE = "write"
    TRUNCATE = "truncate"
    SYNC = "sync"
    SYNC_DIRECTORY = "sync directory"
    RENAME = "rename"
    UNLINK = "unlink"
    READ = "read"
    """A read, also of a size or of a directory's names."""
    OPEN = "open"
    """An open that changes nothing."""


class _Fault(NamedTuple):
    skip: int
    times: int
    error: int


class FakeDisk:
    """A disk of `quota_bytes` (None: no limit) with an empty root directory, `/`.

    `operations` counts what was asked for that changes anything, failures included. `io_bytes_max` makes
    every read and write a short one that moves no more. `watch` is called after every operation that was
    counted and done, so a test that calls `after_crash` there sees every crash there can be in one run.
    """

    def __init__(self, quota_bytes: int | None = None) -> None:
        self.quota_bytes = quota_bytes
        self.io_bytes_max: int | None = None
        self.operations = 0
        self.crashed = False
        self.watch: Callable[[], None] = _nothing
        self.tree = FakeTree()
        """What there is, for `FakeFiles`: no weather here."""
        self._faults: dict[Op, _Fault] = {}
        self._crash_at: int | None = None
        self._torn_bytes = 0

    def crash(self, at: int | None = None, torn_bytes: int = 0) -> None:
        """Die at the operation that finds `operations` to be `at` (None: now), instead of doing it.

        If that is a write, its first `torn_bytes` bytes are written before.
        """
        self._crash_at, self._torn_bytes = at, torn_bytes
        self.crashed = self.crashed or at is None

    def fail(self, op: Op, error: int = errno.EIO, skip: int = 0, times: int = 1) -> None:
        """Let operations of one kind raise `OSError`: after `skip` more of them, the next `times`."""
        self._faults[op] = _Fault(skip, times, error)

    def heal(self) -> None:
        """No more failures, short reads or short writes, and no crash to come. The quota stays."""
        self._faults.clear()
        self.io_bytes_max = self._crash_at = None

    def after_crash(self, after: After, seed: int = 0) -> FakeDisk:
        """The disk that would be found if it all ended now. O(bytes); this one stays as it is.

        Its count of operations starts anew; it has the quota and nothing else of what was set.
        """
        disk = FakeDisk(self.quota_bytes)
        if after is After.KILLED:
            disk.tree = self.tree.killed()
        elif after is After.LOST:
            disk.tree = self.tree.lost()
        else:
            rng = random.Random(seed)
            fill = rng.choice((zeros, noise(rng), remains(self.tree.earlier, rng)))
            names, share = rng.choice(_SHARES), rng.choice(_SHARES)
            disk.tree = self.tree.torn(rng, lambda file: file.torn(rng, share, fill), names)
        return disk

    # -- a test's own hands: not counted, never failing, stable at once ------------------------------

    @property
    def used_bytes(self) -> int:
        """Bytes of all files, of those that are removed but still open as well."""
        return self.tree.used_bytes

    def listing(self, path: str) -> dict[str, int]:
        """Names in a directory and the sizes of the files among them (directories: 0), sorted."""
        names = sorted(self.tree.directory(path).names.items())
        return {name: len(node.data) if isinstance(node, FakeFile) else 0 for name, node in names}

    def content(self, path: str) -> bytes:
        """All bytes of a file."""
        return bytes(self.tree.file(path).data)

    def replace(self, path: str, content: bytes) -> None:
        """Let the file at `path`, made if need be, have this content, as if it had rotted to it. Who has it
        open sees it too."""
        self.tree.put(path, content)

    def remove(self, path: str) -> None:
        """Let a name be gone."""
        head, name = os.path.split(path)
        self.tree.drop(path)
        self.tree.directory(head).stable.pop(name, None)

    # -- for FakeFiles ------------------------------------------------------------------------------

    def step(self, op: Op, path: str) -> None:
        """Begin an operation: counts it, and raises what has been asked for."""
        if self.crashed:
            raise Crashed(f"{op.value} {path}, after the crash")
        if op not in (Op.READ, Op.OPEN):
            if self.operations == self._crash_at:
                self.crashed = True
                raise Crashed(f"operation {self.operations}: {op.value} {path}")
            self.operations += 1
        skip, times, number = self._faults.get(op, _Fault(0, 0, 0))
        if skip:
            self._faults[op] = _Fault(skip - 1, times, number)
        elif times:
            self._faults[op] = _Fault(0, times - 1, number)
            raise error(number, path)

    def torn(self) -> int:
        """If the next operation is where it dies: how many bytes of it are written all the same."""
        return self._torn_bytes if self.operations == self._crash_at and not self.crashed else 0

    def fitting(self, opened: Opened, offset: int, length: int) -> int:
        """How much of a write there is room for. `OSError` if that is nothing."""
        growth = offset + length - len(opened.file.data)
        if self.quota_bytes is None or growth <= max(0, self.quota_bytes - self.used_bytes):
            return length
        length -= growth - max(0, self.quota_bytes - self.used_bytes)
        if length <= 0:
            raise error(errno.ENOSPC, opened.path)
        return length


class FakeFiles(Files):
    """The files of a `FakeDisk`. Descriptors are good for this disk only; all calls return at once."""

    def __init__(self, disk: FakeDisk) -> None:
        self.disk = disk

    def mkdir(self, path: str) -> None:
        """As `Files.mkdir`, an operation for each directory that is made; there are no modes."""
        parts = path.strip("/").split("/")
        for i in range(len(parts)):
            each = "/" + "/".join(parts[: i + 1])
            if not self.disk.tree.exists(each):
                self.disk.step(Op.MKDIR, each)
                self.disk.tree.make(each)
                self.disk.watch()
        self.disk.tree.directory(path)

    def listdir(self, path: str) -> list[str]:
        """As `Files.listdir`; the order is the same every time, and not the alphabet's."""
        self.disk.step(Op.READ, path)
        return sorted(self.disk.tree.directory(path).names, reverse=True)

    def open(self, path: str, flags: int) -> int:
        """As `Files.open`."""
        makes = flags & os.O_TRUNC or (flags & os.O_CREAT and not self.disk.tree.exists(path))
        self.disk.step(Op.CREATE if makes else Op.OPEN, path)
        fd = self.disk.tree.open(path, flags)
        if makes:
            self.disk.watch()
        return fd

    def close(self, fd: int) -> None:
        """As `Files.close`. After a crash there is nothing left to close."""
        if not self.disk.crashed:
            self.disk.tree.close(fd)

    def size(self, fd: int) -> int:
        """As `Files.size`."""
        opened = self._opened(fd)
        self.disk.step(Op.READ, opened.path)
        return len(opened.file.data)

    def preadv(self, fd: int, buffers: Vector, offset: int) -> int:
        """As `Files.preadv`."""
        opened = self._opened(fd)
        self.disk.step(Op.READ, opened.path)
        most = sum(map(len, buffers))
        if self.disk.io_bytes_max is not None:
            most = min(most, self.disk.io_bytes_max)
        data = bytes(opened.file.data[offset : offset + most])
        done = 0
        for buffer in buffers:
            part = data[done : done + len(buffer)]
            memoryview(buffer)[: len(part)] = part
            done += len(part)
        return done

    def pwritev(self, fd: int, buffers: Vector, offset: int) -> int:
        """As `Files.pwritev`. Room that is not enough makes it short, none makes it fail."""
        opened = self._opened(fd, writable=errno.EBADF)
        data = b"".join(buffers)
        torn = data[: self.disk.torn()]
        if torn:
            self._change(opened, offset, torn)
        self.disk.step(Op.WRITE, opened.path)
        data = data[: self.disk.io_bytes_max]
        data = data[: self.disk.fitting(opened, offset, len(data))]
        self._change(opened, offset, data)
        return len(data)

    def truncate(self, fd: int, size: int) -> None:
        """As `Files.truncate`."""
        opened = self._opened(fd, writable=errno.EINVAL)
        self.disk.step(Op.TRUNCATE, opened.path)
        if size > len(opened.file.data):
            self.disk.fitting(opened, size, 0)
        self._change(opened, size, None)

    def fdatasync(self, fd: int) -> None:
        """As `Files.fdatasync`."""
        opened = self._opened(fd)
        try:
            self.disk.step(Op.SYNC, opened.path)
        except OSError:
            opened.file.give_up()
            raise
        opened.file.sync()
        self.disk.watch()

    def fsync_directory(self, path: str) -> None:
        """As `Files.fsync_directory`."""
        self.disk.step(Op.SYNC_DIRECTORY, path)
        self.disk.tree.directory(path).sync()
        self.disk.watch()

    def rename(self, source: str, target: str) -> None:
        """As `Files.rename`, for files of one directory."""
        self.disk.step(Op.RENAME, source)
        self.disk.tree.move(source, target)
        self.disk.watch()

    def unlink(self, path: str) -> None:
        """As `Files.unlink`."""
        self.disk.step(Op.UNLINK, path)
        self.disk.tree.drop(path)
        self.disk.watch()

    def lock(self, fd: int) -> bool:
        """As `Files.lock`."""
        opened = self._opened(fd)
        self.disk.step(Op.OPEN, opened.path)
        if opened.file.holder not in (None, fd):
            return False
        opened.file.holder = fd
        return True

    def _opened(self, fd: int, writable: int = 0) -> Opened:
        """What a descriptor is of; `writable` is the error if that must be writable and is not."""
        opened = self.disk.tree.opened(fd)
        if writable and not opened.writable:
            raise error(writable, opened.path)
        return opened

    def _change(self, opened: Opened, offset: int, data: bytes | None) -> None:
        self.disk.tree.change(opened.file, offset, data)
        self.disk.watch()


def _nothing() -> None:
    pass
