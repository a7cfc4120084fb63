"""One look at the whole cache, `PrefixCache.stats()`: plain numbers, in pages unless named otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .storage.base import StorageStats
from .tree.breaker import Breaker
from .tree.core import Core
from .tree.ledger import Ledger, Owner, State
from .tree.partial import Partial
from .tree.stuck import stuck
from .types import Tier


@dataclass(frozen=True, slots=True)
class TierStats:
    """One in-memory tier. free + resident + detached + requests + operations + lost = capacity;
    `protected` of the resident pages are leased or pinned, the rest are `reclaimable`."""

    capacity: int
    free: int
    resident: int
    protected: int
    reclaimable: int
    detached: int
    requests: int
    operations: int
    lost: int
    evicted: int


@dataclass(frozen=True, slots=True)
class KindStats:
    """One partial kind, in pages; see `KindCounters` for what the counters count."""

    device: TierStats
    host: TierStats
    dropped: int
    backed_up: int
    backups_dropped: int
    loaded_back: int
    persisted: int
    prefetched: int
    recovered: int
    declined: int


@dataclass(frozen=True, slots=True)
class BreakerStats:
    """One breaker. `state`: "closed" (all is well), "open" (the tier is left alone), "half_open" (one
    operation may try it, or is trying it). `opened` counts how often it has opened since the cache was;
    `seconds_left` until it is half open."""

    state: str
    failures_in_a_row: int
    opened: int
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot. Counters run since open; the rest is as of now. `device`, `host` and the counters are
    FULL's; `kinds` are the partial kinds by name; `Counters` says what each counter counts.

    `storage_error` is what a call of the backend raised last; None when none ever has. `storage` is what it
    last said of itself, `storage_age_seconds` ago: 0 unless it hangs or
    fails; both are None without storage, and while it has never answered. `stuck` operations are past
    their deadline and have not come home (see `PrefixCache.stuck`), `stuck_threads` are in a call of
    storage that is late. `breakers`: "copies_to_host", "storage_writes", "storage_reads"."""

    device: TierStats
    host: TierStats
    storage: StorageStats | None
    storage_age_seconds: float | None
    storage_error: str | None
    kinds: dict[str, KindStats]
    nodes: int
    namespaces: int
    leases: int
    operations_in_flight: int
    stuck: int
    stuck_threads: int
    breakers: dict[str, BreakerStats]
    dropped: int
    backed_up: int
    backups_dropped: int
    backups_skipped: int
    loaded_back: int
    offered: int
    persisted: int
    persists_refused: int
    persists_crowded: int
    persists_dropped: int
    prefetched: int
    prefetch_discarded: int
    prefetch_vanished: int
    failed_operations: int
    late_operations: int
    stray_completions: int

    def as_dict(self) -> dict[str, Any]:
        """The same as nested plain dictionaries."""
        return asdict(self)


def _tier(ledger: Ledger, resident: int, protected: int, evicted: int) -> TierStats:
    lost = ledger.count(State.LOST)
    return TierStats(
        capacity=ledger.capacity,
        free=ledger.free,
        resident=resident,
        protected=protected,
        reclaimable=resident - protected,
        detached=ledger.count(owner=Owner.NODE) - resident,
        requests=ledger.count(owner=Owner.REQUEST),
        operations=ledger.count(owner=Owner.OPERATION) - lost,
        lost=lost,
        evicted=evicted,
    )


def _full(core: Core, tier: Tier) -> TierStats:
    radix = core.radix
    return _tier(
        radix.ledgers[tier], radix.resident[tier], radix.protected[tier], core.counters.evicted[tier]
    )


def _kind(kind: Partial) -> KindStats:
    counters = asdict(kind.counters)
    evicted = counters.pop("evicted")
    device, host = (
        _tier(kind.ledgers[tier], kind.resident[tier], kind.protected(tier), evicted[tier])
        for tier in (Tier.DEVICE, Tier.HOST)
    )
    return KindStats(device=device, host=host, **counters)


def _breaker(breaker: Breaker, now: float) -> BreakerStats:
    return BreakerStats(
        state=str(breaker.state(now)),
        failures_in_a_row=breaker.failures,
        opened=breaker.opened,
        seconds_left=breaker.seconds_left(now),
    )


def snapshot(
    core: Core,
    now: float,
    storage: tuple[StorageStats | None, float | None],
    storage_error: str | None,
    stuck_threads: int,
) -> Stats:
    """The statistics of `core` at `now`, with what `storage` said and how long ago, and what it raised last.
    O(capacity), vectorised."""
    counters = asdict(core.counters)
    del counters["evicted"]
    return Stats(
        device=_full(core, Tier.DEVICE),
        host=_full(core, Tier.HOST),
        storage=storage[0],
        storage_age_seconds=storage[1],
        storage_error=storage_error,
        kinds={str(kind.kind): _kind(kind) for kind in core.radix.partials},
        nodes=core.radix.nodes,
        namespaces=len(core.radix.roots),
        leases=len(core.leases),
        operations_in_flight=len(core.operations.in_flight),
        stuck=len(stuck(core.operations, now)),
        stuck_threads=stuck_threads,
        breakers={each.name.replace(" ", "_"): _breaker(each, now) for each in core.operations.breakers.all},
        **counters,
    )
