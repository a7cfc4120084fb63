"""From a configuration with several kinds to pools and an executor that copies the bytes of each."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tiertree.build import make_executor, make_pools
from tiertree.components import Mamba, SlidingWindow
from tiertree.config import (
    CacheConfig,
    DeviceConfig,
    HostConfig,
    KindConfig,
    KVLayout,
    MemoryOrder,
    SidecarConfig,
    StateLayout,
)
from tiertree.executor import Executor, MetadataExecutor
from tiertree.pools.group import PoolGroup
from tiertree.pools.paged import Pool
from tiertree.tree.actions import Copy, Move
from tiertree.types import FULL, MAMBA, SWA, Tier

PAGE = 4
LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=4, page_size=PAGE)
CONFIG = CacheConfig(
    page_size=PAGE,
    layout=LAYOUT,
    device=DeviceConfig(size=6),
    host=HostConfig(size=7),
    kinds=(
        KindConfig(rules=SlidingWindow(window=8), device=4, host=5, layout=LAYOUT),
        KindConfig(rules=Mamba(), device=3, host="1KiB", layout=StateLayout(layers=3, elements=20)),
    ),
    sidecars=(
        SidecarConfig(name="draft", layout=LAYOUT),
        SidecarConfig(name="conv", layout=StateLayout(layers=3, elements=2), kind=MAMBA),
    ),
)
WAIT_SECONDS = 30.0


def content(pool: Pool) -> np.ndarray:
    """The logical bytes of all pages, [page, …], copied."""
    return pool.logical.contiguous().view(torch.uint8).numpy().copy()


@pytest.fixture
def tiers() -> tuple[PoolGroup, PoolGroup]:
    """Both tiers of CONFIG, full of random bytes."""
    device, host = make_pools(CONFIG)
    assert device is not None
    assert host is not None
    rng = np.random.default_rng(5)
    for group in (device, host):
        for pool in (pool for kind in group.kinds for pool in group[kind]):
            values = rng.integers(0, 256, pool.nbytes, np.uint8)
            pool.tensor.view(torch.uint8).reshape(-1).copy_(torch.from_numpy(values))
    return device, host


@pytest.fixture
def executor(tiers: tuple[PoolGroup, PoolGroup]) -> Iterator[Executor]:
    """An executor of these tiers, closed afterwards."""
    executor = make_executor(CONFIG, *tiers)
    yield executor
    assert executor.close(WAIT_SECONDS) == ()


def test_every_kind_has_pools_of_its_own_size(tiers: tuple[PoolGroup, PoolGroup]) -> None:
    device, host = tiers
    assert device.kinds == host.kinds == (FULL, SWA, MAMBA)
    for group, tier in ((device, Tier.DEVICE), (host, Tier.HOST)):
        assert {kind: group[kind].main.pages for kind in group.kinds} == CONFIG.kind_pages(tier)
        assert [list(group[kind].sidecars) for kind in group.kinds] == [["draft"], [], ["conv"]]
    assert host[MAMBA].main.pages == 1024 // (240 + 24)
    assert {pool.order for kind in device.kinds for pool in device[kind]} == {MemoryOrder.LAYER_FIRST}


def test_without_a_layout_there_are_no_pools() -> None:
    kinds = (KindConfig(rules=Mamba(), device=3),)
    config = CacheConfig(device=DeviceConfig(size=6), kinds=kinds)
    assert make_pools(config) == (None, None)
    executor = make_executor(config, None, None)
    assert isinstance(executor, MetadataExecutor)
    executor.clone(MAMBA, np.array([0]), np.array([1]))
    assert executor.poll() == []


def test_a_clone_is_there_at_once_with_its_sidecar_and_in_no_other_kind(
    tiers: tuple[PoolGroup, PoolGroup], executor: Executor
) -> None:
    device = tiers[0]
    pools = [pool for group in tiers for kind in group.kinds for pool in group[kind]]
    expected = [content(pool) for pool in pools]
    executor.clone(MAMBA, np.array([2]), np.array([0]))
    for pool, pages in zip(pools, expected, strict=True):
        if pool in list(device[MAMBA]):
            pages[0] = pages[2]
        assert np.array_equal(content(pool), pages)
    assert executor.poll() == []


def test_one_copy_moves_pages_of_several_kinds(
    tiers: tuple[PoolGroup, PoolGroup], executor: Executor
) -> None:
    device, host = tiers
    slots = {FULL: ([5, 1], [0, 6]), SWA: ([3], [4]), MAMBA: ([1], [2])}
    moves = tuple(Move(kind, np.array(here), np.array(there)) for kind, (here, there) in slots.items())
    executor.submit(Copy(7, Tier.DEVICE, Tier.HOST, moves))
    executor.wait(WAIT_SECONDS)
    assert [(each.op, each.pages, each.error) for each in executor.poll()] == [(7, 4, None)]
    for kind, (here, there) in slots.items():
        for source, target in device.pairs(kind, host):
            assert np.array_equal(content(source)[here], content(target)[there])
