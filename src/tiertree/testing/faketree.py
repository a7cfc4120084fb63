"""The names and descriptors of a file system in memory, as a kernel keeps them; see `fakedisk`.

"/d/seg-1" ──▶ FakeFile ◀── descriptor 1048577          a file is there until it has no name and
                   ▲                                    no descriptor
"/d"  stable ──────┘  a name that was removed, and not durably, leads here after a power loss
"""

from __future__ import annotations

import errno
import os
import posixpath
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from .inode import Edit, FakeDirectory, FakeFile, Node, settled

_EARLIER_MAX = 16
"""Contents of files that were removed or cut, kept to turn up in others after a power loss."""

_FIRST_DESCRIPTOR = 1 << 20
"""No number that the operating system gives, so that one cannot be taken for the other."""


class Opened(NamedTuple):
    """What a descriptor is of."""

    file: FakeFile
    path: str
    writable: bool


class FakeTree:
    """An empty root directory, `/`. Paths are absolute; methods raise `OSError` as real ones do.

    `used_bytes` is the size of all files, of those that are removed but still open as well.
    """

    def __init__(self) -> None:
        self.root = FakeDirectory()
        self.used_bytes = 0
        self.earlier: list[bytes] = []
        self._open: dict[int, Opened] = {}
        self._next = _FIRST_DESCRIPTOR

    # -- names ------------------------------------------------------------------------------------

    def find(self, path: str) -> Node:
        """What is at `path`."""
        assert path.startswith("/"), f"{path!r} is not absolute"
        node: Node = self.root
        for name in filter(None, path.split("/")):
            if not isinstance(node, FakeDirectory):
                raise error(errno.ENOTDIR, path)
            if name not in node.names:
                raise error(errno.ENOENT, path)
            node = node.names[name]
        return node

    def directory(self, path: str) -> FakeDirectory:
        """The directory at `path`."""
        node = self.find(path)
        if not isinstance(node, FakeDirectory):
            raise error(errno.ENOTDIR, path)
        return node

    def file(self, path: str) -> FakeFile:
        """The file at `path`."""
        node = self.find(path)
        if not isinstance(node, FakeFile):
            raise error(errno.EISDIR, path)
        return node

    def exists(self, path: str) -> bool:
        """Is there anything at `path`, in a directory that is there?"""
        head, name = posixpath.split(path)
        return not name or name in self.directory(head).names

    def make(self, path: str) -> None:
        """Make one directory."""
        head, name = posixpath.split(path)
        self.directory(head).edit(Edit(name, FakeDirectory()))

    def move(self, source: str, target: str) -> None:
        """Rename a file within its directory."""
        (head, old), (to, new) = posixpath.split(source), posixpath.split(target)
        if head != to:
            raise error(errno.EXDEV, target)
        file, directory = self.file(source), self.directory(to)
        replaced = self.file(target) if new in directory.names else file
        directory.edit(Edit(new, file, old))
        if replaced is not file:
            self._forget(replaced)

    def drop(self, path: str) -> None:
        """Unlink a file."""
        head, name = posixpath.split(path)
        file = self.file(path)
        self.directory(head).edit(Edit(name, file, gone=True))
        self._forget(file)

    def put(self, path: str, content: bytes) -> None:
        """Let the file at `path`, made if need be, have this content, all of it stable."""
        head, name = posixpath.split(path)
        directory = self.directory(head)
        if name not in directory.names:
            directory.names[name] = directory.stable[name] = file = settled(b"")
            file.named = True
        file = self.file(path)
        self.used_bytes += len(content) - len(file.data)
        file.data[:] = file.stable[:] = content
        file.log.clear()
        file.doomed = 0

    # -- descriptors --------------------------------------------------------------------------------

    def open(self, path: str, flags: int) -> int:
        """A new descriptor; makes or empties the file as the flags say."""
        head, name = posixpath.split(path)
        directory = self.directory(head)
        if name not in directory.names and flags & os.O_CREAT:
            file = FakeFile()
            file.named = True
            directory.edit(Edit(name, file))
        elif flags & os.O_CREAT and flags & os.O_EXCL:
            raise error(errno.EEXIST, path)
        file = self.file(path)
        if flags & os.O_TRUNC and file.data:
            self.change(file, 0, None)
        file.opens += 1
        self._next += 1
        self._open[self._next] = Opened(file, path, bool(flags & (os.O_WRONLY | os.O_RDWR)))
        return self._next

    def opened(self, fd: int) -> Opened:
        """What `fd` is of."""
        if fd not in self._open:
            raise error(errno.EBADF, str(fd))
        return self._open[fd]

    def close(self, fd: int) -> None:
        """Let go of a descriptor and its lock."""
        file = self.opened(fd).file
        del self._open[fd]
        file.opens -= 1
        if file.holder == fd:
            file.holder = None
        self._release(file)

    def change(self, file: FakeFile, offset: int, data: bytes | None) -> None:
        """Write or truncate."""
        before = len(file.data)
        if data is None and offset < before:
            self._remember(file)
        file.change(offset, data)
        self.used_bytes += len(file.data) - before

    def _forget(self, file: FakeFile) -> None:
        file.named = False
        self._remember(file)
        self._release(file)

    def _release(self, file: FakeFile) -> None:
        if not file.opens and not file.named:
            self.used_bytes -= len(file.data)

    def _remember(self, file: FakeFile) -> None:
        self.earlier.append(bytes(file.data))
        del self.earlier[:-_EARLIER_MAX]

    # -- what is left -------------------------------------------------------------------------------

    def killed(self) -> FakeTree:
        """The tree when its process has died: no descriptors, nothing else changed. O(bytes)."""
        return self._again(_killed(self.root, {}))

    def lost(self) -> FakeTree:
        """The tree after a power loss that took everything unsynced. O(bytes)."""
        return self._after_loss(lambda _: False, FakeFile.lost)

    def torn(self, rng: random.Random, left: Callable[[FakeFile], FakeFile], names: float) -> FakeTree:
        """The tree after a power loss that left each unsynced name with probability `names`. O(bytes)."""
        return self._after_loss(lambda _: rng.random() < names, left)

    def _after_loss(self, kept: Callable[[Edit], bool], left: Callable[[FakeFile], FakeFile]) -> FakeTree:
        tree = self._again(_left(self.root, kept, left))
        for file in _files(self.root):  # the blocks of what is lost are given to others
            tree._remember(file)
        return tree

    def _again(self, root: FakeDirectory) -> FakeTree:
        tree = FakeTree()
        tree.root, tree.used_bytes, tree.earlier = root, _bytes(root), list(self.earlier)
        tree._next = self._next  # so that no descriptor of before is mistaken for one of later
        return tree


