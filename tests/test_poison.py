"""Debug poison: a write to a page that nobody owns raises, and a read of one shows."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from rig import Rig, pool_sizes

from tiertree import (
    FULL,
    CacheConfig,
    ConfigError,
    DeviceConfig,
    HostConfig,
    InvariantViolated,
    KindConfig,
    KVLayout,
    Mamba,
    MemoryOrder,
    PrefixCache,
    SidecarConfig,
    SlidingWindow,
    StateLayout,
    Tier,
)
from tiertree.poison import VARIABLE, Poison, wanted
from tiertree.pools.paged import POISON, Pool
from tiertree.testing import faults
from tiertree.tree.actions import Copy
from tiertree.tree.ledger import Ledger, Owner
from tiertree.types import MAMBA, SWA, Kind, Slots

PAGE = 4
LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=4, page_size=PAGE)
DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"]
STRAY = "somebody has written to a page that nobody owns"


def config(order: MemoryOrder = MemoryOrder.LAYER_FIRST, **changes: Any) -> CacheConfig:
    """Three kinds and two sidecars on both tiers, poisoned."""
    fields: dict[str, Any] = {
        "page_size": PAGE,
        "layout": LAYOUT,
        "device": DeviceConfig(size=6, order=order),
        "host": HostConfig(size=7),
        "kinds": (
            KindConfig(rules=SlidingWindow(window=8), device=4, host=5, layout=LAYOUT),
            KindConfig(rules=Mamba(), device=3, host=4, layout=StateLayout(layers=3, elements=5)),
        ),
        "sidecars": (
            SidecarConfig(name="draft", layout=LAYOUT),
            SidecarConfig(name="conv", layout=StateLayout(layers=3, elements=2), kind=MAMBA),
        ),
        "debug_poison": True,
        **changes,
    }
    return CacheConfig(**fields)


@pytest.fixture(params=MemoryOrder)
def cache(request: pytest.FixtureRequest) -> Iterator[PrefixCache]:
    """An open cache with poison on real pools. Whether it closes well is the test's business."""
    cache = PrefixCache(config(request.param)).open()
    yield cache
    cache._poison = None
    cache.close()


def pool_of(cache: PrefixCache, tier: Tier, kind: Kind, name: str) -> Pool:
    """A pool by its name in messages."""
    pools = cache.device_pools if tier == Tier.DEVICE else cache.host_pools
    assert pools is not None
    return pools[kind].main if name == "main" else pools[kind].sidecars[name]


def stray_write(pool: Pool, slot: int, offset: int) -> None:
    """Change one bit of one byte, at `offset` of the page as it is outside its pool."""
    page, slots = np.empty((1, pool.page_bytes), np.uint8), np.array([slot])
    pool.read_pages(slots, page)
    page[0, offset] ^= 0x10
    pool.write_pages(slots, page)


