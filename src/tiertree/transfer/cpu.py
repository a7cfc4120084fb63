"""The transfer engine of main memory: worker threads that copy.

    submit ─▶ queue ─▶ worker: step, step, step … ─▶ results ─▶ poll
                │          │ a look at `cancelled` before every chunk
              cancel ──────┘

    job        held in       its next state
    queued     queue         running (a worker takes it) · finished (cancelled, at once)
    running    a worker      finished (done, failed, or cancelled at a chunk's end)
    finished   results       gone (polled)

A worker takes one transfer at a time, in order of submission; several workers finish in any order. All
state is guarded by one lock, except `layers_done` and `cancelled` of a job, each a single store. The GIL
is released while bytes move.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Final

from ..types import CacheClosed
from .copy import Mover, chunks, plan
from .op import CANCELLED, Transfer, Transferred

_log = logging.getLogger(__name__)
_IDLE_S: Final = 1.0
_GRACE_S: Final = 0.5


@dataclass(slots=True, eq=False)
class _Job:
    transfer: Transfer
    layers_done: int = 0
    cancelled: bool = False
    finished: bool = False


class CpuEngine:
    """`TransferEngine` with `threads` daemon threads, holding at most `capacity` transfers."""

    def __init__(self, notify: Callable[[], None], *, threads: int = 1, capacity: int = 4096) -> None:
        self._notify = notify
        self._capacity = capacity
        self._changed = threading.Condition()
        self._jobs: dict[int, _Job] = {}
        self._queue: deque[_Job] = deque()
        self._results: deque[Transferred] = deque()
        self._unfinished = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"tiertree-transfer-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, transfer: Transfer) -> bool:
        """See `TransferEngine`. O(1)."""
        job = _Job(transfer)
        with self._changed:
            if self._closed:
                raise CacheClosed("the transfer engine is closed")
            if transfer.op in self._jobs:
                raise ValueError(f"op {transfer.op} is already in flight")
            if len(self._jobs) >= self._capacity:
                return False
            self._jobs[transfer.op] = job
            self._queue.append(job)
            self._unfinished += 1
            self._changed.notify_all()
        return True

    def poll(self) -> list[Transferred]:
        """See `TransferEngine`."""
        with self._changed:
            results = list(self._results)
            self._results.clear()
            for result in results:
                del self._jobs[result.op]
        return results

    def cancel(self, op: int) -> None:
        """See `TransferEngine`. A queued transfer finishes at once, a running one after its chunk."""
        with self._changed:
            job = self._jobs.get(op)
            if job is None:
                return
            job.cancelled = True
            if job not in self._queue:
                return
            self._queue.remove(job)
        self._finish(job, CANCELLED)

    def layers_done(self, op: int) -> int:
        """See `TransferEngine`."""
        job = self._jobs.get(op)
        return 0 if job is None else job.layers_done

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        """See `TransferEngine`."""
        with self._changed:
            self._changed.wait_for(lambda: self._unfinished == 0, deadline_s)
            return tuple(op for op, job in self._jobs.items() if not job.finished)

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """See `TransferEngine`. Afterwards the threads are gone, but for one that hangs inside a chunk:
        half a second past the deadline it is left behind, a daemon that holds on to its pools."""
        until = monotonic() + deadline_s
        abandoned = self.drain(deadline_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for op in abandoned:
            self.cancel(op)
        until = max(until, monotonic() + _GRACE_S)
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        return abandoned

    def _work(self) -> None:
        """The life of a worker: until the engine is closed and nothing is queued."""
        while (job := self._next()) is not None:
            self._finish(job, _run(job))

    def _next(self) -> _Job | None:
        with self._changed:
            while not self._queue:
                if self._closed:
                    return None
                self._changed.wait(_IDLE_S)
            return self._queue.popleft()

    def _finish(self, job: _Job, error: str | None) -> None:
        with self._changed:
            job.finished = True
            self._unfinished -= 1
            self._results.append(Transferred(job.transfer.op, error))
            self._changed.notify_all()
        try:
            self._notify()
        except Exception:
            _log.exception("notify of a transfer engine failed; the transfer itself is not affected")


def _run(job: _Job) -> str | None:
    """Copy until done, cancelled or failed; returns the error. A copy may fail in any way: that is the
    transfer's misfortune, never the worker's."""
    try:
        movers = {id(move): Mover(move) for move in job.transfer.moves}
        for step in plan(job.transfer.moves):
            mover = movers[id(step.move)]
            for pages in chunks(step):
                if job.cancelled:
                    return CANCELLED
                mover.copy(step, pages)
            job.layers_done = step.arrived
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
