"""The tree: one deterministic state machine over keys, slots and completions.

    match ─▶ Match ─▶ acquire ─▶ Lease ─▶ load, insert ─▶ …            decides
                 actions ─▶ (executor) ─▶ completions ─▶ complete      is told

No torch, thread, file, socket, clock or random number: time enters as `now`, everything it wants done
leaves through `take_actions`, what was done comes back through `complete`. Equal calls decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from math import lcm
from types import MappingProxyType

from ..types import FULL, ForeignObject, Kind, LeaseReleased, Refused, Slots, StaleMatch, Tier, WritePolicy
from ..validate import shown
from .actions import Action, Completion
from .arrivals import Arrivals
from .backup import Backup
from .breaker import Breakers, Verdict
from .counters import Counters
from .evict import Evictor
from .fetch import Fetches
from .insert import Insert, Inserted
from .journal import Event, Journal
from .key import Key, KeyMaker
from .landing import Landing
from .lease import Allocated, Lease, Match
from .ledger import ANYBODY, Ledger, Owner
from .load import LoadBack, Loads
from .node import Node
from .operation import Operation, Operations, Purpose, verdict_on
from .partial import Partial
from .prefetch import Prefetch
from .radix import DEVICE, HOST, Radix
from .reach import NOWHERE_AT_ALL, Reach, reach
from .rules import Rules
from .stuck import remember
from .victims import Policy
from .window import pin_beyond

NOTHING: Mapping[Kind, Slots] = MappingProxyType({})
"""What an insert brings of partial kinds that brings none."""


class Core:
    """One tree over DEVICE and HOST, with what is in flight. Single-threaded; knows no clock."""

    def __init__(
        self,
        keys: KeyMaker,
        ledgers: tuple[Ledger, Ledger],
        policy: Policy,
        rules: Rules,
        fingerprint: bytes,
        journal: Journal | None = None,
        partials: tuple[Partial, ...] = (),
    ) -> None:
        self.rules = rules
        self.counters = Counters()
        closed = rules.write_policy is not WritePolicy.WRITE_BACK
        self.radix = Radix(keys, ledgers, policy, closed, fingerprint, journal, partials)
        breakers = Breakers(rules.breaker_failures, rules.breaker_base_seconds, rules.breaker_max_seconds)
        self.operations = Operations(self.radix, breakers, rules.op_deadline_seconds, rules.operations_max)
        self.evictor = Evictor(self.radix, self.operations, self.counters, write_back=not closed)
        self.backup = Backup(
            self.radix,
            self.operations,
            self.evictor,
            self.counters,
            rules.write_policy,
            rules.selective_hits,
        )
        self.arrivals = Arrivals(self.radix, self.operations, self.counters, self._settled)
        self.loads = Loads(
            self.radix, self.operations, self.counters, rules.load_back_pages_min, rules.load_back_pages_max
        )
        self.landing = Landing(self.radix, self.backup, self.counters)
        self.fetches = Fetches(
            self.radix,
            self.operations,
            self.evictor,
            self.landing,
            self.counters,
            rules.prefetch_pages_min,
            rules.prefetch_pages_in_flight_max,
        )
        self.leases: dict[int, Lease] = {}
        self.kinds = {partial.kind: partial for partial in partials}
        self._grid = lcm(*(partial.grid for partial in partials))
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
            return Match(key, None, NOWHERE_AT_ALL, 1, radix.version)
        for node in path:
            node.last_used = now
            node.hits += 1
        if self.backup.enabled and self.backup.offer(node, now):
            radix.version += 1
        found = reach(radix, path, node.pages)
        return Match(key, node, found, self._grid, radix.version)

    def peek(self, key: Key) -> Match:
        """`match` that changes nothing: no split, no recency, no hit. O(pages + nodes)."""
        end, found = self._reach(key)
        return Match(key, end, found, self._grid, self.radix.version)

    def _reach(self, key: Key) -> tuple[Node | None, Reach]:
        """The deepest node that has pages of `key`, and how far it can be continued from."""
        path, partial, inside = self.radix.walk(key)
        if partial is not None:
            path.append(partial)
        if not path:
            return None, NOWHERE_AT_ALL
        return path[-1], reach(self.radix, path, inside or path[-1].pages)

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
        lease.reach = min(match.full_device, match.memory_boundary)
        end = match.end
        if end is not None and match.memory_boundary > lease.reach:
            end = self.loads.node_at(end, match.memory_boundary)
            if lease.reach:
                self.loads.node_at(end, lease.reach)
            lease.host_hold = radix.hold(end, HOST, 0 if radix.host_prefix_closed else lease.reach)
        if end is not None and lease.reach:
            lease.device_hold = radix.hold(self.loads.node_at(end, lease.reach), DEVICE)
        if radix.partials:
            lease.pin_windows(radix.partials)
            if lease.end is not None and lease.memory_boundary > lease.device_boundary:
                for kind in radix.partials:
                    lease.beyond += pin_beyond(kind, lease.end, lease.memory_boundary)
        self.leases[lease.number] = lease
        return lease

    def release_window(self, lease: Lease, kind: Kind) -> None:
        """Give the part of `lease` that is of a partial kind back early; a load-back under way is not waited
        for, since it would need it. Raises LeaseReleased the second time, until the lease has moved."""
        lease.window(kind)
        if lease.loading is not None:
            self.loads.abandon(lease.loading)
        lease.returned.add(kind)
        if kind in lease.pins:
            lease.pins.pop(kind).unpin(lease.end)
        for pinned in [each for each in lease.beyond if each.kind.kind == kind]:
            lease.beyond.remove(pinned)
            pinned.unpin(lease.end)
        self.radix.version += 1

    def release(self, lease: Lease) -> None:
        """Give back everything that `lease` holds, exactly once."""
        if lease.released:
            raise LeaseReleased("this lease was released before")
        lease.released = True
        del self.leases[lease.number]
        if lease.loading is not None:
            self.loads.abandon(lease.loading)
        lease.unpin_windows()
        lease.unpin_beyond(lease.end)
        for hold in (lease.host_hold, lease.device_hold):
            if hold is not None:
                self.radix.unhold(hold)
        for kind, allocated in lease.allocated.items():
            ledger = self.ledger(kind, DEVICE)
            left = allocated.left(ledger.tags, lease.number)
            if len(left):
                ledger.drop(left)
        lease.allocated = {}

    # -- growing ----------------------------------------------------------------------------------

    def ledger(self, kind: Kind, tier: Tier) -> Ledger:
        """The books of `kind` on `tier`. Raises ForeignObject for a kind that the cache does not have."""
        if kind is FULL or (isinstance(kind, str) and kind == FULL):
            return self.radix.ledgers[tier]
        if not isinstance(kind, str) or kind not in self.kinds:
            raise ForeignObject(f"this cache has no kind {shown(kind)}; allowed: {[FULL, *self.kinds]}")
        return self.kinds[kind].ledgers[tier]

    def take(self, pages: int, lease: Lease | None, kind: Kind = FULL) -> Slots | None:
        """`pages` device slots of `kind` for a request; None if not as many are free."""
        tag = lease.number if lease is not None else ANYBODY
        ledger = self.ledger(kind, DEVICE)
        slots = ledger.take(pages, Owner.REQUEST, tag)
        if slots is not None and lease is not None:
            if kind not in lease.allocated:
                lease.allocated[kind] = Allocated()
            lease.allocated[kind].add(slots.copy(), ledger.tags, tag)
        return slots

    def give_back(self, slots: Slots, lease: Lease | None, kind: Kind = FULL) -> None:
        """Slots that were taken for `lease` (None: for none) and not inserted. Raises InvalidSlots."""
        ledger = self.ledger(kind, DEVICE)
        self._insert.check(ledger, slots, None, lease.number if lease is not None else ANYBODY)
        ledger.drop(slots)

    def insert(
        self, key: Key, slots: Slots, lease: Lease | None, now: float, partial: Mapping[Kind, Slots] = NOTHING
    ) -> Inserted | Refused:
        """Put pages `first ..` of `key` into the tree, `first` being the lease's device boundary, and
        move the lease to the end of `key`. Refused, with nothing changed, when the leased prefix was
        cleared meanwhile. Raises InvalidSlots, and ForeignObject for a key that does not begin with the
        pages that the lease covers, or for an unknown kind. O(pages + nodes)."""
        first = lease.device_boundary if lease is not None else 0
        hold = lease.device_hold if lease is not None else None
        if lease is not None and not self._extends(key, lease):
            raise ForeignObject("this key does not begin with the pages that the lease covers")
        if hold is not None and hold.end.detached:
            return Refused("the leased prefix was cleared")
        if lease is not None and lease.epoch != self.epoch:
            return Refused("the weights have changed since this lease was acquired")
        tag, pages = lease.number if lease is not None else ANYBODY, key.pages - first
        brought = self._insert.brought(self.kinds, partial, pages, tag) if partial is not NOTHING else []
        self._insert.check(self.radix.ledgers[DEVICE], slots, pages, tag)
        mine = hold.end if hold is not None else None
        end, existing, depth = self._insert.insert(key, slots, first, now, mine)
        partials = self.radix.partials
        if partials and end is not None:
            plain = [self._insert.fill(each, end, first, depth) for each in brought]
            if len(plain) == len(partials) and all(plain):
                end.partial.dead = 0
        self.radix.version += 1
        if lease is not None and end is not None:
            self._move(lease, key, end)
        if partials and end is not None:
            self.radix.offer(end, DEVICE)
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
        lease.unpin_beyond(lease.end)
        lease.key = key
        lease.device_hold, lease.host_hold = self.radix.hold(end, DEVICE), None
        lease.device_boundary = lease.memory_boundary = lease.reach = key.pages
        if self.radix.partials:
            lease.pin_windows(self.radix.partials)
        for hold in old:
            if hold is not None:
                self.radix.unhold(hold)

    # -- shrinking --------------------------------------------------------------------------------

    def evict(self, tier: Tier, pages: int, now: float, kind: Kind = FULL) -> tuple[int, int]:
        """Evict towards `pages` free slots; returns (freed now, pending). Never waits (I10)."""
        if kind == FULL:
            return self.evictor.evict(tier, pages, now)
        return self.evictor.thinner.evict(self.kinds[kind], tier, pages, now)

    def reclaimable(self, tier: Tier, kind: Kind = FULL) -> int:
        """Pages on `tier` that nobody holds (I11)."""
        if kind == FULL:
            return self.radix.resident[tier] - self.radix.protected[tier]
        return self.kinds[kind].resident[tier] - self.kinds[kind].protected(tier)

    def within_reach(self, tier: Tier, kind: Kind = FULL) -> int:
        """How many more slots of `tier` could become free, however what is in flight may end."""
        ledger = self.ledger(kind, tier)
        if self.operations.touch(tier):
            return ledger.capacity - ledger.free
        return self.reclaimable(tier, kind)

    def clear(self, namespace: str | None, now: float) -> None:
        """Forget every page of `namespace` (None: of all) in memory. Leased and pinned slots go home at
        their last release. O(nodes)."""
        for name in list(self.radix.roots) if namespace is None else [namespace]:
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
        self.operations.breakers.storage_changed()
        self.backup.storage_changed()

    def storage_cleared(self) -> None:
        """Storage is empty, or is not ours any more: say so."""
        self.backup.storage_changed()
        if self.radix.announcer is not None:
            self.radix.announcer.storage_cleared()

    # -- what was done ----------------------------------------------------------------------------

    def prefetch(self, key: Key, now: float) -> Prefetch | Refused:
        """Ask storage for what memory lacks of `key`. O(pages)."""
        _, found = self._reach(key)
        return self.fetches.start(key, found, now)

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
            self.backup.persisted(operation, completion, now)
        elif operation.late:
            self.operations.finish(operation)
        else:
            self.operations.hear(operation, verdict_on(completion), now)
            self.arrivals.arrive(operation, completion.error is None)

    def expire(self, now: float) -> None:
        """Operations past their deadline count as failed; their target slots are LOST until they come
        home. Then whatever waited for somebody else's arrival is tried again."""
        # What nobody has begun with is withdrawn first: a stuck worker gets a replacement, who would.
        self._now = now
        late = self.operations.overdue(now)
        for operation in late:
            self.counters.late_operations += 1
            self.radix.version += 1
            remember(operation, self.radix.hashes, self.leases.values())
            self.operations.hear(operation, Verdict.LATE, now)
        for operation in reversed(late):
            self.operations.cancel(operation)
        for operation in late:
            if operation.purpose in (Purpose.QUERY, Purpose.FETCH):
                self.fetches.late(operation, now)
            elif operation.purpose is Purpose.PERSIST:
                self.operations.let_go(operation)
            else:
                self.arrivals.late(operation)
        self.landing.retry(now)

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
