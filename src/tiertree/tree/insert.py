"""Insert: what a request has computed becomes part of the tree.

    page       0 ────── first ──────────────── existing ─────────────── key.pages
    in tree    leased   │ READY on device  │ host only, FILLING, or not there
    slots      (none)   │ duplicates: freed, the │ become the tree's; a FILLING slot goes
                        │ tree's are canonical   │ back to the operation that fills it

`slots` are for pages `first ..`, where `first` is the lease's device boundary (0 without a lease).
"""

from __future__ import annotations

import numpy as np

from ..types import InvalidSlots, Slots
from .key import Key
from .ledger import REQUEST_FILLING
from .node import Node
from .radix import DEVICE, EMPTY, HOST, Radix

EDGE_BYTES_MAX = 1 << 16
"""A leaf is lengthened in place up to this many bytes of edge, so that decoding page by page costs a
bounded copy each time and makes few nodes."""

INT64 = np.dtype(np.int64)


class Inserted:
    """What an insert did: `pages` of the key are in the tree; of the caller's pages `existing` were
    there before, and the slots that came for them have been freed."""

    __slots__ = ("existing", "pages")

    def __init__(self, pages: int, existing: int) -> None:
        self.pages = pages
        self.existing = existing

    def __repr__(self) -> str:
        return f"Inserted(pages={self.pages}, existing={self.existing})"


class Insert:
    """Puts a request's pages into the tree."""

    __slots__ = ("_radix",)

    def __init__(self, radix: Radix) -> None:
        self._radix = radix

    def check(self, slots: Slots, pages: int | None, tag: int) -> None:
        """Raise InvalidSlots, having changed nothing, unless `slots` are `pages` (None: any number of)
        distinct slots that request `tag` has allocated and not given away; the caller gives all of them
        away next. O(pages)."""
        if not isinstance(slots, np.ndarray) or slots.dtype != INT64 or slots.ndim != 1:
            raise InvalidSlots("slots must be a one-dimensional int64 array")
        if pages is not None and len(slots) != pages:
            raise InvalidSlots(f"{len(slots)} slots for {pages} pages: one slot per page is needed")
        wrong = self._radix.ledgers[DEVICE].not_of(slots, tag)
        if wrong is not None:
            raise InvalidSlots(wrong)

    def insert(
        self, key: Key, slots: Slots, first: int, now: float, mine: Node | None
    ) -> tuple[Node | None, int]:
        """Insert pages `first ..` of `key`, whose slots have passed `check`. `mine` is the leaf that the
        request's own lease ends in, which may be lengthened. Returns the node that the key ends at
        (None for a key without pages) and how many of these pages were there. O(pages + nodes)."""
        radix = self._radix
        start = mine if mine is not None and mine.end == first else None
        path, partial, inside = radix.walk(key, start)
        if partial is not None:
            path.append(radix.split(partial, inside))
        end = path[-1] if path else start
        existing = self._fill(path, slots, first) if path and path[-1].end > first else 0
        radix.touch(end, now)
        depth = end.end if end is not None else 0
        if depth == key.pages:
            return end, existing
        fresh = slots[depth - first :] if depth > first else slots
        radix.ledgers[DEVICE].ready(fresh, REQUEST_FILLING)
        units = key.units[depth * radix.keys.page_bytes :]
        if end is not None and end is mine and self._may_grow(end, len(units)):
            radix.lengthen(end, units)
            radix.attach(end, DEVICE, end.pages - len(fresh), fresh, filling=False)
            radix.offer(end, DEVICE)
        else:
            end = radix.graft(end or radix.root(key.namespace), units, DEVICE, fresh, now)
        radix.announce(end, DEVICE, end.pages - len(fresh), end.pages)
        return end, existing

    def _may_grow(self, node: Node, more: int) -> bool:
        return (
            not node.children
            and not node.hits
            and node.device.count == node.pages
            and len(node.edge) + more <= EDGE_BYTES_MAX
        )

    def _fill(self, path: list[Node], slots: Slots, first: int) -> int:
        """Give the caller's slots to pages that are in the tree but not READY on device, and free
        those for pages that are. Returns how many of the latter there were."""
        radix, tier, existing = self._radix, DEVICE, 0
        ledger = radix.ledgers[tier]
        for node in path:
            if node.end <= first:
                continue
            lane = node.lane(tier)
            low = max(first - node.start, 0)
            ready = max(lane.ready_prefix(ledger), low)
            at = node.start - first
            if ready > low:
                radix.drop(tier, slots[at + low : at + ready])
                existing += ready - low
            if ready < node.pages:
                old = radix.detach(node, tier, ready, node.pages) if lane.count > ready else EMPTY
                if len(old):
                    radix.drop(tier, old)
                ours = slots[at + ready : at + node.pages]
                ledger.ready(ours, REQUEST_FILLING)
                radix.attach(node, tier, ready, ours, filling=False)
                radix.announce(node, tier, ready, node.pages)
                radix.offer(node, tier)
                radix.offer(node, HOST)
        return existing
