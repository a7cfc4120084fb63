"""Drives a cache through requests as an engine would: one at a time, in order, each in no time.

    peek ─▶ prefetch until settled ─▶ match ─▶ acquire ─▶ load back ─▶ compare what was hit
                                                             │
         drain ◀─ release ◀─ insert ◀─ write the bytes ◀─ allocate what is missing, of every kind

    page      0 ──── device ──── host ──── storage ──────── key.pages
    counts as   hit: by the tier that held it when the request came │ missing: computed
    bytes       read back and compared                              │ made and written

A page counts as hit once it is on device and the lease covers it: what a refused or failed load-back
leaves on host is computed again. A request that does not fit inserts its head.
"""

from __future__ import annotations

import contextlib
import select
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import numpy as np

from ..build import fingerprint
from ..cache import PrefixCache
from ..storage.disk import DiskStorage
from ..tree.key import Key
from ..tree.lease import Lease
from ..tree.load import Progress
from ..tree.pagehash import PageHashes
from ..types import FULL, ConfigError, Kind, NoRoom, Refused, Slots, Tier
from .clock import ReplayClock
from .corrupt import Corruptor
from .kinds import Prompt, Saver, patiently
from .options import ReplayOptions
from .paging import Paging
from .payload import PageBytes, Payload
from .report import KindTally, Report, Tally
from .tier3 import open_disk_tier
from .trace import Request

WAIT_SECONDS = 0.1
"""How long to sleep at most between two looks at what is under way."""

Watcher = Callable[[Tally], None]
"""Called after every request; must be quick."""


