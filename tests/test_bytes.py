"""Real pools, real threads, a real directory: on every way through the tiers the bytes come back equal.

The bytes of a page are drawn from a generator seeded by its whole prefix, its namespace and the name of
its pool. A comparison looks at the logical page, so that it does not depend on the memory order.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from tiertree import (
    FULL,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    Inserted,
    KVLayout,
    Lease,
    LoadBack,
    LoadBackConfig,
    MemoryOrder,
    Prefetch,
    PrefetchConfig,
    PrefixCache,
    Refused,
    SidecarConfig,
    StopRule,
    StorageConfig,
    Tier,
    WritePolicy,
)
from tiertree.pools.paged import Pool
from tiertree.storage.disk import DiskStorage
from tiertree.storage.tamper import flip_byte
from tiertree.tree.node import slots_of

PAGE = 2
PROMPT = list(range(50, 50 + 5 * PAGE))
OTHER = [*PROMPT[: 2 * PAGE], *range(90, 90 + 3 * PAGE)]
LAYOUT = KVLayout(layers=2, kv_heads=2, head_size=3, dtype="bfloat16", page_size=PAGE)
DRAFT = SidecarConfig(
    name="draft",
    layout=KVLayout(layers=1, kv_heads=1, head_size=5, dtype="float32", attention="mla", page_size=PAGE),
)
WAIT_SECONDS = 60.0
ORDERS = list(itertools.product(MemoryOrder, MemoryOrder))


def config(path: Path | None = None, **changes: object) -> CacheConfig:
    """All tiers, a sidecar and small pools; `changes` replace fields."""
    fields: dict[str, object] = {
        "page_size": PAGE,
        "layout": LAYOUT,
        "sidecars": (DRAFT,),
        "device": DeviceConfig(size=12),
        "host": HostConfig(size=12),
        "storage": StorageConfig(path=str(path), size="1MiB") if path else None,
        "load_back": LoadBackConfig(min_tokens=0),
        "prefetch": PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        "model": "m",
        "revision": "1",
        "op_deadline_seconds": WAIT_SECONDS,
    }
    return CacheConfig(**{**fields, **changes})  # type: ignore[arg-type]


def pools(cache: PrefixCache, tier: Tier) -> Iterator[tuple[str, Pool]]:
    """The main pool of `tier` and its sidecars, by name."""
    group = cache.device_pools if tier == Tier.DEVICE else cache.host_pools
    assert group is not None
    yield "main", group[FULL].main
    yield from group[FULL].sidecars.items()


def page_bytes(pool: Pool, name: str, tokens: list[int], index: int, namespace: str) -> bytes:
    """What page `index` of `tokens` must be, byte for byte, in the order of the logical axes."""
    prefix = repr((name, namespace, tokens[: (index + 1) * PAGE])).encode()
    seed = int.from_bytes(hashlib.sha256(prefix).digest()[:8], "little")
    return np.random.default_rng(seed).bytes(pool.page_bytes)


def read(pool: Pool, slot: int) -> bytes:
    """The logical page in `slot`."""
    return pool.logical[slot].contiguous().view(torch.uint8).numpy().tobytes()


def write(cache: PrefixCache, slots: list[int], tokens: list[int], first: int, namespace: str = "") -> None:
    """The engine computes pages `first ..` of `tokens` into device slots."""
    for (name, pool), (at, slot) in itertools.product(pools(cache, Tier.DEVICE), enumerate(slots, first)):
        data = np.frombuffer(page_bytes(pool, name, tokens, at, namespace), np.uint8).copy()
        pool.logical[slot] = torch.from_numpy(data).view(pool.logical.dtype).reshape(pool.logical.shape[1:])


def fill(cache: PrefixCache, tokens: list[int] = PROMPT, namespace: str = "") -> None:
    """Compute and insert every page of `tokens`, and let everything that follows from it finish."""
    key = cache.key(tokens, namespace)
    with cache.acquire(cache.match(key)) as lease:
        slots = cache.allocate(key.pages - lease.device_boundary, lease)
        write(cache, slots.tolist(), tokens, lease.device_boundary, namespace)
        assert isinstance(cache.insert(key, slots, lease), Inserted)
        assert cache.drain(WAIT_SECONDS)


def differing(cache: PrefixCache, lease: Lease, tokens: list[int]) -> list[tuple[str, str, int]]:
    """(tier, pool, page) of every page of `lease` whose bytes are not the right ones."""
    places = [(Tier.DEVICE, 0, lease.slots)]
    if lease.host_hold is not None:
        first, stop = lease.device_boundary, lease.memory_boundary
        places.append((Tier.HOST, first, slots_of(lease.host_hold.end, Tier.HOST, first, stop - first)))
    return [
        (tier.name, name, index)
        for tier, first, slots in places
        for name, pool in pools(cache, tier)
        for index, slot in enumerate(slots.tolist(), first)
        if read(pool, slot) != page_bytes(pool, name, tokens, index, lease.key.namespace)
    ]


def hit(cache: PrefixCache, tokens: list[int] = PROMPT, namespace: str = "") -> tuple[int, int]:
    """Lease `tokens`, compare every byte on both tiers, load back, compare again. How far it reached."""
    with cache.acquire(cache.match(cache.key(tokens, namespace))) as lease:
        reach = lease.device_boundary, lease.memory_boundary
        assert differing(cache, lease, tokens) == []
        if lease.memory_boundary > lease.device_boundary:
            load = cache.load_back(lease)
            assert isinstance(load, LoadBack)
            assert cache.drain(WAIT_SECONDS)
            assert (load.state, lease.device_boundary) == ("done", reach[1])
            assert differing(cache, lease, tokens) == []
        cache.check()
    return reach


def fetch(cache: PrefixCache, tokens: list[int] = PROMPT, namespace: str = "") -> int:
    """Prefetch `tokens` and wait; how many pages came."""
    started = cache.prefetch(cache.key(tokens, namespace))
    assert isinstance(started, Prefetch), started
    assert cache.drain(WAIT_SECONDS)
    landed = cache.settle(started)
    assert landed is not None
    return landed


@pytest.mark.parametrize(("device", "host"), ORDERS, ids=lambda order: str(order))
def test_every_way_through_the_tiers_keeps_every_byte_in_every_memory_order(
    tmp_path: Path, device: MemoryOrder, host: MemoryOrder
) -> None:
    chosen = config(
        tmp_path, device=DeviceConfig(size=12, order=device), host=HostConfig(size=12, order=host)
    )
    with PrefixCache(chosen) as cache:
        fill(cache)
        fill(cache, OTHER)
        assert hit(cache) == (5, 5)
        cache.evict(12)
        assert hit(cache) == (0, 5)
        assert hit(cache, OTHER) == (2, 5)
        cache.evict(12)
        cache.evict(12, Tier.HOST)
        assert hit(cache) == (0, 0)
        assert fetch(cache) == 5
        assert hit(cache) == (0, 5)
    with PrefixCache(chosen) as again:  # another process, later
        assert hit(again) == (0, 0)
        assert fetch(again) == 5
        assert fetch(again, OTHER) == 3
        assert (hit(again), hit(again, OTHER)) == ((0, 5), (2, 5))


@pytest.mark.parametrize("policy", list(WritePolicy))
def test_every_write_policy_keeps_every_byte_under_pressure(policy: WritePolicy) -> None:
    chosen = config(write_policy=policy, device=DeviceConfig(size=6), host=HostConfig(size=16))
    with PrefixCache(chosen) as cache:
        for turn in range(12):
            tokens = [turn % 4, *PROMPT[1:]]
            fill(cache, tokens)
            hit(cache, [(turn + 2) % 4, *PROMPT[1:]])
            hit(cache, tokens)
        assert cache.stats().loaded_back > 0


def test_namespaces_have_bytes_of_their_own(tmp_path: Path) -> None:
    with PrefixCache(config(tmp_path)) as cache:
        for name in ("", "tenant"):
            fill(cache, PROMPT, name)
        cache.evict(12)
        for name in ("", "tenant"):
            assert hit(cache, PROMPT, name) == (0, 5)
        cache.clear()
        for name in ("", "tenant"):
            assert fetch(cache, PROMPT, name) == 5
            assert hit(cache, PROMPT, name) == (0, 5)
        assert fetch(cache, PROMPT, "nobody") == 0


DIFFERENCES: dict[str, dict[str, object]] = {
    "model": {"model": "n"},
    "revision": {"revision": "2"},
    "shard": {"shard": "tp1/2"},
    "dtype": {"layout": KVLayout(layers=2, kv_heads=2, head_size=3, dtype="float16", page_size=PAGE)},
    "head size": {"layout": KVLayout(layers=2, kv_heads=3, head_size=2, dtype="bfloat16", page_size=PAGE)},
    "layers": {"layout": KVLayout(layers=3, kv_heads=2, head_size=2, dtype="bfloat16", page_size=PAGE)},
    "sidecar": {"sidecars": (SidecarConfig(name="indexer", layout=DRAFT.layout),)},
    "no sidecar": {"sidecars": ()},
    "units": {"unit_bits": 64},
    "page size": {
        "page_size": 1,
        "layout": KVLayout(layers=2, kv_heads=2, head_size=6, dtype="bfloat16", page_size=1),
        "sidecars": (),
    },
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_pages_of_another_kind_of_cache_are_a_miss(tmp_path: Path, what: str) -> None:
    with PrefixCache(config(tmp_path)) as cache:
        fill(cache)
    with PrefixCache(config(tmp_path, **DIFFERENCES[what])) as other:
        wanted = 0 if what != "no sidecar" else 5  # its main pool is the same, and it needs no more
        assert fetch(other) == wanted
        assert other.stats().storage is not None
        assert other.stats().storage.checksum_failures == 0
    with PrefixCache(config(tmp_path)) as same:
        assert fetch(same) == 5
        assert hit(same) == (0, 5)


def test_what_was_computed_before_invalidate_is_a_miss_in_memory_and_on_disk(tmp_path: Path) -> None:
    with PrefixCache(config(tmp_path)) as cache:
        fill(cache)
        cache.invalidate("2")
        assert hit(cache) == (0, 0)
        assert fetch(cache) == 0
    with PrefixCache(config(tmp_path, revision="2")) as cache:
        assert fetch(cache) == 0


# -- negative controls: the comparison can fail ---------------------------------------------------------


@pytest.mark.parametrize("name", ["main", "draft"])
def test_one_flipped_byte_on_host_is_seen_by_the_comparison(name: str) -> None:
    with PrefixCache(config()) as cache:
        fill(cache)
        cache.evict(12)
        with cache.acquire(cache.match(cache.key(PROMPT))) as lease:
            assert lease.host_hold is not None
            slot = int(slots_of(lease.host_hold.end, Tier.HOST, 0, 5)[3])
            pool = dict(pools(cache, Tier.HOST))[name]
            buffer = pool.page_buffer(slot)
            assert buffer is not None
            buffer[7] ^= 1
            assert differing(cache, lease, PROMPT) == [("HOST", name, 3)]
            cache.load_back(lease)
            assert cache.drain(WAIT_SECONDS)
            assert differing(cache, lease, PROMPT) == [("DEVICE", name, 3)]


def test_one_flipped_byte_on_disk_is_a_miss_and_a_checksum_failure(tmp_path: Path) -> None:
    with PrefixCache(config(tmp_path, sidecars=())) as cache:
        fill(cache)
        bad = cache._core.radix.hashes.of_key(cache.key(PROMPT))[3]
    with closing(DiskStorage(str(tmp_path), capacity_bytes=1 << 20)) as disk:
        present = disk.keys()
        (key,) = (each for each in present if each.startswith(bad))
        assert flip_byte(disk, key, 7)
    with PrefixCache(config(tmp_path, sidecars=())) as cache:
        assert fetch(cache) == 3
        assert hit(cache) == (0, 3)
        storage = cache.stats().storage
        assert storage is not None
        assert storage.checksum_failures == 1
        fill(cache)  # computed anew, and stored anew in place of the bad page
    with PrefixCache(config(tmp_path, sidecars=())) as cache:
        assert fetch(cache) == 5
        assert hit(cache) == (0, 5)


def test_without_a_host_only_the_device_hits() -> None:
    with PrefixCache(config(host=None)) as cache:
        fill(cache)
        assert hit(cache) == (5, 5)
        cache.evict(2)
        assert hit(cache) == (3, 3)
        assert isinstance(cache.prefetch(cache.key(PROMPT)), Refused)
