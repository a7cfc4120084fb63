"""The compressed radix tree and everything that must stay true when it changes.

    roots["tenant"] ──0..4──▶ n ──4..10──▶ n      an edge is one `bytes` object of whole pages
                        └─────4..6───▶ n          siblings differ in their first page (I1)

An edge is compared with one call in C (`units.startswith(edge, at)`, which copies nothing); where it
differs is found by one vector operation; a child is found by its first page. This file changes the
tree in small steps, each of which keeps its books: split, graft, attach and detach slots, hold and
unhold. Which step to take when is decided by its neighbours (`lookup`, `insert`, `evict`, …).

FULL is the spine: its lanes, one per in-memory tier, decide which pages exist at all (I2).
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from ..types import Slots, Tier
from .journal import Announcer, Journal
from .key import Key, KeyMaker, first_difference
from .ledger import NODE_FILLING, Ledger
from .node import ABSENT, NO_CHILDREN, NOWHERE, Hold, Lane, Node, Root, subtree
from .pagehash import PageHashes
from .victims import Policy, Victims

DEVICE, HOST = Tier.DEVICE, Tier.HOST
LANES = (DEVICE, HOST)


class Radix:
    """Structure, slots and locks of all namespaces. Owned by one thread; no I/O, no clock."""

    def __init__(
        self,
        keys: KeyMaker,
        ledgers: tuple[Ledger, Ledger],
        policy: Policy,
        host_prefix_closed: bool,
        fingerprint: bytes,
        journal: Journal | None,
    ) -> None:
        self.keys = keys
        self.ledgers = ledgers
        self.has_host = ledgers[HOST].capacity > 0
        self.host_prefix_closed = host_prefix_closed
        self.hashes = PageHashes(keys, fingerprint)
        self.announcer = Announcer(journal, self.hashes, keys.unit_bytes) if journal is not None else None
        self.roots: dict[str, Root] = {}
        self.nodes = 0
        self.version = 0
        self.resident = [0, 0]
        self.protected = [0, 0]
        self.policy = policy
        self.victims = (Victims(DEVICE, policy), Victims(HOST, policy))
        self.duplicates: OrderedDict[Node, None] = OrderedDict()
        self.detached: set[Node] = set()

    # -- structure ------------------------------------------------------------------------------

    def root(self, namespace: str) -> Root:
        """The root of `namespace`, made if need be: the caller grafts a page under it at once."""
        root = self.roots.get(namespace)
        if root is None:
            lanes = (Lane(), Lane() if self.has_host else ABSENT)
            root = self.roots[namespace] = Root(namespace, lanes)
        return root

    def walk(self, key: Key, start: Node | None = None) -> tuple[list[Node], Node | None, int]:
        """The nodes below `start` (None: the root) that `key` covers whole, and the node it ends inside of
        with how many of its pages match (None, 0 if it ends at a node's end). `key` is known to cover
        `start`. Changes nothing. O(pages + nodes)."""
        path: list[Node] = []
        node = start if start is not None else self.roots.get(key.namespace)
        if node is None:
            return path, None, 0
        units, page_bytes = key.units, self.keys.page_bytes
        at = node.end * page_bytes
        while True:
            child = node.children.get(units[at : at + page_bytes])
            if child is None:
                return path, None, 0
            edge = child.edge
            if not units.startswith(edge, at):
                return path, child, first_difference(edge, units, at, page_bytes)
            at += len(edge)
            path.append(child)
            node = child

    def touch(self, end: Node | None, now: float) -> None:
        """Every node on the path to `end` was used at `now`. O(nodes on the path)."""
        while end is not None:
            end.last_used = now
            end = end.parent

    def split(self, node: Node, at: int) -> Node:
        """Cut `node` before its page `at`: a new object takes the first `at` pages and is returned;
        `node` keeps the rest, its children and everything that refers to it. O(pages of the node)."""
        parent = node.parent
        assert parent is not None
        assert 0 < at < node.pages
        page_bytes = self.keys.page_bytes
        device, host = node.lanes
        lanes = (
            device.split(at, self.ledgers[DEVICE]),
            host.split(at, self.ledgers[HOST]) if self.has_host else ABSENT,
        )
        edge, cut = node.edge, at * page_bytes
        upper = Node(edge[:cut], at, node.end - node.pages + at, parent, lanes)
        upper.last_used, upper.hits, upper.detached = node.last_used, node.hits, node.detached
        upper.hashes, node.hashes = node.hashes[: at * 32], node.hashes[at * 32 :]
        node.edge = edge[cut:]
        node.pages -= at
        node.parent = upper
        upper.label, node.label = node.label, node.edge[:page_bytes]
        upper.adopt(node)
        if parent.children.get(upper.label) is node:
            parent.adopt(upper)
        if node.detached:
            self.detached.add(upper)
        else:
            self.nodes += 1
            for tier in LANES:
                self.offer(upper, tier)
                self.offer(node, tier)
        return upper

    def graft(self, parent: Node, edge: bytes, tier: Tier, slots: Slots, now: float) -> Node:
        """A new leaf under `parent`, whose pages are all READY on `tier`. O(pages)."""
        count = len(slots)
        lanes = (Lane(), Lane() if self.has_host else ABSENT)
        node = Node(edge, count, parent.end + count, parent, lanes)
        node.last_used = now
        node.label = edge[: self.keys.page_bytes]
        parent.adopt(node)
        self.nodes += 1
        lane = lanes[tier]
        lane.slots = slots.copy()
        lane.count = count
        self.resident[tier] += count
        self._occupy(node, tier)
        self.victims[tier].push(node)
        return node

    def lengthen(self, node: Node, more: bytes) -> None:
        """Give the leaf `node`, which is whole on the top tier, more pages; the caller attaches their
        slots before the call ends. O(pages of the node)."""
        node.edge += more
        pages = len(more) // self.keys.page_bytes
        node.pages += pages
        node.end += pages
        for lane in node.lanes:
            if lane.slots is not None:
                lane.slots = np.concatenate([lane.slots, np.full(pages, NOWHERE, np.int64)])

    def cut(self, node: Node, pages: int) -> None:
        """Make `node` end after its first `pages` pages; what goes has no slots and no children. A node
        without pages is removed, and so is a root without children. A removed node that is somebody's
        end (a hold for a tier on which it has no page) still leads to its parent. O(pages left)."""
        if pages:
            node.edge = node.edge[: pages * self.keys.page_bytes]
            node.hashes = node.hashes[: pages * 32]
            node.end -= node.pages - pages
            node.pages = pages
            for lane in node.lanes:
                if lane.slots is not None:
                    lane.slots = lane.slots[:pages].copy()
            return
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.label]
        if not any(lane.locks for lane in node.lanes):
            node.parent = None
        self.nodes -= 1
        for tier in LANES:
            self.victims[tier].discard(node)
        self.duplicates.pop(node, None)
        if isinstance(parent, Root) and not parent.children:
            self.roots.pop(parent.namespace, None)

    # -- slots ----------------------------------------------------------------------------------

    def attach(self, node: Node, tier: Tier, low: int, slots: Slots, filling: bool) -> None:
        """Pages `low ..` of `node` get `slots` on `tier`, where they had none; the ledger says already
        that a node owns them. O(pages of the node)."""
        lane, count = node.lane(tier), len(slots)
        was_occupied = lane.count > 0 or lane.below > 0
        if lane.slots is None:
            if count == node.pages:
                lane.slots = slots.copy()
            else:
                lane.slots = np.full(node.pages, NOWHERE, np.int64)
                lane.slots[low : low + count] = slots
        else:
            lane.slots[low : low + count] = slots
        lane.count += count
        if filling:
            lane.filling += count
        self.resident[tier] += count
        if lane.locks:
            self.protected[tier] += count
        if not was_occupied:
            self._occupy(node, tier)

    def detach(self, node: Node, tier: Tier, low: int, high: int) -> Slots:
        """Pages `low .. high` of `node` lose their slots on `tier`, which are returned for the caller
        to drop in the ledger. The pages themselves stay (see `shrink`). O(pages)."""
        lane = node.lane(tier)
        if lane.slots is None:
            return EMPTY
        part = lane.slots[low:high]
        if self.announcer is not None and not node.detached:
            ready = lane.ready_mask(self.ledgers[tier])[low:high]
            self.announcer.removed(node, tier, np.flatnonzero(ready) + low)
        slots = part.copy() if lane.count == node.pages else part[part >= 0]
        count = len(slots)
        if not count:
            return slots
        if lane.filling:
            lane.filling -= int(self.ledgers[tier].book[slots].tobytes().count(NODE_FILLING))
        lane.count -= count
        if lane.count:
            part[:] = NOWHERE
        else:
            lane.slots = None
        if not node.detached:
            self.resident[tier] -= count
            if lane.locks:
                self.protected[tier] -= count
            if not lane.count and not lane.below:
                self._vacate(node, tier)
        self.version += 1
        return slots

    def shrink(self, node: Node) -> None:
        """Cut off the tail pages of `node` that are nowhere any more (I2). O(pages)."""
        keep = 0
        for lane in node.lanes:
            if lane.count == node.pages:
                return
            if lane.slots is not None:
                keep = max(keep, int(np.flatnonzero(lane.slots >= 0)[-1]) + 1)
        if keep < node.pages:
            self.cut(node, keep)

    def announce(self, node: Node, tier: Tier, low: int, high: int) -> None:
        """Pages `low .. high` of `node` have become READY on `tier`."""
        if self.announcer is not None and not node.detached:
            self.announcer.stored(node, tier, np.arange(low, high))

    def unlink(self, node: Node, lane: Lane) -> None:
        """Remove a leaf that is whole on device, where there is neither a host tier nor a journal: what
        `detach` and `shrink` would do step by step. The caller has its slots and calls `unlinked`."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.label]
        node.parent = lane.slots = None
        lane.count = 0
        above = parent.device
        above.below -= 1
        if not above.below:
            if above.count:
                self.offer(parent, DEVICE)
            elif isinstance(parent, Root):
                del self.roots[parent.namespace]

    def unlinked(self, nodes: int, pages: int) -> None:
        """Count what `unlink` has removed."""
        self.nodes -= nodes
        self.resident[DEVICE] -= pages
        self.version += 1

    def drop(self, tier: Tier, slots: Slots) -> int:
        """The tree lets go of `slots`; returns how many are free at once."""
        return self.ledgers[tier].drop(slots)

    def _occupy(self, node: Node, tier: Tier) -> None:
        parent = node.parent
        while parent is not None:
            lane = parent.lane(tier)
            lane.below += 1
            if lane.count or lane.below > 1:
                return
            parent = parent.parent

    def _vacate(self, node: Node, tier: Tier) -> None:
        parent = node.parent
        while parent is not None:
            lane = parent.lane(tier)
            lane.below -= 1
            if lane.count:
                if not lane.below:
                    self.offer(parent, tier)
                return
            if lane.below:
                return
            parent = parent.parent

    # -- locks and candidates ---------------------------------------------------------------------

    def offer(self, node: Node, tier: Tier) -> None:
        """Enter `node` as a candidate for eviction from `tier` if it has become one (I7). O(log n)."""
        lane = node.lane(tier)
        if lane.locks or not lane.count or node.detached:
            return
        if not lane.below and not lane.ticket:
            self.victims[tier].push(node)
        if tier == HOST and not self.host_prefix_closed and node.device.count:
            self.duplicates[node] = None

    def hold(self, end: Node, tier: Tier, floor: int = 0) -> Hold:
        """Lock every node from `end` up to the one with page `floor` for `tier`. O(nodes on the way).

        The hold remembers where the topmost of them starts, so that it finds the same pages whatever is
        split meanwhile."""
        node: Node | None = end
        protected = start = 0
        while node is not None and node.end > floor:
            lane = node.lane(tier)
            if not lane.locks:
                protected += lane.count
            lane.locks += 1
            start = node.end - node.pages
            node = node.parent
        self.protected[tier] += protected
        return Hold(end, tier, start)

    def unhold(self, hold: Hold) -> None:
        """Undo `hold`, wherever splits have moved its nodes."""
        tier, floor = hold.lane, hold.floor
        node: Node | None = hold.end
        while node is not None and node.end > floor:
            lane, parent = node.lane(tier), node.parent
            lane.locks -= 1
            if not lane.locks:
                if node.detached:
                    self._let_go(node)
                else:
                    self.protected[tier] -= lane.count
                    self.offer(node, tier)
            node = parent

    def detach_subtree(self, root: Node) -> None:
        """Take everything under `root` out of the tree. What nobody holds is freed; held nodes keep
        their slots until their last hold goes. O(nodes)."""
        nodes = list(subtree(root))
        for node in reversed(nodes):
            for tier in LANES:
                lane = node.lane(tier)
                if self.announcer is not None and lane.slots is not None:
                    self.announcer.removed(node, tier, np.flatnonzero(lane.ready_mask(self.ledgers[tier])))
                self.resident[tier] -= lane.count
                if lane.locks:
                    self.protected[tier] -= lane.count
                self.victims[tier].discard(node)
            self.duplicates.pop(node, None)
            node.detached = True
        self.nodes -= len(nodes)
        self.version += 1
        self.detached.update(nodes)
        for node in nodes:
            self._let_go(node)
        root.children = NO_CHILDREN

    def _let_go(self, node: Node) -> None:
        """Free what nobody holds of a detached node, and forget the node when that was the last."""
        if node not in self.detached:
            return
        for tier in LANES:
            if not node.lane(tier).locks:
                slots = self.detach(node, tier, 0, node.pages)
                if len(slots):
                    self.drop(tier, slots)
        if not any(lane.locks for lane in node.lanes):
            self.detached.discard(node)
            node.children = NO_CHILDREN


EMPTY: Slots = np.empty(0, np.int64)
