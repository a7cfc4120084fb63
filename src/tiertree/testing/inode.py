"""Files and directories that know what of them is on stable storage, and what may be left of the rest.

                 write a  truncate  write b  sync   write c  write d
    stable  ──────────────────────────────────▶│                          content as of the last sync
    log                                        │   c        d             what came after it, in order
    data    ─────────────────────────────────────────────────▶            content as the kernel has it

A power loss leaves `stable` and any part of the log: each sector of each write for itself, in any order,
the file as long as it was after any of them, and what was never written in between is zeros, noise or
what an earlier file had there. Each name made, moved or removed is kept or lost by itself as well.
A sync that fails keeps its changes from ever becoming stable by a later one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

SECTOR_BYTES = 512
"""What a disk writes whole or not at all."""

LOG_MAX = 512
"""Changes without a sync after which the older half becomes stable by itself, as kernels do in time."""

Fill = Callable[[int, int], bytes]
"""What is found in a range of a file, from offset to offset, that was allocated and never written."""


class Change(NamedTuple):
    """`data` was written at `offset`; or, if it is None, the file was cut or extended to `offset` bytes."""

    offset: int
    data: bytes | None

    def apply(self, content: bytearray, fill: Fill) -> None:
        """Do it to `content`."""
        gap = self.offset - len(content)
        if gap > 0:
            content += fill(len(content), self.offset)
        if self.data is None:
            del content[self.offset :]
        else:
            content[self.offset : self.offset + len(self.data)] = self.data

    def sectors(self) -> list[Change]:
        """The same change in parts that are done whole or not at all."""
        if self.data is None:
            return [self]
        parts, start = [], 0
        while start < len(self.data):
            room = SECTOR_BYTES - (self.offset + start) % SECTOR_BYTES
            parts.append(Change(self.offset + start, self.data[start : start + room]))
            start += room
        return parts


class FakeFile:
    """One file. `data` is what every reader sees; `named`, `opens`, `holder` are the kernel's alone."""

    __slots__ = ("data", "doomed", "holder", "log", "named", "opens", "stable")

    def __init__(self) -> None:
        self.data = bytearray()
        self.stable = bytearray()
        self.log: list[Change] = []
        self.doomed = 0
        """So many leading changes of the log were given up by a failed sync."""
        self.named = False
        self.opens = 0
        self.holder: int | None = None

    def change(self, offset: int, data: bytes | None) -> None:
        """Write or truncate. O(bytes)."""
        change = Change(offset, data)
        change.apply(self.data, zeros)
        self.log.append(change)
        if len(self.log) > LOG_MAX:
            self._settle(LOG_MAX // 2)

    def sync(self) -> None:
        """Everything but what an earlier sync gave up is stable now. O(bytes changed)."""
        self._settle(len(self.log))

    def give_up(self) -> None:
        """A sync has failed: what it was for counts as written from now on, and is not."""
        self.doomed = len(self.log)

    def _settle(self, count: int) -> None:
        for change in self.log[self.doomed : count]:
            change.apply(self.stable, zeros)
        self.doomed = max(0, self.doomed - count)
        del self.log[:count]

    def killed(self) -> FakeFile:
        """The file when its process has died and the machine has not."""
        file = FakeFile()
        file.data[:], file.stable[:] = self.data, self.stable
        file.log, file.doomed, file.named = list(self.log), self.doomed, self.named
        return file

    def lost(self) -> FakeFile:
        """The file after a power loss that took everything unsynced."""
        return settled(bytes(self.stable))

    def torn(self, rng: random.Random, keep: float, fill: Fill) -> FakeFile:
        """The file after a power loss that left each unsynced sector with probability `keep`."""
        if not self.log:
            return settled(bytes(self.stable))
        sizes, running = [len(self.stable)], len(self.stable)
        for change in self.log:
            end = change.offset + len(change.data or b"")
            running = end if change.data is None else max(running, end)
            sizes.append(running)
        parts = [part for change in self.log for part in change.sectors() if rng.random() < keep]
        if rng.random() < 0.5:
            rng.shuffle(parts)
        content = bytearray(self.stable)
        for part in parts:
            part.apply(content, fill)
        if rng.random() < 0.5:
            Change(rng.choice(sizes), None).apply(content, fill)
        return settled(bytes(content))


def settled(content: bytes) -> FakeFile:
    """A file with this content, all of it stable."""
    file = FakeFile()
    file.data[:] = file.stable[:] = content
    return file


class Edit(NamedTuple):
    """`node` got `name`, and no longer has `source`; or, if `gone`, lost `name`."""

    name: str
    node: Node
    source: str | None = None
    gone: bool = False

    def apply(self, names: dict[str, Node]) -> None:
        """Do it to `names`, whatever else was done to them."""
        if self.source is not None and names.get(self.source) is self.node:
            del names[self.source]
        if not self.gone:
            names[self.name] = self.node
        elif names.get(self.name) is self.node:
            del names[self.name]


class FakeDirectory:
    """One directory: `names` is what every reader sees, `stable` what the last sync of it has left."""

    __slots__ = ("log", "names", "stable")

    def __init__(self) -> None:
        self.names: dict[str, Node] = {}
        self.stable: dict[str, Node] = {}
        self.log: list[Edit] = []

    def edit(self, edit: Edit) -> None:
        """Make, move or remove a name. O(1)."""
        edit.apply(self.names)
        self.log.append(edit)
        if len(self.log) > LOG_MAX:
            self._settle(LOG_MAX // 2)

    def sync(self) -> None:
        """All names are stable now."""
        self._settle(len(self.log))

    def _settle(self, count: int) -> None:
        for edit in self.log[:count]:
            edit.apply(self.stable)
        del self.log[:count]

    def left(self, kept: Callable[[Edit], bool]) -> dict[str, Node]:
        """The names after a power loss that left those unsynced edits that `kept` says."""
        names = dict(self.stable)
        for edit in filter(kept, self.log):
            edit.apply(names)
        return names


Node = FakeFile | FakeDirectory


def zeros(start: int, end: int) -> bytes:
    """A `Fill`: holes as POSIX has them."""
    return bytes(end - start)


def noise(rng: random.Random) -> Fill:
    """A `Fill`: blocks that were never written."""
    return lambda start, end: rng.randbytes(end - start)


def remains(earlier: Sequence[bytes], rng: random.Random) -> Fill:
    """A `Fill`: blocks that an earlier file had at the same place, of those in `earlier` that reach there."""

    def fill(start: int, end: int) -> bytes:
        reaching = [content for content in earlier if len(content) > start]
        content = rng.choice(reaching)[start:end] if reaching else b""
        return content.ljust(end - start, b"\0")

    return fill
