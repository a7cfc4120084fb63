"""What `match` must answer, said in the plainest way: a flat dict from prefix and kind to tiers.

    where[("tenant", (5, 9, 7, 1), FULL)] = {DEVICE, HOST}      the page that ends this prefix
    where[("tenant", (5, 9, 7, 1), "swa")] = {HOST}             the same page of another kind

There is no tree, no node, no slot and no lock here, and every boundary is tried. The dict is filled
either by what a test did (`put`, `drop`) or by what the cache said happened (`apply`, an event of
`take_events`), and both must agree with the cache. `apply` also holds the events to their order (I9).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..components import Component
from ..events import AllBlocksCleared, BlockRemoved, BlockStored, Event
from ..types import FULL, Kind, Tier

Page = tuple[str, tuple[int, ...], Kind]
"""One page of one kind: its namespace, all token units up to its end, the kind."""


class EventsOutOfOrder(AssertionError):
    """An event that cannot follow the ones before it."""


class Found(NamedTuple):
    """What a `Match` must say, in pages."""

    device_boundary: int
    memory_boundary: int
    full_reach: int
    branching_point: int | None


class Oracle:
    """Which pages are where. `page_size` in token units; `rules` of every kind but FULL. `prefix_of` says
    which namespace and units a page hash of an event stands for."""

    def __init__(self, page_size: int, rules: Sequence[Component] = ()) -> None:
        self.page_size = page_size
        self.rules = tuple(rules)
        self.where: dict[Page, set[Tier]] = {}
        self.prefix_of: dict[bytes, tuple[str, tuple[int, ...]]] = {}

    def pages(self, units: Sequence[int], namespace: str = "", kind: Kind = FULL) -> list[Page]:
        """Every whole page of `units`, the first one first."""
        size = self.page_size
        ends = range(size, len(units) - len(units) % size + 1, size)
        return [(namespace, tuple(units[:end]), kind) for end in ends]

    def match(self, units: Sequence[int], namespace: str = "") -> Found:
        """What a lookup of `units` must find: the deepest boundary valid on device, the deepest valid in
        memory, how far FULL alone reaches in memory, and where to save a new state."""
        boundaries = range(1, len(units) // self.page_size + 1)
        device, memory = {Tier.DEVICE}, {Tier.DEVICE, Tier.HOST}

        def deepest(valid: list[int]) -> int:
            return max(valid, default=0)

        best = deepest([b for b in boundaries if self.valid(units, namespace, b, memory)])
        reach = deepest([b for b in boundaries if self.there(units, namespace, FULL, 0, b, memory)])
        aligned = [b for b in range(best + 1, reach + 1) if self.on_every_grid(b)]
        return Found(
            deepest([b for b in boundaries if self.valid(units, namespace, b, device)]),
            best,
            reach,
            deepest(aligned) or None,
        )

    def valid(self, units: Sequence[int], namespace: str, boundary: int, tiers: set[Tier]) -> bool:
        """Whether every kind can continue at `boundary` from what is on `tiers` (I8): FULL needs all
        pages before it, every other kind those since the page that its rules name."""
        return self.there(units, namespace, FULL, 0, boundary, tiers) and all(
            self.there(units, namespace, rules.kind, rules.since(boundary, self.page_size), boundary, tiers)
            for rules in self.rules
        )

    def there(
        self, units: Sequence[int], namespace: str, kind: Kind, first: int, stop: int, tiers: set[Tier]
    ) -> bool:
        """Whether each of the pages `first .. stop` of `kind` is on one of `tiers`."""
        ends = range((first + 1) * self.page_size, stop * self.page_size + 1, self.page_size)
        return all(tiers & self.where.get((namespace, tuple(units[:end]), kind), set()) for end in ends)

    def on_every_grid(self, boundary: int) -> bool:
        """Whether a state of each kind may be kept at `boundary`."""
        return all(boundary % rules.grid(self.page_size) == 0 for rules in self.rules)

    def put(
        self, units: Sequence[int], namespace: str = "", tier: Tier = Tier.DEVICE, kind: Kind = FULL
    ) -> None:
        """Every page of `units` of `kind` is on `tier` from now on."""
        for page in self.pages(units, namespace, kind):
            self.where.setdefault(page, set()).add(tier)

    def drop(self, page: Page, tier: Tier) -> None:
        """`page` is not on `tier` any more."""
        self.where[page].discard(tier)
        if not self.where[page]:
            del self.where[page]

    def on(self, tier: Tier, kind: Kind = FULL) -> set[Page]:
        """Every page of `kind` that is on `tier`."""
        return {page for page, tiers in self.where.items() if tier in tiers and page[2] == kind}

    # -- fed by events ----------------------------------------------------------------------------

    def apply(self, event: Event, parents_first: bool = False) -> None:
        """Believe one event. Raises EventsOutOfOrder if the page was there already (stored), was not
        there (removed), or, of FULL with `parents_first`, came before its parent."""
        if isinstance(event, BlockStored):
            self._stored(event, parents_first and event.kind == FULL)
        elif isinstance(event, BlockRemoved):
            for page_hash in event.block_hashes:
                prefix = self.prefix_of.get(page_hash)
                page = None if prefix is None else (*prefix, event.kind)
                if page is None or event.medium not in self.where.get(page, set()):
                    raise EventsOutOfOrder(f"removed from {event.medium.name} but was not there: {page}")
                self.drop(page, event.medium)
        elif isinstance(event, AllBlocksCleared):
            for page in [page for page, tiers in self.where.items() if event.medium in tiers]:
                self.drop(page, event.medium)
        else:
            raise EventsOutOfOrder(f"{event.count} events were lost")

    def _stored(self, event: BlockStored, parents_first: bool) -> None:
        namespace, before = event.namespace, tuple[int, ...]()
        if event.parent_block_hash is not None:
            namespace, before = self.prefix_of[event.parent_block_hash]
            if parents_first and event.medium not in self.where.get((namespace, before, FULL), set()):
                raise EventsOutOfOrder(f"stored on {event.medium.name} before its parent: {before}")
        units, size = event.token_ids, event.block_size
        if namespace != event.namespace or len(units) != size * len(event.block_hashes):
            raise EventsOutOfOrder(f"an event that does not hold together: {event}")
        for at, page_hash in enumerate(event.block_hashes, 1):
            prefix = (namespace, before + units[: at * size])
            page = (*prefix, event.kind)
            if event.medium in self.where.get(page, set()):
                raise EventsOutOfOrder(f"stored on {event.medium.name} twice: {page}")
            self.prefix_of[page_hash] = prefix
            self.where.setdefault(page, set()).add(event.medium)