@pytest.mark.parametrize(
    ("tier", "kind", "name"),
    [
        (Tier.DEVICE, FULL, "main"),
        (Tier.DEVICE, FULL, "draft"),
        (Tier.HOST, FULL, "draft"),
        (Tier.HOST, SWA, "main"),
        (Tier.DEVICE, MAMBA, "conv"),
        (Tier.HOST, MAMBA, "conv"),
    ],
)
def test_a_stray_write_raises_and_says_where(cache: PrefixCache, tier: Tier, kind: Kind, name: str) -> None:
    cache.check()
    pool = pool_of(cache, tier, kind, name)
    last = pool.page_bytes - 1
    for slot, offset in [(0, 0), (1, last), (2, last // 2)]:
        stray_write(pool, slot, offset)
        with pytest.raises(InvariantViolated) as caught:
            cache.check()
        where = f"slot {slot}, pool {name!r}, byte {offset} is 0xef, not 0xff"
        assert str(caught.value) == f"{kind} on {tier.name}: {STRAY}: {where}"
        stray_write(pool, slot, offset)
        cache.check()


def test_a_page_that_was_written_to_is_not_given_out_and_nothing_has_changed(cache: PrefixCache) -> None:
    taken = cache.allocate(2)
    before = cache.stats()
    pool = pool_of(cache, Tier.DEVICE, FULL, "draft")
    assert isinstance(taken, np.ndarray)
    stray_write(pool, int(taken[0]), 3)  # its owner may
    stray_write(pool, 5, 3)
    with pytest.raises(InvariantViolated, match=f"{STRAY}: slot 5, pool 'draft', byte 3"):
        cache.allocate(4)
    assert cache.stats() == before
    assert len(cache.allocate(3)) == 3  # type: ignore[arg-type]
    stray_write(pool, 5, 3)
    assert len(cache.allocate(1)) == 1  # type: ignore[arg-type]


def test_a_write_after_the_slots_were_given_back_shows_at_the_latest_when_the_cache_closes() -> None:
    cache = PrefixCache(config()).open()
    slots = cache.allocate(1)
    assert isinstance(slots, np.ndarray)
    pool = pool_of(cache, Tier.DEVICE, FULL, "main")
    pool.logical[slots] = 1.0
    cache.free(slots)
    pool.logical[slots] = 1.0  # the engine has kept them
    with pytest.raises(InvariantViolated, match=f"full on DEVICE: {STRAY}: slot {slots[0]}, pool 'main'"):
        cache.close()
    assert cache.device_pools is None
    assert cache.close() == ()
    assert all(ledger.observer is None for ledger in cache._core.radix.ledgers)


def test_a_read_after_free_shows() -> None:
    """What was freed is NaN, and so is everything that attends to one entry of it."""
    with PrefixCache(config(layout=LAYOUT)) as cache:
        slots = cache.allocate(3)
        assert isinstance(slots, np.ndarray)
        keys = pool_of(cache, Tier.DEVICE, FULL, "main").logical
        assert keys[slots].isnan().all(), "a page that nobody has written to yet"
        keys[slots] = 1.0
        cache.free(slots[1:2])
        assert keys[slots[1]].isnan().all()
        assert not keys[slots[[0, 2]]].isnan().any()
        scores = keys[slots, 0, 0, :, 0].flatten(0, 1) @ torch.ones(4, dtype=keys.dtype)
        assert torch.softmax(scores, 0).isnan().all()


@pytest.mark.parametrize("order", MemoryOrder)
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_is_not_a_number_or_as_good_as_none(dtype: str, order: MemoryOrder) -> None:
    layout = KVLayout(layers=2, kv_heads=1, head_size=3, dtype=dtype, page_size=2)
    pool = Pool(layout, order, 5)
    pool.logical.view(torch.uint8).fill_(1)
    slots = np.array([4, 0, 2])
    pool.poison(slots)
    assert pool.stain(slots) is None
    assert pool.stain(np.array([0, 3])) == (3, 0, 1)
    values = pool.logical[slots].to(torch.float32)
    assert values.isnan().all() if "float" in dtype else (values == (-1 if dtype == "int8" else 255)).all()
    assert (pool.logical[[1, 3]].view(torch.uint8) == 1).all(), "a page beside them was touched"
    assert pool.stain(np.empty(0, np.int64)) is None


def test_a_stain_is_found_in_pages_of_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiertree.pools.paged._POISON_BYTES", 3 * LAYOUT.page_bytes)
    pool = Pool(LAYOUT, MemoryOrder.PAGE_FIRST, 20)
    pool.poison(np.arange(20))
    for slot in range(20):
        stray_write(pool, slot, slot)
        assert pool.stain(np.arange(20)) == (slot, slot, POISON ^ 0x10)
        pool.poison(np.array([slot]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: poison is not tested there")
def test_poison_on_a_device() -> None:
    with PrefixCache(config(device=DeviceConfig(size=6, torch_device="cuda"))) as cache:
        cache.check()
        pool = pool_of(cache, Tier.DEVICE, FULL, "draft")
        pool.logical[3, 1] = 2.0
        with pytest.raises(InvariantViolated, match="slot 3, pool 'draft'"):
            cache.check()
        pool.poison(np.array([3]))


# Transfers. They cannot write to a free page while the ledger is right, so it is made wrong.


def let_go(ledger: Ledger, slots: Slots) -> None:
    """Free slots that a transfer has pinned, as a broken ledger would."""
    pins = ledger.pins[slots].copy()
    ledger.pins[slots] = 0
    ledger.drop(slots)
    ledger.pins[slots] = pins


@pytest.mark.parametrize("write", ["complete", "submit"])
def test_a_late_transfer_into_a_freed_page_raises(write: str) -> None:
    rig = Rig(device=4, host=4, debug_poison=True)
    rig.put([1, 2])
    (op,) = rig.running(Copy)
    action = rig.executor.pending[op]
    assert isinstance(action, Copy)
    target = action.moves[0].target
    let_go(rig.ledger(Tier.HOST), target)
    if write == "complete":
        rig.executor.complete(op)
        expected = f"full on HOST: {STRAY}: slot {target[-1]}, pool 'main', holds \\('full'"
    else:
        rig.executor.submit(action)
        expected = f"slot {target[-1]}, pool 'main', holds 'junk'"
    with pytest.raises(InvariantViolated, match=expected):
        rig.ledger(Tier.HOST).take(4, Owner.OPERATION)
    rig.cache._poison = None


def test_a_late_transfer_of_real_bytes_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = PrefixCache(config(kinds=(), sidecars=())).open()
    submitted: list[Any] = []
    monkeypatch.setattr(cache._driver.executor, "submit", submitted.append)  # type: ignore[union-attr]
    slots = cache.allocate(2)
    assert isinstance(slots, np.ndarray)
    pool_of(cache, Tier.DEVICE, FULL, "main").logical[slots] = 1.0
    cache.insert(cache.key(range(2 * PAGE)), slots)
    (copy,) = submitted
    let_go(cache._core.ledger(FULL, Tier.HOST), copy.moves[0].target)
    monkeypatch.undo()
    executor = cache._driver.executor  # type: ignore[union-attr]
    executor.submit(copy)
    while not executor.poll():
        executor.wait(1.0)
    with pytest.raises(InvariantViolated, match=f"full on HOST: {STRAY}: slot 0, pool 'main', byte 0 is "):
        cache._poison.check()  # type: ignore[union-attr]
    cache._poison = None
    cache.close(deadline_s=0)


def test_a_page_that_is_read_after_it_was_freed_has_the_wrong_content() -> None:
    rig = Rig(device=4, host=0, debug_poison=True)
    rig.put([1, 2])
    lease = rig.lease([1, 2])
    kept = lease.slots.copy()
    lease.release()
    rig.evict(4)
    contents = rig.executor.contents[Tier.DEVICE]
    assert [contents[slot] for slot in kept] == [faults.POISON] * 2
    rig.cache.check()


# The switch.


class Heard:
    """An `Observer` that writes down what it hears."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int]]] = []

    def freed(self, slots: Slots) -> None:
        self.calls.append(("freed", slots.tolist()))

    def taken(self, slots: Slots) -> None:
        self.calls.append(("taken", slots.tolist()))


def test_a_ledger_tells_of_every_slot_that_becomes_free_or_is_taken() -> None:
    ledger = Ledger(4)
    ledger.observer = heard = Heard()
    slots = ledger.take(3, Owner.REQUEST)
    assert slots is not None
    assert ledger.take(2, Owner.REQUEST) is None
    ledger.pin(slots[:1])
    assert ledger.drop(slots) == 2
    ledger.unpin(slots[:1])
    first = slots.tolist()
    assert heard.calls == [("taken", first), ("freed", first[1:]), ("freed", first[:1])]
    assert sorted(ledger.free_slots()) == [0, 1, 2, 3]


def test_an_observer_that_raises_keeps_the_slots_free() -> None:
    def no(slots: Slots) -> None:
        raise InvariantViolated("no")

    ledger, heard = Ledger(4), Heard()
    heard.taken = no  # type: ignore[method-assign]
    ledger.observer = heard
    with pytest.raises(InvariantViolated):
        ledger.take(1, Owner.REQUEST)
    assert (ledger.free, ledger.book.any(), ledger.tags.any()) == (4, False, False)


@pytest.mark.parametrize(
    ("chosen", "variable", "expected"),
    [
        (None, None, False),
        (None, "1", True),
        (None, "0", False),
        (None, "", False),
        (False, "1", False),
        (True, None, True),
        (True, "0", True),
    ],
)
def test_the_configuration_says_it_or_else_the_environment(
    chosen: bool | None, variable: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, variable)
    chosen_config = config(debug_poison=chosen)
    assert wanted(chosen_config) == expected
    with PrefixCache(chosen_config) as cache:
        observers = [ledger.observer for kind in (FULL, SWA) for ledger in _ledgers(cache, kind)]
        assert all((each is not None) == expected for each in observers)


def _ledgers(cache: PrefixCache, kind: Kind) -> tuple[Ledger, Ledger]:
    return cache._core.ledger(kind, Tier.DEVICE), cache._core.ledger(kind, Tier.HOST)


@pytest.mark.parametrize("value", [1, "1", "yes"])
def test_the_switch_is_a_bool(value: Any) -> None:
    with pytest.raises(ConfigError, match="debug_poison"):
        config(debug_poison=value)


def test_pools_without_bytes_have_no_observer() -> None:
    with PrefixCache(CacheConfig(device=DeviceConfig(size=8), debug_poison=True)) as cache:
        assert [ledger.observer for ledger in cache._core.radix.ledgers] == [None, None]
        cache.check()


def test_it_is_on_in_all_tests() -> None:
    if os.environ[VARIABLE] != "1":
        pytest.skip(f"{VARIABLE} is set from outside")
    rig = Rig(device=3, host=2, kinds=[SlidingWindow(window=2)])
    assert isinstance(rig.cache._poison, Poison)
    for kind, sizes in {FULL: (3, 2), **pool_sizes(rig.options["kinds"])}.items():
        assert [len(rig.executor.of(kind)[tier]) for tier in (Tier.DEVICE, Tier.HOST)] == list(sizes)
        assert all(set(rig.executor.of(kind)[tier]) == {faults.POISON} for tier in (Tier.DEVICE, Tier.HOST))


@pytest.mark.parametrize("seed", range(3))
def test_any_single_stray_write_is_found(seed: int) -> None:
    """In the middle of some work, whichever free page it hits."""
    rng = np.random.default_rng(seed)
    rig = Rig(device=12, host=12, kinds=[SlidingWindow(window=2)], debug_poison=True)
    for _ in range(30):
        rig.put(rng.integers(0, 3, int(rng.integers(1, 5))).tolist())
        rig.settle()
        rig.evict(int(rng.integers(0, 4)))
        rig.cache.check()
        for kind in (FULL, SWA):
            for tier in (Tier.DEVICE, Tier.HOST):
                free = rig.ledger(tier, kind).free_slots()
                if not free:
                    continue
                contents, slot = rig.executor.of(kind)[tier], free[int(rng.integers(len(free)))]
                contents[slot] = "stray"
                with pytest.raises(InvariantViolated, match=f"{kind} on {tier.name}.*slot {slot}"):
                    rig.cache.check()
                contents[slot] = faults.POISON
