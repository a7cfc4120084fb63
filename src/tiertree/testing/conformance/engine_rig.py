"""Pools, transfers and an engine under watch, for the checks of transfer engines.

Tiers    a device and a host pool of each layout, in one memory order each, of random bytes
Watched  an engine, with what it took and what it answered
Bell     its `notify`: rings, and can be made to hold up the thread that calls it
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from time import monotonic

import numpy as np
import torch
from numpy.typing import NDArray

from ...config import Attention, KVLayout, Layout, MemoryOrder, StateLayout
from ...pools.paged import Pool
from ...transfer.engine import TransferEngine
from ...transfer.op import CANCELLED, PoolMove, Transfer, Transferred
from ...types import Slots

Notify = Callable[[], None]
MakeEngine = Callable[[Notify, int], TransferEngine]
"""A new engine with this `notify` that holds at most so many transfers. The check closes it."""

PATIENCE_S = 20.0
"""For how long something that must happen is waited for. Only a broken engine makes a check wait so long."""
SHORT_S = 0.05
"""A deadline that is meant to pass."""

MAIN = KVLayout(layers=4, kv_heads=2, head_size=8, dtype="bfloat16", page_size=4)
DRAFT = KVLayout(layers=2, kv_heads=1, head_size=3, dtype="float8_e5m2", attention=Attention.MLA, page_size=4)
STATE = StateLayout(layers=6, elements=9)
LAYOUTS: tuple[Layout, ...] = (MAIN, DRAFT, STATE)
"""A kind and its sidecars: words of 8, 1 and 4 bytes, and different numbers of layers."""

Bytes = NDArray[np.uint8]


def pages_of(pool: Pool) -> Bytes:
    """The logical bytes of all pages, [page, layer, …], as they are now."""
    return np.array(pool.logical.contiguous().view(torch.uint8).cpu().numpy())


def fill(pool: Pool, values: Bytes) -> None:
    """Make all of a pool's pages `values`, as `pages_of` gives them."""
    made = torch.from_numpy(values).view(pool.tensor.dtype)
    pool.logical.copy_(made.to(pool.device))
    settle(pool)


def settle(pool: Pool) -> None:
    """Wait for what the caller has queued on the pool's device."""
    if pool.device.type == "cuda":
        torch.cuda.current_stream(pool.device).synchronize()


def random_bytes(pool: Pool, seed: int) -> Bytes:
    """Bytes of all kinds, NaN patterns included, in the shape of `pages_of`."""
    shape = pages_of(pool).shape
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


class Tiers:
    """Pools of `layouts` with `pages` pages on a device and on host, of random bytes."""

    def __init__(
        self,
        device: str,
        orders: tuple[MemoryOrder, MemoryOrder] = (MemoryOrder.LAYER_FIRST, MemoryOrder.PAGE_FIRST),
        pages: int = 12,
        layouts: Sequence[Layout] = LAYOUTS,
    ) -> None:
        self.device = [Pool(layout, orders[0], pages, device, pinned=True) for layout in layouts]
        self.host = [Pool(layout, orders[1], pages, pinned=True) for layout in layouts]
        for seed, pool in enumerate(self.pools):
            fill(pool, random_bytes(pool, seed))

    @property
    def pools(self) -> list[Pool]:
        """All of them."""
        return [*self.device, *self.host]

    def contents(self) -> list[Bytes]:
        """What is in all of them."""
        return [pages_of(pool) for pool in self.pools]

    def transfer(self, op: int, source: Sequence[int], target: Sequence[int], up: bool = True) -> Transfer:
        """From device to host (`up` false), or from host to device, in every pool."""
        pairs = zip(self.host, self.device, strict=True) if up else zip(self.device, self.host, strict=True)
        return Transfer(
            op, tuple(PoolMove(here, _slots(source), there, _slots(target)) for here, there in pairs)
        )


def _slots(values: Sequence[int]) -> Slots:
    return np.array(values, np.int64)


def moved(transfer: Transfer) -> bool:
    """Whether every page of the targets is what the sources have there. The sources must not have changed."""
    return all(
        np.array_equal(pages_of(move.target)[move.target_slots], pages_of(move.source)[move.source_slots])
        for move in transfer.moves
    )


