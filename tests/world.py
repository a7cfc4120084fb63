"""Everything that can happen to one small cache, one step at a time, and what must hold after each.

The state machine draws steps with Hypothesis, the campaign and the soak from a seeded generator; both
end in `farewell`. What is rare is counted (`rare.py`), so that a campaign can prove that it went there.
"""

from __future__ import annotations

import numpy as np
from engine import Engine, Request

from tiertree import FULL, Evicted, Prefetch, Progress, Tier
from tiertree.testing.oracle import Page
from tiertree.tree.actions import Get, Put, Span
from tiertree.tree.check import nodes_of
from tiertree.tree.ledger import State
from tiertree.tree.node import Node
from tiertree.tree.prefetch import Stage
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST


class World(Engine):
    """An engine with its prefetches, its executor and its operator. Of a `diligent` executor something
    is done whenever the cache waits; another is as slow as the test."""

    def __init__(self, diligent: bool = True, **options: object) -> None:
        self.fetches: list[Prefetch] = []
        self.diligent = diligent
        super().__init__(**options)
        self._was: dict[Page, set[Tier]] = {}

    def _open(self) -> None:
        super()._open()
        self.executor.on_wait = self._while_waiting if self.diligent else lambda: None

    # -- storage ----------------------------------------------------------------------------------

    def prefetch(self, tokens: list[int], namespace: str) -> None:
        """Read ahead what memory lacks."""
        started = self.cache.prefetch(self.cache.key(tokens, namespace))
        if isinstance(started, Prefetch):
            self.fetches.append(started)
        elif "the breaker of storage reads" in started.reason:
            self.seen["prefetch refused to a storage that is left alone"] += 1
            assert not self.core.operations.breakers.reads.admits(self.clock())

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

    def restart(self) -> None:
        """The process ends, in the middle of whatever is under way, and another one opens the storage."""
        self.requests.clear()
        self.fetches.clear()
        self.heard.clear()
        super().restart()
        self._was = {}
        self.restarted = True

    # -- room -------------------------------------------------------------------------------------

    def evict(self, pages: int, tier: Tier = DEVICE, kind: Kind = FULL, deadline_s: float = 0) -> Evicted:
        """Make room."""
        free = self.free(tier, kind)
        done = super().evict(pages, tier, kind, deadline_s)
        assert done.freed == max(0, self.free(tier, kind) - free)
        return done

    def clear(self, namespace: str | None, revision: str | None) -> None:
        """Forget a namespace, all of them, or the weights."""
        if revision is None:
            for request in self.requests:
                if namespace in (None, request.lease.key.namespace) and request.lease.memory_boundary:
                    self.seen["lease held over clear"] += request.lease.device_boundary > 0
                    request.forgotten = True
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
        spans = self._spans(op)
        if well:
            self.executor.complete(op)
        else:
            lost = pages % 2 and isinstance(self.executor.pending[op], Get)  # it is not there after all
            self.executor.fail(op, *self._some(spans, pages - bool(lost)), broken=not lost)

    def progress(self, op: int, pages: int, whole: bool = True) -> None:
        """Part of a Get has arrived; of the further spans all that storage has, or part as well."""
        if isinstance(self.executor.pending[op], Get) and self.executor.storage is not None:
            some, _, others = self._some(self._spans(op), pages)
            self.executor.progress(op, some, None if whole else others)

    def _spans(self, op: int) -> tuple[Span, ...]:
        action = self.executor.pending[op]
        return action.spans if isinstance(action, Get | Put) else ()

    @staticmethod
    def _some(spans: tuple[Span, ...], pages: int) -> tuple[int, str, list[int]]:
        """How many leading pages of each span are done, when something fails."""
        some = [pages % (len(span.hashes) + 1) for span in spans]
        return some[0] if some else 0, "failed", some[1:]

    def _while_waiting(self) -> None:
        """While the cache waits, a diligent executor gets something done."""
        if self.executor.pending:
            self.executor.complete()

    # -- what must hold after every step ------------------------------------------------------------

    def examine(self) -> None:
        """All invariants, all contents, all events, all promises."""
        self.cache.check()
        self.listen()
        self._examine_tree()
        for request in self.requests:
            self._examine_promises(request)
        for tokens, namespace in self.computed[-1:]:
            self.right(self.cache.peek(self.cache.key(tokens, namespace)), tokens, namespace)
        self.seen["landing parked"] += any(each.stage is Stage.LANDING for each in self.fetches)
        self.watch.look(self.heard, self._was)
        self.heard.clear()
        if self.kinds:
            self._was = {page: set(tiers) for page, tiers in self.oracle.where.items()}

    def _examine_tree(self) -> None:
        """What the events say is what the tree holds, and every READY page has the right content."""
        pools = [(tier, kind) for tier in (DEVICE, HOST) for kind in (FULL, *self.kinds)]
        ready: dict[tuple[Tier, Kind], set[Page]] = {pool: set() for pool in pools}
        size = self.page_size
        for node in nodes_of(self.core):
            namespace, units = self._path(node)
            for (tier, kind), pages in ready.items():
                lane = self.lane(node, tier, kind)
                if lane.slots is None:
                    continue
                contents, states = self.executor.of(kind)[tier], self.states(node, tier, kind)
                for depth, (slot, state) in enumerate(
                    zip(lane.slots.tolist(), states, strict=True), node.start
                ):
                    if state == State.READY:
                        assert contents[slot] == self.page(units, namespace, depth, kind), (node, tier, kind)
                        pages.add((namespace, units[: (depth + 1) * size], kind))
        for (tier, kind), pages in ready.items():
            assert pages == self.oracle.on(tier, kind)
            assert pages <= self.ever

    def _examine_promises(self, request: Request) -> None:
        """The lease still has what it was promised, with the right content; a lookup finds what is there."""
        load, lease = request.load, request.lease
        if load is not None and load.state is Progress.DONE:
            assert lease.device_boundary >= load.boundary
            self.verify_windows(lease)
            self._promised(request)
            request.load = None
        assert lease.device_boundary <= lease.reach <= lease.memory_boundary
        self.verify(lease, request.tokens)
        key = self.cache.key(request.tokens, lease.key.namespace)
        self.right(self.cache.peek(key), request.tokens, lease.key.namespace)
        for kind, promised in request.windows.items():
            window = lease.window(kind)
            pages = enumerate(window.slots.tolist(), window.first)
            assert {page: slot for page, slot in pages if slot >= 0} == promised
        if not request.forgotten:
            memory, namespace, stop = {DEVICE, HOST}, lease.key.namespace, lease.memory_boundary
            assert self.oracle.there(request.tokens, namespace, FULL, 0, stop, memory)
            for kind in request.valid:
                first = self.needed(kind, stop).start
                assert self.oracle.there(request.tokens, namespace, kind, first, stop, memory)

    def _path(self, node: Node) -> tuple[str, tuple[int, ...]]:
        edges, at = [], node
        while at.parent is not None:
            edges.append(at.edge)
            at = at.parent
        units = np.frombuffer(b"".join(reversed(edges)), self.core.radix.keys.dtype)
        return at.namespace, tuple(units.tolist())  # type: ignore[attr-defined]

    def pulse(self) -> object:
        """Whatever the books say, in one value: a step that leaves it as it was has changed nothing."""
        radix, core = self.core.radix, self.core
        books = [
            part.tobytes()
            for owner in (radix, *radix.partials)
            for ledger in owner.ledgers
            for part in (ledger.book, ledger.pins, ledger.tags)
        ]
        leases = [(each.number, each.device_boundary, each.memory_boundary) for each in core.leases.values()]
        return books, leases, list(core.operations.in_flight), radix.nodes

    def farewell(self) -> None:
        """Everybody leaves and everything is answered: nothing may be left, nothing may be lost (I12)."""
        for request in list(self.requests):
            self.finish(request, cancel=False)
        for fetch in list(self.fetches):
            self.look_after(fetch, cancel=True)
        self.settle()
        self.empty_out()
        self.examine()
        assert not any(tiers & {DEVICE, HOST} for tiers in self.oracle.where.values())
        self.cache.close(deadline_s=0)
