"""Landing: pages that came from storage get their place in the tree, wait for it, or are freed.

The host slots of a prefetch belong to its operation until it lands. Then the path is walked again: what
has come to host meanwhile is freed, pages on device gain a host copy where I4 allows, new pages are
grafted on, and if the place to attach is gone everything is freed. Where there are partial kinds only
what makes a boundary valid for all of them is kept.
"""

from __future__ import annotations

import numpy as np

from ..types import Slots
from .backup import Backup
from .counters import Counters
from .journal import runs
from .key import Key
from .ledger import OPERATION_FILLING
from .node import NOWHERE, Node, located
from .partial import boundary_of
from .prefetch import Prefetch, Stage
from .radix import EMPTY, HOST, Radix


class Landing:
    """Lands prefetches, and keeps those that wait for the page before them."""

    __slots__ = ("_backup", "_counters", "_radix", "_seen", "waiting")

    def __init__(self, radix: Radix, backup: Backup, counters: Counters) -> None:
        self._radix = radix
        self._backup = backup
        self._counters = counters
        self._seen = -1
        self.waiting: list[Prefetch] = []

    @property
    def pages(self) -> int:
        """Pages of FULL that have arrived and wait for their place. O(waiting)."""
        return sum(len(each.parcel) for each in self.waiting)

    def look_again(self) -> None:
        """Something has changed that `retry` cannot see."""
        self._seen = -1

    def retry(self, now: float) -> None:
        """Land what was waiting for the page before it, if anything has changed since the last look."""
        if not self.waiting or self._seen == self._radix.version:
            return
        self._seen = self._radix.version
        waiting, self.waiting = self.waiting, []
        for prefetch in waiting:
            self.land(prefetch, now)

    def land(self, prefetch: Prefetch, now: float) -> None:
        """Give what has arrived its place in the tree, keep it waiting, or free it. O(pages)."""
        radix, first = self._radix, prefetch.first
        before, stop = self._worth(prefetch)
        parcel, attached = prefetch.parcel[: max(0, stop - first)], 0
        key = prefetch.key.head(stop)
        path, partial, inside = radix.walk(key)
        depth = (path[-1].end if path else 0) + inside
        if stop > before and not prefetch.unwanted and depth >= min(first, stop):
            if len(parcel):
                if partial is not None:
                    path.append(radix.split(partial, inside))
                if radix.host_prefix_closed and self._must_wait(prefetch, path, now):
                    if prefetch.stage is not Stage.SETTLED:
                        prefetch.stage = Stage.LANDING
                    self.waiting.append(prefetch)
                    return
                attached = self._attach(prefetch, parcel, key, path, now)
            self._attach_parts(prefetch, key)
            prefetch.landed = stop - before if attached or radix.find(key)[1] == stop else 0
        self._counters.prefetched += attached
        self._counters.prefetch_discarded += len(prefetch.parcel) - attached
        self._free(prefetch)

    def _worth(self, prefetch: Prefetch) -> tuple[int, int]:
        """(where the key could be continued from without what has arrived, and with it), as far as memory
        and the parcel reach. O(pages)."""
        radix, first = self._radix, prefetch.first
        stop = first + len(prefetch.parcel)
        if not radix.partials:
            return first, stop
        end, depth = radix.find(prefetch.key.head(stop))
        have = [(kind, kind.in_memory(end, depth, stop)) for kind in radix.partials]
        before = boundary_of(have, min(first, depth))
        for (_, mask), part in zip(have, prefetch.parts, strict=False):
            mask[part.pages[part.pages < stop]] = True
        return before, boundary_of(have, stop)

    def _free(self, prefetch: Prefetch) -> None:
        """Slots that found no place go home, the others are the tree's alone."""
        self._radix.ledgers[HOST].unpin(prefetch.parcel)
        prefetch.parcel = EMPTY
        end, depth = self._radix.find(prefetch.key) if prefetch.parts else (None, 0)
        for part in prefetch.parts:
            part.kind.ledgers[HOST].unpin(part.target)
            part.kind.offer_path(end, part.pages[part.pages < depth])
        prefetch.parts = ()
        prefetch.stage = Stage.SETTLED

    def _must_wait(self, prefetch: Prefetch, path: list[Node], now: float) -> bool:
        """Whether the page before the parcel, or one of its own, is on its way to host (I4). Starts
        the backup of what is before it, once."""
        ledger = self._radix.ledgers[HOST]
        before: Node | None = None
        for node in path:
            lane = node.host
            ready = lane.ready_prefix(ledger)
            if node.start < prefetch.first:
                before = node
            if ready == node.pages:
                continue
            if lane.count > ready:
                return True
            if node.start + ready >= prefetch.first or prefetch.asked_parent or before is None:
                return False
            prefetch.asked_parent = True
            ends = [each for each in path if each.start < prefetch.first]
            return self._backup.offer(ends[-1], now, hits_min=0)
        return False

    def _attach(self, prefetch: Prefetch, parcel: Slots, key: Key, path: list[Node], now: float) -> int:
        """Attach the parcel's slots where host has none. Returns how many found a place."""
        radix, first = self._radix, prefetch.first
        if radix.host_prefix_closed and not self._backed_up_to(path, first):
            return 0
        attached = 0
        for node in path:
            if node.end <= first:
                continue
            low = max(first - node.start, 0)
            held = node.host.slots
            bare = np.arange(low, node.pages) if held is None else np.flatnonzero(held[low:] < 0) + low
            for begin, end in runs(bare):
                at = node.start + begin - first
                attached += self._adopt(node, begin, parcel[at : at + end - begin])
        depth = path[-1].end if path else 0
        if depth < key.pages:
            parent = path[-1] if path else radix.root(key.namespace)
            fresh = parcel[depth - first :]
            radix.ledgers[HOST].ready(fresh, OPERATION_FILLING)
            leaf = radix.graft(parent, key.units[depth * radix.keys.page_bytes :], HOST, fresh, now)
            radix.announce(leaf, HOST, 0, leaf.pages)
            attached += len(fresh)
        return attached

    def _backed_up_to(self, path: list[Node], first: int) -> bool:
        ledger = self._radix.ledgers[HOST]
        return all(
            node.host.ready_prefix(ledger) >= min(node.pages, first - node.start)
            for node in path
            if node.start < first
        )

    def _adopt(self, node: Node, low: int, slots: Slots) -> int:
        radix = self._radix
        radix.ledgers[HOST].ready(slots, OPERATION_FILLING)
        radix.attach(node, HOST, low, slots, filling=False)
        radix.announce(node, HOST, low, low + len(slots))
        radix.offer(node, HOST)
        return len(slots)

    def _attach_parts(self, prefetch: Prefetch, key: Key) -> None:
        """Attach the slots of partial kinds on the path of `key` where host has none."""
        end, depth = self._radix.find(key)
        if end is None:
            return
        for part in prefetch.parts:
            for node, inside, which in located(end, part.pages[part.pages < depth]):
                held = part.kind.lane(node, HOST).slots
                bare = np.ones(len(inside), bool) if held is None else held[inside] == NOWHERE
                slots = part.target[which][bare]
                if len(slots):
                    part.kind.ledgers[HOST].ready(slots, OPERATION_FILLING)
                    part.kind.attach(node, HOST, inside[bare], slots, filling=False)
                    part.kind.counters.prefetched += len(slots)
                    self._radix.revalue([(node, node.start + int(inside[bare][-1]))])
