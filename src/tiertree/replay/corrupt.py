"""Flips bytes of resident pages while a replay runs, to show that its comparison is one.

Pages that the next request is about to hit are chosen where there are any, so that the damage is met:

    of the next request     on device  │ on host only │ on disk only
    one byte is flipped in   a pool    │  a pool      │  a segment file
    and shows as             mismatch  │  mismatch    │  checksum failure

Where there are none for long, a page that an earlier request would hit will do. The flips are spread
evenly over the first nine tenths of the run; what is left then is made up for in the last. No page is
damaged twice on the same tier, so there may be fewer than asked for where there are few pages. Where the
model has further kinds, they and FULL take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..cache import PrefixCache
from ..pools.paged import Pool
from ..storage.disk import DiskStorage
from ..storage.jobs import pool_way
from ..storage.tamper import flip_byte
from ..tree.key import Key
from ..tree.lease import Match
from ..tree.node import Node, fragments
from ..tree.pagehash import PageHashes
from ..types import FULL, Kind, Slots, Tier

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
        self._done: tuple[set[tuple[Kind, bytes]], ...] = (set(), set(), set())
        self._kinds = (FULL, *(each.kind for each in cache.config.kinds))
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
        """Flip a byte of one page that `key` would hit in `tier`, if there is one still sound. The kinds take
        turns, where they have one."""
        match = self._cache.peek(key)
        hashes = self._hashes.of_key(key)
        turn = self.damaged[tier] % len(self._kinds)
        for kind in self._kinds[turn:] + self._kinds[:turn]:
            if tier == Tier.STORAGE:
                flipped = self._flip_on_disk(kind, match, hashes)
            else:
                flipped = self._flip_in_memory(kind, tier, match, hashes)
            if flipped is not None:
                self._done[tier].add((kind, flipped))
                self.damaged[tier] += 1
                break

    def _flip_in_memory(self, kind: Kind, tier: Tier, match: Match, hashes: Sequence[bytes]) -> bytes | None:
        """The hash of the page that was damaged."""
        pools = self._cache.device_pools if tier == Tier.DEVICE else self._cache.host_pools
        assert pools is not None
        places = self._places(kind, match, tier)
        sound = [each for each in places if (kind, hashes[each[0]]) not in self._done[tier]]
        if not sound:
            return None
        page, slot = sound[self._random.integers(len(sound))]
        self._flip_in_pool(pools[kind].main, slot)
        return hashes[page]

    def _since(self, kind: Kind, boundary: int) -> int:
        """The first page of `kind` that a request continuing at `boundary` reads."""
        if kind == FULL or not boundary:
            return 0
        config = self._cache.config
        return config.kinds[self._kinds.index(kind) - 1].rules.since(boundary, config.page_size)

    def _places(self, kind: Kind, match: Match, tier: Tier) -> list[tuple[int, int]]:
        """(page, slot on `tier`) of those pages of `kind` that a hit would find on `tier` and no higher."""
        high = match.device_boundary if tier == Tier.DEVICE else match.memory_boundary
        low = self._since(kind, high)
        found: list[tuple[int, int]] = []
        for node, first, stop in fragments(match.end, low, high - low) if match.end is not None else ():
            device, host = (self._slots(kind, node, each)[first:stop] for each in (Tier.DEVICE, Tier.HOST))
            there = device >= 0 if tier == Tier.DEVICE else (host >= 0) & (device < 0)
            pages = np.flatnonzero(there)
            slots = (device if tier == Tier.DEVICE else host)[pages]
            found += zip((pages + node.start + first).tolist(), slots.tolist(), strict=True)
        return found

    def _slots(self, kind: Kind, node: Node, tier: Tier) -> Slots:
        index = self._kinds.index(kind) - 1
        slots = (node.lane(tier) if kind == FULL else node.partial[2 * index + tier]).slots
        return np.full(node.pages, -1, np.int64) if slots is None else slots

    def _flip_in_pool(self, pool: Pool, slot: int) -> None:
        page = np.empty((1, pool.page_bytes), np.uint8)
        chosen = np.array([slot], np.int64)
        pool.read_pages(chosen, page)
        page[0, self._random.integers(pool.page_bytes)] ^= self._mask()
        pool.write_pages(chosen, page)

    def _flip_on_disk(self, kind: Kind, match: Match, hashes: tuple[bytes, ...]) -> bytes | None:
        """Damage one of the pages that memory lacks and disk has, reached by a prefetch; its hash."""
        first = match.full_reach
        stop = first + [*self._held(FULL, hashes[first:]), False].index(False)
        if kind != FULL:
            first = self._since(kind, stop)
        held = zip(hashes[first:stop], self._held(kind, hashes[first:stop]), strict=True)
        sound = [each for each, there in held if there and (kind, each) not in self._done[Tier.STORAGE]]
        if not sound:
            return None
        assert self._disk is not None
        assert self._cache.host_pools is not None
        chosen = sound[self._random.integers(len(sound))]
        position = int(self._random.integers(self._cache.host_pools[kind].main.page_bytes))
        return (
            chosen if flip_byte(self._disk, self._keys(kind, [chosen])[0], position, self._mask()) else None
        )

    def _held(self, kind: Kind, hashes: Sequence[bytes]) -> list[bool]:
        """Whether disk has these pages of `kind`."""
        assert self._disk is not None
        return self._disk.holds(self._keys(kind, hashes))

    def _keys(self, kind: Kind, hashes: Sequence[bytes]) -> list[bytes]:
        host = self._cache.host_pools
        assert host is not None
        return pool_way(kind, host[kind], self._cache.config.shard).keys.of(hashes)

    def _mask(self) -> int:
        return int(self._random.integers(1, 256))
