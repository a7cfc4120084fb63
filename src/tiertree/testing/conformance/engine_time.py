"""What a transfer engine must do in time: layers, stopping, deadlines, and telling its owner."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ...config import KVLayout, MemoryOrder
from ...transfer.op import Transfer
from ...types import CacheClosed
from . import engine_rig
from .engine_rig import SHORT_S, Tiers, Watched, pages_of

_LARGE = KVLayout(layers=8, kv_heads=8, head_size=64, dtype="bfloat16", page_size=32)
_FLAT = KVLayout(layers=3, kv_heads=1, head_size=8, dtype="float32", page_size=32)
_TRANSFERS = 6


def _layers_arrive(watched: Watched, device: str) -> None:
    """`layers_done` grows from 0 to all, and what it counts is there: in every move, up to its last layer."""
    for order in MemoryOrder:
        tiers = Tiers(device, (order, MemoryOrder.PAGE_FIRST_DIRECT), 24, (_LARGE, _FLAT))
        transfer = tiers.transfer(1, range(24), range(23, -1, -1))
        before = "layers_done is 0 for an op that is not held"
        assert watched.engine.layers_done(1) == 0, before
        watched.must_take(transfer)
        seen = 0
        while watched.engine.drain(0.0):
            seen = _layers_there(watched, transfer, seen)
        seen = _layers_there(watched, transfer, seen)
        assert seen == _LARGE.layers, (
            f"layers_done is all layers when a transfer is done: {_LARGE.layers}, not {seen}"
        )
        watched.finish()
        assert watched.engine.layers_done(1) == 0, before
        watched.well()
        watched.results.clear()
        watched.taken.clear()


def _layers_there(watched: Watched, transfer: Transfer, seen: int) -> int:
    done = watched.engine.layers_done(1)
    assert seen <= done, f"layers_done never falls: {done} after {seen}"
    assert done <= _LARGE.layers, f"layers_done is at most the layers there are, {_LARGE.layers}: {done}"
    for move in transfer.moves if done > seen else ():
        layers = slice(seen, done)
        now = pages_of(move.target)[move.target_slots][:, layers]
        sent = pages_of(move.source)[move.source_slots][:, layers]
        assert np.array_equal(now, sent), (
            f"layers_done counts layers that have arrived: {done} of {_LARGE.layers}"
        )
    return done


def _cancels(watched: Watched, device: str) -> None:
    """Unknown, waiting, running, done: one result each, and of what was stopped it says so."""
    tiers = Tiers(device)
    watched.engine.cancel(99)
    assert watched.poll() == [], "to cancel an op that is not held does nothing"
    for op in range(_TRANSFERS):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
    for op in range(0, _TRANSFERS, 2):
        watched.engine.cancel(op)
        watched.engine.cancel(op)
    watched.drain()
    for op in range(1, _TRANSFERS, 2):
        watched.engine.cancel(op)
    watched.finish()
    for op in range(_TRANSFERS):
        watched.cancelled_or_moved(op)
        error = watched.errors()[op]
        assert error is None or op % 2 == 0, (
            f"to cancel an op that has finished does nothing: op {op} has {error!r}"
        )
    watched.engine.cancel(0)
    assert watched.poll() == [], "to cancel an op that was polled does nothing"


def _notifies(watched: Watched, device: str) -> None:
    """An owner that sleeps until it is notified gets every result."""
    tiers = Tiers(device)
    for op in range(2 * _TRANSFERS):
        while not watched.submit(tiers.transfer(op, (op,), (op,))):
            assert watched.bell.rang(), "notify is called when something is there to poll"
            watched.poll()
    while len(watched.results) < 2 * _TRANSFERS:
        assert watched.bell.rang(), "notify is called when something is there to poll"
        watched.poll()
    watched.balanced()


def _notifies_without_a_lock(watched: Watched, device: str) -> None:
    """While a thread of the engine is in `notify`, the owner may call everything."""
    tiers, bell = Tiers(device), watched.bell
    bell.hold()
    watched.must_take(tiers.transfer(0, (0,), (0,)))
    while not bell.waiting.wait(SHORT_S) and watched.engine.drain(0.0):
        pass
    watched.must_take(tiers.transfer(1, (1,), (1,)))
    watched.poll()
    watched.engine.layers_done(1)
    watched.engine.cancel(1)
    watched.engine.drain(0.0)
    kept = bell.kept_too_long
    bell.release()
    assert not kept, "notify is called without a lock: the owner may call the engine meanwhile"
    watched.finish()


def _drains_until_its_deadline(watched: Watched, device: str) -> None:
    """With a thread held up in `notify` not all may be finished at the deadline: then drain says so."""
    tiers, bell = Tiers(device), watched.bell
    bell.hold()
    for op in range(_TRANSFERS):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
    for _ in range(2):
        over = {result.op for result in watched.results}
        left = watched.engine.drain(SHORT_S)
        assert not bell.kept_too_long, (
            f"drain ends at its deadline, {SHORT_S} s, whatever a thread of it does"
        )
        finished = {result.op for result in watched.poll()} | {result.op for result in watched.results}
        assert isinstance(left, tuple), f"drain gives a tuple of ops, not {left!r}"
        named = "drain names each op that is unfinished once, and no other"
        assert len(set(left)) == len(left), f"{named}: {left}"
        assert set(left) <= set(watched.taken) - over, f"{named}: {left}, and {over} were polled before"
        assert set(watched.taken) - finished <= set(left), (
            f"{named}: {left}, but only {finished} have finished"
        )
    bell.release()
    watched.finish()
    watched.well()
    assert watched.engine.drain(0.0) == (), "drain of nothing is over at once"


def _closes_at_its_deadline(watched: Watched, device: str) -> None:
    """What is unfinished at the deadline is named, and whatever becomes of it, it has one result at most."""
    tiers, bell = Tiers(device), watched.bell
    bell.hold()
    for op in range(_TRANSFERS):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
    abandoned = watched.engine.close(SHORT_S)
    assert not bell.kept_too_long, f"close ends at its deadline, {SHORT_S} s, whatever a thread of it does"
    watched.poll()
    finished = {result.op for result in watched.results if result.error is None}
    named = f"close names what it abandons: {abandoned}, and only {finished} have succeeded"
    assert set(watched.taken) - finished <= set(abandoned), named
    assert set(abandoned) <= set(watched.taken), named
    bell.release()
    watched.answered(_TRANSFERS - len(abandoned))
    ops = [result.op for result in watched.results]
    assert len(set(ops)) == len(ops), f"exactly one Transferred follows each transfer that was taken: {ops}"
    assert set(watched.taken) - set(abandoned) <= set(ops), "what close does not name has a result"


def _closes(watched: Watched, device: str) -> None:
    """What can be finished is finished, poll still works, submit does not, and again is nothing new."""
    tiers = Tiers(device)
    for op in range(_TRANSFERS):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
    left = watched.engine.close(engine_rig.PATIENCE_S)
    assert left == (), f"close with time enough abandons nothing, but named {left}"
    assert watched.engine.close(0.0) == (), "close is idempotent"
    watched.poll()
    watched.balanced()
    watched.well()
    try:
        watched.engine.submit(tiers.transfer(9, (9,), (9,)))
    except CacheClosed:
        return
    raise AssertionError("submit raises CacheClosed after close")


CHECKS: tuple[Callable[[Watched, str], None], ...] = (
    _notifies_without_a_lock,
    _drains_until_its_deadline,
    _layers_arrive,
    _cancels,
    _notifies,
    _closes_at_its_deadline,
    _closes,
)
