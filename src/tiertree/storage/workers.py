"""Threads that carry pages between host pools and a storage backend.

    Put    in batches: page buffers ──▶ backend.put          a page counts when all its pools are stored
    Get    in batches: backend.get ──▶ page buffers          progress after each batch, stops at a miss
    Query  backend.holds                                     a page counts when all its pools are held

Each pool of a kind, main or sidecar, has its own storage key for the same page. The queue is bounded:
what does not fit is refused by a Completion with an error. A backend that raises fails the operation.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np

from ..pools.group import KindPools, PoolGroup
from ..pools.paged import Pool
from ..tree.actions import Completion, Get, Put, Query, Span
from ..types import Kind, Slots, StorageError
from .base import HASH_BYTES, Buffer, Got, Storage, Wrote, storage_key

BATCH_BYTES = 32 << 20
"""Pages are read and written in batches of about this many bytes, at least one page."""

Job = Put | Get | Query


class Keys:
    """Storage keys of one kind's pages: one per pool, in the order of the pools."""

    __slots__ = ("_suffixes", "pools")

    def __init__(self, kind: Kind, pools: KindPools, shard: str) -> None:
        self.pools: tuple[Pool, ...] = tuple(pools)
        names = [str(kind), *pools.sidecars]
        self._suffixes = [
            storage_key(b"\0" * HASH_BYTES, descriptor(name, shard, pool))[HASH_BYTES:]
            for name, pool in zip(names, self.pools, strict=True)
        ]

    def of(self, hashes: tuple[bytes, ...]) -> list[bytes]:
        """The keys of these pages, page by page, pool by pool."""
        return [each + suffix for each in hashes for suffix in self._suffixes]


def descriptor(name: str, shard: str, pool: Pool) -> bytes:
    """What makes the bytes of this pool's pages differ from another's, as unambiguous text."""
    parts = (name.encode(), shard.encode(), pool.layout.descriptor(pool.order))
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


