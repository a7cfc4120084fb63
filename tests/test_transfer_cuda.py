"""Transfers on a CUDA device. Without one every test here skips, and says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tiertree.config import KVLayout, Layout, MemoryOrder, StateLayout
from tiertree.pools.paged import Pool
from tiertree.transfer import cuda
from tiertree.transfer.cuda import CudaEngine
from tiertree.transfer.op import PoolMove, Transfer, Transferred
from tiertree.types import CacheClosed

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the CUDA engine is not tested"
)

LAYER_FIRST, PAGE_FIRST, DIRECT = MemoryOrder
LONG_S = 30.0
LAYOUTS: dict[str, Layout] = {
    "mha-bf16": KVLayout(layers=3, kv_heads=2, head_size=4, dtype="bfloat16", page_size=4),
    "mla-f8-odd": KVLayout(
        layers=2, kv_heads=1, head_size=3, dtype="float8_e5m2", attention="mla", page_size=2
    ),
    "compressed": KVLayout(layers=2, kv_heads=2, head_size=8, dtype="int8", page_size=8, tokens_per_entry=4),
    "large-pages": KVLayout(layers=4, kv_heads=8, head_size=128, dtype="bfloat16", page_size=32),
    "state": StateLayout(layers=3, elements=9, dtype="float32"),
}
SMALL = LAYOUTS["mha-bf16"]


def pool_of(layout: Layout, order: MemoryOrder, pages: int, seed: int, device: str = "cpu") -> Pool:
    """A pool of random bytes, pinned if on the host."""
    pool = Pool(layout, order, pages, device, pinned=True)
    values = np.random.default_rng(seed).integers(0, 256, pool.nbytes, np.uint8)
    pool.tensor.view(torch.uint8).reshape(-1).copy_(torch.from_numpy(values))
    torch.cuda.synchronize()
    return pool


def pages_of(pool: Pool) -> np.ndarray:
    """The logical bytes of all pages, [page, …]."""
    return pool.logical.contiguous().view(torch.uint8).cpu().numpy()


@pytest.fixture
def start() -> Iterator[Callable[..., CudaEngine]]:
    """Starts engines, and closes them afterwards."""
    engines: list[CudaEngine] = []

    def start(notify: Callable[[], None] = lambda: None, **options: int) -> CudaEngine:
        engines.append(CudaEngine("cuda", notify, **options))
        return engines[-1]

    yield start
    for engine in engines:
        engine.close(LONG_S)


def finish(engine: CudaEngine) -> list[Transferred]:
    assert engine.drain(LONG_S) == ()
    return engine.poll()


@pytest.mark.parametrize("dma_bytes", [1, 1 << 40], ids=["dma", "kernels"])
@pytest.mark.parametrize("host_order", MemoryOrder)
@pytest.mark.parametrize("device_order", MemoryOrder)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_come_back_bit_equal_through_any_two_orders(
    layout: Layout,
    device_order: MemoryOrder,
    host_order: MemoryOrder,
    dma_bytes: int,
    start: Callable[..., CudaEngine],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "DMA_BYTES", dma_bytes)
    rng = np.random.default_rng(7)
    device, host = pool_of(layout, device_order, 9, 1, "cuda"), pool_of(layout, host_order, 11, 2)
    before, host_before = pages_of(device), pages_of(host)
    out, there, back = rng.permutation(9)[:6], rng.permutation(11)[:6], rng.permutation(9)[:6]
    engine = start()
    engine.submit(Transfer(1, (PoolMove(device, out, host, there),)))
    assert finish(engine) == [Transferred(1)]
    host_before[there] = before[out]
    assert np.array_equal(pages_of(host), host_before)
    engine.submit(Transfer(2, (PoolMove(host, there, device, back),)))
    assert finish(engine) == [Transferred(2)]
    expected = before.copy()
    expected[back] = before[out]
    assert np.array_equal(pages_of(device), expected)


def test_a_copy_waits_for_what_the_caller_had_queued(start: Callable[..., CudaEngine]) -> None:
    device, host = pool_of(SMALL, LAYER_FIRST, 4, 1, "cuda"), pool_of(SMALL, PAGE_FIRST, 4, 2)
    torch.cuda._sleep(20_000_000)
    device.logical.fill_(3.0)
    engine = start()
    engine.submit(Transfer(1, (PoolMove(device, np.arange(4), host, np.arange(4)),)))
    assert finish(engine) == [Transferred(1)]
    assert (host.logical == 3.0).all()


def test_a_forward_pass_that_waits_per_layer_reads_what_was_loaded(start: Callable[..., CudaEngine]) -> None:
    layout = KVLayout(layers=8, kv_heads=8, head_size=128, page_size=64)
    device, host = pool_of(layout, LAYER_FIRST, 16, 1, "cuda"), pool_of(layout, DIRECT, 16, 2)
    engine = start()
    engine.submit(Transfer(1, (PoolMove(host, np.arange(16), device, np.arange(16)[::-1].copy()),)))
    seen = []
    for layer in range(layout.layers):
        engine.wait_layer(1, layer)
        seen.append(device.layer(layer).view(torch.uint8).clone())
    loaded = torch.stack(seen, 1).cpu().numpy()
    assert np.array_equal(loaded[::-1], pages_of(host))
    assert finish(engine) == [Transferred(1)]


def test_layers_done_ends_at_all_layers_and_an_unknown_op_has_none(start: Callable[..., CudaEngine]) -> None:
    device, host = pool_of(SMALL, LAYER_FIRST, 4, 1, "cuda"), pool_of(SMALL, DIRECT, 4, 2)
    engine = start()
    engine.submit(Transfer(1, (PoolMove(host, np.arange(4), device, np.arange(4)),)))
    assert 0 <= engine.layers_done(1) <= SMALL.layers
    assert engine.drain(LONG_S) == ()
    assert engine.layers_done(1) == SMALL.layers
    assert engine.poll() == [Transferred(1)]
    assert engine.layers_done(1) == 0


def test_notify_comes_without_a_poll_and_the_queue_is_bounded(start: Callable[..., CudaEngine]) -> None:
    notified = threading.Semaphore(0)
    device, host = pool_of(SMALL, LAYER_FIRST, 4, 1, "cuda"), pool_of(SMALL, DIRECT, 4, 2)
    moves = (PoolMove(host, np.arange(4), device, np.arange(4)),)
    engine = start(notified.release, capacity=1)
    assert engine.submit(Transfer(1, moves))
    assert not engine.submit(Transfer(2, moves))
    assert notified.acquire(timeout=LONG_S)
    assert engine.poll() == [Transferred(1)]
    assert engine.submit(Transfer(2, moves))
    with pytest.raises(ValueError, match="op 2"):
        engine.submit(Transfer(2, moves))
    assert engine.close(LONG_S) == ()
    assert engine.poll() == [Transferred(2)]
    assert not engine._watcher.is_alive()
    with pytest.raises(CacheClosed):
        engine.submit(Transfer(3, moves))


def test_a_drain_keeps_its_deadline(start: Callable[..., CudaEngine]) -> None:
    device, host = pool_of(SMALL, LAYER_FIRST, 4, 1, "cuda"), pool_of(SMALL, DIRECT, 4, 2)
    engine = start()
    torch.cuda._sleep(2_000_000_000)
    engine.submit(Transfer(1, (PoolMove(device, np.arange(4), host, np.arange(4)),)))
    engine.cancel(1)
    assert engine.drain(0.0) == (1,)
    assert finish(engine) == [Transferred(1)]


def test_a_host_pool_that_is_not_pinned_is_refused(start: Callable[..., CudaEngine]) -> None:
    device, host = pool_of(SMALL, LAYER_FIRST, 1, 1, "cuda"), Pool(SMALL, DIRECT, 1)
    slots = np.zeros(1, np.int64)
    engine = start()
    with pytest.raises(ValueError, match="nor pinned"):
        engine.submit(Transfer(1, (PoolMove(device, slots, host, slots),)))


def test_moves_in_both_directions_are_refused(start: Callable[..., CudaEngine]) -> None:
    device, host = pool_of(SMALL, LAYER_FIRST, 2, 1, "cuda"), pool_of(SMALL, DIRECT, 2, 2)
    zero, one = np.zeros(1, np.int64), np.ones(1, np.int64)
    engine = start()
    with pytest.raises(ValueError, match="both directions"):
        engine.submit(Transfer(1, (PoolMove(device, zero, host, zero), PoolMove(host, one, device, one))))


def test_a_pool_on_the_device_gives_and_takes_pages() -> None:
    pool, slots = pool_of(SMALL, LAYER_FIRST, 4, 1, "cuda"), np.array([2, 0], np.int64)
    pages = np.zeros((2, pool.page_bytes), np.uint8)
    pool.read_pages(slots, pages)
    assert np.array_equal(pages, pages_of(pool)[slots].reshape(2, -1))
    pool.write_pages(slots[::-1].copy(), pages)
    assert np.array_equal(pages_of(pool)[slots[::-1]].reshape(2, -1), pages)
    assert pool.page_buffer(0) is None
