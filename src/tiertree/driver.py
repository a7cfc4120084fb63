"""The loop between the tree and its executor, and the only places where anybody waits.

submit   actions ──▶ executor
poll     executor ──completions──▶ tree, then deadlines, then submit
drain, make_room   poll until something is so, or a deadline has passed
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from .executor import Executor
from .tree.core import Core
from .types import FULL, Kind, StorageError, Tier

WAIT_SECONDS_MAX = 0.1
"""Longest single sleep, so that deadlines of operations are looked at in between."""


class Evicted:
    """What an evict did: `freed` slots are free now, `pending` pages are still being copied away."""

    __slots__ = ("freed", "pending")

    def __init__(self, freed: int, pending: int) -> None:
        self.freed = freed
        self.pending = pending

    def __repr__(self) -> str:
        return f"Evicted(freed={self.freed}, pending={self.pending})"


class Driver:
    """Carries actions and completions between one tree and one executor."""

    __slots__ = ("_clock", "_core", "executor", "storage_error")

    def __init__(self, core: Core, executor: Executor, clock: Callable[[], float]) -> None:
        self._core = core
        self._clock = clock
        self.executor = executor
        self.storage_error: str | None = None
        """What a storage backend raised last."""

    def submit(self) -> None:
        """Hand over what the tree wants done."""
        for action in self._core.take_actions():
            self.executor.submit(action)

    def poll(self) -> int:
        """Let finished work take effect. Never waits. Returns how many completions there were."""
        completions, now = self.executor.poll(), self._clock()
        for completion in completions:
            self._core.complete(completion, now)
            if completion.broken:
                self.storage_error = completion.error
        self._core.expire(now)
        self.submit()
        return len(completions)

    def drain(self, deadline_s: float) -> bool:
        """Poll until nothing is in flight, for at most `deadline_s` seconds. Returns whether it is so."""
        end = self._clock() + deadline_s
        while self._core.operations.in_flight:
            if not self._progress(end):
                return False
        return True

    def make_room(self, tier: Tier, target: int, deadline_s: float | None, kind: Kind = FULL) -> Evicted:
        """Evict until `target` slots of `kind` on `tier` are free, nothing more can be done, or the deadline
        (None: that of an operation)."""
        core, ledger = self._core, self._core.ledger(kind, tier)
        before, pending = ledger.free, 0
        end = self._clock() + (core.rules.op_deadline_seconds if deadline_s is None else deadline_s)
        while ledger.free < target:
            freed, pending = core.evict(tier, target - ledger.free, self._clock(), kind)
            self.submit()
            if freed:
                continue
            if not core.operations.touch(tier) or not self._progress(end):
                break
        return Evicted(max(0, ledger.free - before), 0 if ledger.free >= target else pending)

    def _progress(self, end: float) -> bool:
        """Poll; where that brings nothing sleep a little. False once `end` has passed."""
        if not self.poll():
            left = end - self._clock()
            if not left > 0:
                return False
            self.executor.wait(min(left, WAIT_SECONDS_MAX))
        return True


class Aside:
    """A place for calls that may block on a dead disk: one at a time, on a thread of its own."""

    __slots__ = ("_thread",)

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def run(self, seconds: float, action: Callable[[], None]) -> bool:
        """Run `action` for at most `seconds`; returns whether it has ended. Raises StorageError for whatever
        it raised by then; a thread that has not ended is left. While an earlier action has not ended nothing
        is started: this one then waits for that, and returns False."""
        if self._thread is not None and self._thread.is_alive():
            self._thread.join(max(0.0, seconds))
            return False
        raised: list[BaseException] = []

        def run() -> None:
            try:
                action()
            except BaseException as error:
                raised.append(error)

        self._thread = threading.Thread(target=run, name="tiertree-storage-call", daemon=True)
        self._thread.start()
        self._thread.join(max(0.0, seconds))
        if raised:
            error = raised[0]
            if isinstance(error, StorageError):
                raise error
            raise StorageError(f"the storage backend raised {type(error).__name__}: {error}") from error
        return not self._thread.is_alive()


def within(seconds: float, action: Callable[[], None]) -> bool:
    """Run `action` aside for at most `seconds`: see `Aside.run`."""
    return Aside().run(seconds, action)