class Bell:
    """A `notify` that remembers that it was called. `hold` keeps the threads of an engine in it, until
    `release`; the owner's own thread is never kept."""

    def __init__(self) -> None:
        self._owner = threading.get_ident()
        self._rung = threading.Event()
        self._open = threading.Event()
        self._open.set()
        self.waiting = threading.Event()
        """Set when a thread of the engine is being kept."""
        self.kept_too_long = False
        """Whether `release` came so late that the kept thread was let go by itself."""

    def __call__(self) -> None:
        self._rung.set()
        if threading.get_ident() != self._owner and not self._open.is_set():
            self.waiting.set()
            if not self._open.wait(PATIENCE_S):
                self.kept_too_long = True
                self._open.set()

    def rang(self) -> bool:
        """Wait until it has rung since the last time; False if it has not within PATIENCE_S."""
        if not self._rung.wait(PATIENCE_S):
            return False
        self._rung.clear()
        return True

    def hold(self) -> None:
        """Keep whoever calls from now on."""
        self.waiting.clear()
        self._open.clear()

    def release(self) -> None:
        """Let them go, and all after them."""
        self._open.set()


class Watched:
    """An engine with the transfers it took and the results it gave."""

    def __init__(self, make: MakeEngine, capacity: int = 64) -> None:
        self.bell = Bell()
        self.engine = make(self.bell, capacity)
        self.taken: dict[int, Transfer] = {}
        self.results: list[Transferred] = []

    def submit(self, transfer: Transfer) -> bool:
        """Submit, and remember what was taken."""
        took = self.engine.submit(transfer)
        assert isinstance(took, bool), f"submit says True or False, not {took!r}"
        if took:
            self.taken[transfer.op] = transfer
        return took

    def must_take(self, transfer: Transfer) -> None:
        """Submit what there is room for."""
        assert self.submit(transfer), "submit takes a transfer as long as there is room"

    def poll(self) -> list[Transferred]:
        """Poll, and remember the results."""
        results = self.engine.poll()
        self.results += results
        return results

    def drain(self) -> None:
        """Wait until all is finished."""
        left = self.engine.drain(PATIENCE_S)
        assert left == (), f"drain with time enough ends everything, but {left} are unfinished"

    def finish(self) -> list[Transferred]:
        """Wait until all is finished, poll, and check the books."""
        self.drain()
        results = self.poll()
        self.balanced()
        return results

    def balanced(self) -> None:
        """Every transfer that was taken has one result, and there is no other."""
        counts, wanted = Counter(result.op for result in self.results), Counter(self.taken.keys())
        assert counts == wanted, (
            f"exactly one Transferred follows each transfer that was taken: missing {dict(wanted - counts)}, "
            f"too many {dict(counts - wanted)}"
        )

    def answered(self, ops: int) -> None:
        """Wait until `ops` results are there, by poll alone."""
        end = monotonic() + PATIENCE_S
        while len(self.results) < ops and monotonic() < end:
            self.poll()
            threading.Event().wait(0.001)

    def errors(self) -> dict[int, str | None]:
        """The error of each result, by operation."""
        return {result.op: result.error for result in self.results}

    def well(self) -> None:
        """Every transfer has succeeded, and its bytes are there."""
        assert not any(self.errors().values()), f"a transfer that nothing hinders succeeds: {self.errors()}"
        for transfer in self.taken.values():
            assert moved(transfer), (
                f"the bytes that arrive are exactly those that were sent: op {transfer.op}"
            )

    def cancelled_or_moved(self, op: int) -> None:
        """A transfer that was asked to stop was stopped and says so, or has arrived."""
        error = self.errors()[op]
        assert error in (None, CANCELLED), (
            f"a cancelled transfer has the error {CANCELLED!r} or none, not {error!r}"
        )
        if error is None:
            assert moved(self.taken[op]), "a transfer without an error has arrived, cancelled or not"

    def close(self) -> None:
        """Close it well."""
        self.bell.release()
        self.engine.close(PATIENCE_S)
