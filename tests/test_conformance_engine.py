"""The suite for transfer engines: ours pass; whoever breaks a promise fails with a message that names it."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from tiertree.testing.conformance import check_engine, engine_rig, hang
from tiertree.transfer.cpu import CpuEngine
from tiertree.transfer.cuda import CudaEngine
from tiertree.transfer.op import PoolMove, Transfer, Transferred
from tiertree.types import CacheClosed

Notify = Callable[[], None]


@pytest.mark.parametrize("threads", [1, 4])
def test_the_cpu_engine_conforms(threads: int) -> None:
    check_engine(lambda notify, capacity: CpuEngine(notify, threads=threads, capacity=capacity))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the CUDA engine is not tested")
def test_the_cuda_engine_conforms() -> None:
    check_engine(lambda notify, capacity: CudaEngine("cuda", notify, capacity=capacity), "cuda")


class AtOnce:
    """The simplest engine there is: everything is done inside `submit`, on the owner's thread."""

    def __init__(self, notify: Notify, capacity: int) -> None:
        self._notify, self._capacity = notify, capacity
        self._held: dict[int, str | None] = {}
        self._closed = False

    def submit(self, transfer: Transfer) -> bool:
        if self._closed:
            raise CacheClosed("closed")
        if transfer.op in self._held:
            raise ValueError(f"op {transfer.op} is held")
        if len(self._held) >= self._capacity:
            return False
        self._held[transfer.op] = None
        try:
            for move in transfer.moves:
                self.move(move)
        except TypeError as error:
            self._held[transfer.op] = str(error)
        self._layers = max((move.source.layout.layers for move in transfer.moves), default=0)
        self._notify()
        return True

    def move(self, move: PoolMove) -> None:
        """Copy the pages of one pool."""
        for source, target in zip(move.source_slots, move.target_slots, strict=True):
            move.target.words[target] = move.source.words[source]

    def poll(self) -> list[Transferred]:
        results = [Transferred(op, error) for op, error in self._held.items()]
        self._held.clear()
        return results

    def cancel(self, op: int) -> None:
        return

    def layers_done(self, op: int) -> int:
        return self._layers if op in self._held else 0

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        return ()

    def close(self, deadline_s: float) -> tuple[int, ...]:
        self._closed = True
        return ()


def test_an_engine_from_outside_conforms() -> None:
    check_engine(AtOnce)


# Broken ones. Each is the engine of the cache, but for one thing.


class Broken(CpuEngine):
    """What the suite makes: an engine with a single thread."""

    def __init__(self, notify: Notify, capacity: int) -> None:
        super().__init__(notify, threads=1, capacity=capacity)


class Batches(Broken):
    """Moves the first 64 pages of a transfer."""

    def submit(self, transfer: Transfer) -> bool:
        moves = [
            PoolMove(each.source, each.source_slots[:64], each.target, each.target_slots[:64])
            for each in transfer.moves
        ]
        return super().submit(Transfer(transfer.op, tuple(moves)))


class Loses(Broken):
    """One result in five is lost."""

    def poll(self) -> list[Transferred]:
        return [result for result in super().poll() if result.op % 5 != 3]


class Doubles(Broken):
    """A result may come twice."""

    last: Transferred | None = None

    def poll(self) -> list[Transferred]:
        results = super().poll()
        again = [self.last] if self.last is not None and not results else []
        self.last = results[-1] if results else None
        return [*results, *again]


class Backwards(Broken):
    """The last to finish comes first."""

    def poll(self) -> list[Transferred]:
        return super().poll()[::-1]


class NeverFull(Broken):
    """Takes whatever comes."""

    def __init__(self, notify: Notify, capacity: int) -> None:
        super().__init__(notify, 1 << 20)


class FullOfTheDone(Broken):
    """Counts only what has not finished."""

    def submit(self, transfer: Transfer) -> bool:
        if len(self._jobs) >= 8 and self._unfinished < 8:
            self._capacity += 1
        return super().submit(transfer)


class TakesAndRefuses(Broken):
    """Says False, and moves it all the same."""

    def submit(self, transfer: Transfer) -> bool:
        took = super().submit(transfer)
        if not took:
            AtOnce(lambda: None, 1).submit(transfer)
        return took


class TwiceTheSame(Broken):
    """Ignores an op that it has already."""

    def submit(self, transfer: Transfer) -> bool:
        return transfer.op in self._jobs or super().submit(transfer)


class StillOpen(Broken):
    """Says that it is full when it is closed."""

    def submit(self, transfer: Transfer) -> bool:
        return False if self._closed else super().submit(transfer)


