"""Matches and leases: what a lookup found, and the receipt for what a request relies on.

    page      0 ······ device_boundary ···· reach ····· memory_boundary ······ key.pages
    FULL      on device                on device  on host              anywhere
    a lease   locks device slots ───────────────│ locks host slots ──│ nothing
    others    pins the window before device_boundary, and what memory_boundary would need

`reach` is `device_boundary` unless FULL is on device where another kind is not.

A `Match` is valid until the next call that changes the cache. A `Lease` lasts until it is released,
exactly once, and releases exactly what it locked, wherever splits have moved it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..types import ForeignObject, Kind, LeaseReleased, Slots
from ..validate import shown
from .key import Key
from .node import Hold, Node, fragments
from .partial import Partial
from .radix import EMPTY
from .reach import Reach
from .window import Pinned, Window, pin_window

if TYPE_CHECKING:
    from .load import LoadBack


NO_WINDOW = Window(0, EMPTY.copy())
"""What continuing at the root needs: nothing."""


class Match:
    """How far a key is cached, in pages: `device_boundary` ≤ `memory_boundary`, each valid for every
    kind and counting READY pages only; `full_reach` is how far FULL alone reaches in memory, `full_device`
    how far it does on device."""

    __slots__ = (
        "_grid",
        "device_boundary",
        "end",
        "full_device",
        "full_reach",
        "key",
        "memory_boundary",
        "version",
    )

    def __init__(self, key: Key, end: Node | None, reach: Reach, grid: int, version: int) -> None:
        self.key = key
        self.end = end
        self.device_boundary, self.memory_boundary, self.full_device, self.full_reach = reach
        self._grid = grid
        self.version = version

    @property
    def branching_point(self) -> int | None:
        """Where FULL is cached beyond `memory_boundary`, the deepest position there that is on every kind's
        grid: the best one to save at what each kind needs there (a state, a window), since others share the
        prompt up to there. None where there is no such position."""
        aligned = self.full_reach - self.full_reach % self._grid
        return aligned if aligned > self.memory_boundary else None

    def __repr__(self) -> str:
        return (
            f"Match(device {self.device_boundary}, memory {self.memory_boundary} of {self.key.pages} pages)"
        )


class Allocated:
    """The slots of one kind that were taken for a lease. Those that were given away are forgotten now and
    then, so that a request may go on for ever."""

    __slots__ = ("_limit", "_parts")

    def __init__(self) -> None:
        self._parts: list[Slots] = []
        self._limit = 64

    def add(self, slots: Slots, tags: Slots, number: int) -> None:
        """`slots` were taken for lease `number`. O(1) amortised; `tags` are those of the ledger."""
        self._parts.append(slots)
        if len(self._parts) > self._limit:
            self._parts = [self.left(tags, number)]
            self._limit = 64 + len(self._parts[0])

    def left(self, tags: Slots, number: int) -> Slots:
        """Those that are still the lease's."""
        slots = np.concatenate(self._parts) if len(self._parts) > 1 else self._parts[0]
        mine: Slots = slots[tags[slots] == number]
        return np.unique(mine) if len(mine) else mine


class Lease:
    """What one request may rely on. Use it as a context manager, or call `release` exactly once.

    `device_boundary`: so many pages can be read on device now (`slots`, and `window(kind)` of each partial
    kind). `memory_boundary`: so many after a load-back. `reach`: up to here FULL is held on device, which
    may be more than `device_boundary` where another kind is missing. `key`: what it is a lease of."""

    __slots__ = (
        "_close",
        "_slots",
        "allocated",
        "beyond",
        "device_boundary",
        "device_hold",
        "epoch",
        "host_hold",
        "key",
        "loading",
        "memory_boundary",
        "number",
        "pins",
        "reach",
        "released",
        "returned",
        "windows",
    )

    def __init__(self, number: int, key: Key, epoch: int, close: Callable[[Lease], None]) -> None:
        self.number = number
        self.epoch = epoch
        self.key = key
        self.device_boundary = 0
        self.memory_boundary = 0
        self.reach = 0
        self.device_hold: Hold | None = None
        self.host_hold: Hold | None = None
        self.loading: LoadBack | None = None
        self.windows: dict[Kind, Window] = {}
        self.pins: dict[Kind, Pinned] = {}
        self.beyond: list[Pinned] = []
        self.returned: set[Kind] = set()
        self.allocated: dict[Kind, Allocated] = {}
        self.released = False
        self._slots: Slots | None = None
        self._close = close

    @property
    def slots(self) -> Slots:
        """Device slots of pages 0 .. device_boundary (int64, read-only). O(pages) after it has grown."""
        if self.released:
            raise LeaseReleased("this lease was released")
        if self._slots is None or len(self._slots) != self.device_boundary:
            self._slots = self._gather()
            self._slots.flags.writeable = False
        return self._slots

    @property
    def end(self) -> Node | None:
        """The deepest node that the lease holds; None when it holds nothing."""
        hold = self.host_hold or self.device_hold
        return hold.end if hold is not None else None

    def window(self, kind: Kind) -> Window:
        """The device slots of a partial kind that continuing at `device_boundary` reads, pinned until the
        lease moves or ends. Raises LeaseReleased when they were released early, ForeignObject for a kind
        that the cache does not have."""
        known = isinstance(kind, str)
        if self.released or (known and kind in self.returned):
            raise LeaseReleased(
                f"the window of {shown(kind)} was released, and cannot be used or released again"
            )
        if not known or kind not in self.windows:
            raise ForeignObject(f"{shown(kind)} has no window here; allowed: {sorted(self.windows)}")
        return self.windows[kind]

    def pin_windows(self, partials: Sequence[Partial]) -> None:
        """Pin what continuing at the device boundary reads of each partial kind, instead of what was pinned
        before. The device hold is at its new place already."""
        hold = self.device_hold
        old, self.pins = self.pins, {}
        self.returned.clear()
        for kind in partials:
            if hold is None or not self.device_boundary:
                self.windows[kind.kind] = NO_WINDOW
            else:
                window, pinned = pin_window(kind, hold.end, self.device_boundary)
                self.windows[kind.kind], self.pins[kind.kind] = window, pinned
        self._unpin(old, hold)

    @staticmethod
    def _unpin(pins: dict[Kind, Pinned], hold: Hold | None) -> None:
        for pinned in pins.values():
            pinned.unpin(hold.end if hold is not None else None)

    def unpin_windows(self) -> None:
        """Let go of every window. The device hold is still there."""
        self._unpin(self.pins, self.device_hold)
        self.pins = {}

    def unpin_beyond(self, end: Node | None) -> None:
        """Let go of what the memory boundary would have needed; `end` is a held node on its path."""
        for pinned in self.beyond:
            pinned.unpin(end)
        self.beyond = []

    def _gather(self) -> Slots:
        hold = self.device_hold
        if hold is None or not self.device_boundary:
            return EMPTY.copy()
        parts = []
        for node, low, high in fragments(hold.end, 0, self.device_boundary):
            slots = node.lane(hold.lane).slots
            assert slots is not None
            parts.append(slots[low:high])
        return np.concatenate(parts[::-1])

    def release(self) -> None:
        """Unlock everything, and give back slots that were allocated for this lease and not inserted.
        Raises LeaseReleased the second time."""
        if self.released:
            raise LeaseReleased("this lease was released before")
        self._close(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.released:
            self.release()

    def __repr__(self) -> str:
        state = (
            "released" if self.released else f"device {self.device_boundary}, memory {self.memory_boundary}"
        )
        return f"Lease({self.number}, {state})"
