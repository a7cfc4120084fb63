"""One partial kind in the tree: its books, its candidates, and where on a path it can continue.

    FULL     ██████████████████████   the spine: every page of a node, locked by node
    partial  ····██░░░░██·····█████   a slot where there is one; pinned by slot, evicted from anywhere

A page of a partial kind is on device only where FULL is on device, and READY there only where FULL is
READY; on host only where FULL is in memory at all: where FULL goes, the others go along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..components.base import Component
from ..types import Slots, Tier
from .ledger import NODE_FILLING, NODE_READY, Ledger
from .node import ABSENT, NOWHERE, UNKNOWN, Lane, Node, located
from .victims import Policy, Victims

if TYPE_CHECKING:
    from .journal import Announcer

DEVICE, HOST = Tier.DEVICE, Tier.HOST
COLD = float("-inf")
"""The score of a node that has pages to let go before any other."""
PASSED_BY = 1e12
"""So much older a node counts whose window or state the path has passed by: it goes on in one way only,
whoever comes again goes on from behind, and every match makes the node as young as what is behind it."""


@dataclass(slots=True)
class KindCounters:
    """Running totals of one partial kind, in pages."""

    evicted: list[int] = field(default_factory=lambda: [0, 0])
    """Pages that left device, host; those that went along with FULL included."""
    dropped: int = 0
    """Pages worth keeping that left device under write_back because host had no room."""
    backed_up: int = 0
    backups_dropped: int = 0
    loaded_back: int = 0
    persisted: int = 0
    """Pages that storage has taken or had already."""
    prefetched: int = 0
    recovered: int = 0
    """Pages that an insert brought to where FULL was already."""
    declined: int = 0
    """Pages off the kind's grid, or above its number per path, that were let go."""


