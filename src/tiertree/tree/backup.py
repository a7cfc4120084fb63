"""Backup (device → host) under the write-through policies, and persist (host → storage).

    insert, touch ──▶ offer(path) ──▶ Copy ──▶ READY on host ──▶ persist ──▶ Put

The pages of a path that have no host copy are backed up from the first one on, so that host stays
prefix-closed (I4). What finds no room is dropped and counted, and offered again at its next touch.
"""

from __future__ import annotations

import numpy as np

from ..types import FULL, WritePolicy
from .actions import Completion, Put, Span
from .breaker import Verdict
from .counters import Counters
from .evict import Evictor
from .node import Node, fragments
from .operation import Operation, Operations, Part, Purpose
from .radix import DEVICE, EMPTY, HOST, Radix


class Backup:
    """Starts backups and persists. `hits_min`: how often a page must have been hit before."""

    __slots__ = (
        "_carrier",
        "_counters",
        "_epoch",
        "_evictor",
        "_operations",
        "_radix",
        "_storing",
        "enabled",
        "hits_min",
        "storage",
    )

    def __init__(
        self,
        radix: Radix,
        operations: Operations,
        evictor: Evictor,
        counters: Counters,
        policy: WritePolicy,
        selective_hits: int,
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._evictor = evictor
        self._carrier = evictor.carrier
        self._counters = counters
        self.enabled = policy is not WritePolicy.WRITE_BACK and radix.has_host
        self.hits_min = selective_hits if policy is WritePolicy.WRITE_THROUGH_SELECTIVE else 0
        self.storage = False
        self._epoch = 0
        self._storing: dict[int, tuple[int, tuple[bytes, ...]]] = {}

    def offer(self, end: Node, now: float, hits_min: int | None = None) -> bool:
        """Back up what the policy wants of the path that ends in `end`. O(1) where all of it is on
        host already. Returns whether a backup was started."""
        wanted = self.hits_min if hits_min is None else hits_min
        node = end
        while node.hits < wanted and node.parent is not None:
            node = node.parent
        first, stop = self._bare(node)
        unsaved = self._unsaved(node) if self._radix.partials else None
        if stop == first and (unsaved is None or unsaved >= first):
            return False
        return self._start(node, first, stop, first if unsaved is None else min(first, unsaved), now)

    def _bare(self, end: Node) -> tuple[int, int]:
        """The pages of the path to `end` that host lacks and device has: from the first that host lacks to
        the first that is not READY on device. O(1) where host has them all."""
        node, bare = end, []
        while node.pages and node.host.count < node.pages:
            bare.append(node)
            assert node.parent is not None
            node = node.parent
        if not bare:
            return end.end, end.end
        first = bare[-1].start + bare[-1].host.count
        stop = first
        for node in reversed(bare):
            ready = node.device.ready_prefix(self._radix.ledgers[DEVICE])
            stop = max(first, node.start + ready)
            if ready < node.pages:
                break
        return first, stop

    @staticmethod
    def _unsaved(end: Node) -> int | None:
        """The first page of the first node on the path to `end` where partial kinds may have something that
        host lacks; None if there is none. O(nodes)."""
        found = None
        node: Node | None = end
        while node is not None and node.pages:
            if node.partial.unsaved:
                found = node.start
            node = node.parent
        return found

    def _start(self, end: Node, first: int, stop: int, since: int, now: float) -> bool:
        """Back up FULL's pages `first .. stop`, and of partial kinds what host lacks from `since` on."""
        radix, operations, wanted = self._radix, self._operations, stop - first
        if not operations.breakers.to_host.admits(now):
            self._counters.backups_skipped += wanted
            return False
        if operations.full:
            self._counters.backups_dropped += wanted
            return False
        holds = [radix.hold(end, DEVICE), radix.hold(end, HOST)]
        room = min(self._evictor.room_on_host(wanted), wanted)
        self._counters.backups_dropped += wanted - room
        covered = first + room
        cargo = self._carrier.cargo(end, since, covered) if radix.partials and covered else ()
        if not room and not cargo:
            for hold in holds:
                radix.unhold(hold)
            return False
        operations.copy(Purpose.BACKUP, (end, first, room), (DEVICE, HOST), holds, now, cargo)
        return True

    def backed_up(self, operation: Operation, now: float) -> None:
        """The pages of a backup or demotion are READY on host: offer them to storage, once, if it is worth
        asking."""
        self._counters.backed_up += operation.count
        for part in operation.parts:
            part.kind.counters.backed_up += len(part.pages)
        end = operation.end
        if not self.storage or end is None or end.detached:
            return
        if not self._operations.breakers.writes.admits(now):
            self._counters.persists_dropped += operation.count
            return
        self._counters.offered += operation.count
        if self._operations.storage_full:
            self._counters.persists_crowded += operation.count
            return
        radix, first = self._radix, operation.first
        if operation.count:
            end = next(fragments(end, first, operation.count))[0]
        put = self._operations.open(Purpose.PERSIST, now)
        put.end, put.first, put.count = end, first, operation.count
        put.source_tier, put.source = HOST, operation.target
        floor = min([first, *(int(part.pages[0]) for part in operation.parts)])
        put.holds = [radix.hold(end, HOST, 0 if radix.host_prefix_closed else floor)]
        put.parts = tuple(Part(part.kind, part.pages, part.target, EMPTY) for part in operation.parts)
        hashes = radix.hashes.of_range(end, first, operation.count) if operation.count else ()
        spans = [Span(FULL, hashes, put.source)]
        for part in put.parts:
            low = int(part.pages[0])
            chain = radix.hashes.of_range(end, low, int(part.pages[-1]) + 1 - low)
            theirs = tuple(chain[page - low] for page in part.pages.tolist())
            spans.append(Span(part.kind.kind, theirs, part.source))
        put.page_hash = next((span.hashes[0] for span in spans if span.hashes), None)
        self._storing[put.number] = (self._epoch, hashes)
        self._operations.send(put, Put(put.number, tuple(spans)))

    def storage_changed(self) -> None:
        """Storage has been attached, detached or cleared: answers to earlier Puts are not about it."""
        self._epoch += 1

    def persisted(self, operation: Operation, completion: Completion, now: float) -> None:
        """Storage has answered a Put."""
        epoch, hashes = self._storing.pop(operation.number)
        self._operations.hear(operation, _verdict(completion), now)
        self._counters.persisted += len(completion.stored)
        kept = max(0, min(completion.pages, operation.count))
        if completion.declined:
            self._counters.persists_crowded += operation.count
        elif operation.cancelled and not operation.late:
            self._counters.persists_dropped += operation.count - kept
        else:
            self._counters.persists_refused += operation.count - kept
        for part, kept in zip(operation.parts, completion.others, strict=False):
            part.kind.counters.persisted += max(0, min(kept, len(part.pages)))
        announcer, end = self._radix.announcer, operation.end
        if announcer is None or end is None or epoch != self._epoch or operation.late:
            return
        stored = set(completion.stored)
        fresh = np.array([each in stored for each in hashes])
        for node, low, high in reversed(list(fragments(end, operation.first, operation.count))):
            at = node.start + low - operation.first
            if not node.detached:
                announcer.persisted(node, np.flatnonzero(fresh[at : at + high - low]) + low)
        announcer.evicted_from_storage(completion.evicted)


def _verdict(put: Completion) -> Verdict:
    """What the answer to a Put says of storage. One that kept nothing at all is full, which is as bad."""
    if put.broken:
        return Verdict.BAD
    if put.error is not None:
        return Verdict.NOTHING
    return Verdict.GOOD if put.pages > 0 or any(kept > 0 for kept in put.others) else Verdict.BAD
