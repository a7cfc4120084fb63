"""The executor: does what the tree asks, and says so. It decides nothing.

owner's thread                        worker threads
submit(Copy) ──▶ transfer engine ───▶ copies pages      ┐
submit(Put, Get, Query) ──▶ queue ──▶ storage backend   ├─▶ finished ──▶ doorbell
poll() ◀── [Completion, …] ◀──────────────────────────── ┘
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Protocol

from .pools.group import PoolGroup
from .storage.base import Storage
from .storage.workers import StorageWorkers, answer
from .transfer.engine import TransferEngine
from .transfer.op import PoolMove, Transfer, moves_between
from .tree.actions import Action, Cancel, Completion, Copy
from .types import Kind, Slots, Tier


class Memory(Protocol):
    """The bytes behind the slots of one kind on one tier, sidecars included, as debug poison sees them."""

    def poison(self, slots: Slots) -> None:
        """Fill the pages of `slots` with the pattern, in order with the caller's own work on the device."""
        ...

    def stain(self, slots: Slots) -> str | None:
        """Which page of `slots` is not all pattern, and where (pool, slot, first byte that differs); None
        when all are."""
        ...


class Executor(Protocol):
    """What carries out actions. Every method but `ring` is called by the cache's own thread only."""

    def submit(self, action: Action) -> None:
        """Start `action`, or refuse it by a final Completion with an error. Never waits."""
        ...

    def poll(self) -> list[Completion]:
        """What has been done since the last call, in order of finishing. Never waits."""
        ...

    def wait(self, seconds: float) -> None:
        """Sleep until something may be there to poll, or `ring`, or for `seconds`."""
        ...

    def ring(self) -> None:
        """Wake `wait`. From any thread."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when something may be there to poll; −1 if there is none."""
        ...

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """Copy device slots of `kind`, `source[i]` to `target[i]`, sidecars too: at once, as far as the
        caller's own later work on the device can tell."""
        ...

    def layers_done(self, op: int) -> int:
        """How many leading layers of the copy `op` have arrived."""
        ...

    def memory(self, kind: Kind, tier: Tier) -> Memory | None:
        """The bytes of `kind` on an in-memory tier; None where there are none to look at."""
        ...

    def attach(self, storage: Storage | None) -> None:
        """Use `storage` for what is submitted from now on (None: there is none)."""
        ...

    def stuck_threads(self) -> int:
        """How many threads are in a call of storage that is late. O(1)."""
        ...

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Stop all workers; returns the operations that were abandoned. Idempotent."""
        ...


class Doorbell:
    """A pipe that is readable from `ring` until `quiet`: any number of rings is one."""

    __slots__ = ("_lock", "_read", "_write")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        os.set_blocking(self._write, False)

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._read

    def ring(self) -> None:
        """Make it readable. From any thread; does nothing once closed."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self._write >= 0:
                os.write(self._write, b"\0")

    def quiet(self) -> None:
        """Make it unreadable until the next ring."""
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self._read, 4096)) == 4096:
                pass

    def wait(self, seconds: float) -> None:
        """Sleep until it is readable or `seconds` have passed."""
        poller = select.poll()
        poller.register(self._read, select.POLLIN)
        poller.poll(max(0.0, seconds) * 1000)

    def close(self) -> None:
        """Close both ends."""
        with self._lock:
            write, self._write = self._write, -1
            os.close(write)
            os.close(self._read)


def pool_moves(copy: Copy, pools: Mapping[Tier, PoolGroup | None]) -> tuple[PoolMove, ...]:
    """What `copy` moves between these pools, sidecars included."""
    source, target = pools[copy.source], pools[copy.target]
    assert source is not None
    assert target is not None
    return tuple(
        each
        for move in copy.moves
        for each in moves_between(source, target, move.kind, move.source, move.target)
    )


