"""Makes a directory one process's own, and makes sure that it is tiertree's at all.

A directory is tiertree's if it holds FORMAT. One without it is taken only if it is empty but for what
an interrupted first open may have left; anything else is somebody's, and is left as it is. The lock is
`flock` on LOCK, which the kernel releases however its holder dies; the file holds the holder's pid for
the message, is never removed, and always has the same size.
"""

from __future__ import annotations

import contextlib
import os

from ..types import StorageError, StorageLocked
from . import format as fmt
from .files import Files, read_fully, write_fully

FIXED_BYTES = len(fmt.encode_directory()) + fmt.LOCK_BYTES
"""Bytes of FORMAT and LOCK together."""

_FORMAT_TEMPORARY = fmt.FORMAT_NAME + fmt.TEMPORARY_SUFFIX
_CONTENT_BYTES_MAX = 64


def claim(path: str, files: Files) -> int:
    """Make `path` if need be, check that it is tiertree's, lock it; returns the lock's descriptor.

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
        with contextlib.suppress(PermissionError):
            files.fsync_directory(os.path.dirname(path))
    fd = files.open(os.path.join(path, fmt.LOCK_NAME), os.O_RDWR | os.O_CREAT)
    try:
        if not files.lock(fd):
            holder = _content(fd, files).decode("ascii", "replace").strip("\0 \n") or "unknown"
            raise StorageLocked(
                f"{path}: already open in the process with pid {holder}; one at a time may use it"
            )
        write_fully(files, fd, [str(os.getpid()).encode().ljust(fmt.LOCK_BYTES - 1) + b"\n"], 0)
        names = files.listdir(path)
        _inspect(path, names, files)
        if fmt.FORMAT_NAME not in names:
            _mark(path, files)
    except BaseException:
        files.close(fd)
        raise
    return fd


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
