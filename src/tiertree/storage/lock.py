"""Makes a directory one process's own, and makes sure that it is tiertree's at all.

A directory is tiertree's if it holds FORMAT. One without it is taken only if it is empty but for what
an interrupted first open may have left; anything else is somebody's, and is left as it is. The lock is
`flock` on LOCK, which the kernel releases however its holder dies; the file holds the holder's pid for
the message and the number of clears, is never removed, and always has the same size.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from ..types import StorageError, StorageLocked
from . import format as fmt
from .files import Files, read_fully, write_fully

FIXED_BYTES = len(fmt.encode_directory()) + fmt.LOCK_BYTES
"""Bytes of FORMAT and LOCK together."""

_FORMAT_TEMPORARY = fmt.FORMAT_NAME + fmt.TEMPORARY_SUFFIX
_CONTENT_BYTES_MAX = 64

_NOT_OURS_TO_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL)
"""Directories above ours that may not be opened, or are of a file system that cannot sync them."""


class Claim(NamedTuple):
    """A directory that is ours: the descriptor of its lock, and how often it has been cleared."""

    fd: int
    epoch: int


def claim(path: str, files: Files) -> Claim:
    """Make `path` if need be, check that it is tiertree's, lock it.

    Raises `StorageLocked` if it is open already, here or in another process, and `StorageError` if it is
    not tiertree's or of another version. Then nothing in it has been changed.
    """
    try:
        names = files.listdir(path)
    except FileNotFoundError:
        names = []
    _inspect(path, names, files)
    if fmt.FORMAT_NAME not in names:
        files.mkdir(path)
        _sync_above(path, files)
    fd = files.open(os.path.join(path, fmt.LOCK_NAME), os.O_RDWR | os.O_CREAT)
    try:
        if not files.lock(fd):
            holder, _ = fmt.decode_lock(_content(fd, files))
            raise StorageLocked(
                f"{path}: already open in the process with pid {holder}; one at a time may use it"
            )
        _, epoch = fmt.decode_lock(_content(fd, files))
        if files.size(fd) > fmt.LOCK_BYTES:
            files.truncate(fd, fmt.LOCK_BYTES)
        write_lock(files, fd, epoch)
        names = files.listdir(path)
        _inspect(path, names, files)
        if fmt.FORMAT_NAME not in names:
            _mark(path, files)
    except BaseException:
        files.close(fd)
        raise
    return Claim(fd, epoch)


def write_lock(files: Files, fd: int, epoch: int) -> None:
    """Say in LOCK that it is ours, and how often the directory has been cleared."""
    write_fully(files, fd, [fmt.encode_lock(os.getpid(), epoch)], 0)


def _sync_above(path: str, files: Files) -> None:
    """Make the names of all directories on the way to `path` durable: `mkdir` may have made any of them,
    now or in a session that died before it came to this."""
    while path != (path := os.path.dirname(path)):
        try:
            files.fsync_directory(path)
        except OSError as error:
            if error.errno not in _NOT_OURS_TO_SYNC:
                raise


def _inspect(path: str, names: list[str], files: Files) -> None:
    """Raise `StorageError` if the directory with these names is not ours to use."""
    if fmt.FORMAT_NAME in names:
        fd = files.open(os.path.join(path, fmt.FORMAT_NAME), os.O_RDONLY)
        try:
            fmt.check_directory(_content(fd, files), path)
        finally:
            files.close(fd)
        return
    foreign = sorted(set(names) - {fmt.LOCK_NAME, _FORMAT_TEMPORARY})
    if foreign:
        raise StorageError(
            f"{path}: has no {fmt.FORMAT_NAME} file and is not empty (it holds {foreign[0]!r}), so it is not "
            "a tiertree directory; nothing was changed. Give it a directory of its own"
        )


def _mark(path: str, files: Files) -> None:
    """Write FORMAT, all of it or nothing, durably."""
    temporary = os.path.join(path, _FORMAT_TEMPORARY)
    fd = files.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    try:
        write_fully(files, fd, [fmt.encode_directory()], 0)
        files.fdatasync(fd)
    finally:
        files.close(fd)
    files.rename(temporary, os.path.join(path, fmt.FORMAT_NAME))
    files.fsync_directory(path)


def _content(fd: int, files: Files) -> bytes:
    """The whole of a small file, or as much of it as shows that it is not one."""
    content = bytearray(min(files.size(fd), _CONTENT_BYTES_MAX))
    return bytes(content) if read_fully(files, fd, [content], 0) else b""
