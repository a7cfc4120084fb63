"""Pools: every order holds the same values at the place its name promises, and gives pages as bytes."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
import torch

from tiertree.config import KVLayout, Layout, MemoryOrder, SidecarConfig, StateLayout
from tiertree.pools.group import KindPools, PoolGroup
from tiertree.pools.paged import Pool
from tiertree.types import FULL, ConfigError, InvalidSlots, Kind

LAYER_FIRST, PAGE_FIRST, DIRECT = MemoryOrder
LAYOUTS: dict[str, Layout] = {
    "mha": KVLayout(layers=3, kv_heads=2, head_size=4, dtype="bfloat16", page_size=4),
    "mla": KVLayout(layers=2, kv_heads=1, head_size=5, dtype="float32", attention="mla", page_size=3),
    "compressed": KVLayout(layers=2, kv_heads=1, head_size=8, dtype="int8", page_size=8, tokens_per_entry=4),
    "odd-bytes": KVLayout(layers=2, kv_heads=1, head_size=3, dtype="float8_e4m3fn", page_size=2),
    "state": StateLayout(layers=3, elements=7, dtype="float32"),
}
PAGES = 5


def filled(layout: Layout, order: MemoryOrder, seed: int = 0, pages: int = PAGES) -> Pool:
    """A pool of random bytes, NaN patterns included, the same logical bytes for every order."""
    pool = Pool(layout, order, pages)
    shape = (*pool.logical.shape[:4], layout.kv_heads, layout.head_size * layout.itemsize)
    values = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
    pool.logical.copy_(values.view(pool.tensor.dtype))
    return pool


def raw(pool: Pool) -> np.ndarray:
    """All bytes of the pool in memory order."""
    return pool.tensor.view(torch.uint8).numpy().reshape(-1)


def pages_of(pool: Pool) -> np.ndarray:
    """The logical bytes of all pages, [page, …], copied."""
    return pool.logical.contiguous().view(torch.uint8).cpu().numpy().copy()


def offset(order: MemoryOrder, layout: Layout, page: int, layer: int, plane: int, entry: int) -> int:
    """Byte offset of an item, written out from the definition of each order."""
    layers, planes, entries = layout.layers, layout.planes, layout.entries
    item = {
        LAYER_FIRST: ((layer * planes + plane) * PAGES + page) * entries + entry,
        PAGE_FIRST: ((page * entries + entry) * layers + layer) * planes + plane,
        DIRECT: ((page * layers + layer) * planes + plane) * entries + entry,
    }[order]
    return item * layout.kv_heads * layout.head_size * layout.itemsize


@pytest.mark.parametrize("order", MemoryOrder)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_item_lies_where_its_order_says(layout: Layout, order: MemoryOrder) -> None:
    pool = filled(layout, order)
    memory = raw(pool)
    assert memory.size == pool.nbytes == PAGES * layout.page_bytes
    for place in itertools.product(
        range(PAGES), range(layout.layers), range(layout.planes), range(layout.entries)
    ):
        item = pool.logical[place].contiguous().view(torch.uint8).numpy().reshape(-1)
        start = offset(order, layout, *place)
        assert np.array_equal(memory[start : start + item.size], item), place


@pytest.mark.parametrize("order", MemoryOrder)
def test_a_layer_is_a_view_of_the_pool(order: MemoryOrder) -> None:
    layout = LAYOUTS["mha"]
    pool = filled(layout, order)
    layer = pool.layer(1)
    assert layer.shape == (PAGES, layout.planes, layout.entries, layout.kv_heads, layout.head_size)
    layer[2, 1, 3] = 7.0
    assert (pool.logical[2, 1, 1, 3] == 7.0).all()
    assert layer[:, 0].is_contiguous() == (order is LAYER_FIRST)


@pytest.mark.parametrize("order", MemoryOrder)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_pages_round_trip_as_bytes(layout: Layout, order: MemoryOrder) -> None:
    source, target = filled(layout, order, seed=1), filled(layout, order, seed=2)
    before = target.logical.clone().view(torch.uint8)
    slots = np.array([3, 0, 4], np.int64)
    out = np.zeros((3, layout.page_bytes), np.uint8)
    source.read_pages(slots, out)
    out.flags.writeable = False
    target.write_pages(slots[::-1].copy(), out)
    for read, written in zip(slots, slots[::-1], strict=True):
        assert torch.equal(source.logical[read].view(torch.uint8), target.logical[written].view(torch.uint8))
    for untouched in (1, 2):
        assert torch.equal(target.logical[untouched].view(torch.uint8), before[untouched])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_page_outside_its_pool_is_page_first_direct_unless_page_first(layout: Layout) -> None:
    slots = np.array([4, 1], np.int64)
    pages = {}
    for order in MemoryOrder:
        pages[order] = np.zeros((2, layout.page_bytes), np.uint8)
        filled(layout, order).read_pages(slots, pages[order])
    direct = raw(filled(layout, DIRECT)).reshape(PAGES, -1)[slots]
    by_entry = raw(filled(layout, PAGE_FIRST)).reshape(PAGES, -1)[slots]
    assert np.array_equal(pages[LAYER_FIRST], direct)
    assert np.array_equal(pages[DIRECT], direct)
    assert np.array_equal(pages[PAGE_FIRST], by_entry)
    assert np.array_equal(direct, by_entry) == isinstance(layout, StateLayout)


@pytest.mark.parametrize("order", [PAGE_FIRST, DIRECT])
def test_a_page_buffer_is_the_page_itself(order: MemoryOrder) -> None:
    pool = filled(LAYOUTS["mha"], order)
    buffer = pool.page_buffer(2)
    assert buffer is not None
    assert (buffer.format, buffer.nbytes, buffer.readonly) == ("B", pool.page_bytes, False)
    before = raw(pool).copy()
    assert bytes(buffer) == before.reshape(PAGES, -1)[2].tobytes()
    buffer[:] = bytes(len(buffer))
    assert not pool.tensor[2].view(torch.uint8).any()
    assert np.array_equal(
        np.delete(raw(pool).reshape(PAGES, -1), 2, 0), np.delete(before.reshape(PAGES, -1), 2, 0)
    )


def test_a_layer_first_page_has_no_buffer() -> None:
    assert Pool(LAYOUTS["mha"], LAYER_FIRST, PAGES).page_buffer(0) is None


@pytest.mark.parametrize(
    "slots",
    [np.array([-1]), np.array([PAGES]), np.array([[0]]), np.array([0], np.int32), np.array([0.0])],
    ids=["negative", "too-large", "2-D", "int32", "float"],
)
def test_slots_that_are_none_are_refused(slots: np.ndarray) -> None:
    pool = filled(LAYOUTS["mha"], DIRECT)
    before = raw(pool).copy()
    pages = np.zeros((1, pool.page_bytes), np.uint8)
    with pytest.raises(InvalidSlots):
        pool.write_pages(slots, pages)
    with pytest.raises(InvalidSlots):
        pool.read_pages(slots, pages)
    assert np.array_equal(raw(pool), before)


def test_a_page_buffer_of_no_slot_is_refused() -> None:
    with pytest.raises(InvalidSlots):
        Pool(LAYOUTS["mha"], DIRECT, PAGES).page_buffer(-1)


@pytest.mark.parametrize("change", ["rows", "bytes", "dtype", "strides"])
def test_page_arrays_of_the_wrong_form_are_refused(change: str) -> None:
    pool = filled(LAYOUTS["mha"], DIRECT)
    size = pool.page_bytes
    data = {
        "rows": np.zeros((2, size), np.uint8),
        "bytes": np.zeros((1, size - 1), np.uint8),
        "dtype": np.zeros((1, size), np.int8),
        "strides": np.zeros((1, 2 * size), np.uint8)[:, ::2],
    }[change]
    with pytest.raises(ValueError, match="C-contiguous uint8"):
        pool.read_pages(np.array([0]), data)


def test_a_group_gives_every_sidecar_the_slots_of_its_kind() -> None:
    other = Kind("other")
    draft = SidecarConfig(name="draft", layout=LAYOUTS["mla"])
    conv = SidecarConfig(name="conv", kind=other, layout=StateLayout(layers=1, elements=5, dtype="float16"))
    group = PoolGroup.build(
        {FULL: LAYOUTS["mha"], other: LAYOUTS["state"]},
        [draft, conv],
        order=PAGE_FIRST,
        pages={FULL: PAGES, other: 2},
    )
    assert group.kinds == (FULL, other)
    assert [pool.layout for pool in group[FULL]] == [LAYOUTS["mha"], LAYOUTS["mla"]]
    assert [pool.layout for pool in group[other]] == [LAYOUTS["state"], conv.layout]
    assert [[pool.pages for pool in group[kind]] for kind in group.kinds] == [[PAGES, PAGES], [2, 2]]
    bytes_of = {name: layout.page_bytes for name, layout in LAYOUTS.items()}
    assert group.nbytes == PAGES * (bytes_of["mha"] + bytes_of["mla"]) + 2 * (bytes_of["state"] + 10)
    assert list(group[other].sidecars) == ["conv"]
    assert other in group
    assert Kind("none") not in group


def test_pairs_are_the_same_pools_of_two_tiers() -> None:
    draft = SidecarConfig(name="draft", layout=LAYOUTS["mla"])
    layouts = {FULL: LAYOUTS["mha"]}
    device = PoolGroup.build(layouts, [draft], order=LAYER_FIRST, pages={FULL: 2})
    host = PoolGroup.build(layouts, [draft], order=DIRECT, pages={FULL: 4}, pinned=True)
    expected = [
        (device[FULL].main, host[FULL].main),
        (device[FULL].sidecars["draft"], host[FULL].sidecars["draft"]),
    ]
    assert device.pairs(FULL, host) == expected
    with pytest.raises(ConfigError, match="draft"):
        device.pairs(FULL, PoolGroup.build(layouts, order=DIRECT, pages={FULL: 4}))


def test_a_sidecar_without_its_kind_or_of_another_size_is_refused() -> None:
    other = Kind("other")
    draft = SidecarConfig(name="draft", layout=LAYOUTS["mla"])
    with pytest.raises(ConfigError, match=r"sidecars\.draft"):
        PoolGroup.build({other: LAYOUTS["mha"]}, [draft], order=DIRECT, pages={other: 2})
    with pytest.raises(ConfigError, match=r"sidecars\.draft"):
        KindPools(Pool(LAYOUTS["mha"], DIRECT, 2), {"draft": Pool(LAYOUTS["mla"], DIRECT, 3)})


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("order", MemoryOrder)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_clone_is_the_page_and_touches_nothing_else(name: str, order: MemoryOrder, device: str) -> None:
    pool = Pool(LAYOUTS[name], order, PAGES, device)
    pool.tensor.copy_(filled(LAYOUTS[name], order).tensor)
    expected = pages_of(pool)
    expected[[4, 1]] = expected[[2, 0]]
    pool.clone(np.array([2, 0]), np.array([4, 1]))
    assert np.array_equal(pages_of(pool), expected)
    pool.clone(np.array([], np.int64), np.array([], np.int64))
    assert np.array_equal(pages_of(pool), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_a_clone_takes_sidecars_along_and_leaves_other_kinds_alone(device: str) -> None:
    other = Kind("other")
    group = PoolGroup.build(
        {FULL: LAYOUTS["mha"], other: LAYOUTS["state"]},
        [SidecarConfig(name="conv", kind=other, layout=LAYOUTS["odd-bytes"])],
        order=LAYER_FIRST,
        pages={FULL: PAGES, other: PAGES},
        device=device,
    )
    for seed, pool in enumerate([*group[FULL], *group[other]]):
        pool.tensor.copy_(filled(pool.layout, pool.order, seed).tensor)
    before = [pages_of(pool) for kind in group.kinds for pool in group[kind]]
    group.clone(other, np.array([1]), np.array([3]))
    for each in before[1:]:
        each[3] = each[1]
    after = [pages_of(pool) for kind in group.kinds for pool in group[kind]]
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("source", "target"), [([0], [PAGES]), ([-1], [0]), ([0, 1], [2])], ids=["target", "source", "number"]
)
def test_a_clone_of_no_slots_is_refused(source: list[int], target: list[int]) -> None:
    pool = filled(LAYOUTS["mha"], DIRECT)
    before = raw(pool).copy()
    with pytest.raises(InvalidSlots):
        pool.clone(np.array(source), np.array(target))
    assert np.array_equal(raw(pool), before)


class FakeRuntime:
    """The two calls of the CUDA runtime that pinning makes."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        if self.status == 0:
            self.registered[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> int:
        del self.registered[address]
        return 0


def test_a_pinned_pool_registers_its_exact_bytes_until_its_last_view_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = FakeRuntime(status=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    pool = Pool(LAYOUTS["mha"], DIRECT, PAGES, pinned=True)
    assert pool.pinned
    assert runtime.registered == {pool.tensor.data_ptr(): pool.nbytes}
    assert math.prod(pool.tensor.shape) * pool.tensor.element_size() == pool.nbytes
    view = pool.layer(0)
    del pool
    gc.collect()
    view.zero_()
    assert len(runtime.registered) == 1
    del view
    gc.collect()
    assert not runtime.registered


def test_memory_that_cannot_be_pinned_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeRuntime(status=2))
    with pytest.raises(RuntimeError, match="pinning"):
        Pool(LAYOUTS["mha"], DIRECT, PAGES, pinned=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without CUDA")
def test_without_cuda_nothing_is_pinned() -> None:
    assert not Pool(LAYOUTS["mha"], DIRECT, PAGES, pinned=True).pinned