class PoolExecutor:
    """Moves real bytes between pools and to and from a storage backend."""

    def __init__(
        self,
        device: PoolGroup,
        host: PoolGroup | None,
        make_engine: Callable[[Callable[[], None]], TransferEngine],
        storage_threads: int,
        queue_max: int,
        shard: str,
    ) -> None:
        self._bell = Doorbell()
        self._pools = {Tier.DEVICE: device, Tier.HOST: host}
        self._done: deque[Completion] = deque()
        self._engine = make_engine(self._bell.ring)
        self._pages: dict[int, int] = {}
        self._workers = (
            None if host is None else StorageWorkers(host, storage_threads, queue_max, shard, self._finished)
        )
        self._closed = False

    def _finished(self, completion: Completion) -> None:
        self._done.append(completion)
        self._bell.ring()

    def submit(self, action: Action) -> None:
        """See `Executor.submit`."""
        if isinstance(action, Copy):
            self._copy(action)
        elif isinstance(action, Cancel):
            self._engine.cancel(action.op)
            if self._workers is not None:
                self._workers.cancel(action.op, action.late)
        elif self._workers is None:
            self._finished(Completion(action.op, 0, "there is no host tier", declined=True))
        else:
            self._workers.submit(action)

    def _copy(self, action: Copy) -> None:
        moves = pool_moves(action, self._pools)
        self._pages[action.op] = sum(len(move.source) for move in action.moves)
        if not self._engine.submit(Transfer(action.op, moves)):
            del self._pages[action.op]
            self._finished(Completion(action.op, 0, "the transfer queue is full", declined=True))

    def poll(self) -> list[Completion]:
        """See `Executor.poll`."""
        self._bell.quiet()
        done = [self._done.popleft() for _ in range(len(self._done))]
        for each in self._engine.poll():
            pages = self._pages.pop(each.op)
            done.append(Completion(each.op, 0 if each.error else pages, each.error))
        return done

    def wait(self, seconds: float) -> None:
        """See `Executor.wait`."""
        self._bell.wait(seconds)

    def ring(self) -> None:
        """See `Executor.ring`."""
        self._bell.ring()

    def fileno(self) -> int:
        """See `Executor.fileno`."""
        return self._bell.fileno()

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """See `Executor.clone`."""
        device = self._pools[Tier.DEVICE]
        assert device is not None
        device.clone(kind, source, target)

    def layers_done(self, op: int) -> int:
        """See `Executor.layers_done`."""
        return self._engine.layers_done(op)

    def memory(self, kind: Kind, tier: Tier) -> Memory | None:
        """See `Executor.memory`."""
        pools = self._pools[tier]
        return None if pools is None else pools[kind]

    def attach(self, storage: Storage | None) -> None:
        """See `Executor.attach`."""
        if self._workers is not None:
            self._workers.storage = storage

    def stuck_threads(self) -> int:
        """See `Executor.stuck_threads`."""
        return 0 if self._workers is None else self._workers.stuck

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """See `Executor.close`."""
        if self._closed:
            return ()
        self._closed = True
        end = time.monotonic() + deadline_s
        abandoned = self._engine.close(deadline_s)
        if self._workers is not None:
            abandoned += self._workers.close(max(0.1, end - time.monotonic()))
        self._bell.close()
        return abandoned


class MetadataExecutor:
    """Moves no bytes: every copy is done at once, and storage is asked with empty buffers."""

    def __init__(self) -> None:
        self._done: list[Completion] = []
        self._storage: Storage | None = None

    def submit(self, action: Action) -> None:
        """See `Executor.submit`. Done before it returns."""
        if isinstance(action, Cancel):
            return
        if isinstance(action, Copy):
            done = Completion(action.op, sum(len(move.source) for move in action.moves))
        elif self._storage is None:
            done = Completion(action.op, 0, "no storage is attached", declined=True)
        else:
            done = answer(action, self._storage)
        self._done.append(done)

    def poll(self) -> list[Completion]:
        """See `Executor.poll`."""
        done, self._done = self._done, []
        return done

    def wait(self, seconds: float) -> None:
        """See `Executor.wait`: nothing is ever under way here, so there is nothing to wait for."""

    def ring(self) -> None:
        """See `Executor.ring`."""

    def fileno(self) -> int:
        """See `Executor.fileno`."""
        return -1

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """See `Executor.clone`: there are no bytes."""

    def layers_done(self, op: int) -> int:
        """See `Executor.layers_done`: no copy is ever in progress."""
        return 0

    def memory(self, kind: Kind, tier: Tier) -> Memory | None:
        """See `Executor.memory`: there are no bytes."""
        return None

    def attach(self, storage: Storage | None) -> None:
        """See `Executor.attach`."""
        self._storage = storage

    def stuck_threads(self) -> int:
        """See `Executor.stuck_threads`: there are no threads."""
        return 0

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """See `Executor.close`."""
        return ()
