"""Threads that carry pages between host pools and a storage backend (see `jobs`).

    submit ─▶ queue ─▶ worker: a call into the backend, another, … ─▶ finished
                │          │ a look at `cancelled` before every call
              cancel ──────┘   and late: the worker is stuck, and another one takes its place

The queue is bounded: what does not fit is declined by a Completion with an error. A backend that raises
fails the operation, and what was done before is still told.

A call that does not return keeps its thread for ever. When such an operation is cancelled because it is
late, its worker counts as stuck and a replacement is started. While `STUCK_MAX / 2` calls of one sort, writes
or reads, are stuck in one storage, no more of that sort are begun there, so one that hangs when it is
written to can still be read. A call that has been stuck for `WRITTEN_OFF_SECONDS` does not count any more, or
a storage that is well again but will never answer what it was asked before would not be used again; nor
is anything begun while `LOST_MAX` workers are stuck. A stuck worker whose call returns after all is needed
no more, and ends.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable

from ..pools.group import PoolGroup
from ..tree.actions import Completion, Put
from .base import Storage
from .jobs import Job, Ways, bare_way, pool_way, task_of

STUCK_MAX = 16
"""Workers that may get stuck within WRITTEN_OFF_SECONDS, half of them in writes."""
WRITTEN_OFF_SECONDS = 600.0
LOST_MAX = 256
"""Stuck workers at most, however long ago."""

BARRED = "too many calls of this sort are stuck in storage"


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
        self._ways: Ways = {kind: pool_way(kind, host[kind], shard) for kind in host.kinds}.__getitem__
        self._finished = finished
        self._queue_max = queue_max
        self._wanted = threads
        self._jobs: deque[tuple[Job, Storage]] = deque()
        self._running: dict[int, tuple[Job, Storage]] = {}
        """Queued, or in the hands of a worker."""
        self._cancelled: set[int] = set()
        self._stuck: dict[int, tuple[Job, Storage, float]] = {}
        """Late, and in the hands of a worker, and since when."""
        self._change = threading.Condition()
        self._closing = False
        self._started = 0
        self._threads: set[threading.Thread] = set()
        for _ in range(threads):
            self._start()

    @property
    def stuck(self) -> int:
        """How many workers are in a call that is late. O(1)."""
        return len(self._stuck)

    def submit(self, job: Job) -> None:
        """Queue `job`, or decline it at once by a Completion. Never waits."""
        storage = self.storage
        with self._change:
            refusal = None
            if storage is None:
                refusal = "no storage is attached"
            elif self._closing or len(self._jobs) >= self._queue_max:
                refusal = "the storage queue is full"
            elif self._barred(job, storage):
                refusal = BARRED
            else:
                self._running[job.op] = job, storage
                self._jobs.append((job, storage))
                self._change.notify()
        if refusal is not None:
            self._finished(task_of(job).declined(refusal))

    def cancel(self, op: int, late: bool = False) -> None:
        """Stop `op` before its next batch, or at once if no worker has it yet; its final Completion
        follows either way. If it is `late` and a worker has it, another one takes that worker's place."""
        with self._change:
            queued = next((item for item in self._jobs if item[0].op == op), None)
            if queued is not None:
                self._jobs.remove(queued)
                del self._running[op]
            elif op in self._running:
                self._cancelled.add(op)
                if late:
                    self._replace(op)
        if queued is not None:
            self._finished(task_of(queued[0]).completion("cancelled"))

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Cancel what is queued or running and stop the threads. Returns what did not end in time."""
        with self._change:
            self._closing = True
            self._cancelled |= self._running.keys()
            self._change.notify_all()
            threads = list(self._threads)
        end = time.monotonic() + deadline_s
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        with self._change:
            return tuple(sorted(self._running))

    # -- worker threads ---------------------------------------------------------------------------

    def _start(self) -> None:
        name = f"tiertree-storage-{self._started}"
        thread = threading.Thread(target=self._work, name=name, daemon=True)
        thread.start()
        self._started += 1
        self._threads.add(thread)

    def _replace(self, op: int) -> None:
        """The worker of `op` is stuck. Where the machine has no thread to spare the next one that gets stuck
        tries again. Holds the lock."""
        self._stuck[op] = (*self._running[op], time.monotonic())
        missing = self._wanted + min(len(self._stuck), LOST_MAX) - len(self._threads)
        with contextlib.suppress(RuntimeError):
            for _ in range(0 if self._closing else missing):
                self._start()

    def _work(self) -> None:
        while True:
            with self._change:
                while not self._jobs and not self._closing and not self._too_many():
                    self._change.wait(1.0)
                if not self._jobs or self._too_many():
                    self._threads.discard(threading.current_thread())
                    return
                job, storage = self._jobs.popleft()
                barred = self._barred(job, storage)
            completion = task_of(job).declined(BARRED) if barred else self._run(job, storage)
            with self._change:
                del self._running[job.op]
                self._cancelled.discard(job.op)
                self._stuck.pop(job.op, None)
            self._finished(completion)

    def _barred(self, job: Job, storage: Storage) -> bool:
        """Whether too many workers are stuck in `storage` to begin another job of this sort. Holds the
        lock. O(stuck)."""
        if not self._stuck:
            return False
        writes, since = isinstance(job, Put), time.monotonic() - WRITTEN_OFF_SECONDS
        same = [
            each
            for each, at, when in self._stuck.values()
            if isinstance(each, Put) == writes and at is storage and when > since
        ]
        return len(same) >= STUCK_MAX // 2 or len(self._stuck) >= LOST_MAX

    def _too_many(self) -> bool:
        """Whether more workers are free than there should be. Holds the lock."""
        return len(self._threads) - len(self._stuck) > self._wanted

    def _run(self, job: Job, storage: Storage) -> Completion:
        task, error = task_of(job, self._finished), None
        try:
            error = task.run(storage, self._ways, lambda: job.op in self._cancelled)
        except BaseException as raised:
            return task.broken(raised)
        return task.completion(error)


def answer(action: Job, storage: Storage) -> Completion:
    """Carry out `action` without bytes: keys are made of page hash and kind, buffers are empty. For
    metadata only."""
    task, error = task_of(action), None
    try:
        error = task.run(storage, bare_way, lambda: False)
    except Exception as raised:
        return task.broken(raised)
    return task.completion(error)
