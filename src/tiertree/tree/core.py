"""The tree: one deterministic state machine over keys, slots and completions.

    match ─▶ Match ─▶ acquire ─▶ Lease ─▶ load, insert ─▶ …            decides
                 actions ─▶ (executor) ─▶ completions ─▶ complete      is told

No torch, thread, file, socket, clock or random number: time enters as `now`, everything it wants done
leaves through `take_actions`, and everything that was done comes back through `complete`. The same
calls with the same arguments give the same decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np

from ..types import ForeignObject, LeaseReleased, Refused, Slots, StaleMatch, Tier, WritePolicy
from .actions import Action, Completion
from .arrivals import Arrivals
from .backup import Backup
from .component import Component
from .counters import Counters
from .evict import Evictor
from .fetch import Fetches, Prefetch
from .insert import Insert, Inserted
from .journal import Event, Journal
from .key import Key, KeyMaker
from .lease import Lease, Match
from .ledger import ANYBODY, Ledger, Owner
from .load import LoadBack, Loads
from .node import Node
from .operation import Operation, Operations, Purpose
from .radix import DEVICE, HOST, Radix
from .victims import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Everything the tree decides by. Lengths in pages, times in seconds."""

    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    selective_hits: int = 1
    load_back_pages_min: int = 1
    load_back_pages_max: int | None = None
    prefetch_pages_min: int = 1
    prefetch_pages_in_flight_max: int = 65_536
    op_deadline_seconds: float = 30.0
    operations_max: int = 4096


