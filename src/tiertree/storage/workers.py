"""Threads that carry pages between host pools and a storage backend (see `jobs`).

The queue is bounded: what does not fit is refused by a Completion with an error. A backend that raises
fails the operation, and what was done before is still told.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from ..pools.group import PoolGroup
from ..tree.actions import Completion
from .base import Storage
from .jobs import Job, Ways, bare_way, pool_way, task_of


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
            self._finished(task_of(job).completion(refusal))

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
            self._finished(task_of(queued[0]).completion("cancelled"))

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
        task, error = task_of(job, self._finished), None
        try:
            error = task.run(storage, self._ways, lambda: job.op in self._cancelled)
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        return task.completion(error)


def answer(action: Job, storage: Storage) -> Completion:
    """Carry out `action` without bytes: keys are made of page hash and kind, buffers are empty. For
    metadata only."""
    task, error = task_of(action), None
    try:
        error = task.run(storage, bare_way, lambda: False)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    return task.completion(error)
