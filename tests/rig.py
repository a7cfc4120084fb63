"""A small cache whose transfers a test works by hand, and the payload trick.

The content of a page is a function of its kind, all tokens before it, its namespace and the weights, so
that one stale or aliased slot shows as a wrong value. See `tiertree.testing.faults`.

Which pages of the partial kinds a request has is said by kind: `{SWA: range(2, 6), MAMBA: [1, 5]}`. For a
kind that is left out the request has what continuing at its end needs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tiertree import (
    FULL,
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    CacheConfig,
    Component,
    DeviceConfig,
    Evicted,
    HostConfig,
    Inserted,
    KindConfig,
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
from tiertree.tree.ledger import Ledger, State
from tiertree.tree.node import Lane, Node, fragments, slots_of
from tiertree.types import Kind, Slots

Tokens = Sequence[int]
Pages = Mapping[Kind, Iterable[int]]
"""Which pages of some partial kinds there are, counted from the start of the prompt."""

WHAT_IT_NEEDS: Pages = {}
"""Of every kind what continuing at the end needs."""
DEVICE, HOST = Tier.DEVICE, Tier.HOST


class Rig:
    """A cache of `device` and `host` pages (and `storage`), everything switched on, nothing automatic.

    A partial kind given by its rules alone has as many slots as there are pages."""

    def __init__(
        self,
        device: int = 8,
        host: int = 0,
        storage: int = 0,
        *,
        kinds: Iterable[Component | KindConfig] = (),
        **options: object,
    ) -> None:
        self.clock = Clock()
        self.storage = KeyStorage(storage) if storage else None
        self.sizes = (device, host)
        self.options = {**options, "kinds": tuple(self._sized(each) for each in kinds)}
        self._open()

    def _sized(self, kind: Component | KindConfig) -> KindConfig:
        device, host = self.sizes
        return (
            kind if isinstance(kind, KindConfig) else KindConfig(rules=kind, device=device, host=host or None)
        )

    def _open(self) -> None:
        self.executor = ManualExecutor(*self.sizes, self.clock, kinds=pool_sizes(self.options["kinds"]))
        self.cache = make_cache(self.executor, self.clock, *self.sizes, **self.options)
        self.page_size = self.cache.config.page_size
        self.core = self.cache._core
        self.kinds = {each.kind: each for each in self.core.radix.partials}
        self._mirror: dict[tuple[Tier, Kind], set[bytes]] = {}
        if self.storage is not None:
            self.cache.attach_storage(self.storage)

    def restart(self) -> None:
        """Close the cache, with whatever is under way, and open another one over the same storage."""
        stored = self.executor.stored
        self.options["revision"] = self.cache.revision
        self.cache.close(deadline_s=0)
        self._open()
        self.executor.stored = stored

    # -- a request's steps ------------------------------------------------------------------------

    def put(self, tokens: Tokens, namespace: str = "", pages: Pages = WHAT_IT_NEEDS) -> Inserted:
        """Compute every page of `tokens`, and `pages` of the other kinds, and insert them without a lease."""
        key = self.cache.key(tokens, namespace)
        slots = self.cache.allocate(key.pages)
        self.write(slots, tokens, namespace, 0)
        partial = {kind: self.compute(kind, tokens, namespace, pages=pages) for kind in self.kinds}
        done = self.cache.insert(key, slots, partial=partial)
        assert isinstance(done, Inserted)
        return done

    def lease(self, tokens: Tokens, namespace: str = "") -> Lease:
        """Match and acquire, and look at every page that this promises, all of each window included."""
        lease = self.cache.acquire(self.cache.match(self.cache.key(tokens, namespace)))
        self.verify(lease, tokens)
        self.verify_windows(lease)
        return lease

    def look_at(self, tokens: Tokens, namespace: str = "") -> None:
        """Lease `tokens` for as long as it takes to look at every page."""
        self.lease(tokens, namespace).release()

    def grow(self, lease: Lease, tokens: Tokens, pages: Pages = WHAT_IT_NEEDS) -> Inserted | Refused:
        """Compute what `lease` lacks of `tokens`, and `pages` of the other kinds, insert it and look at
        every page."""
        key, first = self.cache.key(tokens, lease.key.namespace), lease.device_boundary
        slots = self.cache.allocate(key.pages - first, lease)
        self.write(slots, tokens, key.namespace, first)
        partial = {
            kind: self.compute(kind, tokens, key.namespace, first, lease, pages) for kind in self.kinds
        }
        done = self.cache.insert(key, slots, lease, partial=partial)
        if isinstance(done, Inserted):
            self.verify(lease, tokens)
        return done

    def compute(
        self,
        kind: Kind,
        tokens: Tokens,
        namespace: str = "",
        first: int = 0,
        lease: Lease | None = None,
        pages: Pages = WHAT_IT_NEEDS,
    ) -> Slots:
        """Compute those of `pages` of `kind` that come from page `first` on; what to insert for them."""
        stop = len(tokens) // self.page_size
        wanted = [page for page in pages.get(kind, self.needed(kind, stop)) if first <= page < stop]
        slots = np.full(stop - first, -1, np.int64)
        slots[np.array(wanted, np.int64) - first] = self.cache.allocate(len(wanted), lease, kind=kind)
        self.write(slots, tokens, namespace, first, kind)
        return slots

    def load(self, lease: Lease) -> LoadBack:
        """Start a load-back, which must not be refused."""
        load = self.cache.load_back(lease)
        assert isinstance(load, LoadBack), load
        return load

    def load_all(self, lease: Lease, tokens: Tokens) -> None:
        """Load back everything that `lease` promises, and look at every page."""
        load = self.load(lease)
        self.settle()
        assert lease.device_boundary == load.boundary == lease.memory_boundary
        self.verify(lease, tokens)
        self.verify_windows(lease)

    def fetch(self, tokens: Tokens, namespace: str = "") -> Prefetch:
        """Start a prefetch, which must not be refused."""
        started = self.cache.prefetch(self.cache.key(tokens, namespace))
        assert isinstance(started, Prefetch), started
        return started

    def evict(self, pages: int, tier: Tier = DEVICE, kind: Kind = FULL, deadline_s: float = 0) -> Evicted:
        """Make room, without waiting unless told to."""
        return self.cache.evict(pages, tier, deadline_s=deadline_s, kind=kind)

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

    def page(self, tokens: Tokens, namespace: str, index: int, kind: Kind = FULL) -> object:
        """What page `index` of `tokens` must contain."""
        return (kind, self.cache.revision, namespace, tuple(tokens[: (index + 1) * self.page_size]))

    def write(
        self, slots: Sequence[int], tokens: Tokens, namespace: str, first: int, kind: Kind = FULL
    ) -> None:
        """The engine computes pages `first ..` of `tokens` into `slots`, but for those that are −1."""
        contents = self.executor.of(kind)[DEVICE]
        for at, slot in enumerate(slots):
            if slot >= 0:
                contents[slot] = self.page(tokens, namespace, first + at, kind)

    def verify(self, lease: Lease, tokens: Tokens) -> None:
        """Every page that `lease` promises has exactly the content that was computed for it."""
        namespace = lease.key.namespace
        self._verify(lease.slots, tokens, namespace, 0)
        if lease.device_hold is not None:
            held = slots_of(lease.device_hold.end, DEVICE, 0, lease.reach)
            self._verify(held, tokens, namespace, 0)
        if lease.host_hold is not None:
            beyond = lease.memory_boundary - lease.reach
            held = slots_of(lease.host_hold.end, HOST, lease.reach, beyond)
            self._verify(held, tokens, namespace, lease.reach, tier=HOST)
        for kind in self.kinds:
            if kind not in lease.returned:
                window = lease.window(kind)
                self._verify(window.slots, tokens, namespace, window.first, kind)

    def verify_windows(self, lease: Lease) -> None:
        """Every window of `lease` is whole, as it is after `acquire` and after a load-back."""
        for kind in self.kinds:
            window, boundary = lease.window(kind), lease.device_boundary
            assert window.first == self.needed(kind, boundary).start
            assert len(window.slots) == boundary - window.first
            assert (window.slots >= 0).all(), f"{lease} has a window of {kind} with holes: {window}"

    def _verify(
        self,
        slots: Slots,
        tokens: Tokens,
        namespace: str,
        first: int,
        kind: Kind = FULL,
        tier: Tier = DEVICE,
    ) -> None:
        contents = self.executor.of(kind)[tier]
        for at, slot in enumerate(slots.tolist(), first):
            assert slot < 0 or contents[slot] == self.page(tokens, namespace, at, kind), (kind, at)

    # -- looking ----------------------------------------------------------------------------------

    def needed(self, kind: Kind, boundary: int) -> range:
        """The pages of `kind` that continuing at `boundary` needs."""
        if not boundary:
            return range(0)
        return range(self.kinds[kind].rules.since(boundary, self.page_size), boundary)

    def where(self, tokens: Tokens, namespace: str = "") -> tuple[int, int]:
        """(device boundary, memory boundary) of `tokens`, changing nothing."""
        found = self.cache.peek(self.cache.key(tokens, namespace))
        return found.device_boundary, found.memory_boundary

    def map(self, tokens: Tokens, kind: Kind = FULL, namespace: str = "") -> str:
        """Where each page of `tokens` is READY: D device, H host, B both, ~ on its way, . nowhere."""
        drawn = ["."] * (len(tokens) // self.page_size)
        path, last, inside = self.core.radix.walk(self.cache.key(tokens, namespace))
        end = last or (path[-1] if path else None)
        if end is not None:
            reach = last.start + inside if last is not None else end.end
            for node, low, high in fragments(end, 0, reach):
                device, host = (self.states(node, tier, kind) for tier in (DEVICE, HOST))
                for at in range(low, high):
                    drawn[node.start + at] = _drawn(device[at], host[at])
        return "".join(drawn)

    def lane(self, node: Node, tier: Tier, kind: Kind = FULL) -> Lane:
        """The slots of `kind` of one node."""
        return node.lane(tier) if kind == FULL else self.kinds[kind].lane(node, tier)

    def states(self, node: Node, tier: Tier, kind: Kind = FULL) -> list[int]:
        """Per page of `node` the state of its slot, −1 where it has none."""
        lane = self.lane(node, tier, kind)
        if lane.slots is None:
            return [-1] * node.pages
        book = self.ledger(tier, kind).book
        return [-1 if slot < 0 else int(book[slot]) >> 2 for slot in lane.slots.tolist()]

    def page_hashes(self, tokens: Tokens, namespace: str = "") -> tuple[bytes, ...]:
        """The page hash of every page of `tokens`."""
        return self.core.radix.hashes.of_key(self.cache.key(tokens, namespace))

    def mirror(self, tier: Tier, kind: Kind = FULL) -> set[bytes]:
        """The page hashes of `kind` that are on `tier`, as the events so far have it."""
        for event in self.cache.take_events():
            assert isinstance(event, BlockStored | BlockRemoved | AllBlocksCleared)
            if isinstance(event, AllBlocksCleared):
                self._mirror = {at: on for at, on in self._mirror.items() if at[0] != event.medium}
                continue
            on = self._mirror.setdefault((event.medium, event.kind), set())
            if isinstance(event, BlockStored):
                on.update(event.block_hashes)
            else:
                on.difference_update(event.block_hashes)
        return self._mirror.get((tier, kind), set())

    def ledger(self, tier: Tier = DEVICE, kind: Kind = FULL) -> Ledger:
        """The books of `kind` on `tier`."""
        return (self.core.radix if kind == FULL else self.kinds[kind]).ledgers[tier]

    def free(self, tier: Tier = DEVICE, kind: Kind = FULL) -> int:
        """Free slots of `kind` on `tier`."""
        return self.ledger(tier, kind).free

    def empty_out(self) -> None:
        """Answer everything, evict everything; then every pool must be entirely free (I12)."""
        pools = [(tier, kind) for tier in (DEVICE, HOST) for kind in (FULL, *self.kinds)]
        before = -1
        while before != (before := sum(self.free(*pool) for pool in pools)):
            for tier, kind in pools:
                self.evict(self.ledger(tier, kind).capacity, tier, kind)
                self.settle()
            self.cache.check()
        stats = self.cache.stats()
        for tiers in (stats, *stats.kinds.values()):
            for pool in (tiers.device, tiers.host):
                assert pool.free == pool.capacity, stats
                assert pool.lost == 0
        assert stats.nodes == stats.namespaces == stats.operations_in_flight == 0


def _drawn(device: int, host: int) -> str:
    ready = (device == State.READY, host == State.READY)
    if any(ready):
        return "B" if all(ready) else "DH"[ready[1]]
    return "~" if State.FILLING in (device, host) else "."


def books(rig: Rig) -> tuple[Any, ...]:
    """Everything that a call could have changed, to show that it has not."""
    radix = rig.core.radix
    owners: list[Any] = [radix, *radix.partials]
    ledgers = [ledger for owner in owners for ledger in owner.ledgers]
    return (
        rig.cache.stats(),
        [(ledger.book.tolist(), ledger.pins.tolist(), ledger.tags.tolist()) for ledger in ledgers],
        [ledger.free_slots() for ledger in ledgers],
        (radix.nodes, radix.version, list(radix.roots)),
        (len(rig.executor.submitted), rig.clock.now, set(rig.core.fetches._running)),
    )


def pool_sizes(kinds: Any) -> dict[Kind, tuple[int, int]]:
    """Device and host slots of each kind, for an executor."""
    return {each.rules.kind: (each.device, each.host or 0) for each in kinds}


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
