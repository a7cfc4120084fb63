"""One request being served: what it holds of the cache, and how far it is.

    token     0 ─────────── base ──────────────── done ────────────── len(tokens)
    FULL      │ the lease's │ own, computed        │ own, to be computed │
    a window  ········ ████ │ ██████ (own; those that were passed are given back)
    a state   one that the lease pins, or an own one · and the one saved at the last page boundary

`commit` inserts the whole computed pages: they become the tree's, and the lease grows over them (`base`
moves up to `done`). Boundaries are in pages, all else in tokens. One token left to compute: decoding.
"""

from __future__ import annotations

import time
from typing import Final

import numpy as np
from numpy.typing import NDArray

from ..cache import PrefixCache
from ..config import KindConfig, StateLayout
from ..tree.key import Key
from ..tree.lease import Lease
from ..tree.load import LoadBack, Progress
from ..tree.prefetch import Prefetch
from ..types import FULL, Kind, NoRoom, Refused, Slots
from .request import Cached, Reply
from .row import Move, Row, Table
from .sampling import Chooser

NONE: Final = -1
BEYOND_LAYERS: Final = 1 << 30
LAYER_SECONDS: Final = 0.0002
"""How long a forward pass sleeps between two looks at whether a layer has been loaded back."""


Lacking = tuple[Kind, NoRoom]
"""Of which kind there is no room on device."""


class Lost(Exception):
    """What a request relied on has not come from host, or is no longer there: it must begin again."""


class Pages:
    """Own slots of pages `first ..` of one kind."""

    __slots__ = ("first", "slots")

    def __init__(self, first: int) -> None:
        self.first = first
        self.slots: Slots = np.empty(0, np.int64)

    @property
    def end(self) -> int:
        """The page after the last one."""
        return self.first + len(self.slots)

    def add(self, slots: Slots) -> None:
        """`slots` are for the pages from `end` on."""
        self.slots = np.concatenate((self.slots, slots))

    def cut(self, page: int) -> Slots:
        """Take off the slots of pages before `page`."""
        count = min(max(page - self.first, 0), len(self.slots))
        head, self.slots = self.slots[:count], self.slots[count:]
        self.first += count
        return head


class State:
    """Slots of one recurrent kind. `current` is where the state after `done` tokens is (NONE: there is none
    yet), its own to write over unless it is `pinned` by the lease or `saved` = (pages, slot) for the tree."""

    __slots__ = ("current", "pinned", "saved", "spare")

    def __init__(self, current: int) -> None:
        self.current = current
        self.pinned = True
        self.saved: tuple[int, int] | None = None
        self.spare: list[int] = []

    @property
    def writable(self) -> bool:
        """Whether the next state may be written over `current`."""
        return not self.pinned and (self.saved is None or self.saved[1] != self.current)

    def move(self) -> Move:
        """Where the next pass reads and writes. Needs a spare slot unless `writable`."""
        return Move(self.current, self.current if self.writable else self.spare[-1])

    def moved(self, boundary: int | None) -> None:
        """The pass is over; at a `boundary` (in pages) what it wrote is worth saving."""
        if not self.writable:
            self.current, self.pinned = self.spare.pop(), False
        if boundary is not None:
            if self.saved is not None:
                self.spare.append(self.saved[1])
            self.saved = (boundary, self.current)


