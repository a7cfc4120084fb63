"""What every transfer engine must do: exact bytes, exactly one answer, and nothing waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from ...config import MemoryOrder
from ...transfer.op import PoolMove, Transfer, Transferred
from . import engine_time
from .engine_rig import MAIN, STATE, MakeEngine, Tiers, Watched, fill, moved, pages_of, random_bytes
from .hang import ends

_SOURCES = ((0, 1, 2, 3), (7, 2, 9, 0), (4, 5, 6, 1), (3,))
_TARGETS = ((5, 6, 7, 8), (1, 11, 0, 6), (8, 2, 3, 4), (0,))
"""Runs and scattered slots, and both in one."""


def check_engine(make: MakeEngine, device: str = "cpu", seed: int = 0) -> None:
    """Run every check of the transfer seam, each on a new engine, between pools on `device` and on host
    (pinned where CUDA is present; the moves of one transfer go one way). `seed` is that of the busy one.

    The checks call it from one thread, as an owner does, and some keep a thread of the engine in `notify`
    for a moment, to see what the owner may do meanwhile."""
    for check in CHECKS:
        ends(check.__name__.strip("_"), partial(_with_engine, make, device, check))
    ends("many", partial(_with_engine, make, device, partial(_many, seed=seed)))


def _with_engine(make: MakeEngine, device: str, check: Callable[[Watched, str], None]) -> None:
    watched = Watched(make, 8)
    try:
        check(watched, device)
    finally:
        watched.close()


def _moves_bytes(watched: Watched, device: str) -> None:
    """Between any two orders, up and down, runs and scattered, every pool of the kind."""
    for device_order in MemoryOrder:
        for host_order in MemoryOrder:
            tiers = Tiers(device, (device_order, host_order))
            for op, (source, target) in enumerate(zip(_SOURCES, _TARGETS, strict=True)):
                for up in (True, False):
                    before = tiers.contents()
                    transfer = tiers.transfer(op, source, target, up)
                    watched.must_take(transfer)
                    watched.drain()
                    results = watched.poll()
                    assert results == [Transferred(op)], (
                        f"a transfer that nothing hinders succeeds: {results}"
                    )
                    where = f"{device_order} and {host_order}, slots {source} to {target}, up: {up}"
                    assert moved(transfer), f"the bytes that arrive are exactly those that were sent: {where}"
                    _leaves_the_rest(tiers, before, transfer, where)


def _moves_long_transfers(watched: Watched, device: str) -> None:
    """More pages in one transfer than any batch of an engine, in no order at all."""
    pages = 1000
    tiers = Tiers(device, pages=pages, layouts=(STATE,))
    random = np.random.default_rng(pages)
    for op, up in enumerate((True, False)):
        transfer = tiers.transfer(
            op, random.permutation(pages).tolist(), random.permutation(pages).tolist(), up
        )
        watched.must_take(transfer)
        watched.finish()
        assert moved(transfer), f"all of {pages} pages of one transfer arrive"
    watched.balanced()


def _leaves_the_rest(tiers: Tiers, before: list[np.ndarray], transfer: Transfer, where: str) -> None:
    for pool, was in zip(tiers.pools, before, strict=True):
        now, same = pages_of(pool), np.ones(pool.pages, bool)
        for move in transfer.moves:
            if move.target is pool:
                same[move.target_slots] = False
        assert np.array_equal(now[same], was[same]), f"no byte outside the target slots changes: {where}"


def _moves_within_a_pool(watched: Watched, device: str) -> None:
    tiers = Tiers(device)
    pool = tiers.device[0]
    before = pages_of(pool)
    source, target = np.array([0, 1, 5]), np.array([9, 3, 4])
    watched.must_take(Transfer(1, (PoolMove(pool, source, pool, target),)))
    watched.finish()
    before[target] = before[source]
    assert np.array_equal(pages_of(pool), before), "one pool may be source and target"


def _moves_nothing(watched: Watched, device: str) -> None:
    tiers = Tiers(device)
    watched.must_take(Transfer(1, ()))
    watched.must_take(tiers.transfer(2, (), ()))
    watched.finish()
    assert not any(watched.errors().values()), "a transfer of nothing is done"


def _takes_until_full(watched: Watched, device: str) -> None:
    tiers = Tiers(device)
    for op in range(8):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
    full = "submit is False when as many are held as there is room for, until they are polled"
    assert not watched.submit(tiers.transfer(8, (8,), (8,))), full
    watched.drain()
    before = tiers.contents()
    refused = tiers.transfer(9, (9,), (9,))
    assert not watched.submit(refused), full
    watched.drain()
    kept = all(np.array_equal(a, b) for a, b in zip(before, tiers.contents(), strict=True))
    assert kept, "of a transfer that was not taken nothing is moved"
    assert watched.engine.layers_done(9) == 0, "layers_done is 0 for an op that is not held"
    watched.finish()
    assert watched.submit(refused), "submit takes a transfer again when results have been polled"
    watched.finish()
    watched.well()


def _holds_an_op_once(watched: Watched, device: str) -> None:
    tiers = Tiers(device)
    watched.must_take(tiers.transfer(1, (0,), (0,)))
    once = "submit raises ValueError for an op that is held already"
    for _ in range(2):
        try:
            watched.engine.submit(tiers.transfer(1, (1,), (1,)))
        except ValueError:
            watched.drain()
        else:
            raise AssertionError(once)
    watched.finish()
    watched.results.clear()
    watched.must_take(tiers.transfer(1, (2,), (2,)))
    watched.finish()
    watched.well()


def _polls_once(watched: Watched, device: str) -> None:
    tiers = Tiers(device)
    assert watched.poll() == [], "poll gives what has finished, and nothing has"
    for op in (5, 3, 4):
        watched.must_take(tiers.transfer(op, (op,), (op,)))
        watched.drain()
    results = watched.poll()
    order = "poll gives results in order of finishing"
    assert [result.op for result in results if result.op in (5, 3, 4)] == [5, 3, 4], f"{order}: {results}"
    assert watched.poll() == [], "poll gives each result once"
    watched.balanced()


def _survives_errors(watched: Watched, device: str) -> None:
    """A copy whose pool is not what it should be: an error, and of this transfer only."""
    tiers, other = Tiers(device), Tiers(device)
    bad = tiers.transfer(2, (1, 2), (3, 4))
    pool = bad.moves[1].source
    views = {name: getattr(pool, name) for name in ("words", "rows", "word_array", "row_array", "logical")}
    for name in views:
        setattr(pool, name, None)
    inside = "whatever goes wrong inside a copy is the error of its Transferred"
    watched.must_take(other.transfer(1, (0, 1), (2, 3)))
    try:
        watched.must_take(bad)
    except (TypeError, AttributeError) as error:
        raise AssertionError(f"{inside}, but submit raised {error!r}") from error
    watched.must_take(other.transfer(3, (4, 5, 6), (9, 8, 7)))
    watched.finish()
    errors = watched.errors()
    for name, view in views.items():
        setattr(pool, name, view)
    came = errors[2] is None and moved(bad)
    assert came or (isinstance(errors[2], str) and errors[2]), f"{inside}, and says what: {errors[2]!r}"
    alone = "an error leaves the other transfers alone"
    for op in (1, 3):
        assert errors[op] is None, f"{alone}: op {op} has {errors[op]!r}"
        assert moved(watched.taken[op]), f"{alone}: the bytes of op {op} are not there"
    watched.must_take(other.transfer(4, (10,), (10,)))
    watched.finish()
    assert watched.errors()[4] is None, f"{alone}, those that come after it too"


def _copies_its_arguments(watched: Watched, device: str) -> None:
    """What the engine was told stays so, whatever the caller does to its own arrays."""
    tiers = Tiers(device)
    source, target = np.array([0, 1]), np.array([2, 3])
    move = PoolMove(tiers.host[0], source, tiers.device[0], target)
    watched.must_take(Transfer(1, (move,)))
    source[:], target[:] = 9, 9
    watched.finish()
    watched.well()


def _lets_go(watched: Watched, device: str) -> None:
    """After its result an engine does not touch the slots of a transfer, stopped or not, ever again."""
    tiers = Tiers(device)
    for op in range(6):
        watched.must_take(tiers.transfer(op, (op,), (op + 5,), up=op % 2 == 0))
    for op in (1, 4, 5):
        watched.engine.cancel(op)
    watched.finish()
    values = [random_bytes(pool, 77) for pool in tiers.pools]
    for pool, value in zip(tiers.pools, values, strict=True):
        fill(pool, value)
    watched.must_take(Tiers(device).transfer(9, (0, 1), (0, 1)))
    watched.finish()
    watched.close()
    for pool, value in zip(tiers.pools, values, strict=True):
        assert np.array_equal(pages_of(pool), value), (
            "after its Transferred nothing touches a transfer's slots"
        )


def _many(watched: Watched, device: str, seed: int) -> None:
    """Hundreds of transfers, up and down, some stopped, in an order that `seed` draws."""
    random, pages = np.random.default_rng(seed), 256
    tiers = Tiers(device, (MemoryOrder.LAYER_FIRST, MemoryOrder.PAGE_FIRST_DIRECT), pages, (MAIN,))
    up, down = random.permutation(pages // 2), random.permutation(pages // 2) + pages // 2
    stopped: set[int] = set()
    for op in range(pages // 2):
        here = (down if op % 2 else up)[op // 2 * 2 : op // 2 * 2 + 2].tolist()
        transfer = tiers.transfer(op, here, here, up=op % 2 == 0)
        while not watched.submit(transfer):
            if not watched.poll():
                watched.drain()
        if random.random() < 0.2:
            stopped.add(op)
            watched.engine.cancel(op)
    watched.finish()
    for op, error in watched.errors().items():
        if op in stopped:
            watched.cancelled_or_moved(op)
        else:
            assert error is None, (
                f"a transfer that nothing hinders succeeds: op {op} has {error!r} (seed {seed})"
            )
            assert moved(watched.taken[op]), (
                f"the bytes that arrive are exactly those that were sent (seed {seed})"
            )


CHECKS: tuple[Callable[[Watched, str], None], ...] = (
    _moves_bytes,
    _moves_long_transfers,
    _moves_within_a_pool,
    _moves_nothing,
    _takes_until_full,
    _holds_an_op_once,
    _polls_once,
    _survives_errors,
    _copies_its_arguments,
    _lets_go,
    *engine_time.CHECKS,
)
