"""Backup (device → host) under the write-through policies, and persist (host → storage).

    insert, touch ──▶ offer(path) ──▶ Copy ──▶ READY on host ──▶ persist ──▶ Put

The pages of a path that have no host copy are backed up from the first one on, so that host stays
prefix-closed (I4). What finds no room is dropped and counted, and offered again at its next touch.
"""

from __future__ import annotations

import numpy as np

from ..types import FULL, WritePolicy
from .actions import Completion, Put, Span
from .counters import Counters
from .evict import Evictor
from .node import Node, fragments
from .operation import Operation, Operations, Purpose
from .radix import DEVICE, HOST, Radix


class Backup:
    """Starts backups and persists. `hits_min`: how often a page must have been hit before."""

    __slots__ = (
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
        bare: list[Node] = []
        while node.pages and node.host.count < node.pages:
            bare.append(node)
            assert node.parent is not None
            node = node.parent
        if not bare:
            return False
        first = bare[-1].start + bare[-1].host.count
        stop = first
        for node in reversed(bare):
            ready = node.device.ready_prefix(self._radix.ledgers[DEVICE])
            stop = max(first, node.start + ready)
            if ready < node.pages:
                break
        return stop > first and self._start(node, first, stop, now)

    def _start(self, end: Node, first: int, stop: int, now: float) -> bool:
        radix, operations, wanted = self._radix, self._operations, stop - first
        if operations.full or not self._evictor.health.well(now):
            self._counters.backups_dropped += wanted
            return False
        holds = [radix.hold(end, DEVICE), radix.hold(end, HOST)]
        room = min(self._evictor.room_on_host(wanted), wanted)
        self._counters.backups_dropped += wanted - room
        if not room:
            for hold in holds:
                radix.unhold(hold)
            return False
        operations.copy(Purpose.BACKUP, (end, first, room), (DEVICE, HOST), holds, now)
        return True

    def backed_up(self, operation: Operation, now: float) -> None:
        """The pages of a backup or demotion are READY on host: offer them to storage, once."""
        self._counters.backed_up += operation.count
        end = operation.end
        if not self.storage or end is None or end.detached:
            return
        self._counters.offered += operation.count
        if self._operations.storage_full:
            self._counters.persists_refused += operation.count
            return
        end = next(fragments(end, operation.first, operation.count))[0]
        put = self._operations.open(Purpose.PERSIST, now)
        put.end, put.first, put.count = end, operation.first, operation.count
        put.source_tier, put.source = HOST, operation.target
        put.holds = [self._radix.hold(end, HOST, 0 if self._radix.host_prefix_closed else operation.first)]
        hashes = self._radix.hashes.of_range(end, operation.first, operation.count)
        self._storing[put.number] = (self._epoch, hashes)
        self._operations.send(put, Put(put.number, (Span(FULL, hashes, put.source),)))

    def storage_changed(self) -> None:
        """Storage has been attached, detached or cleared: answers to earlier Puts are not about it."""
        self._epoch += 1

    def persisted(self, operation: Operation, completion: Completion) -> None:
        """Storage has answered a Put."""
        epoch, hashes = self._storing.pop(operation.number)
        self._counters.persisted += len(completion.stored)
        self._counters.persists_refused += operation.count - max(0, min(completion.pages, operation.count))
        announcer, end = self._radix.announcer, operation.end
        if announcer is None or end is None or epoch != self._epoch:
            return
        stored = set(completion.stored)
        fresh = np.array([each in stored for each in hashes])
        for node, low, high in reversed(list(fragments(end, operation.first, operation.count))):
            at = node.start + low - operation.first
            if not node.detached:
                announcer.persisted(node, np.flatnonzero(fresh[at : at + high - low]) + low)
        announcer.evicted_from_storage(completion.evicted)