class Partial:
    """One partial kind. `index` is its place among them; `ledgers` its books on device and host."""

    __slots__ = (
        "announcer",
        "counters",
        "grid",
        "index",
        "kind",
        "ledgers",
        "page_size",
        "per_path",
        "resident",
        "rules",
        "victims",
    )

    def __init__(
        self,
        index: int,
        rules: Component,
        page_size: int,
        ledgers: tuple[Ledger, Ledger],
        policy: Policy,
    ) -> None:
        self.index = index
        self.rules = rules
        self.kind = rules.kind
        self.page_size = page_size
        self.grid = rules.grid(page_size)
        self.per_path = rules.per_path
        self.ledgers = ledgers
        self.resident = [0, 0]
        self.counters = KindCounters()
        self.announcer: Announcer | None = None
        self.victims = (self._candidates(DEVICE, policy), self._candidates(HOST, policy))

    def _candidates(self, tier: Tier, policy: Policy) -> Victims:
        at = itemgetter(2 * self.index + tier)

        def lane_of(node: Node) -> Lane:
            lane: Lane = at(node.partial)
            return lane

        def score(node: Node) -> float:
            pages = self.evictable(node, tier)
            if self.cold(node, pages).any():
                return COLD
            return policy.score(node) - PASSED_BY if self._passed_by(node) else policy.score(node)

        return Victims(lane_of, score, lazy=True)

    def _passed_by(self, node: Node) -> bool:
        """Whether the path goes on in one way only, and its next end does not look back into `node`."""
        if len(node.children) != 1:
            return False
        (child,) = node.children.values()
        return self.since(child.end) >= node.end

    # -- looking ----------------------------------------------------------------------------------

    def lane(self, node: Node, tier: int) -> Lane:
        """The lane of `node` on `tier`."""
        return node.partial[2 * self.index + tier]

    def since(self, boundary: int) -> int:
        """The first page that continuing at `boundary` needs."""
        return self.rules.since(boundary, self.page_size) if boundary else 0

    def needed(self, boundary: int) -> Slots:
        """The pages (ascending depths) that continuing at `boundary` needs."""
        return np.arange(self.since(boundary), boundary)

    def kept(self, node: Node, pages: Slots) -> NDArray[np.bool_]:
        """Which of these pages (indices inside `node`) are worth a place on host."""
        return self.rules.kept(pages + node.start, node.end, self.page_size)

    def cold(self, node: Node, pages: Slots) -> NDArray[np.bool_]:
        """Which of these pages (indices inside `node`, all that may go) go before any other node's."""
        return self.rules.cold(pages + node.start, node.end, self.page_size)

    def evictable(self, node: Node, tier: Tier) -> Slots:
        """Indices of the pages of `node` that may go from `tier`: READY and not pinned (I7)."""
        lane, ledger = self.lane(node, tier), self.ledgers[tier]
        if lane.slots is None:
            return EMPTY
        there = np.flatnonzero(lane.slots >= 0)
        slots = lane.slots[there]
        free = ledger.pins[slots] == 0
        if lane.filling:
            free &= ledger.book[slots] == NODE_READY
        pages: Slots = there[free]
        return pages

    def on(self, end: Node, tier: Tier, pages: Slots, filling: bool = False) -> Slots:
        """The READY (or `filling`: FILLING) slot on `tier` of each of `pages` (ascending depths) of the path
        to `end`; NOWHERE where there is none. O(nodes + pages)."""
        found = np.full(len(pages), NOWHERE, np.int64)
        for node, inside, which in located(end, pages):
            lane = self.lane(node, tier)
            if lane.slots is not None:
                slots = lane.slots[inside]
                if lane.filling and not filling:
                    slots[self.ledgers[tier].book[slots] != NODE_READY] = NOWHERE
                found[which] = slots
        return found

    def deepest(self, end: Node, limit: int, device_only: bool, floor: int = 0) -> int:
        """The deepest boundary in (floor, limit] of the path to `end` that this kind can continue from,
        on device or in memory at large, counting READY pages; `floor` if there is none. O(nodes looked
        at + pages of those that are not whole)."""
        if self._there_at(end, limit):
            return limit
        boundary = need = 0
        node: Node | None = end
        while node is not None and node.pages:
            start = node.end - node.pages
            high = min(node.end, limit)
            if high > start:
                there = self._there(node, device_only)
                if there is None:
                    boundary = 0
                elif isinstance(there, bool):
                    if not boundary:
                        boundary, need = high, self.since(high)
                    if need >= start:
                        break
                else:
                    boundary, need, found = self._scan(there[: high - start], start, boundary, need)
                    if found:
                        break
                if start <= floor and boundary <= floor:
                    return floor
            node = node.parent
        return max(boundary, floor)

    def _there_at(self, node: Node, limit: int) -> bool:
        """Whether all that continuing at `limit` needs is on device in `node` itself: the usual case, found
        quickly."""
        lane = node.partial[2 * self.index]
        slots, start = lane.slots, node.end - node.pages
        if slots is None or lane.filling or not start < limit <= node.end:
            return False
        need = self.rules.since(limit, self.page_size)
        if need == limit - 1:
            return slots.item(need - start) >= 0
        return need >= start and (lane.count == node.pages or slots[need - start : limit - start].min() >= 0)

    def _there(self, node: Node, device_only: bool) -> NDArray[np.bool_] | bool | None:
        """Which pages of `node` are READY; True: all, None: none."""
        at, pages = 2 * self.index, node.pages
        device = node.partial[at]
        if device.count == pages and not device.filling:
            return True
        here = device.ready_mask(self.ledgers[DEVICE]) if device.slots is not None else None
        host = node.partial[at + 1]
        if device_only or host.slots is None:
            return here
        if host.count == pages and not host.filling:
            return True
        there = host.ready_mask(self.ledgers[HOST])
        return there if here is None else here | there

    def _scan(self, there: NDArray[np.bool_], start: int, boundary: int, need: int) -> tuple[int, int, bool]:
        """Go backwards through the runs of pages of one node. `boundary` ends the run that reaches down
        to here (0: none) and needs pages from `need` on. Returns both as they are at the node's first
        page, and whether the boundary is found valid.

        In a run that begins behind `need` no boundary is valid: each needs the page before the run."""
        present, missing = np.flatnonzero(there), np.flatnonzero(~there)
        at = len(there)
        while at:
            if not boundary:
                last = int(np.searchsorted(present, at)) - 1
                if last < 0:
                    break
                at = int(present[last]) + 1
                boundary, need = start + at, self.since(start + at)
            last = int(np.searchsorted(missing, at)) - 1
            begin = int(missing[last]) + 1 if last >= 0 else 0
            if need >= start + begin:
                return boundary, need, True
            if last < 0:
                break
            boundary, at = 0, begin - 1
        return boundary, need, False

    def last_run(self, there: NDArray[np.bool_]) -> int:
        """The deepest boundary that this kind can continue from if these are its pages; 0 if none."""
        found, _, valid = self._scan(there, 0, 0, 0)
        return found if valid else 0

    def in_memory(self, end: Node | None, depth: int, size: int) -> NDArray[np.bool_]:
        """Which of the first `depth` pages of the path to `end` are READY on device or host; `size`
        entries, at least `depth`, the further ones False. O(nodes + size)."""
        there = np.zeros(size, bool)
        if end is not None:
            pages = np.arange(depth)
            for tier in (DEVICE, HOST):
                there[:depth] |= self.on(end, tier, pages) >= 0
        return there

    # -- slots ------------------------------------------------------------------------------------

    def attach(self, node: Node, tier: Tier, inside: Slots, slots: Slots, filling: bool) -> None:
        """Pages `inside` of `node` get `slots` on `tier`, where they had none; the ledger says already
        that a node owns them. O(pages of the node)."""
        lane = self.lane(node, tier)
        if lane is ABSENT:
            lane = node.partial[2 * self.index + tier] = Lane()
        if lane.slots is not None:
            lane.slots[inside] = slots
        elif len(slots) == node.pages:
            lane.slots = slots.copy()
        else:
            lane.slots = np.empty(node.pages, np.int64)
            lane.slots.fill(NOWHERE)
            lane.slots[inside] = slots
        lane.count += len(slots)
        self.resident[tier] += len(slots)
        if filling:
            lane.filling += len(slots)
        else:
            self.arrived(node, tier, inside)

    def was_split(self, upper: Node, lower: Node) -> None:
        """Both parts of a node are candidates by themselves, and what was cold may be warm. O(log n)."""
        for tier in (DEVICE, HOST):
            for node in (upper, lower):
                if self.lane(node, tier).count and not node.detached:
                    self.victims[tier].refresh(node)

    def arrived(self, node: Node, tier: Tier, inside: Slots) -> None:
        """Pages `inside` of `node`, which have slots on `tier`, are READY now."""
        node.partial.dead = UNKNOWN
        if tier == DEVICE:
            node.partial.unsaved = True
        if self.announcer is not None:
            self.announcer.stored(node, tier, inside, self.kind)
        self.victims[tier].refresh(node)

    def detach(self, node: Node, tier: Tier, inside: Slots) -> Slots:
        """Pages `inside` of `node`, all of which have slots on `tier`, lose them; returned for the caller
        to drop. The node leaves the candidates with its last page. O(pages)."""
        lane, ledger = self.lane(node, tier), self.ledgers[tier]
        assert lane.slots is not None
        slots = lane.slots[inside]
        ready = ledger.book[slots] == NODE_READY
        if self.announcer is not None:
            self.announcer.removed(node, tier, inside[ready], self.kind)
        lane.filling -= int(np.count_nonzero(ledger.book[slots] == NODE_FILLING)) if lane.filling else 0
        lane.slots[inside] = NOWHERE
        lane.count -= len(slots)
        self.resident[tier] -= len(slots)
        if not lane.count:
            lane.slots = None
            self.victims[tier].discard(node)
        node.partial.dead = UNKNOWN
        if tier == HOST:
            node.partial.unsaved = True
        return slots

    def let_go(self, node: Node, tier: Tier, low: int = 0, high: int | None = None) -> int:
        """Free what pages `low .. high` of `node` have on `tier`. Returns how many there were. O(pages)."""
        lane = self.lane(node, tier)
        if lane.slots is None:
            return 0
        inside = np.flatnonzero(lane.slots[low:high] >= 0) + low
        if len(inside):
            slots = self.detach(node, tier, inside)
            self.counters.evicted[tier] += len(slots)
            self.ledgers[tier].drop(slots)
        return len(inside)

    def offer_path(self, end: Node | None, pages: Slots) -> None:
        """Somebody has unpinned `pages` (ascending depths) of the path to `end`: they may be evicted
        again. O(nodes from the first of them on)."""
        if end is None or not len(pages):
            return
        first = pages.item(0)
        node: Node | None = end
        while node is not None and node.end > first:
            if not node.detached and node.pages:
                for tier in (DEVICE, HOST):
                    if self.lane(node, tier).count:
                        self.victims[tier].refresh(node)
            node = node.parent

    def protected(self, tier: Tier) -> int:
        """How many pages on `tier` somebody has pinned. O(1)."""
        return self.ledgers[tier].pinned

    def room(self, tier: Tier) -> int:
        """How many slots on `tier` are free or can become so: nobody has pinned their pages. O(1)."""
        ledger = self.ledgers[tier]
        return ledger.free + self.resident[tier] - ledger.pinned


def boundary(partials: Sequence[Partial], end: Node, limit: int, device_only: bool, floor: int = 0) -> int:
    """The deepest boundary in (floor, limit] of the path to `end` that every partial kind can continue
    from (I8); `floor` if there is none. Each kind in turn lowers it until all agree."""
    if len(partials) == 1:
        return partials[0].deepest(end, limit, device_only, floor)
    agreed = at = 0
    while limit > floor and agreed < len(partials):
        lower = partials[at].deepest(end, limit, device_only, floor)
        agreed = agreed + 1 if lower == limit else 1
        limit, at = lower, (at + 1) % len(partials)
    return limit


def boundary_of(there: Sequence[tuple[Partial, NDArray[np.bool_]]], limit: int) -> int:
    """`boundary` for a prompt whose pages of each kind are there or not as the arrays say, one entry per
    page, `limit` or more. O(pages)."""
    agreed = at = 0
    while limit and agreed < len(there):
        kind, mask = there[at]
        lower = kind.last_run(mask[:limit])
        agreed = agreed + 1 if lower == limit else 1
        limit, at = lower, (at + 1) % len(there)
    return limit


EMPTY: Slots = np.empty(0, np.int64)
