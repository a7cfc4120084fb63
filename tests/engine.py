"""The requests of an engine, and everything that a request does.

What a lease has promised is remembered here, in plain sets, and held against the cache in `world.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pytest
from draws import Habits
from rare import Watch
from rig import Rig

from tiertree import (
    FULL,
    BlockRemoved,
    Inserted,
    InvalidSlots,
    Lease,
    LeaseReleased,
    LoadBack,
    Match,
    NoRoom,
    Refused,
    Stats,
    Tier,
    WritePolicy,
)
from tiertree.testing.oracle import Found, Oracle, Page
from tiertree.tree.actions import Action, Copy
from tiertree.types import Kind, Slots

DEVICE, HOST = Tier.DEVICE, Tier.HOST
REQUESTS_MAX = 3


@dataclass
class Draft:
    """What a request computes: `tokens`, from page `first` on, those of `pages` of each kind, in the
    `slots` that it has got so far."""

    tokens: list[int]
    first: int
    pages: dict[Kind, list[int]]
    slots: dict[Kind, Slots] = field(default_factory=dict)


@dataclass
class Request:
    """One request that runs: its lease, its tokens, its load-back, what it is computing.

    `windows` are the pages of each kind that its lease has promised on device; at its memory boundary all
    of `valid` can continue. A lease whose prefix was cleared is `forgotten`: only its slots are good."""

    lease: Lease
    tokens: list[int]
    windows: dict[Kind, dict[int, int]] = field(default_factory=dict)
    valid: set[Kind] = field(default_factory=set)
    load: LoadBack | None = None
    draft: Draft | None = None
    forgotten: bool = False


class Engine(Rig):
    """A cache, its requests, and an oracle that knows only the cache's events. `ever` are the pages that
    were ever computed, `computed` the prompts of late; `restarted` holds until something is computed."""

    def __init__(self, **options: object) -> None:
        self.requests: list[Request] = []
        self.ever: set[Page] = set()
        self.computed: list[tuple[list[int], str]] = []
        self.heard: list[BlockRemoved] = []
        self.seen: Counter[str] = Counter()
        self.restarted = False
        super().__init__(**options)  # type: ignore[arg-type]

    def _open(self) -> None:
        super()._open()
        self.oracle = Oracle(self.page_size, [each.rules for each in self.kinds.values()])
        self.watch = Watch(self)

    def listen(self) -> None:
        """The oracle hears what has happened; what was removed is kept in `heard`."""
        closed = self.cache.config.write_policy is not WritePolicy.WRITE_BACK
        for event in self.cache.take_events():
            medium = getattr(event, "medium", None)
            self.oracle.apply(event, medium == DEVICE or (medium == HOST and closed))
            if isinstance(event, BlockRemoved):
                self.heard.append(event)

    # -- requests ---------------------------------------------------------------------------------

    def match(self, tokens: list[int], namespace: str) -> None:
        """A lookup answers what the oracle answers, and a peek changes nothing."""
        self.listen()
        key = self.cache.key(tokens, namespace)
        before = self.cache.stats(), self.core.radix.nodes
        self._adds_up(before[0])
        want = self.right(self.cache.peek(key), tokens, namespace)
        assert (self.cache.stats(), self.core.radix.nodes) == before
        self.right(self.cache.match(key), tokens, namespace)
        assert want.device_boundary <= want.memory_boundary <= want.full_reach <= key.pages
        self.seen["branching point seen"] += want.branching_point is not None
        self.seen["restart hit from storage"] += self.restarted and want.memory_boundary > 0

    @staticmethod
    def _adds_up(stats: Stats) -> None:
        """Every slot of every pool is counted once (I5)."""
        for tiers in (stats, *stats.kinds.values()):
            for pool in (tiers.device, tiers.host):
                parts = pool.free + pool.resident + pool.detached + pool.requests + pool.operations
                assert parts + pool.lost == pool.capacity

    def right(self, found: Match, tokens: list[int], namespace: str) -> Found:
        """What was found is what the oracle finds; the lookup itself may have made room for a backup."""
        self.listen()
        want = self.oracle.match(tokens, namespace)
        answer = (found.device_boundary, found.memory_boundary, found.full_reach, found.branching_point)
        assert answer == want
        return want

    def begin(self, tokens: list[int], namespace: str, peek: bool = False) -> None:
        """A request arrives and leases what there is."""
        if len(self.requests) == REQUESTS_MAX:
            self.finish(self.requests[0], cancel=False)
        look = self.cache.peek if peek else self.cache.match
        lease = self.cache.acquire(look(self.cache.key(tokens, namespace)))
        request = Request(lease, tokens, valid=set(self.kinds))
        self.verify_windows(lease)
        self._promised(request)
        self.requests.append(request)

    def _promised(self, request: Request) -> None:
        """Remember the slots that the lease has in its windows now: they are promised."""
        for kind in self.kinds:
            if kind in request.lease.returned:  # it was, and the lease has not moved since: no page came
                continue
            window = request.lease.window(kind)
            pages = enumerate(window.slots.tolist(), window.first)
            request.windows[kind] = {page: slot for page, slot in pages if slot >= 0}

    def draft(self, request: Request, more: list[int], habits: Habits) -> None:
        """The request begins to compute its missing pages, and `more` tokens behind them."""
        tokens = [*request.tokens, *more]
        first, stop = request.lease.device_boundary, len(tokens) // self.page_size
        request.draft = Draft(tokens, first, self._habitual(first, stop, habits))

    def _habitual(self, first: int, stop: int, habits: Habits) -> dict[Kind, list[int]]:
        """The pages of each kind that a request has of pages `first .. stop`."""
        pages = {}
        for kind, habit in zip(self.kinds, habits, strict=False):
            needed, middle = self.needed(kind, stop), self.needed(kind, (first + stop) // 2)
            chosen: Iterable[int] = {
                "what it needs": needed,
                "all": range(first, stop),
                "nothing": (),
                "the last page": range(stop - 1, stop),
                "two ends": sorted({*middle, *needed}),
                "every other page": range(first, stop, 2),
            }[habit]
            pages[kind] = [page for page in chosen if first <= page < stop]
        return pages

    def work(self, request: Request, deadline: float, stall: int = 9) -> None:
        """The request takes slots for its draft, kind by kind, and inserts it when it has all; it stops
        after `stall` kinds, to go on later."""
        draft, lease = request.draft, request.lease
        assert draft is not None
        counts = {FULL: len(draft.tokens) // self.page_size - draft.first}
        counts.update((kind, len(pages)) for kind, pages in draft.pages.items())
        for kind in [kind for kind in counts if kind not in draft.slots]:
            if not stall:
                self.seen["stalled"] += 1
                return
            stall -= 1
            slots = self.cache.allocate(counts[kind], lease, deadline_s=deadline, kind=kind)
            if isinstance(slots, NoRoom):
                self.seen["no room"] += 1
                self._give_back(request)
                self.finish(request, cancel=True)  # an engine would preempt it
                return
            draft.slots[kind] = slots
            if lease.device_boundary != draft.first:  # a load-back came in while room was made
                self._give_back(request)
                return
        self._insert_draft(request, draft)

    def _give_back(self, request: Request) -> None:
        draft, request.draft = request.draft, None
        if draft is not None:
            for kind, slots in draft.slots.items():
                self.cache.free(slots, request.lease, kind=kind)

    def _insert_draft(self, request: Request, draft: Draft) -> None:
        lease = request.lease
        if lease.device_boundary != draft.first:  # a load-back came in while it was stalled
            self._give_back(request)
            return
        key = self.cache.key(draft.tokens, lease.key.namespace)
        done = self._insert(draft, key.namespace, lease)
        if isinstance(done, Refused):
            assert request.forgotten
            self.seen["insert refused after clear"] += 1
            self._give_back(request)
            return
        request.tokens, request.load, request.draft = draft.tokens, None, None
        assert lease.device_boundary == lease.memory_boundary == lease.reach == key.pages
        assert not (lease.returned and key.pages)
        self._promised(request)
        request.forgotten = False
        needed = {kind: len(self.needed(kind, key.pages)) for kind in request.windows}
        request.valid = {kind for kind, count in needed.items() if len(request.windows[kind]) == count}

    def _insert(self, draft: Draft, namespace: str, lease: Lease | None) -> Inserted | Refused:
        """Write what was computed, insert it, and look at what has become of it."""
        key = self.cache.key(draft.tokens, namespace)
        self.write(draft.slots[FULL], draft.tokens, namespace, draft.first)
        partial, path = {}, self.oracle.pages(draft.tokens, namespace)
        for kind, pages in draft.pages.items():
            slots = np.full(key.pages - draft.first, -1, np.int64)
            slots[np.array(pages, np.int64) - draft.first] = draft.slots[kind]
            self.write(slots, draft.tokens, namespace, draft.first, kind)
            partial[kind] = slots
        brought = {(*path[at][:2], kind) for kind, pages in draft.pages.items() for at in pages}
        self.listen()
        self.watch.before_insert(brought)
        done = self.cache.insert(key, draft.slots[FULL], lease, partial=partial)
        if isinstance(done, Inserted):
            self.seen["canonical slots"] += bool(done.existing)
            self.ever.update(path, brought)
            self.computed = [*self.computed[-3:], (draft.tokens, namespace)]
            self.restarted = False
            self.listen()
            self.watch.after_insert(brought, path)
        return done

    def insert(self, tokens: list[int], namespace: str, habits: Habits, give_back: bool) -> None:
        """Pages are computed without a lease."""
        stop = len(tokens) // self.page_size
        draft = Draft(tokens, 0, self._habitual(0, stop, habits))
        counts = {FULL: stop, **{kind: len(pages) for kind, pages in draft.pages.items()}}
        for kind, count in counts.items():
            slots = self.cache.allocate(count, deadline_s=0, kind=kind)
            if isinstance(slots, NoRoom):
                give_back = True
                break
            draft.slots[kind] = slots
        if give_back:
            for kind, slots in draft.slots.items():
                self.cache.free(slots, kind=kind)
            return
        assert isinstance(self._insert(draft, namespace, None), Inserted)

    def hoard(self, request: Request, pages: int, kind: Kind) -> None:
        """The request takes slots and does not insert them: they go back with its lease."""
        self.cache.allocate(pages, request.lease, deadline_s=0, kind=kind)

    def copy_on_write(self, request: Request, kind: Kind, deadline: float) -> None:
        """The request takes a copy of a window for itself and writes over it."""
        lease, window = request.lease, request.windows.get(kind)
        if window is None or len(window) < len(lease.window(kind).slots):
            with pytest.raises(LeaseReleased if window is None else InvalidSlots):
                self.cache.copy_on_write(lease, kind)
            return
        slots = self.cache.copy_on_write(lease, kind, deadline_s=deadline)
        if isinstance(slots, NoRoom):
            return
        contents = self.executor.of(kind)[DEVICE]
        assert len(slots) == len(window)
        assert [contents[slot] for slot in slots] == [contents[slot] for slot in window.values()]
        self.seen["copied on write"] += len(slots) > 0
        for slot in slots.tolist():
            contents[slot] = "the request has gone on"

    def release_window(self, request: Request, kind: Kind) -> None:
        """The request gives back what its lease locks of one kind, which it can do once."""
        if kind not in request.windows:
            with pytest.raises(LeaseReleased):
                self.cache.release_window(request.lease, kind)
            return
        self.cache.release_window(request.lease, kind)
        self.seen["window released early"] += bool(request.windows.pop(kind))
        request.valid.discard(kind)

    def finish(self, request: Request, cancel: bool) -> None:
        """The request ends, well or aborted."""
        self.requests.remove(request)
        if cancel:
            self.cache.cancel(request.lease)
        else:
            request.lease.release()

    def load_back(self, request: Request, deadline: float) -> None:
        """Bring the request's host pages to device."""
        before, first = set(self.core.operations.in_flight), len(self.executor.submitted)
        load = self.cache.load_back(request.lease, deadline_s=deadline)
        if isinstance(load, LoadBack):
            request.load = load
            joined = bool(before & set(load.operations))
            self.seen["joined load-back"] += joined
            self.listen()
            self._brings_what_it_must(request, load, self.executor.submitted[first:], joined)

    def _brings_what_it_must(
        self, request: Request, load: LoadBack, actions: list[Action], joined: bool
    ) -> None:
        """A load-back moves what continuing at its boundary lacks on device, unless others do, no more."""
        tokens, namespace, stop = request.tokens, request.lease.key.namespace, load.boundary
        copies = [action for action in actions if isinstance(action, Copy) and action.target == DEVICE]
        moved = Counter({move.kind: len(move.source) for copy in copies for move in copy.moves})
        for kind in (FULL, *self.kinds):
            needed = range(stop) if kind == FULL else self.needed(kind, stop)
            pages = self.oracle.pages(tokens, namespace, kind)
            lacking = sum(DEVICE not in self.oracle.where.get(pages[page], set()) for page in needed)
            assert moved[kind] <= lacking if joined else moved[kind] == lacking, (load, kind)

    def stop_loading(self, request: Request) -> None:
        """The request does not want its load-back any more."""
        if request.load is not None:
            self.cache.cancel(request.load)
