"""Prefetch: storage → host for what memory lacks of a key.

    start ──Query──▶ hit length known ──room on host, Get──▶ pages arrive in order ──▶ land
      │                 │ too short: settled, 0 pages           │ stop rule: land what is there,
      │ too short, too many under way: Refused                  │ cancel the rest

FULL is read page by page from where memory ends. Of a partial kind exactly what the boundary needs is
read, all of it or nothing. Where it all goes is for `landing.py` to say.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..types import FULL, Kind, Refused, Slots
from .actions import Completion, Get, Query, Span
from .breaker import Verdict
from .counters import Counters
from .evict import Evictor
from .key import Key
from .landing import Landing
from .ledger import Ledger, Owner
from .node import Node
from .operation import Operation, Operations, Part, Purpose
from .partial import Partial, boundary_of
from .prefetch import Prefetch, Stage
from .radix import EMPTY, HOST, Radix
from .reach import Reach
from .window import spared


class Fetches:
    """Starts prefetches and lands them."""

    __slots__ = (
        "_breaker",
        "_counters",
        "_evictor",
        "_landing",
        "_operations",
        "_radix",
        "_running",
        "pages_in_flight_max",
        "pages_min",
        "storage",
    )

    def __init__(
        self,
        radix: Radix,
        operations: Operations,
        evictor: Evictor,
        landing: Landing,
        counters: Counters,
        pages_min: int,
        pages_in_flight_max: int,
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._breaker = operations.breakers.reads
        self._counters = counters
        self._evictor = evictor
        self._landing = landing
        self.pages_min = max(pages_min, 1)
        self.pages_in_flight_max = pages_in_flight_max
        self.storage = False
        self._running: dict[int, Prefetch] = {}

    @property
    def pages_in_flight(self) -> int:
        """Pages asked for, or arrived and waiting for their place. O(prefetches)."""
        return self._landing.pages + sum(each.wanted for each in self._running.values())

    def start(self, key: Key, reach: Reach, now: float) -> Prefetch | Refused:
        """Ask storage for what memory, which has `reach` of it, lacks of `key`; Refused when it is not worth
        it, or may not be now. O(pages)."""
        _, memory, _, full = reach
        wanted = key.pages - memory
        if not self.storage:
            return Refused("no storage is attached")
        if wanted < self.pages_min:
            return Refused(f"{wanted} pages are fewer than the minimum of {self.pages_min}")
        if not self._breaker.admits(now):
            return Refused(self._breaker.refusal(now))
        if self.pages_in_flight + wanted > self.pages_in_flight_max:
            return Refused(
                f"{self.pages_in_flight} pages are being prefetched; the limit is {self.pages_in_flight_max}"
            )
        if self._operations.storage_full:
            return Refused("too many operations in flight")
        kinds = self._radix.partials
        end, depth = self._radix.find(key)
        low = min([full, *(kind.since(memory + 1) for kind in kinds)])
        prefetch = Prefetch(key, full, low, self._hashes(key, end, low), now)
        prefetch.wanted = wanted
        prefetch.asked = [(kind, self._lacking(kind, key, memory, end, depth)) for kind in kinds]
        operation = self._operations.open(Purpose.QUERY, now)
        prefetch.operation = operation
        self._running[operation.number] = prefetch
        asked: list[tuple[Kind, tuple[bytes, ...]]] = [(FULL, prefetch.hashes[full - low :])]
        asked += [(kind.kind, prefetch.of(pages)) for kind, pages in prefetch.asked]
        operation.count, operation.namespace = sum(len(hashes) for _, hashes in asked), key.namespace
        operation.page_hash = next((hashes[0] for _, hashes in asked if hashes), None)
        self._operations.send(operation, Query(operation.number, tuple(asked)))
        return prefetch

    def _hashes(self, key: Key, end: Node | None, first: int) -> tuple[bytes, ...]:
        if end is None or not first:
            return self._radix.hashes.of_key(key)
        return self._radix.hashes.behind(end, first, key)

    @staticmethod
    def _lacking(kind: Partial, key: Key, memory: int, end: Node | None, depth: int) -> Slots:
        """Depths of the pages that a deeper boundary than `memory` may need and memory has not."""
        low = kind.since(memory + 1)
        lacking = np.flatnonzero(~kind.in_memory(end, depth, key.pages)[low:]) + low
        on_grid: Slots = lacking[(lacking + 1) % kind.grid == 0]
        return on_grid

    # -- what storage answers ---------------------------------------------------------------------

    def completed(self, operation: Operation, completion: Completion, now: float) -> None:
        """Storage has answered, or part of it has arrived."""
        prefetch = self._running.get(operation.number)
        if prefetch is None:
            if completion.final:
                self._operations.hear(operation, _verdict(operation, completion), now)
                self._operations.finish(operation)
            return
        if operation.purpose is Purpose.FETCH:
            prefetch.arrived = max(0, min(completion.pages, len(operation.target)))
            prefetch.others = completion.others
        if not completion.final:
            return
        del self._running[operation.number]
        if operation.purpose is Purpose.QUERY:
            self._operations.finish(operation)
            if not self._read(prefetch, completion, operation, now):
                prefetch.stage = Stage.SETTLED
                self._operations.hear(operation, _verdict(operation, completion), now)
        else:
            self._operations.hear(operation, _verdict(operation, completion), now)
            self._carve(prefetch, operation)
            if not completion.broken and not completion.declined:
                lacking = operation.target, *(part.target for part in operation.parts)
                self._counters.prefetch_vanished += sum(map(len, lacking))
            self._operations.finish(operation)
            self._landing.land(prefetch, now)

    def _read(self, prefetch: Prefetch, found: Completion, query: Operation, now: float) -> bool:
        """What storage has is known, if it is: take host memory for what is worth reading, and read. Returns
        whether anything is; it is the next step of `query`, and speaks for both to the breaker."""
        unwelcome = prefetch.unwanted or self._operations.storage_full
        if unwelcome or found.error is not None or not self._breaker.current(query.round):
            return False
        planned = self._plan(prefetch, found)
        if planned is None:
            return False
        count, lacking = planned
        operation = self._operations.open(Purpose.FETCH, now)
        operation.target_tier = HOST
        operation.first, operation.count = prefetch.first, count
        operation.target = self._take(self._radix.ledgers[HOST], count)
        operation.parts = tuple(
            Part(kind, pages, EMPTY, self._take(kind.ledgers[HOST], len(pages))) for kind, pages in lacking
        )
        prefetch.operation, prefetch.stage = operation, Stage.READING
        if not self._radix.partials:
            prefetch.wanted = count
        self._running[operation.number] = prefetch
        at = prefetch.first - prefetch.low
        spans = [Span(FULL, prefetch.hashes[at : at + count], operation.target)]
        spans += [Span(part.kind.kind, prefetch.of(part.pages), part.target) for part in operation.parts]
        operation.namespace = prefetch.key.namespace
        operation.page_hash = next((span.hashes[0] for span in spans if span.hashes), None)
        self._operations.send(operation, Get(operation.number, tuple(spans)))
        return True

    @staticmethod
    def _take(ledger: Ledger, count: int) -> Slots:
        slots = ledger.take(count, Owner.OPERATION)
        assert slots is not None
        return slots

    def _plan(self, prefetch: Prefetch, found: Completion) -> tuple[int, list[tuple[Partial, Slots]]] | None:
        """How many pages of FULL to read, and which of each partial kind; None if it is not worth it, or
        host has no room. O(pages)."""
        first, key = prefetch.first, prefetch.key
        hit = first + max(0, min(found.pages, key.pages - first))
        end, depth = self._radix.find(key)
        have = [(kind, kind.in_memory(end, depth, key.pages)) for kind in self._radix.partials]
        before = min(boundary_of(have, depth), first)
        there = [(kind, mask | self._held(prefetch, found, at)) for at, (kind, mask) in enumerate(have)]
        goal = boundary_of(there, hit)
        if any(self._wants(kind, mask, goal) > kind.room(HOST) for kind, mask in have):
            return None
        if goal - before >= self.pages_min:
            goal = boundary_of(there, min(goal, first + self._room(end, goal - first)))
        if goal - before < self.pages_min:
            return None
        lacking = []
        for kind, mask in have:
            low = kind.since(goal)
            pages = np.flatnonzero(~mask[low:goal]) + low
            with spared(kind, end, np.arange(low, min(goal, depth))):
                if self._evictor.thinner.room_on_host(kind, len(pages)) < len(pages):
                    return None
            lacking.append((kind, pages))
        return max(0, goal - first), lacking

    @staticmethod
    def _wants(kind: Partial, mask: NDArray[np.bool_], goal: int) -> int:
        """How many pages of `kind` memory lacks for continuing at `goal`."""
        return int(np.count_nonzero(~mask[kind.since(goal) : goal]))

    @staticmethod
    def _held(prefetch: Prefetch, found: Completion, at: int) -> NDArray[np.bool_]:
        """Which pages of partial kind `at` storage has said it holds, one entry for each page of the key."""
        held = np.zeros(prefetch.key.pages, bool)
        if at < len(found.held):
            pages = prefetch.asked[at][1]
            answer = np.frombuffer(found.held[at], np.uint8)[: len(pages)] == 1
            held[pages[: len(answer)][answer]] = True
        return held

    def _room(self, end: Node | None, wanted: int) -> int:
        """Host slots of FULL for it, without evicting the path to `end` that it will be attached to."""
        if wanted <= 0:
            return 0
        hold = self._radix.hold(end, HOST) if end is not None else None
        room = min(self._evictor.room_on_host(wanted), wanted)
        if hold is not None:
            self._radix.unhold(hold)
        return room

    # -- stopping ---------------------------------------------------------------------------------

    def late(self, operation: Operation, now: float) -> None:
        """Past its deadline: what has arrived lands, the rest is LOST until the operation comes home."""
        prefetch = self._running.get(operation.number)
        if prefetch is not None:
            self.stop(prefetch, now)
        self._operations.lose(operation)

    def stop(self, prefetch: Prefetch, now: float) -> None:
        """Do not wait any longer: land what has arrived and cancel the rest. What must wait for the page
        before it lands later, for whoever comes next."""
        operation = prefetch.operation
        if operation is not None and self._running.pop(operation.number, None) is not None:
            self._operations.cancel(operation)
            self._carve(prefetch, operation)
            self._landing.land(prefetch, now)
        prefetch.stage = Stage.SETTLED

    def forget(self, prefetch: Prefetch, now: float) -> None:
        """Nobody wants it any more (an aborted request, a clear): whatever arrives is freed."""
        prefetch.unwanted = True
        self._landing.look_again()
        self.stop(prefetch, now)

    def forget_all(self, namespace: str | None, now: float) -> None:
        """Forget every prefetch of `namespace` (None: of all)."""
        for prefetch in [*self._running.values(), *self._landing.waiting]:
            if namespace is None or prefetch.key.namespace == namespace:
                self.forget(prefetch, now)
        self._landing.retry(now)

    @staticmethod
    def _carve(prefetch: Prefetch, operation: Operation) -> None:
        """Part what has arrived from what the operation may still write to."""
        prefetch.parcel = operation.target[: prefetch.arrived]
        operation.target = operation.target[prefetch.arrived :]
        arrived, rest = [], []
        for at, part in enumerate(operation.parts):
            count = max(0, prefetch.others[at]) if at < len(prefetch.others) else 0
            arrived.append(Part(part.kind, part.pages[:count], EMPTY, part.target[:count]))
            rest.append(Part(part.kind, part.pages[count:], EMPTY, part.target[count:]))
        prefetch.parts, operation.parts = tuple(arrived), tuple(rest)


def _verdict(operation: Operation, answer: Completion) -> Verdict:
    """What the answer to a Query or Get says of storage. That a page is not there is an answer."""
    if answer.broken:
        return Verdict.BAD
    arrived = operation.purpose is Purpose.FETCH and (answer.pages > 0 or any(n > 0 for n in answer.others))
    if arrived:
        return Verdict.GOOD
    stopped = answer.declined or (answer.error is not None and operation.cancelled)
    return Verdict.NOTHING if stopped else Verdict.ANSWERED
