"""What `match` must answer, said in the plainest way: a flat dict from prefix to the tiers it is on.

    where[("tenant", (5, 9, 7, 1))] = {DEVICE, HOST}      the page that ends this prefix

There is no tree, no node, no slot and no lock here. The dict is filled either by what a test did
(`put`, `drop`) or by what the cache said happened (`apply`, an event of `take_events`), and both must
agree with the cache. `apply` also holds the events to their order (I9).
"""

from __future__ import annotations

from collections.abc import Sequence

from ..events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..types import Tier

Page = tuple[str, tuple[int, ...]]
"""One page: its namespace, and all token units up to its end."""


class EventsOutOfOrder(AssertionError):
    """An event that cannot follow the ones before it."""


class Oracle:
    """Which pages are where. `page_size` in token units."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self.where: dict[Page, set[Tier]] = {}
        self._page_of: dict[bytes, Page] = {}

    def pages(self, units: Sequence[int], namespace: str = "") -> list[Page]:
        """Every whole page of `units`, the first one first."""
        size = self.page_size
        return [
            (namespace, tuple(units[:end])) for end in range(size, len(units) - len(units) % size + 1, size)
        ]

    def match(self, units: Sequence[int], namespace: str = "") -> tuple[int, int]:
        """(device boundary, memory boundary) in pages: how many leading pages are all on device, and
        how many are all on device or host."""
        device = memory = 0
        for page in self.pages(units, namespace):
            tiers = self.where.get(page, set())
            if Tier.DEVICE in tiers and device == memory:
                device += 1
            if not tiers & {Tier.DEVICE, Tier.HOST}:
                break
            memory += 1
        return device, memory

    def put(self, units: Sequence[int], namespace: str = "", tier: Tier = Tier.DEVICE) -> None:
        """Every page of `units` is on `tier` from now on."""
        for page in self.pages(units, namespace):
            self.where.setdefault(page, set()).add(tier)

    def drop(self, page: Page, tier: Tier) -> None:
        """`page` is not on `tier` any more."""
        self.where[page].discard(tier)
        if not self.where[page]:
            del self.where[page]

    def on(self, tier: Tier) -> set[Page]:
        """Every page that is on `tier`."""
        return {page for page, tiers in self.where.items() if tier in tiers}

    # -- fed by events ----------------------------------------------------------------------------

    def apply(self, event: Event, parents_first: bool = False) -> None:
        """Believe one event. Raises EventsOutOfOrder if the page was there already (stored), was not
        there (removed), or, with `parents_first`, came before its parent."""
        if isinstance(event, BlockStored):
            self._stored(event, parents_first)
        elif isinstance(event, BlockRemoved):
            for page_hash in event.block_hashes:
                page = self._page_of.get(page_hash)
                if page is None or event.medium not in self.where.get(page, set()):
                    raise EventsOutOfOrder(f"removed from {event.medium.name} but was not there: {page}")
                self.drop(page, event.medium)
        elif isinstance(event, AllBlocksCleared):
            for page in self.on(event.medium):
                self.drop(page, event.medium)
        else:
            raise EventsOutOfOrder(f"{event.count} events were lost")

    def _stored(self, event: BlockStored, parents_first: bool) -> None:
        before: Page = (event.namespace, ())
        if event.parent_block_hash is not None:
            before = self._page_of[event.parent_block_hash]
            if parents_first and event.medium not in self.where.get(before, set()):
                raise EventsOutOfOrder(f"stored on {event.medium.name} before its parent: {before}")
        units, size = event.token_ids, event.block_size
        if before[0] != event.namespace or len(units) != size * len(event.block_hashes):
            raise EventsOutOfOrder(f"an event that does not hold together: {event}")
        for at, page_hash in enumerate(event.block_hashes, 1):
            page = (event.namespace, before[1] + units[: at * size])
            if event.medium in self.where.get(page, set()):
                raise EventsOutOfOrder(f"stored on {event.medium.name} twice: {page}")
            self._page_of[page_hash] = page
            self.where.setdefault(page, set()).add(event.medium)