class StorageWorkers:
    """`threads` workers over the host pools. `finished` is called from them with each Completion."""

    def __init__(
        self,
        host: PoolGroup,
        threads: int,
        queue_max: int,
        shard: str,
        finished: Callable[[Completion], None],
    ) -> None:
        self.storage: Storage | None = None
        self._keys = {kind: Keys(kind, host[kind], shard) for kind in host.kinds}
        self._finished = finished
        self._queue_max = queue_max
        self._jobs: deque[tuple[Job, Storage]] = deque()
        self._running: set[int] = set()
        self._cancelled: set[int] = set()
        self._change = threading.Condition()
        self._closing = False
        self._threads = [
            threading.Thread(target=self._work, name=f"tiertree-storage-{index}", daemon=True)
            for index in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: Job) -> None:
        """Queue `job`, or refuse it at once by a Completion. Never waits."""
        storage = self.storage
        with self._change:
            refusal = None
            if storage is None:
                refusal = "no storage is attached"
            elif self._closing or len(self._jobs) >= self._queue_max:
                refusal = "the storage queue is full"
            else:
                self._jobs.append((job, storage))
                self._running.add(job.op)
                self._change.notify()
        if refusal is not None:
            self._finished(Completion(job.op, 0, refusal))

    def cancel(self, op: int) -> None:
        """Stop `op` before its next batch, or at once if no worker has it yet; its final Completion
        follows either way."""
        with self._change:
            queued = next((item for item in self._jobs if item[0].op == op), None)
            if queued is not None:
                self._jobs.remove(queued)
                self._running.discard(op)
            elif op in self._running:
                self._cancelled.add(op)
        if queued is not None:
            self._finished(Completion(op, 0, "cancelled"))

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Cancel what is queued or running and stop the threads. Returns what did not end in time."""
        with self._change:
            self._closing = True
            self._cancelled |= self._running
            self._change.notify_all()
        end = time.monotonic() + deadline_s
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._change:
            return tuple(sorted(self._running))

    # -- worker threads ---------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._jobs and not self._closing:
                    self._change.wait(1.0)
                if not self._jobs:
                    return
                job, storage = self._jobs.popleft()
            completion = self._run(job, storage)
            with self._change:
                self._running.discard(job.op)
                self._cancelled.discard(job.op)
            self._finished(completion)

    def _run(self, job: Job, storage: Storage) -> Completion:
        try:
            if isinstance(job, Put):
                return self._put(job, storage)
            if isinstance(job, Get):
                return self._get(job, storage)
            return self._query(job, storage)
        except BaseException as error:
            return Completion(job.op, 0, f"{type(error).__name__}: {error}")

    def _batches(self, span: Span) -> Iterator[tuple[int, int]]:
        page_bytes = sum(pool.page_bytes for pool in self._keys[span.kind].pools)
        step = max(1, BATCH_BYTES // page_bytes)
        for low in range(0, len(span.hashes), step):
            yield low, min(low + step, len(span.hashes))

    def _put(self, job: Put, storage: Storage) -> Completion:
        stored: dict[bytes, None] = {}
        evicted: dict[bytes, None] = {}
        kept = len(job.spans[0].hashes)
        error = None
        for span in job.spans:
            keys, done = self._keys[span.kind], 0
            for low, high in self._batches(span):
                if job.op in self._cancelled:
                    error = "cancelled"
                    break
                hashes = span.hashes[low:high]
                pages = Pages(keys.pools, span.slots[low:high])
                pages.read()
                result = storage.put(keys.of(hashes), pages.buffers)
                _require(len(result.outcomes), len(pages.buffers))
                for key in result.evicted:
                    evicted[key[:HASH_BYTES]] = None
                    stored.pop(key[:HASH_BYTES], None)
                width = len(keys.pools)
                for index, each in enumerate(hashes):
                    outcomes = result.outcomes[index * width : (index + 1) * width]
                    done += Wrote.REFUSED not in outcomes
                    if Wrote.REFUSED not in outcomes and Wrote.STORED in outcomes:
                        stored[each] = None
                        evicted.pop(each, None)
            kept = min(kept, done)
        return Completion(job.op, kept, error, True, tuple(stored), tuple(evicted))

    def _get(self, job: Get, storage: Storage) -> Completion:
        good = len(job.spans[0].hashes)
        error = None
        for span in job.spans:
            keys, arrived = self._keys[span.kind], 0
            for low, high in self._batches(span):
                if job.op in self._cancelled:
                    error = "cancelled"
                    break
                pages = Pages(keys.pools, span.slots[low:high])
                got = storage.get(keys.of(span.hashes[low:high]), pages.buffers)
                _require(len(got), len(pages.buffers))
                hits = next((at for at, each in enumerate(got) if each is not Got.HIT), len(got))
                whole = hits // len(keys.pools)
                pages.write(whole)
                arrived = low + whole
                if arrived < high:
                    error = f"page {arrived} is not there"
                    break
                if len(job.spans) == 1 and high < len(span.hashes):
                    self._finished(Completion(job.op, arrived, None, final=False))
            good = min(good, arrived)
        return Completion(job.op, good, error)

    def _query(self, job: Query, storage: Storage) -> Completion:
        held = len(job.hashes)
        for kind in job.kinds:
            keys = self._keys[kind]
            held = min(held, max(0, int(storage.holds(keys.of(job.hashes)))) // len(keys.pools))
        return Completion(job.op, held)


def _require(answers: int, asked: int) -> None:
    """A backend that answers for another number of pages than it was asked about has not answered."""
    if answers != asked:
        raise StorageError(f"the storage backend answered for {answers} pages of {asked}")


class Pages:
    """The bytes of some pages in all their pools, page by page: views of the pools where those are
    contiguous on the CPU, and otherwise buffers beside them, filled by `read`, emptied by `write`."""

    def __init__(self, pools: tuple[Pool, ...], slots: Slots) -> None:
        self._pools = pools
        self._slots = slots
        self._beside: dict[int, np.ndarray[tuple[int, int], np.dtype[np.uint8]]] = {}
        columns: list[list[Buffer]] = []
        for index, pool in enumerate(pools):
            views = [pool.page_buffer(slot) for slot in slots.tolist()]
            if None in views:
                beside = np.empty((len(slots), pool.page_bytes), np.uint8)
                self._beside[index] = beside
                columns.append([row.data for row in beside])
            else:
                columns.append([view for view in views if view is not None])
        self.buffers: list[Buffer] = [column[at] for at in range(len(slots)) for column in columns]

    def read(self) -> None:
        """Fill the buffers that are not views."""
        for index, beside in self._beside.items():
            self._pools[index].read_pages(self._slots, beside)

    def write(self, pages: int) -> None:
        """Bring the first `pages` pages of the buffers that are not views into the pools."""
        for index, beside in self._beside.items():
            if pages:
                self._pools[index].write_pages(self._slots[:pages], beside[:pages])


def answer(action: Job, storage: Storage) -> Completion:
    """Carry out `action` without bytes: keys are page hashes, buffers are empty. For metadata only."""
    try:
        return _answer(action, storage)
    except Exception as error:
        return Completion(action.op, 0, f"{type(error).__name__}: {error}")


def _answer(action: Job, storage: Storage) -> Completion:
    if isinstance(action, Query):
        return Completion(action.op, storage.holds(bare_keys(action.hashes)))
    span = action.spans[0]
    keys = bare_keys(span.hashes)
    nothing = [memoryview(b"")] * len(keys)
    if isinstance(action, Put):
        result = storage.put(keys, nothing)
        kept = sum(each is not Wrote.REFUSED for each in result.outcomes)
        new = (key for key, each in zip(span.hashes, result.outcomes, strict=True) if each is Wrote.STORED)
        gone = tuple(key[:HASH_BYTES] for key in result.evicted)
        return Completion(action.op, kept, None, True, tuple(new), gone)
    got = storage.get(keys, nothing)
    arrived = next((at for at, each in enumerate(got) if each is not Got.HIT), len(got))
    return Completion(action.op, arrived, None if arrived == len(keys) else f"page {arrived} is not there")


def bare_keys(hashes: tuple[bytes, ...]) -> list[bytes]:
    """Storage keys of pages that have no bytes: the page hash and nothing to tell pools apart by."""
    return [each + b"\0" * 16 for each in hashes]
