"""The executor of a simulation: real pools, real copies, real storage jobs, made-up time and luck.

    submit ──▶ [works_s: bytes move, step by step] ──▶ [answers_s] ──▶ poll ──▶ cache
                     a hanging one may work long after its deadline, and answers when the faults are over

A copy spoils its targets first, so that nothing that is read too early can look right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np

from ..build import make_pools
from ..config import CacheConfig
from ..executor import Memory, pool_moves
from ..pools.group import PoolGroup
from ..pools.paged import Pool
from ..storage.base import Storage
from ..storage.jobs import Job, Way, pool_way, task_of
from ..transfer.copy import Mover, plan
from ..tree.actions import Action, Cancel, Completion, Copy, Get, Put
from ..types import Kind, Slots, Tier
from .content import Bytes
from .faults import NEVER, Faults
from .loop import Diary, Event, Loop

JUNK = 0xA5
BATCH_PAGES = 3
"""Pages of one call of the storage, few enough for operations to be half done."""


class SmallWay(Way):
    """A way in small batches."""

    def batches(self, pages: int) -> Iterator[tuple[int, int]]:
        """Ranges of at most BATCH_PAGES pages."""
        for low in range(0, pages, BATCH_PAGES):
            yield low, min(low + BATCH_PAGES, pages)


class SimExecutor:
    """An `Executor` over small pools of its own. `life` is the number of the process it belongs to."""

    def __init__(self, config: CacheConfig, loop: Loop, faults: Faults, diary: Diary, life: int) -> None:
        device, host = make_pools(config)
        assert device is not None
        self.device = device
        self.pools: dict[Tier, PoolGroup | None] = {Tier.DEVICE: device, Tier.HOST: host}
        self.actions: Counter[str] = Counter()
        self._loop = loop
        self._faults = faults
        self._diary = diary
        self._life = life
        self._storage: Storage | None = None
        self._ways: dict[Kind, Way] = {}
        if host is not None:
            for kind in host.kinds:
                way = pool_way(kind, host[kind], config.shard)
                self._ways[kind] = SmallWay(way.keys, way.pools)
        self._done: list[Completion] = []
        self._layers: dict[int, int] = {}
        self._open: dict[int, Completion | None] = {}
        """Operations not answered yet, and what they will answer as far as it is known."""
        self._cancelled: set[int] = set()
        self._hidden: dict[int, list[tuple[int, Pool, Slots, Bytes]]] = {}
        """Of a Get that has read all, what it has not told of yet: from which page of FULL on, and where."""
        self._dead = False

    # -- what the cache calls ---------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        """See `Executor.submit`."""
        self._diary.note(describe(action))
        self.actions[type(action).__name__.lower()] += 1
        if isinstance(action, Cancel):
            self._cancel(action.op)
            return
        self._open[action.op] = None
        if isinstance(action, Copy):
            self._copy(action)
        else:
            self._store(action)

    def poll(self) -> list[Completion]:
        """See `Executor.poll`."""
        done, self._done = self._done, []
        for each in done:
            self._diary.note(
                f"answer {each.op}: {each.pages} {each.others} {each.error is None} {each.final}"
            )
        return done

    def wait(self, seconds: float) -> None:
        """See `Executor.wait`: virtual time passes."""
        self._loop.wait(seconds, lambda: bool(self._done))

    def ring(self) -> None:
        """See `Executor.ring`: nobody else is there."""

    def fileno(self) -> int:
        """See `Executor.fileno`: there is none."""
        return -1

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """See `Executor.clone`."""
        self.device.clone(kind, source, target)

    def layers_done(self, op: int) -> int:
        """See `Executor.layers_done`."""
        return self._layers.get(op, 0)

    def memory(self, kind: Kind, tier: Tier) -> Memory | None:
        """See `Executor.memory`."""
        pools = self.pools[tier]
        return None if pools is None else pools[kind]

    def stuck_threads(self) -> int:
        """See `Executor.stuck_threads`: there are no threads."""
        return 0

    def attach(self, storage: Storage | None) -> None:
        """See `Executor.attach`."""
        self._storage = storage

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """See `Executor.close`. What is under way never comes to anything."""
        self._dead = True
        return tuple(self._open)

    # -- what the simulation calls ------------------------------------------------------------------

    def heal(self) -> None:
        """Whatever hangs is answered soon: done, or provably dead."""
        for op in list(self._open):
            self._plan(0.01, partial(self._give_up, op))

    # -- copies -----------------------------------------------------------------------------------

    def _copy(self, action: Copy) -> None:
        op, names = action.op, (self._life, action.op)
        if self._faults.strikes("copy_refused", *names):
            self._answer(op, Completion(op, 0, "the transfer queue is full", declined=True))
            return
        fate = self._faults.fate("copy", *names, self._loop.now)
        moves = pool_moves(action, self.pools)
        movers = {id(move): Mover(move) for move in moves}
        for move in moves:
            spoil = np.full((len(move.target_slots), move.target.page_bytes), JUNK, np.uint8)
            move.target.write_pages(move.target_slots, spoil)
        steps = plan(moves)
        pages = sum(len(move.source) for move in action.moves)
        stop = self._faults.below(len(steps) + 1, "copied", *names) if fate.fails else len(steps)

        def work(at: int) -> None:
            if op not in self._open:
                return
            for step in steps[at : min(at + 1, stop)]:
                movers[id(step.move)].copy(step, slice(0, step.move.source_slots.size))
                self._layers[op] = step.arrived
            if at + 1 < stop:
                self._plan(fate.works_s / len(steps), lambda: work(at + 1))
                return
            self._open[op] = Completion(op, 0, "made up") if fate.fails else Completion(op, pages)
            if fate.answers_s < NEVER:
                self._plan(fate.answers_s / 10, lambda: self._finish(op, fate.twice))

        self._plan(min(fate.works_s, NEVER), lambda: work(0))

    # -- storage ----------------------------------------------------------------------------------

    def _store(self, job: Job) -> None:
        op = job.op
        if self._storage is None:
            self._answer(op, task_of(job).declined("no storage is attached"))
            return
        storage = self._storage
        fate = self._faults.fate("store", self._life, op, self._loop.now)

        def work() -> None:
            if op not in self._open:
                return
            self._open[op] = self._run(job, storage, fate.pause_s)
            if fate.answers_s < NEVER:
                self._plan(fate.answers_s, lambda: self._finish(op, fate.twice))

        if fate.works_s < NEVER:
            self._plan(fate.works_s, work)

    def _run(self, job: Job, storage: Storage, pause_s: float) -> Completion:
        """Do all of it now, and tell of progress batch by batch."""
        heard: list[Completion] = []
        task = task_of(job, heard.append)
        try:
            error = task.run(storage, self._ways.__getitem__, lambda: job.op in self._cancelled)
            done = task.completion(error)
        except Exception as raised:
            done = task.broken(raised)
        if isinstance(job, Get) and heard:
            self._hide(job, [each.pages for each in heard], done.pages)
        for at, each in enumerate(heard, 1):
            self._plan(pause_s * at, partial(self._tell, each))
        return done

    def _hide(self, job: Get, told: list[int], arrived: int) -> None:
        """FULL's pages are JUNK until their batch is told: whoever takes them earlier shall see it."""
        host, full = self.pools[Tier.HOST], job.spans[0]
        assert host is not None
        hidden = self._hidden[job.op] = []
        for low, high in zip([0, *told], [*told, arrived], strict=True):
            slots = full.slots[low:high]
            for pool in host[full.kind] if len(slots) else ():
                bytes_ = np.empty((len(slots), pool.page_bytes), np.uint8)
                pool.read_pages(slots, bytes_)
                pool.write_pages(slots, np.full_like(bytes_, JUNK))
                hidden.append((high, pool, slots, bytes_))

    def _reveal(self, op: int, pages: int) -> None:
        """The first `pages` pages of a Get are there."""
        still = []
        for high, pool, slots, bytes_ in self._hidden.pop(op, []):
            if high <= pages:
                pool.write_pages(slots, bytes_)
            else:
                still.append((high, pool, slots, bytes_))
        if still:
            self._hidden[op] = still

    # -- answers ----------------------------------------------------------------------------------

    def _finish(self, op: int, twice: bool) -> None:
        done = self._open.get(op)
        if done is not None:
            self._answer(op, done)
            if twice:
                self._plan(0.01, lambda: self._done.append(done))

    def _tell(self, progress: Completion) -> None:
        if progress.op in self._open:
            self._reveal(progress.op, progress.pages)
            self._done.append(progress)

    def _give_up(self, op: int) -> None:
        """Answer with what has been done, or that it is provably dead."""
        self._answer(op, self._open.get(op) or Completion(op, 0, "cancelled"))

    def _answer(self, op: int, completion: Completion) -> None:
        if self._open.pop(op, self) is not self:
            self._layers.pop(op, None)
            self._reveal(op, completion.pages)
            self._hidden.pop(op, None)
            self._done.append(completion)

    def _cancel(self, op: int) -> None:
        """What has been cancelled stops soon, if it hears it."""
        if op in self._open and not self._faults.strikes("cancel_deaf", self._life, op):
            self._cancelled.add(op)
            self._plan(0.005, partial(self._give_up, op))

    def _plan(self, seconds: float, event: Event) -> None:
        def alive() -> None:
            if not self._dead:
                event()

        self._loop.at(self._loop.now + seconds, alive, deep=True)


def describe(action: Action) -> str:
    """One line that says everything about an action."""
    if isinstance(action, Cancel):
        return f"cancel {action.op}"
    if isinstance(action, Copy):
        moves = [f"{each.kind} {each.source.tolist()} {each.target.tolist()}" for each in action.moves]
        return f"copy {action.op} {action.source.name} {action.target.name} {moves}"
    if isinstance(action, Put | Get):
        spans = [
            f"{each.kind} {[page.hex()[:8] for page in each.hashes]} {each.slots.tolist()}"
            for each in action.spans
        ]
        return f"{type(action).__name__.lower()} {action.op} {spans}"
    asked = [f"{kind} {[page.hex()[:8] for page in hashes]}" for kind, hashes in action.asked]
    return f"query {action.op} {asked}"
