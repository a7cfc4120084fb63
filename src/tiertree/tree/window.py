"""What a lease relies on of the partial kinds: their slots, pinned one by one.

    page       0 ······ since ────── device_boundary ······ since' ────── memory_boundary
    pinned              │ `windows`: device │               │ `beyond`: device or host │

A window remembers its slots, so splits, evictions around it and `clear` need no bookkeeping. Whoever
pins also holds the path in FULL's lanes, so the nodes are there when the pins go.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..types import Slots, Tier
from .node import NOWHERE, Node
from .partial import DEVICE, HOST, Partial


class Window:
    """The device slots of one kind that continuing at a boundary reads: of pages `first ..` (int64,
    read-only; −1 where the kind has none, which only happens behind an insert that brought none)."""

    __slots__ = ("first", "slots")

    def __init__(self, first: int, slots: Slots) -> None:
        self.first = first
        self.slots = slots
        slots.flags.writeable = False

    def __repr__(self) -> str:
        return f"Window(pages {self.first} to {self.first + len(self.slots)})"


class Pinned:
    """Pins on `slots` of `kind` on `tier`, which were those of `pages` (ascending depths) when pinned."""

    __slots__ = ("kind", "pages", "slots", "tier")

    def __init__(self, kind: Partial, tier: Tier, pages: Slots, slots: Slots) -> None:
        self.kind = kind
        self.tier = tier
        self.pages = pages
        self.slots = slots
        slots.flags.writeable = False
        kind.ledgers[tier].pin(slots)

    def unpin(self, end: Node | None) -> None:
        """Let go; `end` is a held node on whose path the pages are, or were (None: there are none)."""
        self.kind.ledgers[self.tier].unpin(self.slots)
        self.kind.offer_path(end, self.pages)


def pin_window(kind: Partial, end: Node, boundary: int) -> tuple[Window, Pinned]:
    """Pin what `kind` has READY on device of the window before `boundary`."""
    pages, start = kind.needed(boundary), end.end - end.pages
    first = boundary - len(pages)
    lane = kind.lane(end, DEVICE)
    if first >= start and lane.slots is not None and not lane.filling:
        slots = lane.slots[first - start : boundary - start].copy()
        if slots.min() >= 0:
            return Window(first, slots), Pinned(kind, DEVICE, pages, slots)
    slots = kind.on(end, DEVICE, pages)
    there = slots != NOWHERE
    return Window(first, slots), Pinned(kind, DEVICE, pages[there], slots[there])


@contextmanager
def spared(kind: Partial, end: Node | None, pages: Slots) -> Iterator[None]:
    """While room is made on host, keep what `kind` has there of `pages` (ascending depths) of the path to
    `end`."""
    pinned = None
    if end is not None:
        pages = pages[pages < end.end]
        slots = kind.on(end, HOST, pages)
        there = slots != NOWHERE
        pinned = Pinned(kind, HOST, pages[there], slots[there])
    try:
        yield
    finally:
        if pinned is not None:
            pinned.unpin(end)


def pin_beyond(kind: Partial, end: Node, boundary: int) -> list[Pinned]:
    """Pin what continuing at `boundary` would need, each page where it is READY: on device, else on host."""
    pages = kind.needed(boundary)
    device = kind.on(end, DEVICE, pages)
    bare = device == NOWHERE
    host = kind.on(end, HOST, pages[bare])
    found = host != NOWHERE
    return [
        Pinned(kind, DEVICE, pages[~bare], device[~bare]),
        Pinned(kind, HOST, pages[bare][found], host[found]),
    ]
