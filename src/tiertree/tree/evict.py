"""Making room: which pages go, and where to.

    device, host is inclusive (or absent)     device, write_back             host
    ┌──────────────────────────────┐   ┌────────────────────────────┐   ┌─────────────────────────┐
    │ tail of the first candidate  │   │ tail pages also on host: go│   │ write_back: duplicates  │
    │ goes; what is on host stays  │   │ others: copied to host     │   │ then tails of candidates│
    │ in the tree as host-only     │   │ first (pending), or, if    │   └─────────────────────────┘
    └──────────────────────────────┘   │ host has no room, dropped  │
                                       └────────────────────────────┘
A page that is nowhere any more leaves the tree, and by I3, I4 and I7 nothing is behind it.
"""

from __future__ import annotations

import numpy as np

from ..types import Slots, Tier
from .carry import Carrier
from .counters import Counters
from .node import Lane, Node, subtree
from .operation import Operation, Operations, Purpose
from .radix import DEVICE, EMPTY, HOST, LANES, Radix
from .thin import Thinner


class Evictor:
    """Evicts from either in-memory tier. `write_back`: device pages go to host before they go."""

    __slots__ = ("_counters", "_operations", "_radix", "_write_back", "carrier", "thinner")

    def __init__(self, radix: Radix, operations: Operations, counters: Counters, write_back: bool) -> None:
        self._radix = radix
        self._operations = operations
        self._counters = counters
        self._write_back = write_back
        self.thinner = Thinner(radix, operations, write_back)
        self.carrier = Carrier(radix, self.thinner)

    def evict(self, tier: Tier, count: int, now: float) -> tuple[int, int]:
        """Make `count` slots of `tier` free. Returns (slots free now that were not, pages being copied
        away whose slots follow). O(pages + candidates met · log n)."""
        if count <= 0:
            return 0, 0
        if tier == HOST:
            return self._evict_host(count), 0
        if self._write_back and self._radix.has_host:
            return self._demote(count, now)
        return self._evict_device(count), 0

    def room_on_host(self, count: int) -> int:
        """How many slots host has free, after evicting there towards `count`."""
        ledger = self._radix.ledgers[HOST]
        if ledger.free < count:
            self._evict_host(count - ledger.free)
        return ledger.free

    def _evict_device(self, count: int) -> int:
        radix = self._radix
        partials = radix.partials
        alone = not radix.has_host and radix.announcer is None
        gone: list[Slots] = []
        along: list[list[Slots]] = [[] for _ in partials]
        need, removed, whole = count, 0, 0
        for node, lane in radix.victims[DEVICE].candidates():
            resident = lane.count
            dead = radix.dead_on(node, DEVICE) if partials else 0
            if alone and resident <= need and resident == node.pages and (not dead or dead == resident):
                assert lane.slots is not None
                gone.append(lane.slots)
                radix.unlink(node, lane, along)
                removed += 1
                whole += resident
                need -= resident
            else:
                take = min(need, dead or resident)
                gone.append(radix.detach(node, DEVICE, resident - take, resident))
                radix.shrink(node)
                if lane.count:
                    radix.victims[DEVICE].push(node)
                need -= take
            if need <= 0:
                break
        radix.unlinked(removed, whole, along)
        return self._gone(DEVICE, gone)

    def _gone(self, tier: Tier, gone: list[Slots]) -> int:
        if not gone:
            return 0
        slots = np.concatenate(gone)
        self._counters.evicted[tier] += len(slots)
        return self._radix.drop(tier, slots)

    # -- host -------------------------------------------------------------------------------------

    def _evict_host(self, count: int) -> int:
        radix = self._radix
        gone = self._duplicates(count)
        need = count - sum(map(len, gone))
        for node, lane in radix.victims[HOST].candidates() if need > 0 else ():
            gone.append(self._host_tail(node, lane, need))
            need -= len(gone[-1])
            radix.shrink(node)
            if lane.count:
                radix.victims[HOST].push(node)
            if need <= 0:
                break
        return self._gone(HOST, gone)

    def _host_tail(self, node: Node, lane: Lane, need: int) -> Slots:
        assert lane.slots is not None
        resident = np.flatnonzero(lane.slots >= 0)
        dead = self._radix.dead_on(node, HOST)
        low = int(resident[-min(need, dead or len(resident))])
        return self._radix.detach(node, HOST, low, node.pages)

    def _duplicates(self, count: int) -> list[Slots]:
        """Host copies of pages that are READY on device too (I7b); oldest duplicates first."""
        radix = self._radix
        gone: list[Slots] = []
        need = count
        while need > 0 and radix.duplicates:
            node, _ = radix.duplicates.popitem(last=False)
            device, host = node.lanes
            if host.locks or host.slots is None:
                continue
            both = host.slots[: device.ready_prefix(radix.ledgers[DEVICE])] >= 0
            pages = np.flatnonzero(both)
            gone += [radix.detach(node, HOST, page, page + 1) for page in pages[-need:][::-1].tolist()]
            need -= min(len(pages), need)
            if len(pages) and host.count:
                radix.offer(node, HOST)
        return gone

    # -- device under write_back --------------------------------------------------------------------

    def _demote(self, count: int, now: float) -> tuple[int, int]:
        radix, freed, pending = self._radix, 0, self._leaving()
        if pending >= count:
            return 0, pending
        skipped: list[Node] = []
        breaker = self._operations.breakers.to_host
        for node, lane in radix.victims[DEVICE].candidates():
            if self._operations.full:
                skipped.append(node)
                break
            high = lane.count
            need = count - freed - pending
            if dead := radix.dead_on(node, DEVICE):
                need = min(need, dead)
            backed = min(self._backed_up_tail(node, high), need)
            if backed and self._save_others(node, high - backed, high, now):
                pending += backed
            elif backed:
                freed += self._gone(DEVICE, [radix.detach(node, DEVICE, high - backed, high)])
            else:
                low = max(high - need, self._bare_from(node, high))
                first = self._up_to(node, node.start + low, node.start + high, need)
                well = breaker.admits(now)
                copied = self._copy_out(node, first, node.start + high, now) if well else 0
                pending += copied
                if not copied and pending and well:
                    radix.victims[DEVICE].discard(node)
                    skipped.append(node)
                    break
                if not copied:
                    dropped = self._drop_tail(node, high - 1)
                    freed += dropped
                    if not dropped:
                        radix.victims[DEVICE].discard(node)
                        skipped.append(node)
                        continue
            if node.parent is not None:
                radix.offer(node, DEVICE)
            if freed + pending >= count:
                break
        for node in skipped:
            radix.offer(node, DEVICE)
        return freed, pending

    def _leaving(self) -> int:
        """Pages on their way from device to host whose device slots follow. O(in flight)."""
        flying = self._operations.in_flight.values()
        return sum(each.leaving for each in flying if not each.late)

    def _backed_up_tail(self, node: Node, high: int) -> int:
        """How many pages before page `high` are READY on host, counted backwards."""
        host = node.host
        if host.slots is None:
            return 0
        bare = np.flatnonzero(~host.ready_mask(self._radix.ledgers[HOST])[:high])
        return high - (int(bare[-1]) + 1 if len(bare) else 0)

    def _bare_from(self, node: Node, high: int) -> int:
        """Where the run of pages without a host slot that ends at page `high` begins."""
        host = node.host
        if host.slots is None:
            return 0
        there = np.flatnonzero(host.slots[:high] >= 0)
        return int(there[-1]) + 1 if len(there) else 0

    def _up_to(self, node: Node, first: int, stop: int, need: int) -> int:
        """Where the pages before `stop` that leave together begin: a chain of nodes with one child each,
        none of which the policy would keep longer than the one behind it, goes in one copy."""
        score, at = self._radix.policy.score, node
        while at.start == first and stop - first < need:
            parent = at.parent
            assert parent is not None
            device, host = parent.lanes
            alone = device.below == 1 and not device.locks and not device.filling and not host.count
            if not parent.pages or not alone or score(parent) > score(at):
                break
            first = max(parent.start, stop - need)
            at = parent
        return first

    def _copy_out(self, end: Node, first: int, stop: int, now: float) -> int:
        """Start copying pages `first .. stop` of the path to `end` to host, as many of the last ones as
        find room there. Returns how many."""
        radix, operations = self._radix, self._operations
        hold = radix.hold(end, DEVICE)
        room = min(self.room_on_host(stop - first), stop - first)
        if not room:
            radix.unhold(hold)
            return 0
        first = stop - room
        holds = [hold, radix.hold(end, HOST, first)]
        cargo = self.carrier.cargo(end, first, stop) if radix.partials else ()
        operation = operations.copy(Purpose.DEMOTE, (end, first, room), (DEVICE, HOST), holds, now, cargo)
        operation.leaving = room
        return room

    def _save_others(self, node: Node, low: int, high: int, now: float) -> bool:
        """FULL is on host for pages `low .. high` of `node`: copy there what partial kinds would lose with
        them. Returns whether a copy was started; once it is done the next evict lets these pages go."""
        radix, first, stop = self._radix, node.start + low, node.start + high
        if not node.partial or self._operations.full or not self._operations.breakers.to_host.admits(now):
            return False
        cargo = self.carrier.cargo(node, first, stop)
        if not cargo:
            return False
        holds = [radix.hold(node, DEVICE), radix.hold(node, HOST, first)]
        tiers, pages = (DEVICE, HOST), (node, first, 0)
        operation = self._operations.copy(Purpose.DEMOTE, pages, tiers, holds, now, cargo)
        operation.leaving = high - low
        return True

    def _drop_tail(self, node: Node, page: int) -> int:
        """Drop page `page` of `node`, the last on device, and everything after it. Returns the device
        slots that are free now; 0 if somebody holds one of those pages."""
        radix = self._radix
        after = list(subtree(node))
        if any(lane.locks for each in (node, *after) for lane in each.lanes):
            return 0
        freed = 0
        for each in (*reversed(after), node):
            low = page if each is node else 0
            for tier in LANES:
                slots = radix.detach(each, tier, low, each.pages)
                self._counters.dropped += len(slots)
                free = self._gone(tier, [slots])
                freed += free if tier == DEVICE else 0
            radix.shrink(each)
        return freed

    def finish_demotion(self, operation: Operation) -> None:
        """The bytes are on host: the device slots go, unless somebody wants them again (I10)."""
        radix = self._radix
        assert operation.end is not None
        self.thinner.finish_demotion(operation)
        gone: list[Slots] = []
        node: Node | None = operation.end
        while operation.count and node is not None and node.end > operation.first:
            parent, lane = node.parent, node.device
            if not lane.locks and not lane.below and not node.detached:
                low = max(operation.first - node.start, 0)
                ours = (
                    lane.slots is not None and np.isin(lane.slots[low : lane.count], operation.source).all()
                )
                if ours and lane.count > low and not self.carrier.leaves_behind(node, low):
                    gone.append(radix.detach(node, DEVICE, low, lane.count))
            node = parent
        self._gone(DEVICE, gone or [EMPTY])
