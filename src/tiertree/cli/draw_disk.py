"""What `tiertree inspect` shows of a disk tier's directory: its files, what is in them, and of what kinds."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from rich.table import Table

from ..storage import format as fmt
from ..storage.base import HASH_BYTES
from ..storage.files import Files
from ..storage.fsck import Totals, segment_totals, totals
from ..storage.segment import DEAD
from ..storage.survey import Found, Standing, Survey, holder, survey
from .common import ago, plain_table, say, shown, some

LOCKS = "/proc/locks"


def draw(path: str, limit: int | None, keys: bool) -> None:
    """Print the directory at `path`; of its segments the newest `limit`, with `keys` every page. Raises
    StorageError."""
    files = Files()
    found = survey(os.path.abspath(path), files)
    user = _user(found.path, files)
    each = [segment_totals(found, one) for one in found.found]
    together = totals(found)
    print(
        f"disk tier, format {fmt.VERSION}, {f'open in the process with pid {user}' if user else 'not open'}"
    )
    print(
        f"{some(together.segments, 'segment')}, {together.bytes:,} bytes, {together.garbage_bytes:,} of them "
        f"garbage: {some(together.live, 'page')} live, {together.superseded:,} superseded, "
        f"{some(together.tombstones, 'tombstone')}"
    )
    if found.found:
        say("", _segments(found, each, limit, user is not None))
    if found.live:
        say("", _layouts(found))
    for text, names in (
        ("left by an interrupted opening", found.temporaries),
        ("no file of tiertree's", found.foreign),
        ("cannot be read", list(found.unread)),
    ):
        for name in names[:limit]:
            print(f"{shown(name)}: {text}")
        if len(names) > len(names[:limit]):
            print(f"and {some(len(names) - len(names[:limit]), 'file')} more: {text}")
    if keys:
        print()
        _list_keys(found)


def _user(path: str, files: Files) -> str | None:
    """The pid of whoever has the directory open, None if nobody has. Asks the kernel's table of locks: trying
    the lock would keep a cache from opening at that moment."""
    with suppress(OSError):
        inode = str(os.stat(os.path.join(path, fmt.LOCK_NAME)).st_ino)
        with open(LOCKS, encoding="ascii", errors="replace") as table:
            lines = [line.split() for line in table]
        if any("FLOCK" in words and any(word.endswith(f":{inode}") for word in words) for words in lines):
            return holder(path, files)
    return None


def _state(one: Found, newest: bool, used: bool) -> str:
    if one.standing is Standing.UNSEALED:
        return "being written" if newest and used else "not sealed"
    return {Standing.HEADLESS: "damaged", Standing.UNUSABLE: "damaged"}.get(one.standing, str(one.standing))


def _segments(found: Survey, each: list[Totals], limit: int | None, used: bool) -> Table:
    table = plain_table(
        *("segment", "state", "bytes", "live", "superseded", "tombstones", "garbage", "written"), left=2
    )
    hidden = len(each) - min(len(each), limit or len(each))
    if hidden:
        table.add_row("…", f"{hidden:,} older", *_cells(each[:hidden]), "")
    now = time.time()
    for one, its in list(zip(found.found, each, strict=True))[hidden:]:
        age = ""
        with suppress(OSError):
            age = ago(now - os.stat(one.segment.path).st_mtime)
        table.add_row(
            f"{one.segment.number:x}", _state(one, one is found.found[-1], used), *_cells([its]), age
        )
    return table


def _cells(each: list[Totals]) -> list[str]:
    names = ("bytes", "live", "superseded", "tombstones", "garbage_bytes")
    return [f"{sum(getattr(one, name) for one in each):,}" for name in names]


def _layouts(found: Survey) -> Table:
    """What the live pages are: a storage key ends in a digest of everything but the tokens that tells pages
    apart: kind or sidecar, shard, layout, dtype."""
    counts: dict[tuple[bytes, int], int] = {}
    for one in found.found:
        for row, (key, length) in enumerate(zip(one.segment.keys, one.segment.lengths, strict=True)):
            if found.is_live(one.segment, row):
                what = key[HASH_BYTES:], length
                counts[what] = counts.get(what, 0) + 1
    table = plain_table("layout", "pages", "bytes each", "bytes")
    for (layout, length), count in sorted(counts.items()):
        table.add_row(layout.hex(), f"{count:,}", f"{length:,}", f"{count * length:,}")
    return table


def _list_keys(found: Survey) -> None:
    """One line per record, in the order in which they lie."""
    for one in found.found:
        segment = one.segment
        for row, key in enumerate(segment.keys):
            length = segment.lengths[row]
            if length == DEAD:
                what = "tombstone"
            else:
                what = f"{length} {'live' if found.is_live(segment, row) else 'superseded'}"
            where = f"{segment.number:x} {segment.offsets[row]}"
            print(f"{where} {key[:HASH_BYTES].hex()} {key[HASH_BYTES:].hex()} {what}")
