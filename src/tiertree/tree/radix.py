"""The compressed radix tree: which node is where.

    roots["tenant"] ──0..4──▶ n ──4..10──▶ n      an edge is one `bytes` object of whole pages
                        └─────4..6───▶ n          siblings differ in their first page (I1)

An edge is compared with one call in C (`units.startswith(edge, at)`, which copies nothing); where it
differs is found by one vector operation; a child is found by its first page. This file and
`holdings.py` change the tree in small steps, each of which keeps its books: split, graft, cut, attach
and detach slots, hold and unhold. Which step to take when is decided by others (`insert`, `evict`, …).
"""

from __future__ import annotations

import numpy as np

from ..types import Slots, Tier
from .holdings import DEVICE, HOST, LANES, Holdings
from .key import Key, first_difference
from .node import ABSENT, NO_CHILDREN, NO_PARTIALS, NOWHERE, UNKNOWN, Lane, Node, Partials, Root, subtree
from .partial import EMPTY

__all__ = ["DEVICE", "EMPTY", "HOST", "LANES", "Radix"]


class Radix(Holdings):
    """The nodes of all namespaces. Owned by one thread; no I/O, no clock."""

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

    def find(self, key: Key) -> tuple[Node | None, int]:
        """The deepest node that has pages of `key` (None: there is none), and how many pages of `key` are
        in the tree. Changes nothing. O(pages + nodes)."""
        path, partial, inside = self.walk(key)
        if partial is not None:
            return partial, partial.start + inside
        return (path[-1], path[-1].end) if path else (None, 0)

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
        partial = self._split_partials(node, at) if self.partials else NO_PARTIALS
        upper = Node(edge[:cut], at, node.end - node.pages + at, parent, lanes, partial)
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
            for partial_kind in self.partials:
                partial_kind.was_split(upper, node)
        return upper

    def _split_partials(self, node: Node, at: int) -> Partials:
        lower = node.partial
        upper = Partials(self._blank)
        for kind in self.partials:
            for tier in LANES:
                lane = kind.lane(node, tier)
                if lane.slots is not None:
                    above = lane.split(at, kind.ledgers[tier])
                    above.below = 0
                    upper[2 * kind.index + tier] = above
        upper.unsaved = True
        lower.dead = UNKNOWN
        return upper

    def graft(self, parent: Node, edge: bytes, tier: Tier, slots: Slots, now: float) -> Node:
        """A new leaf under `parent`, whose pages are all READY on `tier`. Where there are partial kinds the
        caller offers it for eviction from device once it has theirs. O(pages)."""
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
        if self.partials:
            node.partial = Partials(self._blank)
            self.parted(parent)
            if tier == DEVICE:
                return node
        self.victims[tier].push(node)
        return node

    def lengthen(self, node: Node, more: bytes) -> None:
        """Give the leaf `node`, which is whole on the top tier, more pages; the caller attaches their
        slots before the call ends. O(pages of the node)."""
        node.edge += more
        pages = len(more) // self.keys.page_bytes
        node.pages += pages
        node.end += pages
        for lane in (*node.lanes, *node.partial):
            if lane.slots is not None:
                lane.slots = np.concatenate([lane.slots, np.full(pages, NOWHERE, np.int64)])
        if self.partials:
            self.reassess(node)
            if node.parent is not None:
                self.parted(node.parent)

    def cut(self, node: Node, pages: int) -> None:
        """Make `node` end after its first `pages` pages; what goes has no slots and no children. A node
        without pages is removed, and so is a root without children. A removed node that is somebody's
        end (a hold for a tier on which it has no page) still leads to its parent. What partial kinds have
        on the pages that go, goes. O(pages)."""
        for kind in self.partials:
            for tier in LANES:
                kind.let_go(node, tier, pages)
        if pages:
            node.edge = node.edge[: pages * self.keys.page_bytes]
            node.hashes = node.hashes[: pages * 32]
            node.end -= node.pages - pages
            node.pages = pages
            for lane in (*node.lanes, *node.partial):
                if lane.slots is not None:
                    lane.slots = lane.slots[:pages].copy()
            if self.partials:
                self.reassess(node)
            return
        parent = node.parent
        assert parent is not None
        assert not node.children
        del parent.children[node.label]
        if self.partials:
            self.parted(parent)
        if not any(lane.locks for lane in node.lanes):
            node.parent = None
        self.nodes -= 1
        for tier in LANES:
            self.victims[tier].discard(node)
        self.duplicates.pop(node, None)
        if isinstance(parent, Root) and not parent.children:
            self.roots.pop(parent.namespace, None)

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

    def unlink(self, node: Node, lane: Lane, along: list[list[Slots]]) -> None:
        """Remove a leaf that is whole on device, where there is neither a host tier nor a journal: what
        `detach` and `shrink` would do step by step. The caller has its slots and calls `unlinked`; what
        partial kinds have there goes into `along`."""
        parent = node.parent
        assert parent is not None
        del parent.children[node.label]
        node.parent = lane.slots = None
        lane.count = 0
        if self.partials:
            self._unlink_partials(node, parent, along)
        above = parent.device
        above.below -= 1
        if not above.below:
            if above.count:
                self.offer(parent, DEVICE)
            elif isinstance(parent, Root):
                del self.roots[parent.namespace]

    def _unlink_partials(self, node: Node, parent: Node, along: list[list[Slots]]) -> None:
        self.parted(parent)
        for kind in self.partials:
            lane = node.partial[2 * kind.index]
            if lane.slots is not None:
                along[kind.index].append(lane.slots)
                lane.slots = None
                kind.victims[DEVICE].discard(node)

    def unlinked(self, nodes: int, pages: int, along: list[list[Slots]]) -> None:
        """Count what `unlink` has removed, and free what went `along`."""
        for kind, parts in zip(self.partials, along, strict=True):
            if parts:
                slots = np.concatenate(parts)
                slots = slots[slots >= 0]
                kind.resident[DEVICE] -= len(slots)
                kind.counters.evicted[DEVICE] += len(slots)
                kind.ledgers[DEVICE].drop(slots)
        self.nodes -= nodes
        self.resident[DEVICE] -= pages
        self.version += 1

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
            for kind in self.partials:
                for tier in LANES:
                    kind.let_go(node, tier)
            self.duplicates.pop(node, None)
            node.detached = True
        self.nodes -= len(nodes)
        self.version += 1
        self.detached.update(nodes)
        for node in nodes:
            self._let_go(node)
        root.children = NO_CHILDREN
