"""Making room for partial kinds: single pages go, from anywhere, and leave a tombstone.

    candidates   nodes with cold pages first, then by the policy; inside a node front to back
    device       write_back: what is worth keeping is copied to host first, if host has room
    host         gone

A node stays when its last page of a partial kind goes: FULL decides what is in the tree.
"""

from __future__ import annotations

import numpy as np

from ..types import Slots, Tier
from .node import NOWHERE, Node, located
from .operation import Operation, Operations, Purpose
from .partial import DEVICE, HOST, Partial
from .radix import Radix


class Thinner:
    """Evicts partial kinds from either in-memory tier. `write_back`: to host before they go."""

    __slots__ = ("_operations", "_radix", "_write_back")

    def __init__(self, radix: Radix, operations: Operations, write_back: bool) -> None:
        self._radix = radix
        self._operations = operations
        self._write_back = write_back

    def evict(self, kind: Partial, tier: Tier, count: int, now: float) -> tuple[int, int]:
        """Make `count` slots of `kind` on `tier` free. Returns (slots free now that were not, pages being
        copied away whose slots follow). O(pages + candidates met · (log n + pages of each))."""
        if count <= 0:
            return 0, 0
        if tier == DEVICE and self._write_back and self._radix.has_host:
            return self._demote(kind, count, now)
        return self._drop(kind, tier, count), 0

    def room_on_host(self, kind: Partial, count: int) -> int:
        """How many slots of `kind` host has free, after evicting there towards `count`."""
        ledger = kind.ledgers[HOST]
        if ledger.free < count:
            self._drop(kind, HOST, count - ledger.free)
        return ledger.free

    def _drop(self, kind: Partial, tier: Tier, count: int) -> int:
        freed = 0
        for node, lane in kind.victims[tier].candidates():
            pages = self._chosen(kind, node, tier, count - freed)
            if not len(pages):
                continue
            freed += self._detach(kind, node, tier, pages)
            if lane.count:
                kind.victims[tier].refresh(node)
            if freed >= count:
                break
        return freed

    @staticmethod
    def _chosen(kind: Partial, node: Node, tier: Tier, most: int) -> Slots:
        """The pages of `node` to go first: its cold ones, or if there are none any; front to back."""
        pages = kind.evictable(node, tier)
        cold = pages[kind.cold(node, pages)]
        return cold[:most] if len(cold) else pages[:most]

    def _detach(self, kind: Partial, node: Node, tier: Tier, pages: Slots) -> int:
        slots = kind.detach(node, tier, pages)
        self._radix.revalue([(node, node.start + int(pages[-1]))])
        self._radix.version += 1
        kind.counters.evicted[tier] += len(slots)
        return kind.ledgers[tier].drop(slots)

    # -- device under write_back --------------------------------------------------------------------

    def _demote(self, kind: Partial, count: int, now: float) -> tuple[int, int]:
        freed, pending = 0, self._leaving(kind)
        if pending >= count:
            return 0, pending
        waiting: Node | None = None
        breaker = self._operations.breakers.to_host
        for node, lane in kind.victims[DEVICE].candidates():
            pages = self._chosen(kind, node, DEVICE, count - freed - pending)
            if not len(pages):
                continue
            bare = self._bare(kind, node, pages)
            if len(bare) and self._operations.full:
                waiting = node
                break
            copied = self._copy_out(kind, node, bare, now)
            if len(bare) and not copied and pending and breaker.admits(now):
                waiting = node
                break
            kind.counters.dropped += len(bare) - copied
            gone = np.setdiff1d(pages, bare[len(bare) - copied :], assume_unique=True)
            if len(gone):
                freed += self._detach(kind, node, DEVICE, gone)
            pending += copied
            if lane.count:
                kind.victims[DEVICE].refresh(node)
            if freed + pending >= count:
                break
        if waiting is not None:
            kind.victims[DEVICE].refresh(waiting)
        return freed, pending

    def _leaving(self, kind: Partial) -> int:
        """Pages of `kind` on their way to host whose device slots follow. O(in flight)."""
        flying = self._operations.in_flight.values()
        return sum(
            len(part.pages)
            for each in flying
            if each.purpose is Purpose.DEMOTE and not each.late
            for part in each.parts
            if part.kind is kind
        )

    @staticmethod
    def _bare(kind: Partial, node: Node, pages: Slots) -> Slots:
        """Those of `pages` that are worth keeping and are not on host."""
        host = kind.lane(node, HOST).slots
        bare = pages if host is None else pages[host[pages] == NOWHERE]
        return bare[kind.kept(node, bare)]

    def _copy_out(self, kind: Partial, node: Node, pages: Slots, now: float) -> int:
        """Start copying as many of the last of `pages` to host as find room there. Returns how many."""
        if not len(pages) or not self._operations.breakers.to_host.admits(now):
            return 0
        radix = self._radix
        hold = radix.hold(node, DEVICE)
        room = min(self.room_on_host(kind, len(pages)), len(pages))
        if not room:
            radix.unhold(hold)
            return 0
        deep = pages[-room:] + node.start
        holds = [hold, radix.hold(node, HOST, int(deep[0]))]
        whole = (node, node.end, 0)
        self._operations.copy(Purpose.DEMOTE, whole, (DEVICE, HOST), holds, now, [(kind, deep)])
        return room

    def finish_demotion(self, operation: Operation) -> None:
        """The bytes are on host: the device slots go, unless somebody relies on them again (I10)."""
        assert operation.end is not None
        for part in operation.parts:
            ledger = part.kind.ledgers[DEVICE]
            for node, inside, which in located(operation.end, part.pages):
                slots = part.kind.lane(node, DEVICE).slots
                if slots is None or node.detached:
                    continue
                source = part.source[which]
                ours = inside[(slots[inside] == source) & (ledger.pins[source] == 0)]
                if len(ours):
                    self._detach(part.kind, node, DEVICE, ours)