class Core:
    """One tree over DEVICE and HOST, with what is in flight. Single-threaded; knows no clock."""

    def __init__(
        self,
        keys: KeyMaker,
        ledgers: tuple[Ledger, Ledger],
        component: Component,
        policy: Policy,
        rules: Rules,
        fingerprint: bytes,
        journal: Journal | None = None,
    ) -> None:
        self.rules = rules
        self.counters = Counters()
        closed = rules.write_policy is not WritePolicy.WRITE_BACK
        self.radix = Radix(keys, ledgers, policy, closed, fingerprint, journal)
        self.operations = Operations(self.radix, rules.op_deadline_seconds, rules.operations_max)
        self.evictor = Evictor(self.radix, self.operations, self.counters, write_back=not closed)
        self.backup = Backup(
            self.radix, self.operations, self.evictor, self.counters, rules.write_policy, rules.selective_hits
        )
        self.arrivals = Arrivals(self.radix, self.operations, self.counters, self._settled)
        self.loads = Loads(
            self.radix, self.operations, self.counters, rules.load_back_pages_min, rules.load_back_pages_max
        )
        self.fetches = Fetches(
            self.radix,
            self.operations,
            self.evictor,
            self.backup,
            self.counters,
            rules.prefetch_pages_min,
            rules.prefetch_pages_in_flight_max,
        )
        self.leases: dict[int, Lease] = {}
        self._component = component
        self._insert = Insert(self.radix)
        self._numbers = count(ANYBODY + 1)
        self._now = 0.0
        self.epoch = 0

    # -- looking up -------------------------------------------------------------------------------

    def match(self, key: Key, now: float) -> Match:
        """Longest usable prefix of `key`. O(pages + nodes). May split one node; refreshes recency and
        counts a hit on every node of the path; may start a backup that was owed to it."""
        radix = self.radix
        path, partial, inside = radix.walk(key)
        if partial is not None:
            path.append(radix.split(partial, inside))
        if not path:
            return Match(key, None, 0, 0, 0, radix.version)
        for node in path:
            node.last_used = now
            node.hits += 1
        device, memory = self._component.reach(path, node.pages)
        if self.backup.enabled and self.backup.offer(node, now):
            radix.version += 1
        return Match(key, node, device, memory, memory, radix.version)

    def peek(self, key: Key) -> Match:
        """`match` that changes nothing: no split, no recency, no hit. O(pages + nodes)."""
        radix = self.radix
        path, partial, inside = radix.walk(key)
        if partial is not None:
            path.append(partial)
        if not path:
            return Match(key, None, 0, 0, 0, radix.version)
        device, memory = self._component.reach(path, inside or path[-1].pages)
        return Match(key, path[-1], device, memory, memory, radix.version)

    def acquire(self, match: Match, close: Callable[[Lease], None]) -> Lease:
        """Lock what `match` found: device slots up to its device boundary, host slots from there to its
        memory boundary; the lease's `release` calls `close`. O(nodes on the path). May split a node at
        each boundary. Raises StaleMatch."""
        radix = self.radix
        if match.version != radix.version:
            raise StaleMatch("the cache has changed since this match: match again")
        lease = Lease(next(self._numbers), match.key, self.epoch, close)
        lease.device_boundary = match.device_boundary
        lease.memory_boundary = match.memory_boundary
        end = match.end
        if end is not None and match.memory_boundary > match.device_boundary:
            host_end = self.loads.node_at(end, match.memory_boundary)
            end = host_end
            if match.device_boundary:
                self.loads.node_at(end, match.device_boundary)
            floor = 0 if radix.host_prefix_closed else match.device_boundary
            lease.host_hold = radix.hold(host_end, HOST, floor)
        if end is not None and match.device_boundary:
            lease.device_hold = radix.hold(self.loads.node_at(end, match.device_boundary), DEVICE)
        self.leases[lease.number] = lease
        return lease

    def release(self, lease: Lease) -> None:
        """Give back everything that `lease` holds, exactly once."""
        if lease.released:
            raise LeaseReleased("this lease was released before")
        lease.released = True
        del self.leases[lease.number]
        if lease.loading is not None:
            self.loads.abandon(lease.loading)
        for hold in (lease.host_hold, lease.device_hold):
            if hold is not None:
                self.radix.unhold(hold)
        if lease.allocated:
            slots = np.concatenate(lease.allocated)
            mine = slots[self.radix.ledgers[DEVICE].tags[slots] == lease.number]
            lease.allocated = []
            if len(mine):
                self.radix.drop(DEVICE, np.unique(mine))

    # -- growing ----------------------------------------------------------------------------------

    def take(self, pages: int, lease: Lease | None) -> Slots | None:
        """`pages` device slots for a request; None if not as many are free."""
        tag = lease.number if lease is not None else ANYBODY
        slots = self.radix.ledgers[DEVICE].take(pages, Owner.REQUEST, tag)
        if slots is not None and lease is not None:
            lease.allocated.append(slots)
            if len(lease.allocated) > lease.allocated_max:
                lease.forget_given_away(self.radix.ledgers[DEVICE].tags)
        return slots

    def give_back(self, slots: Slots, lease: Lease | None) -> None:
        """Slots that were taken for `lease` (None: for none) and not inserted. Raises InvalidSlots."""
        self._insert.check(slots, None, lease.number if lease is not None else ANYBODY)
        self.radix.drop(DEVICE, slots)

    def insert(self, key: Key, slots: Slots, lease: Lease | None, now: float) -> Inserted | Refused:
        """Put pages `first ..` of `key` into the tree, `first` being the lease's device boundary, and
        move the lease to the end of `key`. Refused, with nothing changed, when the leased prefix was
        cleared meanwhile. Raises InvalidSlots, and ForeignObject for a key that does not begin with the
        pages that the lease covers. O(pages + nodes)."""
        first = lease.device_boundary if lease is not None else 0
        hold = lease.device_hold if lease is not None else None
        if lease is not None and not self._extends(key, lease):
            raise ForeignObject("this key does not begin with the pages that the lease covers")
        if hold is not None and hold.end.detached:
            return Refused("the leased prefix was cleared")
        if lease is not None and lease.epoch != self.epoch:
            return Refused("the weights have changed since this lease was acquired")
        self._insert.check(slots, key.pages - first, lease.number if lease is not None else ANYBODY)
        end, existing = self._insert.insert(key, slots, first, now, hold.end if hold is not None else None)
        self.radix.version += 1
        if lease is not None and end is not None:
            self._move(lease, key, end)
        if self.backup.enabled and end is not None:
            self.backup.offer(end, now)
        return Inserted(key.pages, existing)

    def _extends(self, key: Key, lease: Lease) -> bool:
        if key is lease.key:
            return True
        covered = memoryview(lease.key.units)[: lease.device_boundary * self.radix.keys.page_bytes]
        return key.namespace == lease.key.namespace and key.units.startswith(covered)

    def _move(self, lease: Lease, key: Key, end: Node) -> None:
        """Re-point `lease` to `end`; on the way no page loses its last lock."""
        if lease.loading is not None:
            self.loads.abandon(lease.loading)
        old = (lease.device_hold, lease.host_hold)
        lease.key = key
        lease.device_hold, lease.host_hold = self.radix.hold(end, DEVICE), None
        lease.device_boundary = lease.memory_boundary = key.pages
        for hold in old:
            if hold is not None:
                self.radix.unhold(hold)

    # -- shrinking --------------------------------------------------------------------------------

    def evict(self, tier: Tier, pages: int, now: float) -> tuple[int, int]:
        """Evict towards `pages` free slots; returns (freed now, pending). Never waits (I10)."""
        return self.evictor.evict(tier, pages, now)

    def reclaimable(self, tier: Tier) -> int:
        """Pages on `tier` that nobody holds (I11)."""
        return self.radix.resident[tier] - self.radix.protected[tier]

    def within_reach(self, tier: Tier) -> int:
        """How many more slots of `tier` could become free, however what is in flight may end."""
        ledger = self.radix.ledgers[tier]
        return ledger.capacity - ledger.free if self.operations.touch(tier) else self.reclaimable(tier)

    def clear(self, namespace: str | None, now: float) -> None:
        """Forget every page of `namespace` (None: of all) in memory. Leased and pinned slots go home at
        their last release. O(nodes)."""
        names = list(self.radix.roots) if namespace is None else [namespace]
        for name in names:
            root = self.radix.roots.pop(name, None)
            if root is not None:
                self.radix.detach_subtree(root)
        self.fetches.forget_all(namespace, now)

    def invalidate(self, fingerprint: bytes, now: float) -> None:
        """Clear everything and root page hashes in `fingerprint`; what leases of before have computed
        cannot be inserted any more. O(nodes)."""
        self.clear(None, now)
        self.radix.hashes.fingerprint = fingerprint
        self.epoch += 1

    def attach_storage(self, attached: bool) -> None:
        """Whether there is a storage to persist to and prefetch from."""
        self.backup.storage = self.fetches.storage = attached
        self.backup.storage_changed()

    def storage_cleared(self) -> None:
        """Storage is empty, or is not ours any more: say so."""
        self.backup.storage_changed()
        if self.radix.announcer is not None:
            self.radix.announcer.storage_cleared()

    # -- what was done ----------------------------------------------------------------------------

    def prefetch(self, key: Key, now: float) -> Prefetch | Refused:
        """Ask storage for what memory lacks of `key`. O(pages)."""
        match = self.peek(key)
        return self.fetches.start(key, match.end, match.memory_boundary, now)

    def load_back(self, lease: Lease, now: float) -> LoadBack | Refused:
        """Start bringing the lease's host pages to device. O(pages)."""
        load = self.loads.start(lease, now)
        if isinstance(load, LoadBack):
            self.radix.version += 1
        return load

    def take_actions(self) -> list[Action]:
        """What the executor is to do, in order. The list is the caller's."""
        actions, self.operations.outbox = self.operations.outbox, []
        return actions

    def take_events(self) -> list[Event]:
        """What happened since the last call, oldest first; nothing where events are off."""
        return [] if self.radix.announcer is None else self.radix.announcer.journal.take()

    def complete(self, completion: Completion, now: float) -> None:
        """One answer of the executor takes effect."""
        self._now = now
        operation = self.operations.in_flight.get(completion.op)
        if operation is None or operation.arrived:
            self.counters.stray_completions += 1
            return
        self.radix.version += 1
        if operation.purpose in (Purpose.QUERY, Purpose.FETCH):
            self.fetches.completed(operation, completion, now)
        elif not completion.final:
            self.counters.stray_completions += 1
        elif operation.purpose is Purpose.PERSIST:
            self.operations.finish(operation)
            self.backup.persisted(operation, completion)
        elif operation.late:
            self.operations.finish(operation)
        else:
            if operation.target_tier == HOST:
                self.evictor.health.ended(completion.error is None, now)
            self.arrivals.arrive(operation, completion.error is None)

    def expire(self, now: float) -> None:
        """Operations past their deadline count as failed; their target slots are LOST until they come
        home. Then whatever waited for somebody else's arrival is tried again."""
        self._now = now
        for operation in self.operations.overdue(now):
            self.counters.late_operations += 1
            self.radix.version += 1
            if operation.purpose in (Purpose.QUERY, Purpose.FETCH):
                self.fetches.late(operation, now)
            elif operation.purpose is not Purpose.PERSIST:
                if operation.target_tier == HOST:
                    self.evictor.health.failed(now, late=True)
                self.arrivals.late(operation)
        self.fetches.retry(now)

    def _settled(self, operation: Operation, ok: bool) -> None:
        if operation.purpose is Purpose.LOAD_BACK:
            self.loads.settled(operation, ok)
        elif ok:
            self.backup.backed_up(operation, self._now)
            if operation.purpose is Purpose.DEMOTE:
                self.evictor.finish_demotion(operation)

    def has_arrived(self, number: int) -> bool:
        """Whether the executor is done with this operation (it may still wait for another)."""
        operation = self.operations.in_flight.get(number)
        return operation is None or operation.arrived

    def pinned_slots(self, tier: Tier) -> Iterator[Slots]:
        """The slots of `tier` that something in flight may touch, one array for each such thing."""
        for operation in self.operations.in_flight.values():
            if operation.source_tier == tier:
                yield operation.source
            if operation.target_tier == tier:
                yield operation.target
        if tier == HOST:
            yield from self.fetches.parked