class NoSidecars(Broken):
    """Moves the main pool."""

    def submit(self, transfer: Transfer) -> bool:
        return super().submit(dataclasses.replace(transfer, moves=transfer.moves[:1]))


def changed(transfer: Transfer, change: Callable[[np.ndarray], np.ndarray]) -> Transfer:
    """The same with other target slots."""
    moves = tuple(
        PoolMove(move.source, move.source_slots, move.target, change(move.target_slots))
        for move in transfer.moves
    )
    return dataclasses.replace(transfer, moves=moves)


class Sorts(Broken):
    """Takes targets in ascending order."""

    def submit(self, transfer: Transfer) -> bool:
        return super().submit(changed(transfer, np.sort))


class Runs(Broken):
    """Takes targets as one run."""

    def submit(self, transfer: Transfer) -> bool:
        first = [int(move.target_slots.min(initial=0)) for move in transfer.moves]
        least = min(first, default=0)
        room = min((move.target.pages - move.target_slots.size for move in transfer.moves), default=0)
        return super().submit(
            changed(transfer, lambda slots: np.arange(slots.size, dtype=np.int64) + min(least, room))
        )


class Spills(Broken):
    """Writes to a page beside the targets."""

    def submit(self, transfer: Transfer) -> bool:
        for move in transfer.moves[:1]:
            free = [slot for slot in range(move.target.pages) if slot not in move.target_slots]
            if move.source is not move.target:
                move.target.logical[free[0]] = 0
        return super().submit(transfer)


class Numbers(Broken):
    """Moves values, not bytes: a NaN becomes another."""

    def submit(self, transfer: Transfer) -> bool:
        for move in transfer.moves:
            values = move.source.logical[move.source_slots]
            if values.dtype == torch.float32 and move.source is not move.target:
                move.source.logical[move.source_slots] = torch.nan_to_num(values)
        return super().submit(transfer)


class Eager(Broken):
    """Counts all layers at once, and takes its time, so that somebody sees it."""

    def _next(self) -> Any:
        job = super()._next()
        time.sleep(0.05)
        return job

    def layers_done(self, op: int) -> int:
        job = self._jobs.get(op)
        return 0 if job is None else max((m.source.layout.layers for m in job.transfer.moves), default=0)


class Falls(Broken):
    """Counts layers, and then none."""

    def layers_done(self, op: int) -> int:
        done = super().layers_done(op)
        return done if done < 8 or not self._jobs[op].finished else 7


class Stays(Broken):
    """Counts no layer before all are there, and none then."""

    def layers_done(self, op: int) -> int:
        return 0


class Counts(Broken):
    """Goes on counting layers of what was polled."""

    most = 0

    def layers_done(self, op: int) -> int:
        self.most = max(self.most, super().layers_done(op))
        return self.most


class Cancels(Broken):
    """What is cancelled has no result."""

    def cancel(self, op: int) -> None:
        with self._changed:
            job = self._jobs.get(op)
            if job is not None and job in self._queue:
                self._queue.remove(job)
                self._unfinished -= 1
                del self._jobs[op]


class CancelsTheDone(Broken):
    """To cancel what has finished makes an error of it."""

    def cancel(self, op: int) -> None:
        with self._changed:
            if Transferred(op) in self._results:
                self._results.remove(Transferred(op))
                self._results.append(Transferred(op, "cancelled"))
        super().cancel(op)


class InOwnWords(Broken):
    """Says of what was cancelled something else."""

    def poll(self) -> list[Transferred]:
        return [Transferred(result.op, result.error and "aborted") for result in super().poll()]


class Mute(Broken):
    """Tells nobody."""

    def __init__(self, notify: Notify, capacity: int) -> None:
        super().__init__(lambda: None, capacity)


class Locked(Broken):
    """Tells its owner with a lock held."""

    def __init__(self, notify: Notify, capacity: int) -> None:
        self._guard = threading.RLock()

        def locked() -> None:
            with self._guard:
                notify()

        super().__init__(locked, capacity)

    def poll(self) -> list[Transferred]:
        with self._guard:
            return super().poll()


class Patient(Broken):
    """Has another deadline than it was given."""

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        return super().drain(deadline_s if deadline_s == 0.0 else 60.0)


class Forgets(Broken):
    """Drain names nobody."""

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        super().drain(deadline_s)
        return ()


class NamesAll(Broken):
    """Drain names everybody there ever was."""

    def submit(self, transfer: Transfer) -> bool:
        vars(self).setdefault("ever", []).append(transfer.op)
        return super().submit(transfer)

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        left = super().drain(deadline_s)
        return (*left, *vars(self)["ever"]) if left else ()


