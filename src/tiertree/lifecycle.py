"""Opening and closing a cache, who may call it, and which storage it uses."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Self

from .build import make_core, make_executor, make_pools, open_storage
from .config import CacheConfig
from .driver import Aside, Driver, within
from .executor import Executor
from .guard import Guard, deadline
from .poison import Poison, wanted
from .pools.group import PoolGroup
from .storage.base import Storage
from .storage.gauge import Gauge
from .types import CacheClosed, ConfigError, ForkedCache, StorageError, WrongThread

CLOSE_SECONDS_MAX = 10.0
"""How long an `open` that fails waits for a storage that it has to close again."""


class Lifecycle:
    """What a `PrefixCache` is before anything is cached: the parts it is made of, and their owner."""

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
        self._gauge: Gauge | None = None
        self._clearing = Aside()
        self._core = make_core(config)
        self._guard = Guard(self._core.radix.keys)
        self._driver: Driver | None = None
        self._poison: Poison | None = None

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
                within(CLOSE_SECONDS_MAX, storage.close)
            raise
        if wanted(self.config):
            self._poison = Poison(self._core, executor)
        self._driver = Driver(self._core, executor, self._clock)
        if storage is not None:
            self._attach(storage, owned=True)
        return self

    def close(self, deadline_s: float = 10.0) -> tuple[int, ...]:
        """Finish what is in flight, for at most `deadline_s` seconds, then stop. Returns the numbers of
        the operations that were abandoned. The second close does nothing. Raises StorageError when a
        storage that the cache had opened cannot be closed cleanly; with debug poison it ends like `check`
        when somebody has written to a page that nobody owns. Everything is closed then too."""
        if self._pid and self._driver is None:
            return ()
        driver, limit = self._enter(), deadline(deadline_s)
        end = self._clock() + limit
        driver.drain(limit)
        abandoned = set(self._core.operations.in_flight)
        self._core.attach_storage(False)
        abandoned.update(driver.executor.close(max(0.1, end - self._clock())))
        try:
            if self._owns_storage and self._storage is not None:
                within(max(0.1, end - self._clock()), self._storage.close)
        finally:
            self._driver = self.device_pools = self.host_pools = None
            self._stop_poison()
        return tuple(sorted(abandoned))

    def _stop_poison(self) -> None:
        poison, self._poison = self._poison, None
        if poison is not None:
            try:
                poison.check()
            finally:
                poison.stop()

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

    # -- storage ----------------------------------------------------------------------------------

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
        self._storage, self._owns_storage, self._gauge = storage, owned, Gauge(storage)
        self._clearing = Aside()
        self._driver.executor.attach(storage)
        self._core.attach_storage(True)

    def detach_storage(self, deadline_s: float = 10.0) -> None:
        """Stop using the storage, after finishing what is in flight for at most `deadline_s` seconds. One
        that the cache had opened itself is closed. Does nothing when none is attached."""
        driver, limit = self._enter(), deadline(deadline_s)
        end = self._clock() + limit
        self._core.attach_storage(False)
        driver.drain(limit)
        storage, self._storage, self._gauge = self._storage, None, None
        driver.executor.attach(None)
        if storage is not None:
            self._core.storage_cleared()
            if self._owns_storage:
                within(max(0.1, end - self._clock()), storage.close)

    def clear_storage(self, deadline_s: float = 10.0) -> None:
        """Forget every page that storage holds. Raises StorageError when none is attached, when the backend
        raises, or when it has not done it within `deadline_s` seconds (it may still do it later; while it
        has not, clearing again only waits for that)."""
        driver, limit = self._enter(), deadline(deadline_s)
        if self._storage is None:
            raise StorageError("no storage is attached")
        driver.poll()
        try:
            done = self._clearing.run(limit, self._storage.clear)
        finally:
            self._core.storage_cleared()
        if not done:
            raise StorageError(f"storage was not cleared within {limit} s")
