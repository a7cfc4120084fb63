"""What happened to each page on each medium, in order (I9), as plain structs.

For one page of one kind and one medium, stored and removed alternate, starting with stored. Of FULL,
DEVICE always, and HOST under write_through and write_through_selective, announce a parent before its
child. STORAGE announces FULL only.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import FULL, Kind, Tier
from .node import Node, Root
from .pagehash import SIZE, PageHashes, pieces


@dataclass(frozen=True, slots=True)
class BlockStored:
    """Consecutive pages of one kind became READY on `medium`. `token_ids` are their units, in order."""

    medium: Tier
    namespace: str
    block_hashes: tuple[bytes, ...]
    parent_block_hash: bytes | None
    token_ids: tuple[int, ...]
    block_size: int
    kind: Kind = FULL


@dataclass(frozen=True, slots=True)
class BlockRemoved:
    """Pages of one kind left `medium`."""

    medium: Tier
    block_hashes: tuple[bytes, ...]
    kind: Kind = FULL


@dataclass(frozen=True, slots=True)
class AllBlocksCleared:
    """Every page left `medium`; no BlockRemoved follows for them."""

    medium: Tier


@dataclass(frozen=True, slots=True)
class EventsLost:
    """`count` events were dropped here because nobody took them in time: resynchronise."""

    count: int


Event = BlockStored | BlockRemoved | AllBlocksCleared | EventsLost


class Journal:
    """A bounded queue of events. When it is full the oldest go, and the next `take` says how many."""

    __slots__ = ("_events", "_limit", "lost")

    def __init__(self, limit: int) -> None:
        self._events: deque[Event] = deque()
        self._limit = limit
        self.lost = 0

    def add(self, event: Event) -> None:
        """Append one event. O(1)."""
        if len(self._events) >= self._limit:
            self._events.popleft()
            self.lost += 1
        self._events.append(event)

    def take(self) -> list[Event]:
        """All events since the last take, oldest first; led by EventsLost if any were dropped."""
        events = list(self._events)
        self._events.clear()
        if self.lost:
            events.insert(0, EventsLost(self.lost))
            self.lost = 0
        return events


class Announcer:
    """Turns what happens to a node's pages into events. A root's hash stands for no parent (None)."""

    __slots__ = ("_hashes", "_on_storage", "_unit_type", "journal")

    def __init__(self, journal: Journal, hashes: PageHashes, unit_bytes: int) -> None:
        self.journal = journal
        self._hashes = hashes
        self._unit_type = np.dtype(f"<u{unit_bytes}")
        self._on_storage: set[bytes] = set()

    def stored(self, node: Node, medium: Tier, pages: NDArray[np.int64], kind: Kind = FULL) -> None:
        """The pages of `node` with these indices (ascending) are READY on `medium` now."""
        joined = self._hashes.of_node(node)
        page_bytes = len(node.edge) // node.pages
        for low, high in runs(pages):
            if low:
                before: bytes | None = joined[(low - 1) * SIZE : low * SIZE]
            else:
                before = None if isinstance(node.parent, Root) else self._hashes.before(node)
            units = np.frombuffer(node.edge[low * page_bytes : high * page_bytes], self._unit_type)
            self.journal.add(
                BlockStored(
                    medium,
                    namespace_of(node),
                    pieces(joined[low * SIZE : high * SIZE]),
                    before,
                    tuple(units.tolist()),
                    page_bytes // self._unit_type.itemsize,
                    kind,
                )
            )

    def removed(self, node: Node, medium: Tier, pages: NDArray[np.int64], kind: Kind = FULL) -> None:
        """The pages of `node` with these indices are leaving `medium`; last page first."""
        joined = self._hashes.of_node(node)
        hashes = tuple(joined[page * SIZE : (page + 1) * SIZE] for page in pages[::-1].tolist())
        if hashes:
            self.journal.add(BlockRemoved(medium, hashes, kind))

    def persisted(self, node: Node, pages: NDArray[np.int64]) -> None:
        """Storage took these pages of `node` and did not have them before."""
        joined = self._hashes.of_node(node)
        new = [
            page for page in pages.tolist() if joined[page * SIZE : (page + 1) * SIZE] not in self._on_storage
        ]
        if new:
            self.stored(node, Tier.STORAGE, np.array(new))
            self._on_storage.update(joined[page * SIZE : (page + 1) * SIZE] for page in new)

    def evicted_from_storage(self, hashes: tuple[bytes, ...]) -> None:
        """Storage let these pages go; only those it was announced to have are announced."""
        known = tuple(each for each in hashes if each in self._on_storage)
        self._on_storage.difference_update(known)
        if known:
            self.journal.add(BlockRemoved(Tier.STORAGE, known))

    def storage_cleared(self) -> None:
        """Storage is empty, or is not ours any more."""
        self._on_storage.clear()
        self.journal.add(AllBlocksCleared(Tier.STORAGE))


def runs(pages: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Ascending page indices as half-open runs of consecutive ones."""
    if not len(pages):
        return []
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    return [(int(part[0]), int(part[-1]) + 1) for part in np.split(pages, breaks)]


def namespace_of(node: Node) -> str:
    """The namespace a node is in. O(depth in nodes)."""
    at = node
    while at.parent is not None:
        at = at.parent
    assert isinstance(at, Root)
    return at.namespace
