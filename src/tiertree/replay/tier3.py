"""The disk tier of a replay: keys alone, or a directory with room for so many pages and no more."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator

from ..storage import format as fmt
from ..storage.base import Storage
from ..storage.disk import (
    CAPACITY_BYTES_MIN,
    SEGMENT_BYTES_MAX,
    SEGMENT_BYTES_MIN,
    SEGMENTS_PER_CAPACITY,
    DiskStorage,
)
from ..storage.lock import FIXED_BYTES
from ..storage.memory import KeyStorage
from ..types import StorageError
from .options import ReplayOptions


def disk_bytes(pages: int, page_bytes: int) -> tuple[int, int]:
    """(capacity, segment size) in bytes of a directory that holds `pages` pages when it is full. Not less
    than a directory may have, so a few small pages may become more."""
    record = fmt.RECORD_HEADER_BYTES + page_bytes
    header = fmt.SEGMENT_HEADER_BYTES
    least, most = (SEGMENT_BYTES_MIN - header) // record, (SEGMENT_BYTES_MAX - header) // record
    per_segment = max(1, least, min(-(-pages // SEGMENTS_PER_CAPACITY), most))
    segments = -(-pages // per_segment)
    capacity = FIXED_BYTES + segments * fmt.SEGMENT_OVERHEAD_BYTES + pages * (record + fmt.ENTRY_BYTES)
    capacity = max(capacity, CAPACITY_BYTES_MIN)
    segment = max(header + per_segment * record, SEGMENT_BYTES_MIN)
    return capacity, min(segment, capacity)


@contextlib.contextmanager
def open_disk_tier(options: ReplayOptions) -> Iterator[Storage | None]:
    """The empty disk tier that `options` describe, closed at the end; None if there is none. A temporary
    directory is removed, one that was named stays. Raises StorageError, StorageLocked."""
    if not options.disk_pages:
        yield None
    elif options.page_bytes is None:
        yield KeyStorage(options.disk_pages)
    else:
        with contextlib.ExitStack() as stack:
            path = options.disk_dir
            if path is None:
                path = stack.enter_context(tempfile.TemporaryDirectory(prefix="tiertree-replay-"))
            capacity, segment = disk_bytes(options.disk_pages, options.page_bytes)
            disk = DiskStorage(path, capacity, segment)
            stack.callback(disk.close)
            held = disk.stats().pages
            if held:
                raise StorageError(f"--disk-dir: {path} holds {held} pages already; a replay starts cold")
            yield disk
