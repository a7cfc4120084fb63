"""Everything that can happen to one small cache, one step at a time, and what must hold after each.

The state machine draws steps with Hypothesis, the campaign and the soak from a seeded generator; both
end in `farewell`. `seen` counts the rare paths, so that a campaign can prove that it went there.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from rig import Rig

from tiertree import (
    Inserted,
    Lease,
    LoadBack,
    LoadBackConfig,
    NoRoom,
    Prefetch,
    PrefetchConfig,
    Progress,
    Refused,
    StopRule,
    Tier,
    WritePolicy,
)
from tiertree.testing.oracle import Oracle, Page
from tiertree.tree.actions import Get, Put
from tiertree.tree.check import nodes_of, state_of
from tiertree.tree.fetch import Stage
from tiertree.tree.ledger import State
from tiertree.tree.node import Node, fragments
from tiertree.tree.operation import Purpose

REQUESTS_MAX = 3
NAMESPACES = ("", "tenant")
FORKS = (9, 0, 1, 2, 3)
"""Prompts of one family are alike but for one token: where it is, decides where they part."""


@dataclass
class Request:
    """One request that runs: its lease, its tokens, the weights it began with, its load-back."""

    lease: Lease
    tokens: list[int]
    load: LoadBack | None = None


def prompt(fork: int, pages: int, page_size: int, odd: int = 0) -> list[int]:
    """A prompt of `pages` pages and `odd` more tokens, that parts from its family in page `fork`."""
    length = pages * page_size + odd
    return [int(at // page_size == fork) for at in range(length)]


def draw_options(rng: random.Random) -> dict[str, object]:
    """A tiny cache: sizes, policies and limits at which the rare paths are common."""
    host = rng.choice([0, 1, 4, 8, 12, 16])
    return {
        "diligent": rng.random() < 0.7,
        "device": rng.choice([1, 4, 6, 8, 8, 10]),
        "host": host,
        "storage": rng.choice([0, 3, 12, 1000, 1000]) if host else 0,
        "page_size": rng.randint(1, 3),
        "write_policy": rng.choice(list(WritePolicy)),
        "selective_hits": rng.randint(1, 3),
        "op_deadline_seconds": rng.choice([1.0, 30.0, 30.0]),
        "max_operations": rng.choice([2, 4096, 4096]),
        "load_back": LoadBackConfig(min_tokens=rng.choice([0, 2]), max_pages=rng.choice([None, 1, 3])),
        "prefetch": PrefetchConfig(
            min_tokens=rng.choice([0, 2]),
            stop_rule=rng.choice(list(StopRule)),
            base_seconds=0.5,
            max_pages_in_flight=rng.choice([4, 1000]),
        ),
    }


class World(Rig):
    """A cache, its requests and prefetches, and an oracle that knows only the cache's events. Of a
    `diligent` executor something is done whenever the cache waits; another is as slow as the test."""

    def __init__(self, diligent: bool = True, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.oracle = Oracle(self.page_size)
        self.requests: list[Request] = []
        self.fetches: list[Prefetch] = []
        self.ever: set[Page] = set()
        self.computed: list[tuple[list[int], str]] = []
        self.seen: Counter[str] = Counter()
        self.closed = self.cache.config.write_policy is not WritePolicy.WRITE_BACK
        self._watch_splits()
        self.executor.on_wait = self._while_waiting if diligent else lambda: None

    # -- requests ---------------------------------------------------------------------------------

    def match(self, tokens: list[int], namespace: str) -> None:
        """A lookup answers what the oracle answers, and a peek changes nothing."""
        key = self.cache.key(tokens, namespace)
        before = self.cache.stats(), self.core.radix.nodes
        peeked = self.cache.peek(key)
        assert (self.cache.stats(), self.core.radix.nodes) == before
        want = self.oracle.match(tokens, namespace)
        assert (peeked.device_boundary, peeked.memory_boundary) == want
        found = self.cache.match(key)
        assert (found.device_boundary, found.memory_boundary) == want
        assert found.full_reach == found.memory_boundary <= key.pages

    def begin(self, tokens: list[int], namespace: str, peek: bool = False) -> None:
        """A request arrives and leases what there is."""
        if len(self.requests) == REQUESTS_MAX:
            self.finish(self.requests[0], cancel=False)
        look = self.cache.peek if peek else self.cache.match
        lease = self.cache.acquire(look(self.cache.key(tokens, namespace)))
        self.requests.append(Request(lease, tokens))

    def compute(self, request: Request, more: list[int], deadline: float) -> None:
        """The request computes its missing pages, and `more` behind them, and inserts them."""
        lease = request.lease
        tokens = [*request.tokens, *more]
        key = self.cache.key(tokens, lease.key.namespace)
        first = lease.device_boundary
        slots = self.cache.allocate(key.pages - first, lease, deadline_s=deadline)
        if isinstance(slots, NoRoom):
            self.seen["no room"] += 1
            self._note_full()
            self.finish(request, cancel=True)  # an engine would preempt it
            return
        if lease.device_boundary != first:  # a load-back came in while room was made
            self.cache.free(slots, lease)
            return
        self.write(slots, tokens, key.namespace, first)
        done = self.cache.insert(key, slots, lease)
        if isinstance(done, Refused):
            self.seen["insert refused after clear"] += 1
            return
        self.seen["canonical slots"] += bool(done.existing)
        self._learn(tokens, key.namespace)
        request.tokens, request.load = tokens, None
        assert lease.device_boundary == lease.memory_boundary == key.pages

    def hoard(self, request: Request, pages: int) -> None:
        """The request takes slots and does not insert them: they go back with its lease."""
        self.cache.allocate(pages, request.lease, deadline_s=0)

    def insert(self, tokens: list[int], namespace: str, give_back: bool) -> None:
        """Pages are computed without a lease."""
        key = self.cache.key(tokens, namespace)
        slots = self.cache.allocate(key.pages, deadline_s=0)
        if isinstance(slots, NoRoom):
            return
        self.write(slots, tokens, namespace, 0)
        if give_back:
            self.cache.free(slots)
            return
        assert isinstance(self.cache.insert(key, slots), Inserted)
        self._learn(tokens, namespace)

    def finish(self, request: Request, cancel: bool) -> None:
        """The request ends, well or aborted."""
        self.requests.remove(request)
        if cancel:
            self.cache.cancel(request.lease)
        else:
            request.lease.release()

    def load_back(self, request: Request, deadline: float) -> None:
        """Bring the request's host pages to device."""
        before = set(self.core.operations.in_flight)
        load = self.cache.load_back(request.lease, deadline_s=deadline)
        if isinstance(load, LoadBack):
            request.load = load
            self.seen["joined load-back"] += bool(before & set(load.operations))

    def stop_loading(self, request: Request) -> None:
        """The request does not want its load-back any more."""
        if request.load is not None:
            self.cache.cancel(request.load)

    # -- storage ----------------------------------------------------------------------------------

    def prefetch(self, tokens: list[int], namespace: str) -> None:
        """Read ahead what memory lacks."""
        started = self.cache.prefetch(self.cache.key(tokens, namespace))
        if isinstance(started, Prefetch):
            self.fetches.append(started)

    def look_after(self, fetch: Prefetch, cancel: bool) -> None:
        """Settle a prefetch by the stop rule, or cancel it."""
        if cancel:
            self.cache.cancel(fetch)
        else:
            landed = self.cache.settle(fetch)
            assert (landed is None) == (fetch.stage is not Stage.SETTLED)
        if fetch.stage is Stage.SETTLED:
            self.fetches.remove(fetch)
            self.seen["landed"] += bool(fetch.landed)

    def switch_storage(self) -> None:
        """Detach the storage, or attach it again."""
        if self.storage is None:
            return
        if self.executor.storage is None:
            self.cache.attach_storage(self.storage)
        else:
            self.cache.detach_storage(deadline_s=0)

    # -- room -------------------------------------------------------------------------------------

    def evict(self, pages: int, tier: Tier, deadline: float) -> None:
        """Make room."""
        free = self.free(tier)
        done = self.cache.evict(pages, tier, deadline_s=deadline)
        assert done.freed == max(0, self.free(tier) - free)
        self.seen["dropped victim"] = self.cache.stats().dropped

    def clear(self, namespace: str | None, revision: str | None) -> None:
        """Forget a namespace, all of them, or the weights."""
        held = [each for each in self.requests if each.lease.device_boundary]
        self.seen["lease held over clear"] += any(
            namespace in (None, each.lease.key.namespace) for each in held
        )
        if revision is None:
            self.cache.clear(namespace)
            return
        for request in list(self.requests):  # an engine stops its requests before it swaps the weights
            self.finish(request, cancel=True)
        if self.executor.storage is not None:
            self.cache.poll()
            self.cache.clear_storage()
        self.cache.invalidate(revision)
        self.ever.clear()

    # -- the executor -----------------------------------------------------------------------------

    def answer(self, op: int, well: bool, pages: int) -> None:
        """The executor answers an operation."""
        operation = self.core.operations.in_flight.get(op)
        assert operation is not None, "an action is pending whose operation is over"
        self.seen["late operation home"] += operation.late
        action = self.executor.pending[op]
        if well:
            self.executor.complete(op)
        else:
            self.executor.fail(op, min(pages, self._pages_of(action)))

    def progress(self, op: int, pages: int) -> None:
        """Part of a Get has arrived."""
        action = self.executor.pending[op]
        if isinstance(action, Get) and self.executor.storage is not None:
            self.executor.progress(op, min(pages, self._pages_of(action)))

    def _while_waiting(self) -> None:
        """While the cache waits, a diligent executor gets something done."""
        if self.executor.pending:
            self.executor.complete()

    @staticmethod
    def _pages_of(action: object) -> int:
        return len(action.spans[0].hashes) if isinstance(action, Get | Put) else 0

    # -- what must hold after every step ------------------------------------------------------------

    def examine(self) -> None:
        """All invariants, all contents, all events, all promises."""
        self.cache.check()
        for event in self.cache.take_events():
            medium = getattr(event, "medium", None)
            self.oracle.apply(event, medium == Tier.DEVICE or (medium == Tier.HOST and self.closed))
        self._examine_tree()
        for request in self.requests:
            self.verify(request.lease, request.tokens)
            load, lease = request.load, request.lease
            if load is not None and load.state is Progress.DONE:
                assert lease.device_boundary >= load.boundary
        self.seen["landing parked"] += any(each.stage is Stage.LANDING for each in self.fetches)
        stats = self.cache.stats()
        for tier in (stats.device, stats.host):
            parts = tier.free + tier.resident + tier.detached + tier.requests + tier.operations + tier.lost
            assert parts == tier.capacity

    def _examine_tree(self) -> None:
        """What the events say is what the tree holds, and every READY page has the right content."""
        ready: dict[Tier, set[Page]] = {Tier.DEVICE: set(), Tier.HOST: set()}
        size = self.page_size
        for node in nodes_of(self.core):
            namespace, units = self._path(node)
            for tier, pages in ready.items():
                slots = node.lane(tier).slots
                for index, state in enumerate(state_of(self.core, tier, node)):
                    if state != State.READY:
                        continue
                    assert slots is not None
                    depth = node.start + index
                    content = self.executor.contents[tier][slots[index]]
                    assert content == self.page(units, namespace, depth), (node, tier.name, index)
                    pages.add((namespace, units[: (depth + 1) * size]))
        for tier, pages in ready.items():
            assert pages == self.oracle.on(tier)
            assert pages <= self.ever

    def _path(self, node: Node) -> tuple[str, tuple[int, ...]]:
        edges, at = [], node
        while at.parent is not None:
            edges.append(at.edge)
            at = at.parent
        units = np.frombuffer(b"".join(reversed(edges)), self.core.radix.keys.dtype)
        return at.namespace, tuple(units.tolist())  # type: ignore[attr-defined]

    def farewell(self) -> None:
        """Everybody leaves and everything is answered: nothing may be left, nothing may be lost (I12)."""
        for request in list(self.requests):
            self.finish(request, cancel=False)
        for fetch in list(self.fetches):
            self.look_after(fetch, cancel=True)
        self.settle()
        self.empty_out()
        self.examine()
        assert not self.oracle.on(Tier.DEVICE)
        assert not self.oracle.on(Tier.HOST)
        self.cache.close(deadline_s=0)

    # -- rare paths -------------------------------------------------------------------------------

    def _learn(self, tokens: list[int], namespace: str) -> None:
        self.computed.append((tokens, namespace))
        del self.computed[:-4]
        self.ever.update(self.oracle.pages(tokens, namespace))
        self._note_full()

    def _note_full(self) -> None:
        if self.cache.config.host is not None:
            self.seen["both full"] += self.free(Tier.DEVICE) == self.free(Tier.HOST) == 0

    def _watch_splits(self) -> None:
        radix, split = self.core.radix, self.core.radix.split

        def watched(node: Node, at: int) -> Node:
            for operation in self.core.operations.in_flight.values():
                if operation.purpose is Purpose.BACKUP and operation.end is not None:
                    pieces = fragments(operation.end, operation.first, operation.count)
                    self.seen["split under backup"] += any(piece[0] is node for piece in pieces)
            return split(node, at)

        radix.split = watched  # type: ignore[method-assign]
