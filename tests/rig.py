"""A small cache whose transfers a test works by hand, and the payload trick.

The content of a page is a function of all tokens before it, its namespace and the weights, so that one
stale or aliased slot shows as a wrong value. See `tiertree.testing.faults`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from tiertree import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    Inserted,
    Lease,
    LoadBack,
    LoadBackConfig,
    Prefetch,
    PrefetchConfig,
    PrefixCache,
    Refused,
    StopRule,
    Tier,
)
from tiertree.storage.memory import KeyStorage
from tiertree.testing.faults import Clock, ManualExecutor
from tiertree.tree.node import slots_of

Tokens = Sequence[int]


class Rig:
    """A cache of `device` and `host` pages (and `storage`), everything switched on, nothing automatic."""

    def __init__(self, device: int = 8, host: int = 0, storage: int = 0, **options: object) -> None:
        self.clock = Clock()
        self.executor = ManualExecutor(device, host, self.clock)
        self.cache = make_cache(self.executor, self.clock, device, host, **options)
        self.page_size = self.cache.config.page_size
        self.core = self.cache._core
        self.storage = KeyStorage(storage) if storage else None
        self._mirror: dict[Tier, set[bytes]] = {}
        if self.storage is not None:
            self.cache.attach_storage(self.storage)

    # -- a request's steps ------------------------------------------------------------------------

    def put(self, tokens: Tokens, namespace: str = "") -> Inserted:
        """Compute every page of `tokens` and insert them without a lease."""
        key = self.cache.key(tokens, namespace)
        slots = self.cache.allocate(key.pages)
        self.write(slots, tokens, namespace, 0)
        done = self.cache.insert(key, slots)
        assert isinstance(done, Inserted)
        return done

    def lease(self, tokens: Tokens, namespace: str = "") -> Lease:
        """Match and acquire, and look at every page that this promises."""
        lease = self.cache.acquire(self.cache.match(self.cache.key(tokens, namespace)))
        self.verify(lease, tokens)
        return lease

    def look_at(self, tokens: Tokens, namespace: str = "") -> None:
        """Lease `tokens` for as long as it takes to look at every page."""
        self.lease(tokens, namespace).release()

    def grow(self, lease: Lease, tokens: Tokens) -> Inserted | Refused:
        """Compute what `lease` lacks of `tokens`, insert it and look at every page."""
        key = self.cache.key(tokens, lease.key.namespace)
        slots = self.cache.allocate(key.pages - lease.device_boundary, lease)
        self.write(slots, tokens, key.namespace, lease.device_boundary)
        done = self.cache.insert(key, slots, lease)
        if isinstance(done, Inserted):
            self.verify(lease, tokens)
        return done

    def load(self, lease: Lease) -> LoadBack:
        """Start a load-back, which must not be refused."""
        load = self.cache.load_back(lease)
        assert isinstance(load, LoadBack), load
        return load

    def fetch(self, tokens: Tokens, namespace: str = "") -> Prefetch:
        """Start a prefetch, which must not be refused."""
        started = self.cache.prefetch(self.cache.key(tokens, namespace))
        assert isinstance(started, Prefetch), started
        return started

    # -- the executor's steps ---------------------------------------------------------------------

    def settle(self) -> None:
        """Complete everything, and what follows from it, until nothing is in flight."""
        while self.executor.pending or self.core.operations.in_flight:
            before = len(self.executor.submitted)
            self.executor.complete_all()
            self.cache.poll()
            assert self.executor.pending or before == len(self.executor.submitted)

    def done(self, op: int | None = None) -> None:
        """Complete one action (None: the oldest) and poll."""
        self.executor.complete(op)
        self.cache.poll()

    def failed(self, op: int | None = None) -> None:
        """Fail one action (None: the oldest) and poll."""
        self.executor.fail(op)
        self.cache.poll()

    def running(self, kind: type) -> list[int]:
        """The operations pending whose action is a `kind`, oldest first."""
        return [op for op, action in self.executor.pending.items() if isinstance(action, kind)]

    # -- contents ---------------------------------------------------------------------------------

    def page(self, tokens: Tokens, namespace: str, index: int) -> object:
        """What page `index` of `tokens` must contain."""
        return (self.cache.revision, namespace, tuple(tokens[: (index + 1) * self.page_size]))

    def write(self, slots: Sequence[int], tokens: Tokens, namespace: str, first: int) -> None:
        """The engine computes pages `first ..` of `tokens` into `slots`."""
        for at, slot in enumerate(slots):
            self.executor.contents[Tier.DEVICE][slot] = self.page(tokens, namespace, first + at)

    def verify(self, lease: Lease, tokens: Tokens) -> None:
        """Every page that `lease` promises has exactly the content that was computed for it."""
        namespace = lease.key.namespace
        device, host = (self.executor.contents[tier] for tier in (Tier.DEVICE, Tier.HOST))
        for index, slot in enumerate(lease.slots.tolist()):
            assert device[slot] == self.page(tokens, namespace, index)
        beyond = lease.memory_boundary - lease.device_boundary
        if lease.host_hold is not None:
            slots = slots_of(lease.host_hold.end, Tier.HOST, lease.device_boundary, beyond)
            for at, slot in enumerate(slots.tolist()):
                assert host[slot] == self.page(tokens, namespace, lease.device_boundary + at)

    # -- looking ----------------------------------------------------------------------------------

    def where(self, tokens: Tokens, namespace: str = "") -> tuple[int, int]:
        """(device boundary, memory boundary) of `tokens`, changing nothing."""
        found = self.cache.peek(self.cache.key(tokens, namespace))
        return found.device_boundary, found.memory_boundary

    def page_hashes(self, tokens: Tokens, namespace: str = "") -> tuple[bytes, ...]:
        """The page hash of every page of `tokens`."""
        return self.core.radix.hashes.of_key(self.cache.key(tokens, namespace))

    def mirror(self, tier: Tier) -> set[bytes]:
        """The page hashes that are on `tier`, as the events so far have it."""
        for event in self.cache.take_events():
            assert isinstance(event, BlockStored | BlockRemoved | AllBlocksCleared)
            on = self._mirror.setdefault(event.medium, set())
            if isinstance(event, BlockStored):
                on.update(event.block_hashes)
            elif isinstance(event, BlockRemoved):
                on.difference_update(event.block_hashes)
            else:
                on.clear()
        return self._mirror.get(tier, set())

    def free(self, tier: Tier = Tier.DEVICE) -> int:
        """Free slots of `tier`."""
        return self.core.radix.ledgers[tier].free

    def empty_out(self) -> None:
        """Answer everything, evict everything; then every pool must be entirely free (I12)."""
        before = -1
        while before != (before := self.free(Tier.DEVICE) + self.free(Tier.HOST)):
            for tier in (Tier.DEVICE, Tier.HOST):
                self.cache.evict(self.core.radix.ledgers[tier].capacity, tier, deadline_s=0)
                self.settle()
            self.cache.check()
        stats = self.cache.stats()
        for tier_stats in (stats.device, stats.host):
            assert tier_stats.free == tier_stats.capacity, stats
            assert tier_stats.lost == 0
        assert stats.nodes == stats.namespaces == stats.operations_in_flight == 0


def books(rig: Rig) -> tuple[Any, ...]:
    """Everything that a call could have changed, to show that it has not."""
    radix, ledgers = rig.core.radix, rig.core.radix.ledgers
    return (
        rig.cache.stats(),
        [(ledger.book.tolist(), ledger.pins.tolist(), ledger.tags.tolist()) for ledger in ledgers],
        [ledger.free_slots() for ledger in ledgers],
        (radix.nodes, radix.version, list(radix.roots)),
        (len(rig.executor.submitted), rig.clock.now, set(rig.core.fetches._running)),
    )


def make_cache(
    executor: ManualExecutor, clock: Clock, device: int, host: int, **options: object
) -> PrefixCache:
    """An open metadata-only cache over `executor`. `options` are fields of CacheConfig; the minimum
    lengths are 0 and the page size is 1 unless they say otherwise."""
    chosen: dict[str, object] = {
        "page_size": 1,
        "load_back": LoadBackConfig(min_tokens=0),
        "prefetch": PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        "events": True,
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a host smaller than the device is what many of these are about
        config = CacheConfig(
            device=DeviceConfig(size=device), host=HostConfig(size=host) if host else None, **chosen
        )
    return PrefixCache(config, executor=executor, clock=clock).open()
