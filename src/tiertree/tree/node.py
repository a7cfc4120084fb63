"""A node of the radix tree, and its lanes: which page of it is where.

    parent ──edge: pages 4..9──▶ node          start = 4, end = 10, pages = 6
                                   │
               device.slots  [ 7 3 9 -1 -1 -1]   count 3   prefix-closed (I3)
               host.slots    [ 0 1 2  5  6  4]   count 6

`end` never changes while pages are only cut off in front: a split leaves the existing object its
suffix and its children, and makes a new object for the prefix. Whoever remembers (end node, first
page, page count) finds the fragments by walking to the parent, so a split needs nobody's help.

        before                 after splitting at 2
    p ──abcdef──▶ n        p ──ab──▶ upper ──cdef──▶ n
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from ..types import Slots, Tier
from .ledger import Ledger, State

NOWHERE = -1
"""In a lane's `slots`: this page has no slot here."""


class Lane:
    """The slots of one kind on one in-memory tier for the pages of one node. A partial kind's lane has
    neither `locks` (its slots are pinned) nor `below` (its pages may go from anywhere): both stay 0.

    | field | meaning |
    |---|---|
    | slots | one slot per page, NOWHERE where there is none; None when there is none at all |
    | count | pages that have a slot; `filling` of them are not READY yet |
    | locks | holds (leases, operations) on this node for this lane |
    | below | child subtrees that have a page in this lane |
    | ticket | number of this node's live entry in the lane's victim heap, 0 when not in it |
    """

    __slots__ = ("below", "count", "filling", "locks", "slots", "ticket")

    def __init__(self) -> None:
        self.slots: Slots | None = None
        self.count = 0
        self.filling = 0
        self.locks = 0
        self.below = 0
        self.ticket = 0

    @property
    def occupied(self) -> bool:
        """Whether this node or anything after it has a page in this lane."""
        return self.count > 0 or self.below > 0

    def ready_prefix(self, ledger: Ledger) -> int:
        """How many leading pages are READY here. O(1) unless some page is FILLING or missing."""
        slots = self.slots
        if slots is None:
            return 0
        if not self.filling and self.count == len(slots):
            return self.count
        missing = np.flatnonzero(~self.ready_mask(ledger))
        return int(missing[0]) if len(missing) else len(slots)

    def ready_mask(self, ledger: Ledger) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Per page, whether it is READY here. The lane must have slots."""
        assert self.slots is not None
        mask = self.slots >= 0
        if self.filling:
            mask[mask] = ledger.states(self.slots[mask]) == State.READY
        return mask

    def split(self, at: int, ledger: Ledger) -> Lane:
        """Cut off the first `at` pages into a new lane, which is returned. Copies both parts, so that
        neither keeps the other's array alive."""
        upper = Lane()
        upper.locks = self.locks
        if self.slots is not None:
            slots = self.slots
            upper.slots = slots[:at].copy()
            self.slots = slots[at:].copy()
            if self.count == len(slots) and not self.filling:
                upper.count, self.count = at, len(slots) - at
            else:
                upper.filling = self.filling
                upper._recount(ledger)
                self._recount(ledger)
        if self.count or self.below:
            upper.below = 1
        return upper

    def _recount(self, ledger: Ledger) -> None:
        assert self.slots is not None
        held = self.slots[self.slots >= 0]
        self.count = len(held)
        if self.filling:
            self.filling = int((ledger.states(held) == State.FILLING).sum())
        if not self.count:
            self.slots = None


ABSENT = Lane()
"""Stands in for a lane that is not there: a tier that this tree does not have, a partial kind that has had
no slot here. Never written to."""


NO_CHILDREN: dict[bytes, Node] = {}
"""The children of every leaf; never written to (see `Node.adopt`)."""


UNKNOWN = -1
"""In `Partials.dead`: not counted since something has changed."""


class Partials(list[Lane]):
    """The lanes of the partial kinds of one node: kind `i` on tier `t` at `2 * i + t`, ABSENT until it has
    a slot for the first time.

    `dead`: how many pages at the node's end are behind the last boundary that every kind can continue
    from, UNKNOWN until asked for. `unsaved`: a page that host should have may be missing there."""

    __slots__ = ("dead", "unsaved")

    def __init__(self, lanes: Iterable[Lane] = ()) -> None:
        super().__init__(lanes)
        self.dead = UNKNOWN
        self.unsaved = False


