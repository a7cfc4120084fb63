"""Prefetch: storage → host for the pages of a key behind what memory holds.

    start ──Query──▶ hit length known ──room on host, Get──▶ pages arrive in order ──▶ land
      │                 │ too short: settled, 0 pages           │ stop rule: land what is there,
      │ too short, too many under way: Refused                  │ cancel the rest

The host slots belong to the operation until it lands. Then the path is walked again: what has come to
host meanwhile is freed, pages on device gain a host copy where I4 allows, new pages are grafted on,
and if the place to attach is gone everything is freed.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from ..types import FULL, Refused, Slots
from .actions import Completion, Get, Query, Span
from .backup import Backup
from .counters import Counters
from .evict import Evictor
from .journal import runs
from .key import Key
from .ledger import OPERATION_FILLING, Owner
from .node import Node
from .operation import Operation, Operations, Purpose
from .radix import EMPTY, HOST, Radix


class Stage(StrEnum):
    """Where a prefetch is."""

    ASKING = "asking"
    READING = "reading"
    LANDING = "landing"
    SETTLED = "settled"


class Prefetch:
    """One prefetch of pages `first .. first+wanted` of `key`. `landed` pages of it are in the tree.

    `parcel` are the slots that have arrived and wait for their place, still pinned.
    """

    __slots__ = (
        "arrived",
        "asked_parent",
        "first",
        "hashes",
        "key",
        "landed",
        "operation",
        "parcel",
        "stage",
        "started",
        "unwanted",
        "wanted",
    )

    def __init__(self, key: Key, first: int, hashes: tuple[bytes, ...], started: float) -> None:
        self.key = key
        self.first = first
        self.hashes = hashes
        self.wanted = len(hashes)
        self.started = started
        self.arrived = 0
        self.landed = 0
        self.parcel: Slots = EMPTY
        self.stage = Stage.ASKING
        self.operation: Operation | None = None
        self.asked_parent = False
        self.unwanted = False

    def __repr__(self) -> str:
        return f"Prefetch({self.stage}, {self.landed} of {self.wanted} pages from page {self.first})"


class Fetches:
    """Starts prefetches and lands them."""

    __slots__ = (
        "_backup",
        "_counters",
        "_evictor",
        "_operations",
        "_parked",
        "_radix",
        "_running",
        "_seen",
        "pages_in_flight_max",
        "pages_min",
        "storage",
    )

    def __init__(
        self,
        radix: Radix,
        operations: Operations,
        evictor: Evictor,
        backup: Backup,
        counters: Counters,
        pages_min: int,
        pages_in_flight_max: int,
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._evictor = evictor
        self._backup = backup
        self._counters = counters
        self.pages_min = pages_min
        self.pages_in_flight_max = pages_in_flight_max
        self.storage = False
        self._running: dict[int, Prefetch] = {}
        self._parked: list[Prefetch] = []
        self._seen = -1

    @property
    def pages_in_flight(self) -> int:
        """Pages asked for, or arrived and waiting for their place. O(prefetches)."""
        waiting = sum(len(each.parcel) for each in self._parked)
        return waiting + sum(each.wanted for each in self._running.values())

    @property
    def parked(self) -> list[Slots]:
        """Slots of prefetched pages that wait for the page before them."""
        return [each.parcel for each in self._parked]

    def start(self, key: Key, end: Node | None, first: int, now: float) -> Prefetch | Refused:
        """Ask storage for the pages of `key` from `first` on, where memory ends; `end` is the deepest
        node of its path. O(pages)."""
        wanted = key.pages - first
        if not self.storage:
            return Refused("no storage is attached")
        if wanted < max(self.pages_min, 1):
            return Refused(f"{wanted} pages are fewer than the minimum of {max(self.pages_min, 1)}")
        if self.pages_in_flight + wanted > self.pages_in_flight_max:
            return Refused(
                f"{self.pages_in_flight} pages are being prefetched; the limit is {self.pages_in_flight_max}"
            )
        if self._operations.storage_full:
            return Refused("too many operations in flight")
        hashes = self._hashes(key, end, first)
        prefetch = Prefetch(key, first, hashes, now)
        operation = self._operations.open(Purpose.QUERY, now)
        prefetch.operation = operation
        self._running[operation.number] = prefetch
        self._operations.send(operation, Query(operation.number, hashes, (FULL,)))
        return prefetch

    def _hashes(self, key: Key, end: Node | None, first: int) -> tuple[bytes, ...]:
        if end is None or not first:
            return self._radix.hashes.of_key(key)
        return self._radix.hashes.behind(end, first, key)

    # -- what storage answers ---------------------------------------------------------------------

    def completed(self, operation: Operation, completion: Completion, now: float) -> None:
        """Storage has answered, or part of it has arrived."""
        prefetch = self._running.get(operation.number)
        if prefetch is None:
            if completion.final:
                self._operations.finish(operation)
            return
        if operation.purpose is Purpose.FETCH:
            prefetch.arrived = max(0, min(completion.pages, len(operation.target)))
        if not completion.final:
            return
        del self._running[operation.number]
        if operation.purpose is Purpose.QUERY:
            self._operations.finish(operation)
            self._read(prefetch, min(completion.pages, prefetch.wanted), now)
        else:
            self._carve(prefetch, operation)
            self._operations.finish(operation)
            self._land(prefetch, now)

    def _read(self, prefetch: Prefetch, hit: int, now: float) -> None:
        """The hit length is known: take host memory for it and read."""
        least = max(self.pages_min, 1)
        room = self._room(prefetch, hit) if hit >= least and not self._operations.storage_full else 0
        if room < least or prefetch.unwanted:
            prefetch.stage = Stage.SETTLED
            return
        operation = self._operations.open(Purpose.FETCH, now)
        target = self._radix.ledgers[HOST].take(room, Owner.OPERATION)
        assert target is not None
        operation.target_tier, operation.target = HOST, target
        operation.first, operation.count = prefetch.first, room
        prefetch.operation, prefetch.stage, prefetch.wanted = operation, Stage.READING, room
        self._running[operation.number] = prefetch
        self._operations.send(operation, Get(operation.number, (Span(FULL, prefetch.hashes[:room], target),)))

    def _room(self, prefetch: Prefetch, wanted: int) -> int:
        """Host slots for it, without evicting the path it will be attached to."""
        path, partial, _ = self._radix.walk(prefetch.key)
        end = partial or (path[-1] if path else None)
        hold = self._radix.hold(end, HOST) if end is not None else None
        room = min(self._evictor.room_on_host(wanted), wanted)
        if hold is not None:
            self._radix.unhold(hold)
        return room

    def late(self, operation: Operation, now: float) -> None:
        """Past its deadline: what has arrived lands, the rest is LOST until the operation comes home."""
        prefetch = self._running.get(operation.number)
        if prefetch is not None:
            self.stop(prefetch, now)
        if len(operation.target):
            self._radix.ledgers[HOST].lose(operation.target)

    def stop(self, prefetch: Prefetch, now: float) -> None:
        """Do not wait any longer: land what has arrived and cancel the rest. What must wait for the page
        before it lands later, for whoever comes next."""
        operation = prefetch.operation
        if operation is not None and self._running.pop(operation.number, None) is not None:
            self._operations.cancel(operation)
            self._carve(prefetch, operation)
            self._land(prefetch, now)
        prefetch.stage = Stage.SETTLED

    def forget(self, prefetch: Prefetch, now: float) -> None:
        """Nobody wants it any more (an aborted request, a clear): whatever arrives is freed."""
        prefetch.unwanted = True
        self._seen = -1
        self.stop(prefetch, now)

    def forget_all(self, namespace: str | None, now: float) -> None:
        """Forget every prefetch of `namespace` (None: of all)."""
        for prefetch in [*self._running.values(), *self._parked]:
            if namespace is None or prefetch.key.namespace == namespace:
                self.forget(prefetch, now)
        self.retry(now)

    # -- landing ----------------------------------------------------------------------------------

    def _carve(self, prefetch: Prefetch, operation: Operation) -> None:
        """Part what has arrived from what the operation may still write to."""
        prefetch.parcel = operation.target[: prefetch.arrived]
        operation.target = operation.target[prefetch.arrived :]

    def retry(self, now: float) -> None:
        """Land what was waiting for the page before it, if anything has changed since the last look."""
        if not self._parked or self._seen == self._radix.version:
            return
        self._seen = self._radix.version
        parked, self._parked = self._parked, []
        for prefetch in parked:
            self._land(prefetch, now)

    def _land(self, prefetch: Prefetch, now: float) -> None:
        """Give the parcel its place in the tree, keep it waiting, or free it."""
        parcel = prefetch.parcel
        stop = prefetch.first + len(parcel)
        key = prefetch.key.head(stop)
        path, partial, inside = self._radix.walk(key)
        depth = partial.start + inside if partial is not None else (path[-1].end if path else 0)
        attached = 0
        if len(parcel) and not prefetch.unwanted and depth >= prefetch.first:
            if partial is not None:
                path.append(self._radix.split(partial, inside))
            if self._radix.host_prefix_closed and self._must_wait(prefetch, path, stop, now):
                if prefetch.stage is not Stage.SETTLED:
                    prefetch.stage = Stage.LANDING
                self._parked.append(prefetch)
                return
            attached = self._attach(prefetch, key, path, now)
            prefetch.landed = len(parcel) if attached else 0
        self._counters.prefetched += attached
        self._counters.prefetch_discarded += len(parcel) - attached
        self._radix.ledgers[HOST].unpin(parcel)
        prefetch.parcel = EMPTY
        prefetch.stage = Stage.SETTLED

    def _must_wait(self, prefetch: Prefetch, path: list[Node], stop: int, now: float) -> bool:
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

    def _attach(self, prefetch: Prefetch, key: Key, path: list[Node], now: float) -> int:
        """Attach the parcel's slots where host has none. Returns how many found a place."""
        radix, first, parcel = self._radix, prefetch.first, prefetch.parcel
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
