"""What a request has of a kind beside FULL, and what an engine saves of it.

    page        0 ───── hit ─────────── branching point ──── checkpoint ───────── last whole page
    computed            │·····················│··················│··························│
    window saved        │                 ████│              ████│                      ████│
    state saved         │                    █│                 █│                         █│

An engine lets go of early pages of a window, and writes over its one state, while it prefills. What it
allocates a slot for is what continuing at some boundaries needs: the end of the prompt, then the
branching point that the match named, then checkpoints from the last to the first, each of them whole or
not at all, as far as there is room.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache import PrefixCache
from ..tree.lease import Lease
from ..types import Kind, NoRoom, Slots
from .options import KindPlan
from .payload import PageBytes
from .report import KindTally

NONE = -1
"""Says in an insert that the request has nothing of the kind at a page."""
EMPTY: Slots = np.empty(0, np.int64)


class Prompt(NamedTuple):
    """What a request inserts: `pages` whole pages, and what its match named as `branching` point. `numbers`
    are those of its pages, for payloads."""

    numbers: NDArray[np.int64]
    pages: int
    branching: int | None


class Saver:
    """An engine's layers of one kind, going through `cache` one request at a time. Counts in `tally`."""

    def __init__(self, cache: PrefixCache, plan: KindPlan, tally: KindTally, data: PageBytes | None) -> None:
        self.kind: Kind = plan.rules.kind
        self._cache = cache
        self._plan = plan
        self._tally = tally
        self._bytes = data

    def compare(self, lease: Lease, numbers: NDArray[np.int64]) -> None:
        """A hit came with the window of `lease`; `numbers` are those of the request's pages."""
        window = lease.window(self.kind)
        if self._bytes is not None and len(window.slots):
            self._bytes.compare(numbers[window.first :][: len(window.slots)], window.slots)

    def save(self, lease: Lease, prompt: Prompt) -> Slots:
        """The request computes its pages from the lease's device boundary on, and saves what is worth it: a
        slot for each of these pages, or NONE. O(pages + boundaries)."""
        first = lease.device_boundary
        most = self._plan.rules.per_path or prompt.pages
        places = self._places(first, prompt, most)
        wanted = len(places)
        own = self._own_copy(lease, prompt.numbers) if self._plan.overwrites and first and wanted else EMPTY
        slots = self._allocate(wanted - len(own), lease)
        while isinstance(slots, NoRoom):
            room = slots.free + slots.reclaimable
            most = len(own) + (room if room < slots.wanted else slots.free)
            places = self._places(first, prompt, most)
            slots = self._allocate(len(places) - len(own), lease)
        saved = np.full(prompt.pages - first, NONE, np.int64)
        saved[places - first] = np.concatenate((slots, own))
        self._tally.saved += len(places)
        self._tally.uncached += wanted - len(places)
        if self._bytes is not None:
            self._bytes.fill(prompt.numbers[places], saved[places - first])
        return saved

    def _allocate(self, count: int, lease: Lease) -> Slots | NoRoom:
        return patiently(self._cache, lambda: self._cache.allocate(count, lease, 0, self.kind))

    def _own_copy(self, lease: Lease, numbers: NDArray[np.int64]) -> Slots:
        """The request goes on in a copy of the state that it hit, which becomes that of its end."""
        cache = self._cache
        copy = patiently(cache, lambda: cache.copy_on_write(lease, self.kind, 0))
        if isinstance(copy, NoRoom):
            return EMPTY
        if self._bytes is not None:
            self._bytes.compare(numbers[lease.window(self.kind).first :][: len(copy)], copy)
        return copy

    def _places(self, first: int, prompt: Prompt, most: int) -> Slots:
        """At most `most` of the prompt's pages from `first` on to save, ascending."""
        rules, size, last = self._plan.rules, self._cache.config.page_size, prompt.pages
        boundaries = [last, prompt.branching or 0]
        if self._plan.every is not None:
            step = self._plan.every // size
            boundaries += range(last - last % step, first, -step)
        chosen, left = np.zeros(prompt.pages, bool), most
        for boundary in boundaries:
            if first < boundary <= last:
                window = chosen[max(first, rules.since(boundary, size)) : boundary]
                more = len(window) - int(np.count_nonzero(window))
                if more <= left:
                    window[:] = True
                    left -= more
        return np.flatnonzero(chosen)


def patiently(cache: PrefixCache, ask: Callable[[], Slots | NoRoom]) -> Slots | NoRoom:
    """What `ask` gives once nothing that it could have is still being copied away."""
    given = ask()
    while isinstance(given, NoRoom) and given.pending:
        cache.drain()
        given = ask()
    return given