class Replay:
    """One replay of `requests` through a fresh cache. Use it as a context manager, and `run` it once.

    `cache` is open from entering to leaving. Raises ConfigError for options that cannot work, StorageError
    for a directory that cannot be used."""

    def __init__(self, options: ReplayOptions, requests: Sequence[Request]) -> None:
        self.options = options
        self.paging = Paging(requests, options.block_tokens, options.tokens_per_page)
        self._clock = ReplayClock()
        self.cache = PrefixCache(options.cache_config(self.paging), clock=self._clock)
        self.tally = Tally(kinds={kind: KindTally() for kind in self.cache.config.kind_pages(Tier.DEVICE)})
        self._stack = contextlib.ExitStack()
        self._stored = False
        self._bytes: PageBytes | None = None
        self._savers: list[Saver] = []
        self._corruptor: Corruptor | None = None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            disk = stack.enter_context(open_disk_tier(self.options))
            try:
                stack.enter_context(self.cache)
            except (MemoryError, OSError, OverflowError, RuntimeError) as error:
                raise ConfigError(f"the pools of these tiers cannot be had: {error}") from error
            if disk is not None:
                self.cache.attach_storage(disk)
                self._stored = True
            self._set_up(disk if isinstance(disk, DiskStorage) else None)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _set_up(self, disk: DiskStorage | None) -> None:
        options, cache = self.options, self.cache
        self._bytes = self._bytes_of(FULL)
        for plan in options.kinds():
            kind = plan.rules.kind
            self._savers.append(Saver(cache, plan, self.tally.kinds[kind], self._bytes_of(kind)))
        if options.corrupt:
            hashes = PageHashes(cache.key([]).maker, fingerprint(cache.config, cache.revision))
            requests = len(self.paging.counts)
            self._corruptor = Corruptor(
                cache, disk, hashes, self._key, options.corrupt, requests, options.seed
            )
            self.tally.corrupted = self._corruptor.damaged

    def _bytes_of(self, kind: Kind) -> PageBytes | None:
        pools = self.cache.device_pools
        if pools is None:
            return None
        pool = pools[kind].main
        payload = Payload(pool.page_bytes, self.options.seed, kind)
        return PageBytes(pool, payload, self.tally, self.tally.kinds[kind])

    def run(self, watch: Watcher | None = None) -> Report:
        """Serve all requests; the cache stays open, with nothing in flight. O(tokens)."""
        start = time.perf_counter()
        for index in range(len(self.paging.counts)):
            self._clock.next_request()
            self._serve(index)
            if watch is not None:
                watch(self.tally)
        seconds = time.perf_counter() - start
        return Report(
            self.tally,
            self.cache.stats(),
            self.paging.unique_pages,
            self.options.settings(),
            round(seconds, 3),
            self.cache.config.slot_bytes,
        )

    def _key(self, index: int) -> Key:
        """The key of request `index`. States are saved at ends of pages, so where there are some a last
        partial page is no part of it."""
        pages = self.paging.whole[index] if self.cache.config.kinds else self.paging.counts[index]
        return self.cache.key(self.paging.tokens(index)[: pages * self.paging.page_tokens])

    # -- one request ------------------------------------------------------------------------------

    def _serve(self, index: int) -> None:
        cache, tally = self.cache, self.tally
        key = self._key(index)
        pages = key.pages
        if self._corruptor is not None:
            self._corruptor.before(index, key)
        in_memory = pages
        if self._stored:
            in_memory = cache.peek(key).memory_boundary
            if in_memory < pages:
                self._prefetch(key)
        match = cache.match(key)
        lease = cache.acquire(match)
        if self._savers:
            cache.drain()  # a backup that the match began may pin pages beyond the lease
        on_device = lease.device_boundary
        if lease.memory_boundary > on_device:
            self._load_back(lease)
            cache.drain()
        hit = lease.device_boundary
        tally.requests += 1
        tally.pages += self.paging.counts[index]
        in_memory = min(in_memory, hit)
        on_device = min(on_device, in_memory)
        tally.hits[0] += on_device
        tally.hits[1] += in_memory - on_device
        tally.hits[2] += hit - in_memory
        tally.lost += match.full_reach - match.memory_boundary
        if hit and self._bytes is not None:
            numbers = self.paging.numbers(index)
            self._bytes.compare(numbers[:hit], lease.slots)
            for saver in self._savers:
                saver.compare(lease, numbers)
        if hit < pages:
            self._compute(index, key, lease, match.branching_point)
        lease.release()
        cache.drain()

    def _prefetch(self, key: Key) -> None:
        """Bring what disk has of `key` to host, for as long as the stop rule waits. What the storage has
        answered already is taken first, so best_effort gets what needs no waiting."""
        cache = self.cache
        started = cache.prefetch(key)
        if isinstance(started, Refused):
            return
        while True:
            while cache.poll():
                pass
            if cache.settle(started) is not None:
                return
            self._wait()

    def _load_back(self, lease: Lease) -> None:
        load = self.cache.load_back(lease)
        if isinstance(load, Refused):
            self.tally.loads_refused += 1
            return
        while load.state is Progress.PENDING:
            if not self.cache.poll():
                self._wait()
        self.tally.loads_refused += load.state is Progress.FAILED

    def _wait(self) -> None:
        """Sleep until something may have been done."""
        descriptor = self.cache.fileno()
        if descriptor >= 0:
            poller = select.poll()
            poller.register(descriptor, select.POLLIN)
            poller.poll(WAIT_SECONDS * 1000)

    def _compute(self, index: int, key: Key, lease: Lease, branching: int | None) -> None:
        """Allocate the missing pages, or as many as there is room for, fill them and insert them, with what
        is worth saving of other kinds."""
        hit, pages = lease.device_boundary, key.pages
        slots = self._allocate(pages - hit, lease)
        count, tally = len(slots), self.tally.kinds[FULL]
        tally.saved += count
        if hit + count < pages:
            tally.uncached += pages - hit - count
            if not count:
                return
            key = key.head(hit + count)
        numbers = self.paging.numbers(index)
        if self._bytes is not None:
            self._bytes.fill(numbers[hit : hit + count], slots)
        prompt = Prompt(numbers, key.pages, branching)
        partial = {each.kind: each.save(lease, prompt) for each in self._savers}
        self.cache.insert(key, slots, lease, partial)

    def _allocate(self, missing: int, lease: Lease) -> Slots:
        room = min(missing, self.cache.config.device_pages - lease.reach)
        slots = patiently(self.cache, lambda: self.cache.allocate(room, lease, deadline_s=0))
        if isinstance(slots, NoRoom):
            slots = self.cache.allocate(slots.free, lease)
        return np.empty(0, np.int64) if isinstance(slots, NoRoom) else slots
