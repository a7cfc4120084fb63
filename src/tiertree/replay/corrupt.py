"""Flips bytes of resident pages while a replay runs, to show that its comparison is one.

Pages that the next request is about to hit are chosen where there are any, so that the damage is met:

    of the next request     on device  │ on host only │ on disk only
    one byte is flipped in   a pool    │  a pool      │  a segment file
    and shows as             mismatch  │  mismatch    │  checksum failure

Where there are none for long, a page that an earlier request would hit will do. The flips are spread
evenly over the first nine tenths of the run; what is left then is made up for in the last. No page is
damaged twice on the same tier, so there may be fewer than asked for where there are few pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
from ..types import FULL, Tier

EARLIER_TRIES = 8
"""How many earlier requests are asked for a page before each request, where flips are overdue."""


class Corruptor:
    """Flips one byte in `count` different pages of each tier of `cache` in the course of `requests` requests.
    Only while nothing is in flight. `key_of(i)` is the key of request i; `damaged` counts pages by tier."""

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
        self._done: tuple[set[bytes], ...] = (set(), set(), set())
        self.damaged = [0, 0, 0]

    def before(self, index: int, key: Key) -> None:
        """Request `index` with `key` comes next: flip what is due. O(flips · pages)."""
        due = min(self._count, -(-self._count * (index + 1) // max(1, self._requests * 9 // 10)))
        late = index >= self._requests * 9 // 10
        for tier in self._tiers():
            if self.damaged[tier] < due:
                self._flip(tier, key)
            tries = EARLIER_TRIES if late or due - self.damaged[tier] > 1 else 0
            while self.damaged[tier] < due and tries:
                tries -= 1
                self._flip(tier, self._key_of(int(self._random.integers(index + 1))))

    def _tiers(self) -> list[Tier]:
        tiers = [Tier.DEVICE]
        if self._cache.host_pools is not None:
            tiers.append(Tier.HOST)
        if self._disk is not None:
            tiers.append(Tier.STORAGE)
        return tiers

    def _flip(self, tier: Tier, key: Key) -> None:
        """Flip a byte of one page that `key` would hit in `tier`, if there is one still sound."""
        match = self._cache.peek(key)
        hashes = self._hashes.of_key(key)
        if tier == Tier.STORAGE:
            flipped = self._flip_on_disk(hashes[match.memory_boundary :])
        else:
            flipped = self._flip_in_memory(tier, match, hashes)
        if flipped is not None:
            self._done[tier].add(flipped)
            self.damaged[tier] += 1

    def _flip_in_memory(self, tier: Tier, match: Match, hashes: Sequence[bytes]) -> bytes | None:
        """The hash of the page that was damaged."""
        pools = self._cache.device_pools if tier == Tier.DEVICE else self._cache.host_pools
        assert pools is not None
        low, high = 0, match.device_boundary
        if tier == Tier.HOST:
            low, high = match.device_boundary, match.memory_boundary
        sound = [each for each in _places(match, tier, low, high) if hashes[each[0]] not in self._done[tier]]
        if not sound:
            return None
        page, slot = sound[self._random.integers(len(sound))]
        self._flip_in_pool(pools, slot)
        return hashes[page]

    def _flip_in_pool(self, pools: PoolGroup, slot: int) -> None:
        pool = pools[FULL].main
        page = np.empty((1, pool.page_bytes), np.uint8)
        chosen = np.array([slot], np.int64)
        pool.read_pages(chosen, page)
        page[0, self._random.integers(pool.page_bytes)] ^= self._mask()
        pool.write_pages(chosen, page)

    def _flip_on_disk(self, hashes: tuple[bytes, ...]) -> bytes | None:
        """Damage one of the pages that memory lacks and disk has, reached by a prefetch; its hash."""
        host = self._cache.host_pools
        assert self._disk is not None
        assert host is not None
        keys = Keys(FULL, host[FULL], self._cache.config.shard).of(hashes)
        held = range(self._disk.holds(keys))
        sound = [at for at in held if hashes[at] not in self._done[Tier.STORAGE]]
        if not sound:
            return None
        chosen = sound[self._random.integers(len(sound))]
        position = int(self._random.integers(host[FULL].main.page_bytes))
        return hashes[chosen] if flip_byte(self._disk, keys[chosen], position, self._mask()) else None

    def _mask(self) -> int:
        return int(self._random.integers(1, 256))


def _places(match: Match, tier: Tier, low: int, high: int) -> list[tuple[int, int]]:
    """(page, slot on `tier`) of those of the pages `low .. high` that are there."""
    found: list[tuple[int, int]] = []
    for node, first, stop in fragments(match.end, low, high - low) if match.end is not None else ():
        slots = node.lane(tier).slots
        if slots is not None:
            start = node.end - node.pages
            each = enumerate(slots[first:stop].tolist(), start + first)
            found += [(page, slot) for page, slot in each if slot >= 0]
    return found