def error(number: int, path: str) -> OSError:
    """The exception for an `errno`, of the subclass that Python has for it."""
    return OSError(number, os.strerror(number), path)


def _killed(directory: FakeDirectory, copies: dict[int, Node]) -> FakeDirectory:
    """A copy, each node copied once wherever it is named."""

    def copy(node: Node) -> Node:
        if id(node) not in copies:
            copies[id(node)] = node.killed() if isinstance(node, FakeFile) else _killed(node, copies)
        return copies[id(node)]

    after = FakeDirectory()
    after.names = {name: copy(node) for name, node in directory.names.items()}
    after.stable = {name: copy(node) for name, node in directory.stable.items()}
    after.log = [edit._replace(node=copy(edit.node)) for edit in directory.log]
    return after


def _left(
    directory: FakeDirectory, kept: Callable[[Edit], bool], left: Callable[[FakeFile], FakeFile]
) -> FakeDirectory:
    after = FakeDirectory()
    for name, node in directory.left(kept).items():
        if isinstance(node, FakeFile):
            after.names[name] = file = left(node)
            file.named = True
        else:
            after.names[name] = _left(node, kept, left)
    after.stable = dict(after.names)
    return after


def _files(directory: FakeDirectory) -> Iterator[FakeFile]:
    for node in directory.names.values():
        if isinstance(node, FakeFile):
            yield node
        else:
            yield from _files(node)


def _bytes(directory: FakeDirectory) -> int:
    return sum(len(file.data) for file in _files(directory))
