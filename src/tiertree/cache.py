"""`PrefixCache`: the tree, its pools and its executor behind one object that an engine drives.

    key ─▶ match ─▶ acquire ─▶ (load_back) ─▶ allocate ─▶ the engine computes ─▶ insert ─▶ release
                                       poll() between steps: only there does finished work take effect

A cache belongs to the thread that opened it. Only `wake` and `fileno` may be used by another thread; a
child process must open a cache of its own. Lengths are pages unless a name says otherwise.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Self

from .build import fingerprint, make_core, make_executor, make_pools, open_storage
from .config import CacheConfig
from .driver import Driver, Evicted, within
from .events import Event
from .executor import Executor
from .guard import Guard, count
from .metrics import Stats, snapshot
from .policy.prefetch import patience_seconds
from .pools.group import PoolGroup
from .storage.base import Storage
from .tree.check import audit
from .tree.fetch import Prefetch, Stage
from .tree.insert import Inserted
from .tree.key import Key, Tokens
from .tree.lease import Lease, Match
from .tree.load import LoadBack, Progress
from .tree.radix import DEVICE, HOST
from .types import (
    CacheClosed,
    ConfigError,
    ForkedCache,
    InvalidSlots,
    NoRoom,
    Refused,
    Slots,
    StorageError,
    Tier,
    WrongThread,
)


class PrefixCache:
    """A hierarchical prefix cache. Open it with `with`, or by `open` and `close`.

    `executor` and `clock` (seconds, never going back) are for simulators and tests; without them the
    cache builds the pools and workers that `config` describes and uses the monotonic clock.

    Every method but `key` and `extend_key` raises CacheClosed before open and after close, WrongThread
    from another thread and ForkedCache in a child process, and ForeignObject for another cache's objects;
    it then changes nothing.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.revision = config.revision
        self.device_pools: PoolGroup | None = None
        self.host_pools: PoolGroup | None = None
        self._clock = clock
        self._given_executor = executor
        self._thread = 0
        self._pid = 0
        self._storage: Storage | None = None
        self._owns_storage = False
        self._core = make_core(config)
        self._guard = Guard(self._core.radix.keys)
        self._driver: Driver | None = None

    # -- opening and closing ----------------------------------------------------------------------

    def open(self) -> Self:
        """Take the memory, open the disk tier, start the workers. A cache is opened once. Raises
        CacheClosed, StorageLocked, StorageError."""
        if self._pid:
            raise CacheClosed("this cache has been opened before; make a new one")
        self._pid, self._thread = os.getpid(), threading.get_ident()
        executor = self._given_executor
        if executor is None:
            self.device_pools, self.host_pools = make_pools(self.config)
        storage = open_storage(self.config)
        try:
            if executor is None:
                executor = make_executor(self.config, self.device_pools, self.host_pools)
        except BaseException:
            if storage is not None:
                storage.close()
            raise
        self._driver = Driver(self._core, executor, self._clock)
        if storage is not None:
            self._attach(storage, owned=True)
        return self

    def close(self, deadline_s: float = 10.0) -> tuple[int, ...]:
        """Finish what is in flight, for at most `deadline_s` seconds, then stop. Returns the numbers of
        the operations that were abandoned. The second close does nothing."""
        if self._pid and self._driver is None:
            return ()
        driver = self._enter()
        end = self._clock() + deadline_s
        driver.drain(deadline_s)
        abandoned = set(self._core.operations.in_flight)
        self._core.attach_storage(False)
        abandoned.update(driver.executor.close(max(0.1, end - self._clock())))
        if self._owns_storage and self._storage is not None:
            within(max(0.1, end - self._clock()), self._storage.close)
        self._driver = self.device_pools = self.host_pools = None
        return tuple(sorted(abandoned))

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _enter(self) -> Driver:
        """Whether this call may be made at all."""
        driver = self._driver
        if driver is None:
            raise CacheClosed("this cache is not open" if not self._pid else "this cache is closed")
        if os.getpid() != self._pid:
            raise ForkedCache("a cache cannot be used after fork: open one in the child")
        if threading.get_ident() != self._thread:
            raise WrongThread("a cache belongs to the thread that opened it")
        return driver

    def wake(self) -> None:
        """Wake the owner out of a wait. May be called from any thread."""
        if (driver := self._driver) is not None:
            driver.executor.ring()

    def fileno(self) -> int:
        """A descriptor that is readable when `poll` may have something to do, for select or asyncio's
        `add_reader`; −1 where nothing ever is under way (metadata only). From any thread."""
        if (driver := self._driver) is None:
            raise CacheClosed("this cache is not open")
        return driver.executor.fileno()

    # -- keys and lookups -------------------------------------------------------------------------

    def key(self, tokens: Tokens, namespace: str = "") -> Key:
        """The key of `tokens` (any flat integer sequence or array); only whole pages are part of it.
        Keys of different namespaces never share a page. O(tokens). Raises InvalidTokens,
        InvalidNamespace."""
        return self._core.radix.keys.make(tokens, namespace)

    def extend_key(self, key: Key, tokens: Tokens) -> Key:
        """`key` with the whole pages of `tokens` behind it. O(pages). Raises InvalidTokens."""
        return self._core.radix.keys.extend(key, tokens)

    def match(self, key: Key) -> Match:
        """Longest usable prefix of `key`. O(pages + nodes on the path). Refreshes recency; may split a
        node and start a backup that was owed. Valid until the next call that changes the cache."""
        driver = self._enter()
        self._guard.key(key)
        found = self._core.match(key, self._clock())
        if self._core.operations.outbox:
            driver.submit()
        return found

    def peek(self, key: Key) -> Match:
        """`match` that changes neither recency nor the tree."""
        self._enter()
        self._guard.key(key)
        return self._core.peek(key)

    def acquire(self, match: Match) -> Lease:
        """Lock what `match` found until the lease is released. O(nodes on the path). Raises StaleMatch
        if the cache has changed since."""
        self._enter()
        self._guard.match(match)
        return self._core.acquire(match, self._release)

    def _release(self, lease: Lease) -> None:
        self._enter()
        self._core.release(lease)

    # -- a request's pages ------------------------------------------------------------------------

    def allocate(
        self, pages: int, lease: Lease | None = None, deadline_s: float | None = None
    ) -> Slots | NoRoom:
        """`pages` device slots for a request to compute into; evicts, and waits for pages being copied
        away, for at most `deadline_s` seconds (default: op_deadline_seconds). With a lease they go back
        when it is released, unless inserted before. NoRoom when they cannot be had: nothing is taken."""
        driver = self._enter()
        if lease is not None:
            self._guard.lease(lease)
        pages = count("pages", pages)
        ledger, pending = self._core.radix.ledgers[DEVICE], 0
        if ledger.free < pages <= ledger.free + self._core.within_reach(DEVICE):
            pending = driver.make_room(DEVICE, pages, deadline_s).pending
        slots = self._core.take(pages, lease)
        if slots is not None:
            return slots
        return NoRoom(pages, ledger.free, self._core.reclaimable(DEVICE), pending)

    def free(self, slots: Slots, lease: Lease | None = None) -> None:
        """Give back slots that were allocated for `lease` (None: for none) and not inserted. Raises
        InvalidSlots."""
        self._enter()
        if lease is not None:
            self._guard.lease(lease)
        self._core.give_back(slots, lease)

    def insert(self, key: Key, slots: Slots, lease: Lease | None = None) -> Inserted | Refused:
        """Pages that a request has computed become part of the cache.

        With a lease (a request that goes on: chunked prefill, decode): `key` extends the lease's prefix,
        `slots` are for its pages from `lease.device_boundary` on, and the lease grows to the whole key;
        `lease.slots` are then the slots to use. Without: `slots` are for all pages of `key`. Slots of
        pages that the cache had already are freed. Refused, nothing changed and the slots still the
        request's, if the leased prefix was cleared. Raises InvalidSlots, and ForeignObject for a key that
        does not extend the lease's. O(pages + nodes)."""
        driver = self._enter()
        self._guard.key(key)
        if lease is not None:
            self._guard.lease(lease)
        done = self._core.insert(key, slots, lease, self._clock())
        if self._core.operations.outbox:
            driver.submit()
        return done

    def load_back(self, lease: Lease, deadline_s: float | None = None) -> LoadBack | Refused:
        """Start copying the leased host pages to device: the deepest boundary that fits the quota and
        the room, all of it or nothing. Makes room for at most `deadline_s` seconds. When its `state` is
        DONE, after some `poll`, the lease's device boundary has moved."""
        driver = self._enter()
        self._guard.lease(lease)
        wanted = self._core.loads.plan(lease)
        if isinstance(wanted, Refused):
            return wanted
        driver.make_room(DEVICE, wanted, deadline_s)
        load = self._core.load_back(lease, self._clock())
        driver.submit()
        return load

    def layers_ready(self, load_back: LoadBack) -> int:
        """How many leading layers of `load_back.slots` may be read already: all when it is DONE, none when
        it has FAILED. A layer that was ready stays so for as long as the load-back is PENDING or DONE."""
        executor = self._enter().executor
        self._guard.load_back(load_back)
        layers = self.config.layout.layers if self.config.layout is not None else 0
        if load_back.state is not Progress.PENDING:
            return layers if load_back.state is Progress.DONE else 0
        arrived = {op for op in load_back.waiting if self._core.has_arrived(op)}
        return min((executor.layers_done(op) for op in load_back.waiting - arrived), default=layers)

    # -- storage ----------------------------------------------------------------------------------

    def prefetch(self, key: Key) -> Prefetch | Refused:
        """Start reading what memory lacks of `key` from storage into host. O(pages)."""
        driver = self._enter()
        self._guard.key(key)
        started = self._core.prefetch(key, self._clock())
        driver.submit()
        return started

    def settle(self, prefetch: Prefetch) -> int | None:
        """Ask whether `prefetch` is over by the configured stop rule: None while it is not, and else how
        many pages it brought into host. What has arrived when the rule says stop is used."""
        driver = self._enter()
        self._guard.prefetch(prefetch)
        rules, now = self.config.prefetch, self._clock()
        patience = patience_seconds(
            rules.stop_rule,
            rules.base_seconds,
            rules.per_1024_tokens_seconds,
            prefetch.wanted * self.config.page_size,
        )
        if prefetch.stage is not Stage.SETTLED and now - prefetch.started >= patience:
            self._core.fetches.stop(prefetch, now)
            self._core.radix.version += 1
            driver.submit()
        return prefetch.landed if prefetch.stage is Stage.SETTLED else None

    def attach_storage(self, storage: Storage) -> None:
        """Persist to and prefetch from `storage` from now on; it stays the caller's to close. Raises
        ConfigError when one is attached already, or there is no host tier."""
        self._enter()
        if self._storage is not None:
            raise ConfigError("storage: one is attached already; detach it first")
        if self.config.host is None:
            raise ConfigError("storage: pages reach storage through host; allowed: only with a host")
        self._attach(storage, owned=False)

    def _attach(self, storage: Storage, owned: bool) -> None:
        assert self._driver is not None
        self._storage, self._owns_storage = storage, owned
        self._driver.executor.attach(storage)
        self._core.attach_storage(True)

    def detach_storage(self, deadline_s: float = 10.0) -> None:
        """Stop using the storage, after finishing what is in flight for at most `deadline_s` seconds. One
        that the cache had opened itself is closed. Does nothing when none is attached."""
        driver = self._enter()
        self._core.attach_storage(False)
        driver.drain(deadline_s)
        storage, self._storage = self._storage, None
        driver.executor.attach(None)
        if storage is not None:
            self._core.storage_cleared()
            if self._owns_storage:
                within(deadline_s, storage.close)

    def clear_storage(self, deadline_s: float = 10.0) -> None:
        """Forget every page that storage holds. Raises StorageError when none is attached, or when the
        backend has not done it within `deadline_s` seconds (it may still do it later)."""
        driver = self._enter()
        if self._storage is None:
            raise StorageError("no storage is attached")
        driver.poll()
        done = within(deadline_s, self._storage.clear)
        self._core.storage_cleared()
        if not done:
            raise StorageError(f"storage was not cleared within {deadline_s} s")

    # -- room -------------------------------------------------------------------------------------

    def evict(self, pages: int, tier: Tier = DEVICE, deadline_s: float | None = None) -> Evicted:
        """Free `pages` slots of `tier` beyond those that are free; counts only what is free already.
        Under write_back it waits for the copies to host, for at most `deadline_s` seconds."""
        driver = self._enter()
        pages = count("pages", pages)
        if tier not in (DEVICE, HOST):
            raise InvalidSlots("only DEVICE and HOST can be evicted from")
        ledger = self._core.radix.ledgers[tier]
        return driver.make_room(tier, min(ledger.free + pages, ledger.capacity), deadline_s)

    # -- progress ---------------------------------------------------------------------------------

    def poll(self) -> int:
        """Let finished work take effect. Never waits. Returns how many completions there were."""
        return self._enter().poll()

    def drain(self, deadline_s: float = 10.0) -> bool:
        """Poll until nothing is in flight, for at most `deadline_s` seconds. Returns whether it is so."""
        return self._enter().drain(deadline_s)

    def cancel(self, what: Lease | LoadBack | Prefetch) -> None:
        """What an aborted request calls. A lease: stop its load-back and release it. A load-back: the
        request goes on from its device boundary. A prefetch: whatever arrives is freed. Cancelling what
        is over does nothing, except that a lease is released only once (LeaseReleased)."""
        driver = self._enter()
        if isinstance(what, Lease):
            self._guard.lease(what)
            self._core.release(what)
        elif isinstance(what, LoadBack):
            self._guard.load_back(what)
            self._core.loads.abandon(what)
        else:
            self._guard.prefetch(what)
            self._core.fetches.forget(what, self._clock())
        driver.submit()

    # -- everything -------------------------------------------------------------------------------

    def clear(self, namespace: str | None = None) -> None:
        """Forget every page of `namespace` (None: of all) in device and host memory; storage keeps its
        own (`clear_storage`). Leases stay good for reading their slots until they are released. O(nodes)."""
        driver = self._enter()
        self._core.clear(namespace, self._clock())
        driver.submit()

    def invalidate(self, revision: str) -> None:
        """The model's weights are `revision` from now on: clear memory, and never again hit what was
        computed by others, here or in storage. What a lease of before has computed is refused by `insert`;
        slots allocated without a lease carry no such mark: do not insert them."""
        driver = self._enter()
        self._core.invalidate(fingerprint(self.config, revision), self._clock())
        self.revision = revision
        driver.submit()

    def take_events(self) -> list[Event]:
        """The KV events since the last call, oldest first. Empty unless config.events."""
        self._enter()
        return self._core.take_events()

    def stats(self) -> Stats:
        """Counters and gauges. O(capacity), vectorised."""
        self._enter()
        return snapshot(self._core, None if self._storage is None else self._storage.stats())

    def check(self) -> None:
        """Verify every invariant (I1 to I12). O(everything). Raises InvariantViolated: a bug in tiertree."""
        self._enter()
        audit(self._core)
