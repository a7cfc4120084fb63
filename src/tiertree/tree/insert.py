"""Insert: what a request has computed becomes part of the tree.

    page       0 ────── first ──────────────── existing ─────────────── key.pages
    in tree    leased   │ READY on device  │ host only, FILLING, or not there
    slots      (none)   │ duplicates: freed, the │ become the tree's; a FILLING slot goes
                        │ tree's are canonical   │ back to the operation that fills it

`slots` are for pages `first ..`, where `first` is the lease's device boundary (0 without a lease).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..types import ForeignObject, InvalidSlots, Kind, Slots
from ..validate import shown
from .key import Key
from .ledger import NODE_READY, REQUEST_FILLING, Ledger
from .node import NOWHERE, Node, located
from .partial import Partial
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


Brought = tuple[Partial, Slots, Slots]
"""What a request brings of a partial kind: (kind, for which of the pages it inserts, the slot of each)."""


class Insert:
    """Puts a request's pages into the tree."""

    __slots__ = ("_radix",)

    def __init__(self, radix: Radix) -> None:
        self._radix = radix

    def check(self, ledger: Ledger, slots: Slots, pages: int | None, tag: int) -> None:
        """Raise InvalidSlots, having changed nothing, unless `slots` are `pages` (None: any number of)
        distinct slots that request `tag` has allocated and not given away; the caller gives all of them
        away next. O(pages)."""
        if not isinstance(slots, np.ndarray) or slots.dtype != INT64 or slots.ndim != 1:
            raise InvalidSlots("slots must be a one-dimensional int64 array")
        if pages is not None and len(slots) != pages:
            raise InvalidSlots(f"{len(slots)} slots for {pages} pages: one slot per page is needed")
        wrong = ledger.not_of(slots, tag)
        if wrong is not None:
            raise InvalidSlots(wrong)

    def brought(
        self, kinds: Mapping[Kind, Partial], partial: Mapping[Kind, Slots], pages: int, tag: int
    ) -> list[Brought]:
        """`check` for what request `tag` brings of partial kinds, where −1 says that it has none. Raises
        ForeignObject for an unknown kind too."""
        if not isinstance(partial, Mapping):
            raise InvalidSlots(f"partial must map kinds to slots, got {shown(partial)}")
        found = []
        for name, slots in partial.items():
            if name not in kinds:
                raise ForeignObject(f"{shown(name)} is no partial kind of this cache; allowed: {[*kinds]}")
            found.append(self._check_partial(kinds[name], slots, pages, tag))
        return found

    @staticmethod
    def _check_partial(kind: Partial, slots: Slots, pages: int, tag: int) -> Brought:
        if not isinstance(slots, np.ndarray) or slots.dtype != INT64 or slots.ndim != 1:
            raise InvalidSlots(f"slots of {kind.kind} must be a one-dimensional int64 array")
        if len(slots) != pages:
            raise InvalidSlots(
                f"{len(slots)} slots of {kind.kind} for {pages} pages: one entry per page, -1 for none"
            )
        at = (slots != NOWHERE).nonzero()[0]
        given = slots if len(at) == pages else slots[at]
        wrong = kind.ledgers[DEVICE].not_of(given, tag)
        if wrong is not None:
            raise InvalidSlots(f"slots of {kind.kind}: {wrong}")
        return kind, at, given

    def insert(
        self, key: Key, slots: Slots, first: int, now: float, mine: Node | None
    ) -> tuple[Node | None, int, int]:
        """Insert pages `first ..` of `key`, whose slots have passed `check`. `mine` is the leaf that the
        request's own lease ends in, which may be lengthened. Returns the node that the key ends at
        (None for a key without pages), how many of these pages were on device, and how many pages of the
        key were in the tree. O(pages + nodes)."""
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
            return end, existing, depth
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
        return end, existing, depth

    def fill(self, brought: Brought, end: Node, first: int, depth: int) -> bool:
        """Pages `first ..` of the path to `end`, which is on device, get what was brought of a partial kind
        where they have none READY. Slots off the kind's grid and for pages that have one are freed. The
        first `depth` pages were in the tree before this insert. Returns True where it is plain that the kind
        can be continued from at `end`. O(pages + nodes)."""
        kind, at, slots = brought
        plain = False
        ledger, start = kind.ledgers[DEVICE], end.end - end.pages
        if kind.grid > 1:
            off = (at + (first + 1)) % kind.grid != 0
            if off.any():
                kind.counters.declined += ledger.drop(slots[off])
                at, slots = at[~off], slots[~off]
        if len(at) and at.item(0) + first >= depth:
            ledger.ready(slots, REQUEST_FILLING)
            inside = at if first == start else at + (first - start)
            kind.attach(end, DEVICE, inside, slots, filling=False)
            need = kind.since(end.end) - first
            back = end.end - first - need
            plain = need >= 0 and len(at) >= back and at.item(len(at) - back) == need
        elif len(at):
            self._spread(kind, end, at + first, slots, depth)
        if kind.per_path is not None:
            self._cap(kind, end, kind.per_path)
        return plain

    def _spread(self, kind: Partial, end: Node, pages: Slots, slots: Slots, depth: int) -> None:
        """The same for `pages` (depths) in any nodes, of which some may have slots already."""
        for node, inside, which in located(end, pages):
            ours = slots[which]
            if kind.lane(node, DEVICE).slots is not None:
                inside, ours = self._replace(kind, node, inside, ours)
            if len(inside):
                kind.ledgers[DEVICE].ready(ours, REQUEST_FILLING)
                kind.attach(node, DEVICE, inside, ours, filling=False)
                kind.counters.recovered += int(np.count_nonzero(inside + node.start < depth))
                self._radix.revalue([(node, node.start + int(inside[-1]))])

    @staticmethod
    def _replace(kind: Partial, node: Node, inside: Slots, ours: Slots) -> tuple[Slots, Slots]:
        """Free those of `ours` whose page has one that is READY, and what is FILLING at the others; what is
        left finds its place empty."""
        ledger, theirs = kind.ledgers[DEVICE], kind.lane(node, DEVICE).slots
        assert theirs is not None
        held = theirs[inside]
        ready = (held != NOWHERE) & (ledger.book[held] == NODE_READY)
        if ready.any():
            ledger.drop(ours[ready])
        filling = inside[(held != NOWHERE) & ~ready]
        if len(filling):
            ledger.drop(kind.detach(node, DEVICE, filling))
        return inside[~ready], ours[~ready]

    def _cap(self, kind: Partial, end: Node, most: int) -> None:
        """Let go of the first pages of `kind` on the path to `end` that are not pinned, so that at most
        `most` are left, or more where they are pinned. O(nodes)."""
        path: list[Node] = []
        node: Node | None = end
        while node is not None and node.pages:
            path.append(node)
            node = node.parent
        excess = sum(kind.lane(node, DEVICE).count for node in path) - most
        for node in reversed(path):
            pages = kind.evictable(node, DEVICE)[: max(0, excess)]
            if node is end and len(pages) and pages[-1] == node.pages - 1:
                pages = pages[:-1]
            if len(pages):
                excess -= len(pages)
                kind.counters.declined += kind.ledgers[DEVICE].drop(kind.detach(node, DEVICE, pages))
                copies = np.intersect1d(kind.evictable(node, HOST), pages)
                if len(copies):
                    kind.ledgers[HOST].drop(kind.detach(node, HOST, copies))
                self._radix.revalue([(node, node.start + int(pages[-1]))])

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
                old = EMPTY
                if lane.count > ready:
                    old = radix.detach(node, tier, ready, node.pages, replaced=True)
                if len(old):
                    radix.drop(tier, old)
                ours = slots[at + ready : at + node.pages]
                ledger.ready(ours, REQUEST_FILLING)
                radix.attach(node, tier, ready, ours, filling=False)
                radix.announce(node, tier, ready, node.pages)
                radix.offer(node, tier)
                radix.offer(node, HOST)
        return existing
