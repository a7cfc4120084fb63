"""The rare paths of a world: what they are, and how each is noticed.

Most are read off what anybody can see: events, actions, counters, the oracle. `RARE` is what a campaign
must have met; `seen` counts how often.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from tiertree import FULL, MAMBA, BlockRemoved, Tier
from tiertree.testing.oracle import Oracle, Page
from tiertree.tree.breaker import State
from tiertree.tree.node import Node, fragments
from tiertree.tree.operation import Purpose
from tiertree.types import Kind

if TYPE_CHECKING:
    from engine import Engine

DEVICE, HOST = Tier.DEVICE, Tier.HOST

RARE = (
    "split under backup",
    "landing parked",
    "dropped victim",
    "lease held over clear",
    "late operation home",
    "joined load-back",
    "both full",
    "insert refused after clear",
    "canonical slots",
    "landed",
    "no room",
    "stalled",
    "tombstone brought back",
    "window released early",
    "window evicted from inside a path",
    "split under backup of a partial kind",
    "load-back of a window alone",
    "load-back with a state",
    "prefetch of a partial kind alone",
    "partial kind dropped for want of host room",
    "restart hit from storage",
    "both pools of a partial kind full",
    "dead page went first",
    "branching point seen",
    "cap on states enforced",
    "page off the grid declined",
    "copied on write",
    "copies to host left alone",
    "storage writes left alone",
    "storage reads left alone",
    "left alone and well again",
    "page not offered to a storage that is left alone",
    "prefetch refused to a storage that is left alone",
    "storage did not bring what it said it holds",
)
"""What the campaign must have met."""


class Watch:
    """Looks at one world, after each step and where the tree splits a node."""

    def __init__(self, world: Engine) -> None:
        self.world = world
        self.seen = world.seen
        self._bare: set[Page] = set()
        self._before: dict[str, int] = {}
        self._ill: set[str] = set()
        self._watch_splits()

    # -- after each step --------------------------------------------------------------------------

    def look(self, removed: Sequence[BlockRemoved], was: dict[Page, set[Tier]]) -> None:
        """Look at what the step has done: `removed` are its events, `was` the oracle's dict before it."""
        world, seen = self.world, self.seen
        self._counted()
        self._breakers()
        if world.cache.config.host is not None:
            seen["both full"] += world.free(DEVICE) == world.free(HOST) == 0
            seen["both pools of a partial kind full"] += any(
                world.free(DEVICE, kind) == world.free(HOST, kind) == 0 for kind in world.kinds
            )
        if removed:
            self._inside(removed)
            self._dead(removed, was)

    def _counted(self) -> None:
        """What the counters say, compared with what they said before."""
        full = self.world.core.counters
        kinds = {kind: partial.counters for kind, partial in self.world.kinds.items()}
        now = {
            "loaded full": full.loaded_back,
            "loaded": sum(each.loaded_back for each in kinds.values()),
            "loaded states": kinds[MAMBA].loaded_back if MAMBA in kinds else 0,
            "prefetched full": full.prefetched,
            "prefetched": sum(each.prefetched for each in kinds.values()),
            "dropped": sum(each.backups_dropped + each.dropped for each in kinds.values()),
            "victims": full.dropped,
            "not offered": full.persists_dropped,
            "vanished": full.prefetch_vanished,
        }
        more = {name: count - self._before.get(name, 0) for name, count in now.items()}
        self._before, seen = now, self.seen
        seen["load-back of a window alone"] += more["loaded"] > 0 and not more["loaded full"]
        seen["load-back with a state"] += more["loaded states"] > 0
        seen["prefetch of a partial kind alone"] += more["prefetched"] > 0 and not more["prefetched full"]
        seen["partial kind dropped for want of host room"] += more["dropped"] > 0
        seen["dropped victim"] += more["victims"] > 0
        seen["page not offered to a storage that is left alone"] += more["not offered"] > 0
        seen["storage did not bring what it said it holds"] += more["vanished"] > 0

    def _breakers(self) -> None:
        """Which ways to a tier are left alone, and which have come back."""
        now = self.world.clock()
        every = self.world.core.operations.breakers.all
        ill = {each.name for each in every if each.state(now) != State.CLOSED}
        for name in ill - self._ill:
            self.seen[f"{name} left alone"] += 1
        self.seen["left alone and well again"] += len(self._ill - ill)
        self._ill = ill

    def _inside(self, removed: Iterable[BlockRemoved]) -> None:
        """A page of a partial kind has gone, and FULL goes on behind it."""
        oracle = self.world.oracle
        for event in removed:
            for page_hash in event.block_hashes if event.kind != FULL else ():
                namespace, units = oracle.prefix_of[page_hash]
                self.seen["window evicted from inside a path"] += any(
                    page[0] == namespace and len(page[1]) > len(units) and page[1][: len(units)] == units
                    for page in oracle.on(event.medium)
                )

    def _dead(self, removed: Iterable[BlockRemoved], was: dict[Page, set[Tier]]) -> None:
        """A page of FULL has gone behind which no match could end, and one where it could is still there."""
        oracle, size = self.world.oracle, self.world.page_size
        gone = {
            (event.medium, oracle.prefix_of[page_hash])
            for event in removed
            if event.kind == FULL
            for page_hash in event.block_hashes
        }
        if not gone:
            return
        past = Oracle(size, oracle.rules)
        past.where = was
        alive = {
            (namespace, units[:end])
            for namespace, units, kind in was
            if kind == FULL and past.valid(units, namespace, len(units) // size, {DEVICE, HOST})
            for end in range(size, len(units) + 1, size)
        }
        for medium, prefix in gone:
            left = any(page[:2] in alive for page in oracle.on(medium))
            self.seen["dead page went first"] += prefix not in alive and left

    # -- around an insert -------------------------------------------------------------------------

    def before_insert(self, brought: Iterable[Page]) -> None:
        """Remember which of the pages `brought` are tombstones: FULL is on device, they are not."""
        where = self.world.oracle.where
        self._bare = {
            page
            for page in brought
            if DEVICE in where.get((*page[:2], FULL), set()) and DEVICE not in where.get(page, set())
        }

    def after_insert(self, brought: Iterable[Page], path: Iterable[Page]) -> None:
        """Look at what has become of them, and at how many of their kind there are on `path`."""
        world, oracle, path = self.world, self.world.oracle, list(path)
        for page in brought:
            there = DEVICE in oracle.where.get(page, set())
            rules = world.kinds[page[2]].rules
            boundary = len(page[1]) // world.page_size
            if boundary % rules.grid(world.page_size):
                assert not there, f"{page} is not on the grid"
                self.seen["page off the grid declined"] += 1
            elif not there:
                assert rules.per_path is not None, f"{page} was inserted and is not there"
                self.seen["cap on states enforced"] += 1
            self.seen["tombstone brought back"] += there and page in self._bare
        for kind, partial in world.kinds.items():
            cap = partial.rules.per_path
            if cap is not None:
                on_path = [each for each in path if DEVICE in oracle.where.get((*each[:2], kind), set())]
                self._capped(kind, len(on_path), cap)

    def _capped(self, kind: Kind, count: int, cap: int) -> None:
        pins = self.world.ledger(DEVICE, kind).pins
        assert count <= cap or pins.any(), f"{count} pages of {kind} on one path, {cap} are allowed"

    # -- where nodes split ------------------------------------------------------------------------

    def _watch_splits(self) -> None:
        """Notice a split of what is being copied to host."""
        core = self.world.core
        radix, split = core.radix, core.radix.split

        def watched(node: Node, at: int) -> Node:
            for operation in core.operations.in_flight.values():
                if operation.purpose is Purpose.BACKUP and operation.end is not None:
                    pieces = fragments(operation.end, operation.first, operation.count)
                    hit = any(piece[0] is node for piece in pieces)
                    self.seen["split under backup"] += hit
                    self.seen["split under backup of a partial kind"] += hit and bool(operation.parts)
            return split(node, at)

        radix.split = watched  # type: ignore[method-assign]