class Sequence:
    """`reply`'s request on its way through `cache`. `units` stand for its prompt in keys of namespace
    `scope`. Whether it waits or runs is the scheduler's to know."""

    def __init__(
        self, cache: PrefixCache, reply: Reply, units: NDArray[np.int64], scope: str, seed: int
    ) -> None:
        self.reply = reply
        self.tokens: list[int] = [int(each) for each in reply.request.tokens]
        self.scope = scope
        self.chooser = Chooser(reply.request.sampling, seed)
        self.prefetch: Prefetch | None = None
        self.prefetched = False
        self.landed = 0
        self.overtaken = 0
        self.starving_since: float | None = None
        self.may_load = True
        self.restarts = 0
        self.closing = False
        self.done = 0
        self.base = 0
        self.load: LoadBack | None = None
        self.lease: Lease | None = None
        self._cache = cache
        self._page: int = cache.config.page_size
        self._units = units
        self._key: Key | None = None
        self._orphan = False
        self._computed = False
        self._full = Pages(0)
        self._shared: Slots = self._full.slots
        self._rules = {each.kind: each.rules for each in cache.config.kinds}
        self._windows: dict[Kind, Pages] = {}
        self._behind: dict[Kind, Table] = {}
        self._states: dict[Kind, State] = {}
        self._stops: tuple[int, ...] = ()

    @property
    def left(self) -> int:
        """Tokens that are known but not computed."""
        return len(self.tokens) - self.done

    @property
    def decoding(self) -> bool:
        """Whether its next pass computes a single token of its answer, behind tokens that are on device."""
        return self.left == 1 and self.done > 0 and self.load is None and bool(self.reply.tokens)

    def key(self, tokens: int) -> Key:
        """The key of its first `tokens` tokens."""
        answer = np.array(self.reply.tokens, np.int64)
        return self._cache.key(np.concatenate((self._units, answer))[:tokens], self.scope)

    # -- admission --------------------------------------------------------------------------------

    def admit(self, most: int) -> Lacking | None:
        """Lease what the cache has of it, start loading what is on host, and take device pages of FULL for
        all of its known tokens, of other kinds for a first pass of at most `most`. None: it may run; else it
        holds nothing."""
        cache = self._cache
        self._key = self.key(len(self.tokens) - 1)
        match = cache.match(self._key)
        branching = (match.branching_point or 0) * self._page
        if not self.may_load:  # and hold nothing beyond, which may be the room that it lacks
            match = cache.match(self._key.head(match.device_boundary))
        lease = self.lease = cache.acquire(match)
        device, boundary, target = lease.device_boundary, lease.device_boundary, lease.memory_boundary
        wanted = -(-len(self.tokens) // self._page)
        own = cache.allocate(wanted - target, lease, 0)
        if not isinstance(own, NoRoom) and target > device:
            load = cache.load_back(lease, 0)
            if isinstance(load, LoadBack):
                self.load, boundary = load, load.boundary
            more = cache.allocate(target - boundary, lease, 0)
            own = more if isinstance(more, NoRoom) else np.concatenate((more, own))
        if isinstance(own, NoRoom):
            self.release()
            return FULL, own
        try:
            self._begin(device, boundary, own)
        except Lost:
            self.may_load = False
            self.release()
            return self.admit(most)
        if self._states:
            grid = max(self._rules[kind].grid(self._page) for kind in self._states) * self._page
            last = (len(self.tokens) - 1) // grid * grid
            self._stops = (last, branching)
        lacking = self.ensure(self.chunk(most))
        if lacking is not None:
            self.release()
        return lacking

    def _begin(self, device: int, boundary: int, own: Slots) -> None:
        self.base, self.done = boundary, boundary * self._page
        self._full = Pages(boundary)
        self._full.add(own)
        for each in self._cache.config.kinds:
            if is_state(each):
                self._states[each.kind] = State(NONE)
            else:
                self._windows[each.kind] = Pages(boundary)
        self._look_behind()
        if not self._computed:
            storage = min(self.landed, boundary - device)
            counts = (device, boundary - device - storage, storage)
            self.reply.cached = Cached(*(count * self._page for count in counts))

    def _look_behind(self) -> None:
        """Where what it goes on from is now: a page being loaded may be brought by others meanwhile. Raises
        Lost where it is no longer."""
        load, lease = self.load, self.lease
        assert lease is not None
        if load is not None and load.state is Progress.FAILED:
            raise Lost
        if load is not None and load.state is Progress.DONE:
            load = self.load = None
        self._shared = lease.slots if load is None else np.concatenate((lease.slots, load.slots))
        for kind in self._rules:
            slots = lease.window(kind).slots if load is None else load.window(kind)
            if (slots < 0).any():
                raise Lost
            if kind in self._windows:
                self._behind[kind] = Table(self.base - len(slots), slots)
            elif self.base:
                self._states[kind].current = int(slots[-1])

    def outdated(self) -> bool:
        """Whether it has nothing that the cache has not, and others have more of its prompt on device by now.
        What is on host alone does not count: where it cannot be loaded, beginning again would lose what only
        the lease has (a state off its grid). O(pages)."""
        if self._key is None or self.load is not None or self.done > self.base * self._page:
            return False
        return self._cache.peek(self._key).device_boundary > self.base

    # -- passes -----------------------------------------------------------------------------------

    def chunk(self, most: int) -> int:
        """How many tokens its next pass computes, at most `most`. With recurrent state it ends where one is
        worth saving: at the last page boundary of the prompt, and where the prompt branches from others."""
        end = self.done + min(self.left, most)
        return min([stop for stop in self._stops if self.done < stop < end], default=end) - self.done

    def ensure(self, count: int) -> Lacking | None:
        """Take what the next `count` tokens need on device; None when all is there."""
        assert self.lease is not None
        end = -(-(self.done + count) // self._page)
        for kind, pages in ((FULL, self._full), *self._windows.items()):
            if end > pages.end:
                slots = self._cache.allocate(end - pages.end, self.lease, 0, kind)
                if isinstance(slots, NoRoom):
                    return kind, slots
                pages.add(slots)
        for kind, state in self._states.items():
            if not state.writable and not state.spare:
                slots = self._cache.allocate(1, self.lease, 0, kind)
                if isinstance(slots, NoRoom):
                    return kind, slots
                state.spare.append(int(slots[0]))
        return None

    def row(self, count: int) -> Row:
        """Its next `count` tokens as a runner takes them. Raises Lost when it must begin again."""
        if self.load is not None:
            self._look_behind()
        tables = {FULL: Table(0, np.concatenate((self._shared, self._full.slots)))}
        for kind, pages in self._windows.items():
            behind = self._behind.get(kind)
            tables[kind] = (
                Table(pages.first, pages.slots)
                if behind is None
                else Table(behind.first, np.concatenate((behind.slots, pages.slots)))
            )
        return Row(
            self.done,
            self.tokens[self.done : self.done + count],
            tables,
            {kind: state.move() for kind, state in self._states.items()},
            None if self.load is None else self._layer_ready,
            self.reply.request.embeds,
        )

    def _layer_ready(self, layer: int) -> None:
        """Wait until `layer` of what is being loaded has arrived, for BEYOND_LAYERS until the load-back is
        over. Raises Lost if it fails."""
        cache, load = self._cache, self.load
        while load is not None and load.state is Progress.PENDING and cache.layers_ready(load) <= layer:
            if not cache.poll():
                time.sleep(LAYER_SECONDS)
        if load is not None and load.state is Progress.FAILED:
            raise Lost

    def advance(self, count: int) -> None:
        """A pass has computed `count` tokens. Raises Lost if what it read has failed to arrive."""
        assert self.lease is not None
        self._layer_ready(BEYOND_LAYERS)
        self.load, self._computed = None, True
        self.done += count
        pages, rest = divmod(self.done, self._page)
        for kind, state in self._states.items():
            whole = rest == 0 and pages % self._rules[kind].grid(self._page) == 0
            if state.pinned and state.current != NONE:
                self._cache.release_window(self.lease, kind)
            state.moved(pages if whole else None)

    def pass_windows(self) -> None:
        """Give back pages of windows that decoding has moved past."""
        lease, boundary = self.lease, self.done // self._page
        assert lease is not None
        for kind, pages in self._windows.items():
            since = self._rules[kind].since(boundary, self._page) if boundary else 0
            if since >= pages.first and kind in self._behind:
                del self._behind[kind]
                self._cache.release_window(lease, kind)
            passed = pages.cut(since)
            if len(passed):
                self._cache.free(passed, lease, kind)

    # -- handing over -----------------------------------------------------------------------------

    def commit(self) -> None:
        """Insert the whole pages that are computed, and go on behind them. Raises Lost where the cache did
        not keep what going on needs. O(pages)."""
        pages = self.done // self._page
        if self.hand_over():
            self._moved_to(pages)

    def hand_over(self) -> bool:
        """Insert the whole pages that are computed, for others: only `commit` goes on behind them. False if
        there are none, or the prefix was cleared meanwhile: the request keeps its slots then. O(pages)."""
        pages, base = self.done // self._page, self.base
        if pages <= base or self._orphan:
            return False
        assert self.lease is not None
        assert self._key is not None
        key = self._key.head(pages) if self._key.pages >= pages else self.key(self.done)
        partial = {kind: np.full(pages - base, NONE, np.int64) for kind in self._rules}
        for kind, own in self._windows.items():
            there = own.slots[: max(0, pages - own.first)]
            partial[kind][own.first - base : own.first - base + len(there)] = there
        for kind, state in self._states.items():
            if state.saved is not None:
                partial[kind][state.saved[0] - 1 - base] = state.saved[1]
        done = self._cache.insert(key, self._full.slots[: pages - base], self.lease, partial)
        self._orphan = isinstance(done, Refused)
        return not self._orphan

    def _moved_to(self, pages: int) -> None:
        lease = self.lease
        assert lease is not None
        self.base, self._shared = pages, lease.slots
        self._full.cut(pages)
        for kind, own in self._windows.items():
            own.cut(pages)
            own.first = max(own.first, pages)
            self._behind[kind] = Table(*_pinned(lease, kind))
        for kind, state in self._states.items():
            if state.saved is not None and state.saved[1] == state.current:
                state.current, state.pinned = int(_pinned(lease, kind)[1][-1]), True
            state.saved = None

    def release(self) -> None:
        """Give back what it holds. What is not committed will be computed again."""
        if self.lease is not None:
            self._cache.cancel(self.lease)
        self.lease = self.load = self._key = None
        self.done = self.base = 0
        self._orphan = False
        self._windows, self._behind, self._states, self._stops = {}, {}, {}, ()

    def forget_prefetch(self) -> None:
        """Stop waiting for storage; what arrives later is freed."""
        if self.prefetch is not None:
            self._cache.cancel(self.prefetch)
        self.prefetch, self.prefetched = None, False


def _pinned(lease: Lease, kind: Kind) -> tuple[int, Slots]:
    """What `lease` pins of `kind`. Raises Lost where the cache did not keep it."""
    window = lease.window(kind)
    if (window.slots < 0).any():
        raise Lost
    return window.first, window.slots


def is_state(kind: KindConfig) -> bool:
    """Whether a kind is a recurrent state, and not a window over tokens."""
    return isinstance(kind.layout, StateLayout)
