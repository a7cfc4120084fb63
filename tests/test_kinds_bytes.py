"""Every kind and its sidecars in real pools: what comes back from host and from disk is equal, byte for byte.

A sidecar rides on each kind, so whatever moves slots of a kind must move the sidecar's pages along.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kinds import each_set, rules
from test_kinds import PROMPT, Kinds

from tiertree import (
    FULL,
    MAMBA,
    CacheConfig,
    DeviceConfig,
    HostConfig,
    Inserted,
    KindConfig,
    KVLayout,
    Lease,
    LoadBack,
    LoadBackConfig,
    Prefetch,
    PrefetchConfig,
    PrefixCache,
    SidecarConfig,
    StateLayout,
    StopRule,
    StorageConfig,
    WritePolicy,
)
from tiertree.pools.paged import Pool
from tiertree.types import Kind, Slots

KEYS = KVLayout(layers=2, kv_heads=2, head_size=3, dtype="bfloat16", page_size=1)
STATE = StateLayout(layers=2, elements=10)
INDEX = KVLayout(layers=1, kv_heads=1, head_size=5, dtype="uint8", attention="mla", page_size=1)
WAIT_SECONDS = 60.0


def open_cache(kinds: Kinds, path: Path | None = None, **changes: object) -> PrefixCache:
    """All tiers, tiny pools, and a sidecar named after each kind."""
    fields: dict[str, object] = {
        "page_size": 1,
        "layout": KEYS,
        "device": DeviceConfig(size=8),
        "host": HostConfig(size=16),
        "storage": StorageConfig(path=str(path), size="1MiB") if path else None,
        "kinds": tuple(
            KindConfig(rules=rules()[kind], device=8, host=16, layout=STATE if kind == MAMBA else KEYS)
            for kind in kinds
        ),
        "sidecars": tuple(
            SidecarConfig(name=f"beside-{kind}", layout=INDEX, kind=kind) for kind in (FULL, *kinds)
        ),
        "load_back": LoadBackConfig(min_tokens=0),
        "prefetch": PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        "op_deadline_seconds": WAIT_SECONDS,
        **changes,
    }
    return PrefixCache(CacheConfig(**fields)).open()  # type: ignore[arg-type]


def pools(cache: PrefixCache, kind: Kind) -> Iterator[tuple[str, Pool]]:
    """The device pools of `kind` by name: its own and its sidecars."""
    assert cache.device_pools is not None
    yield "main", cache.device_pools[kind].main
    yield from cache.device_pools[kind].sidecars.items()


def page_bytes(pool: Pool, *what: object) -> bytes:
    """The bytes that belong to `what`, as many as a page of `pool` has."""
    seed = hashlib.sha256(repr(what).encode()).digest()[:8]
    return np.random.default_rng(int.from_bytes(seed, "little")).bytes(pool.page_bytes)


def write(cache: PrefixCache, kind: Kind, slots: Slots, tokens: list[int], first: int) -> None:
    """The engine computes pages `first ..` of `tokens` into device slots, but for those that are −1."""
    for name, pool in pools(cache, kind):
        for at, slot in enumerate(slots.tolist(), first):
            if slot >= 0:
                data = np.frombuffer(page_bytes(pool, kind, name, tokens[: at + 1]), np.uint8).copy()
                shape = pool.logical.shape[1:]
                pool.logical[slot] = torch.from_numpy(data).view(pool.logical.dtype).reshape(shape)


def differing(
    cache: PrefixCache, kind: Kind, slots: Slots, tokens: list[int], first: int
) -> list[tuple[str, int]]:
    """(pool, page) of every page from `first` on whose bytes are not the right ones."""
    return [
        (name, at)
        for name, pool in pools(cache, kind)
        for at, slot in enumerate(slots.tolist(), first)
        if pool.logical[slot].contiguous().view(torch.uint8).numpy().tobytes()
        != page_bytes(pool, kind, name, tokens[: at + 1])
    ]


def fill(cache: PrefixCache, kinds: Kinds, tokens: list[int]) -> None:
    """Compute every page of `tokens` of every kind and insert them; all that follows from it finishes."""
    slots = {kind: cache.allocate(len(tokens), kind=kind) for kind in (FULL, *kinds)}
    for kind, theirs in slots.items():
        write(cache, kind, theirs, tokens, 0)
    full = slots.pop(FULL)
    assert isinstance(cache.insert(cache.key(tokens), full, partial=slots), Inserted)
    assert cache.drain(WAIT_SECONDS)


def verify(cache: PrefixCache, kinds: Kinds, lease: Lease, tokens: list[int]) -> None:
    """Every byte that `lease` has on device is right."""
    assert differing(cache, FULL, lease.slots, tokens, 0) == []
    for kind in kinds:
        window = lease.window(kind)
        assert (window.slots >= 0).all()
        assert differing(cache, kind, window.slots, tokens, window.first) == []


def hit(cache: PrefixCache, kinds: Kinds, tokens: list[int]) -> tuple[int, int]:
    """Lease `tokens`, load back what is on host, compare every byte. How far it reached before."""
    with cache.acquire(cache.match(cache.key(tokens))) as lease:
        before = lease.device_boundary, lease.memory_boundary
        verify(cache, kinds, lease, tokens)
        if before[1] > before[0]:
            assert isinstance(cache.load_back(lease), LoadBack)
            assert cache.drain(WAIT_SECONDS)
            assert lease.device_boundary == before[1]
            verify(cache, kinds, lease, tokens)
        cache.check()
    return before


@each_set
@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_every_kind_and_sidecar_comes_back_from_host(kinds: Kinds, policy: WritePolicy) -> None:
    cache = open_cache(kinds, write_policy=policy)
    fill(cache, kinds, PROMPT)
    assert hit(cache, kinds, PROMPT) == (8, 8)
    cache.evict(8)
    assert hit(cache, kinds, PROMPT) == (0, 8)
    assert hit(cache, kinds, PROMPT) == (8, 8)
    assert cache.close() == ()


@each_set
def test_every_kind_and_sidecar_comes_back_from_disk(kinds: Kinds, tmp_path: Path) -> None:
    cache = open_cache(kinds, tmp_path)
    fill(cache, kinds, PROMPT)
    assert cache.close() == ()
    cache = open_cache(kinds, tmp_path)
    started = cache.prefetch(cache.key(PROMPT))
    assert isinstance(started, Prefetch)
    assert cache.drain(WAIT_SECONDS)
    assert cache.settle(started) == 8
    assert hit(cache, kinds, PROMPT) == (0, 8)
    assert cache.close() == ()


@each_set
def test_a_copy_on_write_has_the_bytes_of_its_sidecars_too(kinds: Kinds) -> None:
    cache = open_cache(kinds)
    fill(cache, kinds, PROMPT[:4])
    with cache.acquire(cache.match(cache.key(PROMPT[:4]))) as lease:
        for kind in kinds:
            copy, first = cache.copy_on_write(lease, kind), lease.window(kind).first
            assert differing(cache, kind, copy, PROMPT, first) == []
            write(cache, kind, copy, [99] * 8, first)
        verify(cache, kinds, lease, PROMPT[:4])
    assert cache.close() == ()


@each_set
def test_one_flipped_byte_in_a_sidecar_is_seen(kinds: Kinds) -> None:
    """The comparison that the tests above rest on can fail."""
    cache = open_cache(kinds)
    fill(cache, kinds, PROMPT)
    with cache.acquire(cache.match(cache.key(PROMPT))) as lease:
        kind = kinds[-1]
        slot = lease.window(kind).slots[-1]
        dict(pools(cache, kind))[f"beside-{kind}"].logical[slot].view(torch.uint8).flatten()[0] += 1
        with pytest.raises(AssertionError):
            verify(cache, kinds, lease, PROMPT)
    assert cache.close() == ()