NO_PARTIALS = Partials()
"""The partial lanes of every node of a tree that has FULL alone; never written to."""


class Node:
    """A run of pages on one edge. `device` and `host` are its lanes for FULL, `partial` those of the other
    kinds; `label` is the first page, the node's name among its siblings. Few objects per node: eviction
    touches them all, mostly cold."""

    __slots__ = (
        "children",
        "detached",
        "device",
        "edge",
        "end",
        "hashes",
        "hits",
        "host",
        "label",
        "last_used",
        "pages",
        "parent",
        "partial",
    )

    def __init__(
        self,
        edge: bytes,
        pages: int,
        end: int,
        parent: Node | None,
        lanes: tuple[Lane, Lane],
        partial: Partials = NO_PARTIALS,
    ) -> None:
        self.edge = edge
        self.pages = pages
        self.end = end
        self.parent = parent
        self.device, self.host = lanes
        self.partial = partial
        self.children = NO_CHILDREN
        self.hashes = b""
        self.last_used = 0.0
        self.hits = 0
        self.label = b""
        self.detached = False

    def lane(self, tier: int) -> Lane:
        """The lane for `tier`, DEVICE or HOST."""
        return self.host if tier else self.device

    @property
    def lanes(self) -> tuple[Lane, Lane]:
        """Both lanes."""
        return self.device, self.host

    def adopt(self, child: Node) -> None:
        """Make `child` a child under its label, in the place of whoever had it."""
        if self.children is NO_CHILDREN:
            self.children = {}
        self.children[child.label] = child

    @property
    def start(self) -> int:
        """Depth of this node's first page."""
        return self.end - self.pages

    def __repr__(self) -> str:
        return f"Node(pages {self.start}..{self.end}, device {self.device.count}, host {self.host.count})"


class Root(Node):
    """The top of one namespace: no pages, no slots, only children."""

    __slots__ = ("namespace",)

    def __init__(self, namespace: str, lanes: tuple[Lane, Lane]) -> None:
        super().__init__(b"", 0, 0, None, lanes)
        self.namespace = namespace


class Hold:
    """One lock on the nodes from `end` up to depth `floor`, for one lane. Released exactly once."""

    __slots__ = ("end", "floor", "lane")

    def __init__(self, end: Node, lane: Tier, floor: int) -> None:
        self.end = end
        self.lane = lane
        self.floor = floor


def fragments(end: Node, first: int, count: int) -> Iterator[tuple[Node, int, int]]:
    """The pieces of pages `first .. first+count` on the path that ends in `end`, deepest first, as
    (node, low, high) with page indices inside the node. O(depth in nodes)."""
    stop = first + count
    node: Node | None = end
    while node is not None and node.end > first:
        start = node.end - node.pages
        low, high = max(first - start, 0), min(stop - start, node.pages)
        if low < high:
            yield node, low, high
        node = node.parent


def subtree(root: Node) -> Iterator[Node]:
    """Every node under `root`, parents before children."""
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())


def located(end: Node, pages: Slots) -> Iterator[tuple[Node, Slots, slice]]:
    """Where `pages` (ascending depths) of the path to `end` are, deepest first: (node, indices inside the
    node, which of `pages` these are). O(depth in nodes + pages)."""
    stop = len(pages)
    node: Node | None = end
    while stop and node is not None and node.pages:
        start = node.end - node.pages
        low = int(np.searchsorted(pages[:stop], start))
        if low < stop:
            yield node, pages[low:stop] - start, slice(low, stop)
        stop, node = low, node.parent


def slots_of(end: Node, tier: int, first: int, count: int) -> Slots:
    """The slots on `tier` of pages `first .. first+count` on the path that ends in `end`; all are there."""
    parts = []
    for node, low, high in fragments(end, first, count):
        slots = node.lane(tier).slots
        assert slots is not None
        parts.append(slots[low:high])
    return np.concatenate(parts[::-1])
