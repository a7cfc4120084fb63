"""Transfers on CPU: the same bytes between any two orders, and an engine that always answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from time import monotonic

import numpy as np
import pytest
import torch

from tiertree.config import KVLayout, Layout, MemoryOrder, SidecarConfig, StateLayout
from tiertree.pools.group import PoolGroup
from tiertree.pools.paged import Pool
from tiertree.transfer import copy
from tiertree.transfer.cpu import CpuEngine
from tiertree.transfer.op import CANCELLED, PoolMove, Transfer, Transferred, moves_between
from tiertree.types import FULL, CacheClosed, InvalidSlots

LAYER_FIRST, PAGE_FIRST, DIRECT = MemoryOrder
LONG_S = 30.0  # a deadline that only a hung test meets
LAYOUTS: dict[str, Layout] = {
    "mha-bf16": KVLayout(layers=3, kv_heads=2, head_size=4, dtype="bfloat16", page_size=4),
    "mha-f8": KVLayout(layers=2, kv_heads=1, head_size=3, dtype="float8_e5m2", page_size=2),
    "mla-f32": KVLayout(layers=2, kv_heads=1, head_size=5, dtype="float32", attention="mla", page_size=3),
    "mla-f16": KVLayout(layers=4, kv_heads=1, head_size=6, dtype="float16", attention="mla", page_size=2),
    "compressed-i8": KVLayout(
        layers=2, kv_heads=2, head_size=8, dtype="int8", page_size=8, tokens_per_entry=4
    ),
    "large-pages": KVLayout(layers=4, kv_heads=8, head_size=128, dtype="bfloat16", page_size=32),
    "state": StateLayout(layers=3, elements=9, dtype="float32"),
}
SMALL = LAYOUTS["mha-bf16"]


def pool_of(layout: Layout, order: MemoryOrder, pages: int, seed: int) -> Pool:
    """A pool of random bytes, NaN patterns included."""
    pool = Pool(layout, order, pages)
    values = np.random.default_rng(seed).integers(0, 256, pool.nbytes, np.uint8)
    pool.tensor.view(torch.uint8).reshape(-1).copy_(torch.from_numpy(values))
    return pool


def pages_of(pool: Pool) -> np.ndarray:
    """The logical bytes of all pages, [page, …], by torch's own indexing."""
    return pool.logical.contiguous().view(torch.uint8).numpy()


