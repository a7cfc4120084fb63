"""One look at the whole cache, `PrefixCache.stats()`: plain numbers, in pages unless named otherwise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .storage.base import StorageStats
from .tree.core import Core
from .tree.ledger import Owner, State
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
class Stats:
    """A snapshot. Counters run since open; the rest is as of now."""

    device: TierStats
    host: TierStats
    storage: StorageStats | None
    nodes: int
    namespaces: int
    leases: int
    operations_in_flight: int
    dropped: int
    backed_up: int
    backups_dropped: int
    loaded_back: int
    offered: int
    persisted: int
    persists_refused: int
    prefetched: int
    prefetch_discarded: int
    failed_operations: int
    late_operations: int
    stray_completions: int

    def as_dict(self) -> dict[str, Any]:
        """The same as nested plain dictionaries."""
        return asdict(self)


def _tier(core: Core, tier: Tier) -> TierStats:
    ledger, radix = core.radix.ledgers[tier], core.radix
    resident, protected = radix.resident[tier], radix.protected[tier]
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
        evicted=core.counters.evicted[tier],
    )


def snapshot(core: Core, storage: StorageStats | None) -> Stats:
    """The statistics of `core` now. O(capacity), vectorised."""
    counters = asdict(core.counters)
    del counters["evicted"]
    return Stats(
        device=_tier(core, Tier.DEVICE),
        host=_tier(core, Tier.HOST),
        storage=storage,
        nodes=core.radix.nodes,
        namespaces=len(core.radix.roots),
        leases=len(core.leases),
        operations_in_flight=len(core.operations.in_flight),
        **counters,
    )
