"""The slots of the tree's nodes and everything that must stay true when they change.

    attach, detach     a page gets or loses its slot on a tier; what partial kinds have there goes along
    hold, unhold       nobody may take what is on this path
    offer, revalue     who may be evicted, and who first

FULL is the spine: its lanes, one per in-memory tier, decide which pages exist at all (I2). `Radix` adds
the structure: which node is where.
"""

from __future__ import annotations

from collections import OrderedDict
from operator import attrgetter, itemgetter

import numpy as np

from ..types import Slots, Tier
from .journal import Announcer, Journal
from .key import KeyMaker
from .ledger import NODE_FILLING, Ledger
from .node import ABSENT, NO_CHILDREN, NOWHERE, UNKNOWN, Hold, Node, Root
from .pagehash import PageHashes
from .partial import COLD, EMPTY, Partial, boundary
from .victims import Policy, Victims

DEVICE, HOST = Tier.DEVICE, Tier.HOST
LANES = (DEVICE, HOST)


class Holdings:
    """Slots, locks and candidates of all nodes. Owned by one thread; no I/O, no clock."""

    def __init__(
        self,
        keys: KeyMaker,
        ledgers: tuple[Ledger, Ledger],
        policy: Policy,
        host_prefix_closed: bool,
        fingerprint: bytes,
        journal: Journal | None,
        partials: tuple[Partial, ...] = (),
    ) -> None:
        self.keys = keys
        self.ledgers = ledgers
        self.partials = partials
        self._blank = (ABSENT,) * (2 * len(partials))
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
        self.victims = (self._candidates(DEVICE), self._candidates(HOST))
        self.duplicates: OrderedDict[Node, None] = OrderedDict()
        self.detached: set[Node] = set()
        for partial in partials:
            partial.announcer = self.announcer

    def _candidates(self, tier: Tier) -> Victims:
        score = self.policy.score

        def dead_first(node: Node) -> float:
            if not node.partial.dead:
                return score(node)
            return COLD if self.dead_on(node, tier) else score(node)

        lane_of = attrgetter("host" if tier else "device")
        return Victims(lane_of, dead_first if self.partials else score)

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
        if self.partials and lane.ticket:
            self.victims[tier].refresh(node)
        if not was_occupied:
            self._occupy(node, tier)

    def detach(self, node: Node, tier: Tier, low: int, high: int, replaced: bool = False) -> Slots:
        """Pages `low .. high` of `node` lose their slots on `tier`, which are returned for the caller
        to drop in the ledger. What partial kinds have there goes along, unless the slots are `replaced`
        at once. The pages themselves stay (see `shrink`). O(pages)."""
        lane = node.lane(tier)
        if self.partials and not replaced and not node.detached:
            self._cascade(node, tier, low, high)
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

    def _cascade(self, node: Node, tier: Tier, low: int, high: int) -> None:
        """Partial kinds leave device with FULL, and host unless FULL is still on device."""
        if tier == HOST:
            low = max(low, node.device.count)
        gone = [kind.let_go(node, tier, low, high) for kind in self.partials] if low < high else []
        if any(gone):
            self.revalue([(node, node.start + high - 1)])

    def announce(self, node: Node, tier: Tier, low: int, high: int) -> None:
        """Pages `low .. high` of `node` have become READY on `tier`."""
        if self.announcer is not None and not node.detached:
            self.announcer.stored(node, tier, np.arange(low, high))

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

    # -- candidates -----------------------------------------------------------------------------

    def offer(self, node: Node, tier: Tier) -> None:
        """Enter `node` as a candidate for eviction from `tier` if it has become one (I7). O(log n)."""
        lane = node.lane(tier)
        if lane.locks or not lane.count or node.detached:
            return
        if not lane.below and not lane.ticket:
            self.victims[tier].push(node)
        if tier == HOST and not self.host_prefix_closed and node.device.count:
            self.duplicates[node] = None

    def alive(self, node: Node) -> int:
        """How many pages of `node` are before the last boundary in it that every kind can continue from;
        those behind it are dead: no match can end there. All, where the path goes on behind it: what is
        there is dead first. O(1) unless something has changed."""
        partial = node.partial
        if not partial or node.children:
            return node.pages
        if partial.dead == UNKNOWN:
            partial.dead = node.end - boundary(self.partials, node, node.end, False, node.start)
        return node.pages - partial.dead

    def dead_on(self, node: Node, tier: Tier) -> int:
        """How many of the dead pages of `node` have slots on `tier`."""
        alive, lane = self.alive(node), node.lane(tier)
        if alive == node.pages or lane.slots is None:
            return 0
        return int(np.count_nonzero(lane.slots[alive:] >= 0))

    def parted(self, node: Node) -> None:
        """`node` has a child more or less, and may be a leaf, or passed by, from now on."""
        if len(node.children) < 2 and node.pages:
            self.reassess(node)

    def reassess(self, node: Node) -> None:
        """`node` has another end: what is dead, cold or unsaved in it may be another now. O(log n)."""
        node.partial.dead = UNKNOWN
        node.partial.unsaved = True
        for tier in LANES:
            if node.lane(tier).ticket:
                self.victims[tier].refresh(node)
            for kind in self.partials:
                if kind.lane(node, tier).ticket:
                    kind.victims[tier].refresh(node)

    def revalue(self, changed: list[tuple[Node, int]]) -> None:
        """Partial kinds have gained or lost pages of these nodes, the last one of each at the depth beside
        it: what can be continued from may be another now, there and in nodes behind them. O(nodes that look
        back so far)."""
        seen: dict[Node, int] = {}
        for first, page in sorted(changed, key=itemgetter(1), reverse=True):
            todo = [first]
            while todo:
                node = todo.pop()
                if seen.get(node, -1) >= page:
                    continue
                seen[node] = page
                node.partial.dead = UNKNOWN
                if node.children:
                    todo += [child for child in node.children.values() if self._looks_back(child, page)]
                    continue
                for tier in LANES:
                    if node.lane(tier).ticket:
                        self.victims[tier].refresh(node)

    def _looks_back(self, node: Node, page: int) -> bool:
        return any(kind.since(node.start + 1) <= page for kind in self.partials)

    # -- locks ----------------------------------------------------------------------------------

    def hold(self, end: Node, tier: Tier, floor: int = 0) -> Hold:
        """Lock every node from `end` up to the one with page `floor` for `tier`. O(nodes on the way).

        The hold remembers where the topmost of them starts, so that it finds the same pages whatever is
        split meanwhile."""
        node: Node | None = end
        protected, start = 0, end.end
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