def slots(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


class Gate:
    """Stands before every copy of a chunk: counts, and lets through one `allow()` at a time."""

    real = copy.Mover.copy

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def pass_through(self, mover: copy.Mover, step: copy.Step, pages: slice) -> None:
        self.arrived.release()
        assert self.allowed.acquire(timeout=LONG_S)
        Gate.real(mover, step, pages)

    def wait(self) -> None:
        """Until a worker stands before its next chunk."""
        assert self.arrived.acquire(timeout=LONG_S)

    def allow(self, chunks: int = 1) -> None:
        self.allowed.release(chunks)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """A gate before every chunk; opened wide at the end, so that no worker is left behind."""
    gate = Gate()
    monkeypatch.setattr(copy.Mover, "copy", lambda *part: gate.pass_through(*part))
    yield gate
    gate.allow(10_000)


@pytest.fixture
def start() -> Iterator[Callable[..., CpuEngine]]:
    """Starts engines, and closes them afterwards."""
    engines: list[CpuEngine] = []

    def start(notify: Callable[[], None] = lambda: None, **options: int) -> CpuEngine:
        engines.append(CpuEngine(notify, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(0.0)


def transfer(op: int = 1, pages: int = 2, order: MemoryOrder = LAYER_FIRST) -> Transfer:
    """A small transfer between pools of its own."""
    source, target = pool_of(SMALL, DIRECT, pages, seed=op), pool_of(SMALL, order, pages, seed=op + 1)
    return Transfer(op, (PoolMove(source, np.arange(pages), target, np.arange(pages)[::-1].copy()),))


def finish(engine: CpuEngine) -> list[Transferred]:
    assert engine.drain(LONG_S) == ()
    return engine.poll()


# Bytes


@pytest.mark.parametrize("host_order", MemoryOrder)
@pytest.mark.parametrize("device_order", MemoryOrder)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_come_back_bit_equal_through_any_two_orders(
    layout: Layout, device_order: MemoryOrder, host_order: MemoryOrder, start: Callable[..., CpuEngine]
) -> None:
    rng = np.random.default_rng(7)
    device, host = pool_of(layout, device_order, 9, seed=1), pool_of(layout, host_order, 11, seed=2)
    before, host_before = pages_of(device).copy(), pages_of(host).copy()
    out, there, back = rng.permutation(9)[:6], rng.permutation(11)[:6], rng.permutation(9)[:6]
    engine = start()
    engine.submit(Transfer(1, (PoolMove(device, out, host, there),)))
    assert finish(engine) == [Transferred(1)]
    assert np.array_equal(pages_of(device), before)
    host_before[there] = before[out]
    assert np.array_equal(pages_of(host), host_before)

    engine.submit(Transfer(2, (PoolMove(host, there, device, back),)))
    assert finish(engine) == [Transferred(2)]
    expected = before.copy()
    expected[back] = before[out]
    assert np.array_equal(pages_of(device), expected)


@pytest.mark.parametrize("target_order", MemoryOrder)
@pytest.mark.parametrize("source_order", MemoryOrder)
@pytest.mark.parametrize(
    ("s", "t"),
    [
        (slots(*range(20)), slots(*range(7, 27))),
        (slots(*range(3, 9), 12, *range(3)), slots(*range(10, 16), 19, *range(7, 10))),
        (slots(0, 2, 4, 5, 6), slots(10, 11, 12, 13, 14)),
        (slots(0, 1, 2, 3, 4), slots(20, 10, 11, 12, 2)),
        (slots(5, 3, 11), slots(12, 10, 18)),
    ],
    ids=["one-run", "three-runs", "gaps-in-source", "gaps-in-target", "no-runs"],
)
@pytest.mark.parametrize("short_bytes", [0, 1 << 30], ids=["runs", "gather"])
def test_every_way_to_copy_gives_the_same_bytes(
    source_order: MemoryOrder,
    target_order: MemoryOrder,
    s: np.ndarray,
    t: np.ndarray,
    short_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(copy, "_SHORT_BYTES", short_bytes)
    monkeypatch.setattr(copy, "_BUFFER_BYTES", 3 * SMALL.page_bytes)
    source, target = pool_of(SMALL, source_order, 20, seed=3), pool_of(SMALL, target_order, 30, seed=4)
    expected = pages_of(target).copy()
    expected[t] = pages_of(source)[s]
    for step in copy.plan([PoolMove(source, s, target, t)]):
        for pages in copy.chunks(step, 4 * SMALL.page_bytes):
            copy.Mover(step.move).copy(step, pages)
    assert np.array_equal(pages_of(target), expected)


@pytest.mark.parametrize("short_bytes", [0, 1 << 30], ids=["runs", "gather"])
@pytest.mark.parametrize("t", [slots(7, 1, 5, 3), slots(4, 5, 6, 7)], ids=["scattered", "run"])
def test_a_part_of_a_step_touches_only_its_pages(
    t: np.ndarray, short_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copy, "_SHORT_BYTES", short_bytes)
    source, target = pool_of(SMALL, DIRECT, 8, seed=3), pool_of(SMALL, PAGE_FIRST, 8, seed=4)
    expected = pages_of(target).copy()
    expected[t[1:3]] = pages_of(source)[[1, 2]]
    (step,) = copy.plan([PoolMove(source, np.arange(4), target, t)])
    copy.Mover(step.move).copy(step, slice(1, 3))
    assert np.array_equal(pages_of(target), expected)


@pytest.mark.parametrize("target_order", MemoryOrder)
@pytest.mark.parametrize("source_order", MemoryOrder)
def test_other_devices_copy_the_same_bytes(source_order: MemoryOrder, target_order: MemoryOrder) -> None:
    """The way that devices other than CPU go, on CPU tensors."""
    source, target = pool_of(SMALL, source_order, 6, seed=3), pool_of(SMALL, target_order, 6, seed=4)
    s, t = slots(4, 0, 5), slots(1, 2, 0)
    expected = pages_of(target).copy()
    expected[t] = pages_of(source)[s]
    for step in copy.plan([PoolMove(source, s, target, t)]):
        copy.copy_tensors(*copy.step_words(step), torch.from_numpy(s), torch.from_numpy(t))
    assert np.array_equal(pages_of(target), expected)


def test_sidecars_ride_along(start: Callable[..., CpuEngine]) -> None:
    draft = SidecarConfig(name="draft", layout=LAYOUTS["mla-f16"])
    device = PoolGroup.build({FULL: SMALL}, [draft], order=LAYER_FIRST, pages={FULL: 4})
    host = PoolGroup.build({FULL: SMALL}, [draft], order=PAGE_FIRST, pages={FULL: 4})
    for seed, pool in enumerate([*device[FULL], *host[FULL]]):
        pool.logical.copy_(pool_of(pool.layout, pool.order, 4, seed).logical)
    engine = start()
    engine.submit(Transfer(1, moves_between(device, host, FULL, slots(3, 1), slots(0, 2))))
    assert finish(engine) == [Transferred(1)]
    for here, there in device.pairs(FULL, host):
        assert np.array_equal(pages_of(here)[[3, 1]], pages_of(there)[[0, 2]])


# Steps


def test_a_step_is_a_layer_a_slice_of_a_page_or_the_page() -> None:
    layout = KVLayout(layers=5, kv_heads=8, head_size=128, dtype="bfloat16", page_size=24)
    assert 2 * layout.page_bytes // 5 < copy.STEP_BYTES < 3 * layout.page_bytes // 5
    steps = {order: copy.layers_per_step(Pool(layout, order, 1)) for order in MemoryOrder}
    assert steps == {LAYER_FIRST: 1, DIRECT: 3, PAGE_FIRST: 5}
    assert copy.layers_per_step(Pool(SMALL, DIRECT, 1)) == SMALL.layers


def test_a_plan_covers_every_layer_of_every_move_once_in_order() -> None:
    deep, flat = LAYOUTS["mla-f16"], SMALL
    moves = [
        PoolMove(Pool(layout, DIRECT, 1), slots(0), Pool(layout, order, 1), slots(0))
        for layout, order in ((flat, PAGE_FIRST), (deep, LAYER_FIRST), (flat, LAYER_FIRST))
    ]
    steps = copy.plan(moves)
    assert [step.first for step in steps] == sorted(step.first for step in steps)
    for move in moves:
        covered = [layer for step in steps if step.move is move for layer in range(step.first, step.last)]
        assert covered == list(range(move.source.layout.layers))


def test_chunks_cover_every_page_once() -> None:
    (step,) = copy.plan(
        [PoolMove(Pool(SMALL, DIRECT, 7), np.arange(7), Pool(SMALL, PAGE_FIRST, 7), np.arange(7))]
    )
    for chunk_bytes in (1, 3 * SMALL.page_bytes, 100 * SMALL.page_bytes):
        covered = [page for pages in copy.chunks(step, chunk_bytes) for page in range(7)[pages]]
        assert covered == list(range(7))


def test_layer_0_is_there_while_the_last_layer_still_loads(
    gate: Gate, start: Callable[..., CpuEngine]
) -> None:
    engine, load = start(), transfer(pages=3)
    (move,) = load.moves
    engine.submit(load)
    source, before = pages_of(move.source), pages_of(move.target).copy()
    for layer in range(SMALL.layers):
        gate.wait()
        assert engine.layers_done(1) == layer
        now = pages_of(move.target)[move.target_slots]
        assert np.array_equal(now[:, :layer], source[move.source_slots, :layer])
        assert np.array_equal(now[:, layer:], before[move.target_slots, layer:])
        gate.allow()
    assert engine.drain(LONG_S) == ()
    assert engine.layers_done(1) == SMALL.layers
    assert engine.poll() == [Transferred(1)]
    assert engine.layers_done(1) == 0


def test_a_layer_counts_once_it_is_there_in_every_move(gate: Gate, start: Callable[..., CpuEngine]) -> None:
    whole, layered = transfer(1, order=PAGE_FIRST), transfer(2, order=LAYER_FIRST)
    engine = start()
    engine.submit(Transfer(1, whole.moves + layered.moves))
    done = []
    for _ in range(1 + SMALL.layers):
        gate.wait()
        done.append(engine.layers_done(1))
        gate.allow()
    assert done == [0, 0, 1, 2]


# The engine


def test_completions_come_in_order_of_finishing(gate: Gate, start: Callable[..., CpuEngine]) -> None:
    notified = threading.Semaphore(0)
    engine = start(notified.release, threads=2)
    engine.submit(transfer(1, order=LAYER_FIRST))
    gate.wait()
    engine.submit(transfer(2, order=LAYER_FIRST))
    gate.wait()
    engine.cancel(1)
    assert engine.poll() == []
    gate.allow(1 + SMALL.layers)
    for _ in range(2):
        assert notified.acquire(timeout=LONG_S)
    results = engine.poll()
    assert sorted(results, key=lambda result: result.op) == [Transferred(1, CANCELLED), Transferred(2)]
    assert engine.poll() == []


def test_a_later_transfer_may_finish_first(
    monkeypatch: pytest.MonkeyPatch, start: Callable[..., CpuEngine]
) -> None:
    release, slow, fast = threading.Event(), transfer(1), transfer(2)

    def copy_late(mover: copy.Mover, step: copy.Step, pages: slice) -> None:
        if step.move is slow.moves[0]:
            assert release.wait(LONG_S)
        Gate.real(mover, step, pages)

    monkeypatch.setattr(copy.Mover, "copy", copy_late)
    notified = threading.Semaphore(0)
    engine = start(notified.release, threads=2)
    engine.submit(slow)
    engine.submit(fast)
    assert notified.acquire(timeout=LONG_S)
    assert engine.drain(0.0) == (1,)
    release.set()
    assert engine.drain(LONG_S) == ()
    assert engine.poll() == [Transferred(2), Transferred(1)]


def test_the_queue_is_bounded_until_polled(gate: Gate, start: Callable[..., CpuEngine]) -> None:
    engine = start(capacity=2)
    assert engine.submit(transfer(1))
    assert engine.submit(transfer(2))
    assert not engine.submit(transfer(3))
    gate.allow(100)
    assert engine.drain(LONG_S) == ()
    assert not engine.submit(transfer(3))
    assert engine.poll() == [Transferred(1), Transferred(2)]
    assert engine.submit(transfer(3))
    assert finish(engine) == [Transferred(3)]


def test_a_queued_transfer_is_cancelled_at_once_and_copies_nothing(
    gate: Gate, start: Callable[..., CpuEngine]
) -> None:
    notified = threading.Semaphore(0)
    engine, queued = start(notified.release), transfer(2)
    before = pages_of(queued.moves[0].target).copy()
    engine.submit(transfer(1))
    gate.wait()
    engine.submit(queued)
    engine.cancel(2)
    assert notified.acquire(blocking=False)
    assert engine.poll() == [Transferred(2, CANCELLED)]
    gate.allow(100)
    assert finish(engine) == [Transferred(1)]
    assert np.array_equal(pages_of(queued.moves[0].target), before)


def test_a_running_transfer_is_cancelled_between_chunks(gate: Gate, start: Callable[..., CpuEngine]) -> None:
    engine, running = start(), transfer(1)
    (move,) = running.moves
    before = pages_of(move.target).copy()
    engine.submit(running)
    gate.wait()
    engine.cancel(1)
    assert engine.drain(0.0) == (1,)
    gate.allow(100)
    assert finish(engine) == [Transferred(1, CANCELLED)]
    assert np.array_equal(pages_of(move.target)[:, 1:], before[:, 1:])
    assert not np.array_equal(pages_of(move.target)[:, 0], before[:, 0])


def test_cancelling_what_is_over_or_unknown_does_nothing(start: Callable[..., CpuEngine]) -> None:
    engine = start()
    engine.cancel(1)
    engine.submit(transfer(1))
    assert engine.drain(LONG_S) == ()
    engine.cancel(1)
    assert engine.poll() == [Transferred(1)]


def test_a_copy_that_fails_is_an_error_and_the_worker_lives_on(
    monkeypatch: pytest.MonkeyPatch, start: Callable[..., CpuEngine]
) -> None:
    bad = transfer(1)

    def copy_or_fail(mover: copy.Mover, step: copy.Step, pages: slice) -> None:
        if step.move is bad.moves[0]:
            raise MemoryError("no room for a buffer")
        Gate.real(mover, step, pages)

    monkeypatch.setattr(copy.Mover, "copy", copy_or_fail)
    engine = start()
    engine.submit(bad)
    engine.submit(transfer(2))
    assert finish(engine) == [Transferred(1, "MemoryError: no room for a buffer"), Transferred(2)]


def test_a_notify_that_fails_is_logged_and_the_worker_lives_on(
    start: Callable[..., CpuEngine], caplog: pytest.LogCaptureFixture
) -> None:
    def notify() -> None:
        raise RuntimeError("the receiver is gone")

    engine = start(notify)
    engine.submit(transfer(1))
    assert finish(engine) == [Transferred(1)]
    engine.submit(transfer(2))
    assert finish(engine) == [Transferred(2)]
    engine.close(LONG_S)
    assert caplog.text.count("the receiver is gone") >= 2


def test_drain_and_close_keep_their_deadline_and_name_the_abandoned(
    gate: Gate, start: Callable[..., CpuEngine]
) -> None:
    engine = start()
    engine.submit(transfer(1))
    engine.submit(transfer(2))
    gate.wait()
    assert engine.drain(0.01) == (1, 2)
    assert engine.close(0.01) == (1, 2)
    assert engine.poll() == [Transferred(2, CANCELLED)]
    gate.allow(100)
    assert engine.drain(LONG_S) == ()
    assert engine.poll() == [Transferred(1, CANCELLED)]


def test_close_finishes_what_it_can_and_its_threads_are_gone(start: Callable[..., CpuEngine]) -> None:
    engine = start(threads=3)
    mine = [thread for thread in threading.enumerate() if thread in engine._threads]
    assert len(mine) == 3
    assert all(thread.daemon and thread.name.startswith("tiertree-transfer-") for thread in mine)
    engine.submit(transfer(1))
    assert engine.close(LONG_S) == ()
    assert not any(thread.is_alive() for thread in mine)
    assert engine.poll() == [Transferred(1)]
    with pytest.raises(CacheClosed):
        engine.submit(transfer(2))
    assert engine.close(0.0) == ()


def test_an_op_is_held_once(gate: Gate, start: Callable[..., CpuEngine]) -> None:
    engine = start()
    engine.submit(transfer(1))
    with pytest.raises(ValueError, match="op 1"):
        engine.submit(transfer(1))
    gate.allow(100)
    assert finish(engine) == [Transferred(1)]
    assert engine.submit(transfer(1))


def test_a_transfer_of_nothing_is_done(start: Callable[..., CpuEngine]) -> None:
    engine, pool = start(), Pool(SMALL, DIRECT, 1)
    engine.submit(Transfer(1, ()))
    engine.submit(Transfer(2, (PoolMove(pool, slots(), Pool(SMALL, LAYER_FIRST, 1), slots()),)))
    assert finish(engine) == [Transferred(1), Transferred(2)]


@pytest.mark.parametrize(
    ("source", "target"),
    [((0, 1), (0,)), ((0,), (9,)), ((9,), (0,)), ((-1,), (0,)), ((0, 1), (1, 1))],
    ids=["unequal", "target-outside", "source-outside", "negative", "repeated"],
)
def test_slots_that_cannot_be_are_refused(source: tuple[int, ...], target: tuple[int, ...]) -> None:
    pool = Pool(SMALL, DIRECT, 3)
    with pytest.raises(InvalidSlots):
        PoolMove(pool, slots(*source), Pool(SMALL, LAYER_FIRST, 3), slots(*target))


def test_pools_of_different_layouts_are_refused() -> None:
    with pytest.raises(ValueError, match="layouts differ"):
        PoolMove(Pool(SMALL, DIRECT, 1), slots(0), Pool(LAYOUTS["mha-f8"], DIRECT, 1), slots(0))


def test_a_move_keeps_its_own_slots() -> None:
    here, there = slots(0, 1), slots(1, 0)
    move = PoolMove(Pool(SMALL, DIRECT, 2), here, Pool(SMALL, DIRECT, 2), there)
    here[:], there[:] = 9, 9
    assert (move.source_slots.tolist(), move.target_slots.tolist()) == ([0, 1], [1, 0])


def test_many_transfers_on_many_threads_all_arrive(start: Callable[..., CpuEngine]) -> None:
    rng = np.random.default_rng(11)
    source, target = pool_of(SMALL, LAYER_FIRST, 200, seed=1), pool_of(SMALL, PAGE_FIRST, 200, seed=2)
    s, t = rng.permutation(200), rng.permutation(200)
    engine = start(threads=4, capacity=20)
    results: list[Transferred] = []
    end = monotonic() + LONG_S
    for op in range(100):
        part = slice(2 * op, 2 * op + 2)
        while not engine.submit(Transfer(op, (PoolMove(source, s[part], target, t[part]),))):
            assert monotonic() < end
            results += engine.poll()
    results += finish(engine)
    assert sorted(results, key=lambda result: result.op) == [Transferred(op) for op in range(100)]
    assert np.array_equal(pages_of(target)[t], pages_of(source)[s])
