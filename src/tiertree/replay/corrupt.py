"""Flips bytes of resident pages while a replay runs, to show that its comparison is one.

Pages that the next request is about to hit are chosen where there are any, so that the damage is met:

    of the next request     on device  │ on host only │ on disk only
    one byte is flipped in   a pool    │  a pool      │  a segment file
    and shows as             mismatch  │  mismatch    │  checksum failure

Where there are none for long, a page that an earlier request would hit will do. The flips are spread
evenly over the first nine tenths of the run; what is left then is made up for in the last.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..cache import PrefixCache
from ..pools.group import PoolGroup
from ..storage.disk import DiskStorage
from ..storage.tamper import flip_byte
from ..storage.workers import Keys
from ..tree.key import Key
from ..tree.lease import Match
from ..tree.node import fragments
from ..tree.pagehash import PageHashes
from ..types import FULL, Slots, Tier

EARLIER_TRIES = 8
"""How many earlier requests are asked for a page before each request, where flips are overdue."""


class Corruptor:
    """Flips one byte in `count` pages of each tier of `cache` in the course of `requests` requests. Only
    while nothing is in flight. `key_of(i)` is the key of request i; `flipped` counts by tier."""

    def __init__(
        self,
        cache: PrefixCache,
        disk: DiskStorage | None,
        hashes: PageHashes,
        key_of: Callable[[int], Key],
        count: int,
        requests: int,
        seed: int,
    ) -> None:
        self._cache, self._disk, self._hashes, self._key_of = cache, disk, hashes, key_of
        self._count, self._requests = count, requests
        self._random = np.random.default_rng([seed, 2])
        self.flipped = [0, 0, 0]

    def before(self, index: int, key: Key) -> None:
        """Request `index` with `key` comes next: flip what is due. O(flips · pages)."""
        due = min(self._count, -(-self._count * (index + 1) // max(1, self._requests * 9 // 10)))
        late = index >= self._requests * 9 // 10
        for tier in self._tiers():
            if self.flipped[tier] < due:
                self.flipped[tier] += self._flip(tier, key)
            tries = EARLIER_TRIES if late or due - self.flipped[tier] > 1 else 0
            while self.flipped[tier] < due and tries:
                tries -= 1
                earlier = self._key_of(int(self._random.integers(index + 1)))
                self.flipped[tier] += self._flip(tier, earlier)

    def _tiers(self) -> list[Tier]:
        tiers = [Tier.DEVICE]
        if self._cache.host_pools is not None:
            tiers.append(Tier.HOST)
        if self._disk is not None:
            tiers.append(Tier.STORAGE)
        return tiers

    def _flip(self, tier: Tier, key: Key) -> bool:
        """Flip a byte of one page that `key` would hit in `tier`; False where it would hit none there."""
        match = self._cache.peek(key)
        if tier == Tier.STORAGE:
            return self._flip_on_disk(key, match.memory_boundary)
        pools = self._cache.device_pools if tier == Tier.DEVICE else self._cache.host_pools
        assert pools is not None
        low, high = 0, match.device_boundary
        if tier == Tier.HOST:
            low, high = match.device_boundary, match.memory_boundary
        slots = _slots(match, tier, low, high)
        if not len(slots):
            return False
        self._flip_in_pool(pools, slots[self._random.integers(len(slots))])
        return True

    def _flip_in_pool(self, pools: PoolGroup, slot: np.int64) -> None:
        pool = pools[FULL].main
        page = np.empty((1, pool.page_bytes), np.uint8)
        chosen = np.array([slot], np.int64)
        pool.read_pages(chosen, page)
        page[0, self._random.integers(pool.page_bytes)] ^= self._mask()
        pool.write_pages(chosen, page)

    def _flip_on_disk(self, key: Key, memory: int) -> bool:
        """A page that memory lacks and disk has, reached by a prefetch."""
        host = self._cache.host_pools
        assert self._disk is not None
        assert host is not None
        keys = Keys(FULL, host[FULL], self._cache.config.shard).of(self._hashes.of_key(key)[memory:])
        held = self._disk.holds(keys)
        if not held:
            return False
        chosen = keys[self._random.integers(held)]
        position = int(self._random.integers(host[FULL].main.page_bytes))
        return flip_byte(self._disk, chosen, position, self._mask())

    def _mask(self) -> int:
        return int(self._random.integers(1, 256))


def _slots(match: Match, tier: Tier, low: int, high: int) -> Slots:
    """The slots on `tier` of those of the pages `low .. high` that are there."""
    found: list[Slots] = []
    for node, first, stop in fragments(match.end, low, high - low) if match.end is not None else ():
        slots = node.lanes[tier].slots
        if slots is not None:
            found.append(slots[first:stop])
    joined = np.concatenate(found) if found else np.empty(0, np.int64)
    return joined[joined >= 0]
