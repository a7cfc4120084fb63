"""What comes of pages that were copied between the in-memory tiers: they become READY, wait, or go.

Where a tier is prefix-closed a page becomes READY only after the page before it, whatever the order
in which transfers finish; so events announce parents first and nothing READY ever hangs behind a
transfer that fails.

    page before      is READY, or a root     is FILLING      is not there
    then             commit                  park            the copy is useless: fail
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from ..types import Slots, Tier
from .counters import Counters
from .journal import runs
from .ledger import NODE_FILLING, NODE_READY
from .node import NOWHERE, Node, fragments, located, subtree
from .operation import Operation, Operations
from .partial import Partial
from .radix import DEVICE, HOST, Radix


class Arrivals:
    """Commits, parks and fails copies. `settled(operation, ok)` is called once for each."""

    __slots__ = ("_counters", "_operations", "_parked", "_radix", "_settled")

    def __init__(
        self,
        radix: Radix,
        operations: Operations,
        counters: Counters,
        settled: Callable[[Operation, bool], None],
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._counters = counters
        self._settled = settled
        self._parked: dict[tuple[Tier, int], list[Operation]] = {}

    def arrive(self, operation: Operation, ok: bool) -> None:
        """The executor is done with a copy. Settles it, and then what was waiting for it. O(pages)."""
        operation.arrived = True
        todo = [(operation, ok)]
        while todo:
            operation, ok = todo.pop()
            before = self._page_before(operation)
            if ok and before is not None and before[1] != NODE_READY:
                self._parked.setdefault((operation.target_tier, before[0]), []).append(operation)
                continue
            if not ok or before is None:
                self.fail(operation)
            ok = ok and before is not None and self._commit(operation)
            self._operations.finish(operation)
            self._settled(operation, ok)
            todo += [(each, True) for each in self._woken(operation)]

    def late(self, operation: Operation) -> None:
        """Give up on a copy that is past its deadline: its target slots are LOST until it comes home."""
        self.fail(operation)
        self._operations.lose(operation)
        self._settled(operation, False)
        for each in self._woken(operation):
            self.arrive(each, True)

    def _woken(self, operation: Operation) -> list[Operation]:
        """What was parked behind one of the pages that `operation` was filling, not parked any more."""
        if not self._parked:
            return []
        tier, woken = operation.target_tier, []
        for slot in operation.target.tolist():
            woken += self._parked.pop((tier, slot), [])
        return woken

    def _page_before(self, operation: Operation) -> tuple[int, int] | None:
        """Slot and ledger entry of the page of FULL that must be READY on the target tier before what the
        operation brings may be: the page before its first, or, where it brings partial kinds alone, the
        last page that they are of. None if it is not there; READY where nothing needs to be before.
        O(depth in nodes)."""
        tier = operation.target_tier
        page = operation.first - 1
        if not operation.count:
            page = max(int(part.pages[-1]) for part in operation.parts) if tier == DEVICE else -1
        if page < 0 or (tier == HOST and not self._radix.host_prefix_closed):
            return NOWHERE, NODE_READY
        assert operation.end is not None
        for node, low, _ in fragments(operation.end, page, 1):
            slots = node.lane(tier).slots
            if not node.detached and slots is not None and slots[low] >= 0:
                return int(slots[low]), int(self._radix.ledgers[tier].book[slots[low]])
        return None

    def _ours(self, operation: Operation) -> list[tuple[Node, int, int]]:
        """Fragments whose slots are still this operation's, parents first."""
        assert operation.end is not None
        tier = operation.target_tier
        ours: list[tuple[Node, int, int]] = []
        if not operation.count:
            return ours
        for node, low, high in fragments(operation.end, operation.first, operation.count):
            slots = node.lane(tier).slots
            if slots is None:
                continue
            at = node.start + low - operation.first
            same = np.flatnonzero(slots[low:high] == operation.target[at : at + high - low]) + low
            ours += [(node, begin, stop) for begin, stop in reversed(runs(same))]
        return ours[::-1]

    def _commit(self, operation: Operation) -> bool:
        """Make READY what is still this operation's. Returns whether that is all it was asked for."""
        radix, tier, committed = self._radix, operation.target_tier, 0
        for node, low, high in self._ours(operation):
            lane = node.lane(tier)
            if node.detached:
                continue
            committed += high - low
            assert lane.slots is not None
            radix.ledgers[tier].ready(lane.slots[low:high], NODE_FILLING)
            lane.filling -= high - low
            radix.announce(node, tier, low, high)
        radix.version += 1
        return self._commit_parts(operation) and committed == operation.count

    def _parts(self, operation: Operation) -> Iterator[tuple[Partial, Node, Slots]]:
        """Of each part, node by node, the indices of the pages whose slots are still this operation's."""
        assert operation.end is not None
        for part in operation.parts:
            for node, inside, which in located(operation.end, part.pages):
                slots = part.kind.lane(node, operation.target_tier).slots
                if slots is not None:
                    yield part.kind, node, inside[slots[inside] == part.target[which]]

    def _commit_parts(self, operation: Operation) -> bool:
        tier, committed = operation.target_tier, 0
        gained: list[tuple[Node, int]] = []
        for kind, node, inside in self._parts(operation):
            lane = kind.lane(node, tier)
            assert lane.slots is not None
            if len(inside):
                kind.ledgers[tier].ready(lane.slots[inside], NODE_FILLING)
                lane.filling -= len(inside)
                kind.arrived(node, tier, inside)
                gained.append((node, node.start + int(inside[-1])))
                committed += len(inside)
        self._radix.revalue(gained)
        return committed == sum(len(part.pages) for part in operation.parts)

    def fail(self, operation: Operation) -> None:
        """The copy brought nothing: its slots leave the nodes, and so does whatever was being filled
        behind them on a prefix-closed tier (it is all FILLING, see above)."""
        radix, tier = self._radix, operation.target_tier
        self._counters.failed_operations += 1
        for kind, node, inside in self._parts(operation):
            if len(inside):
                kind.ledgers[tier].drop(kind.detach(node, tier, inside))
        ours = self._ours(operation)
        if not ours:
            return
        closed = radix.host_prefix_closed or tier != HOST
        if closed:
            top, first, _ = ours[0]
            for node in reversed(list(subtree(top))):
                self._take_out(node, tier, 0, node.pages)
            self._take_out(top, tier, first, top.pages)
            return
        for node, low, high in reversed(ours):
            self._take_out(node, tier, low, high)

    def _take_out(self, node: Node, tier: Tier, low: int, high: int) -> None:
        slots = self._radix.detach(node, tier, low, high)
        if len(slots):
            self._radix.drop(tier, slots)