class ForgetsToClose(Broken):
    """Close names nobody."""

    def close(self, deadline_s: float) -> tuple[int, ...]:
        super().close(deadline_s)
        return ()


class Hurries(Broken):
    """Close waits for nothing."""

    def close(self, deadline_s: float) -> tuple[int, ...]:
        return super().close(0.0) if not self._closed else ()

    def _next(self) -> Any:
        threading.Event().wait(0.01)
        return super()._next()


class OneError(Broken):
    """After one error there are only errors."""

    def poll(self) -> list[Transferred]:
        results = super().poll()
        if any(result.error and "Error" in result.error for result in results):
            vars(self)["broken"] = True
        bad = "broken" in vars(self)
        return [Transferred(result.op, result.error or ("broken" if bad else None)) for result in results]


class Raises(Broken):
    """What is wrong with a copy is raised."""

    def submit(self, transfer: Transfer) -> bool:
        for move in transfer.moves:
            move.source.words[:1]
        return super().submit(transfer)


class Hushes(Broken):
    """Has no errors."""

    def poll(self) -> list[Transferred]:
        return [Transferred(result.op) for result in super().poll()]


class HoldsOn(Broken):
    """Writes a page once more when it has said that it is done."""

    first: PoolMove | None = None

    def submit(self, transfer: Transfer) -> bool:
        if self.first is None and transfer.moves:
            self.first = transfer.moves[0]
        return super().submit(transfer)

    def close(self, deadline_s: float) -> tuple[int, ...]:
        if self.first is not None:
            self.first.target.logical[self.first.target_slots] = 0
        return super().close(deadline_s)


class Hangs(Broken):
    """Waits for what never comes."""

    over: ClassVar[threading.Event]

    def drain(self, deadline_s: float) -> tuple[int, ...]:
        self.over.wait()
        return ()


MOVES = "the bytes that arrive are exactly those that were sent"
ONCE = "exactly one Transferred follows each transfer that was taken"
BROKEN = [
    (Batches, "all of 1000 pages of one transfer arrive"),
    (Loses, f"{ONCE}|a transfer that nothing hinders succeeds"),
    (Doubles, f"{ONCE}|poll gives each result once"),
    (Backwards, "poll gives results in order of finishing"),
    (NeverFull, "submit is False when as many are held as there is room for"),
    (FullOfTheDone, "until they are polled"),
    (TakesAndRefuses, "of a transfer that was not taken nothing is moved"),
    (TwiceTheSame, "submit raises ValueError for an op that is held already"),
    (StillOpen, "submit raises CacheClosed after close"),
    (NoSidecars, MOVES),
    (Sorts, MOVES),
    (Runs, MOVES),
    (Spills, "no byte outside the target slots changes"),
    (Numbers, "no byte outside the target slots changes"),
    (Eager, "layers_done counts layers that have arrived"),
    (Falls, "layers_done never falls|layers_done is all layers when a transfer is done"),
    (Stays, "layers_done is all layers when a transfer is done"),
    (Counts, "layers_done is 0 for an op that is not held"),
    (Cancels, ONCE),
    (CancelsTheDone, "to cancel an op that has finished does nothing"),
    (InOwnWords, "a cancelled transfer has the error 'cancelled' or none"),
    (Mute, "notify is called when something is there to poll"),
    (Locked, "notify is called without a lock"),
    (Patient, "drain ends at its deadline"),
    (Forgets, "drain names each op that is unfinished once, and no other"),
    (NamesAll, "drain names each op that is unfinished once, and no other"),
    (ForgetsToClose, "close names what it abandons"),
    (Hurries, "close with time enough abandons nothing"),
    (OneError, "an error leaves the other transfers alone"),
    (Raises, "whatever goes wrong inside a copy is the error of its Transferred"),
    (Hushes, "whatever goes wrong inside a copy is the error of its Transferred"),
    (HoldsOn, "after its Transferred nothing touches a transfer's slots"),
]


@pytest.mark.parametrize(("make", "promise"), BROKEN, ids=[each.__name__ for each, _ in BROKEN])
def test_an_engine_that_breaks_a_promise_does_not_conform(
    make: type[Broken], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_rig, "PATIENCE_S", 2.0)
    with pytest.raises(AssertionError, match=promise):
        check_engine(make)


def test_an_engine_that_hangs_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "HANG_S", 0.3)
    Hangs.over = threading.Event()
    with pytest.raises(AssertionError, match="moves_bytes hangs"):
        check_engine(Hangs)
    Hangs.over.set()
