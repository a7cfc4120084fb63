"""The engine of a simulation: continuous batching over one cache, in virtual time.

    waiting ──prefetch, until the stop rule──▶ admitted: match, acquire, load back
       ▲                                          │
       └── preempted: no room, or cleared ── running: allocate ─▶ compute ─▶ insert, chunk by chunk
                                                  │
                                              finished, or aborted at any time

Every step polls once, lets clients leave and operators act, admits, and computes one chunk for each
running request. What a hit returns is compared with what it must be, as long as the lease lasts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from ..cache import PrefixCache
from ..tree.insert import Inserted
from ..tree.lease import Lease
from ..tree.load import LoadBack, Progress
from ..tree.prefetch import Prefetch, Stage
from ..types import FULL, Kind, NoRoom, Refused, Slots, StopRule
from .content import Contents
from .dice import Dice
from .executor import SimExecutor
from .loop import Diary, Loop
from .plan import Plan
from .request import Ask, Draft, Request
from .verifier import Found, Verifier

STEP_SECONDS = 0.001
"""Seconds of a step beside those of computing; in a calm world a page is computed in so many."""
LONG_STEP_SECONDS = 3.0
"""No step takes longer, that of many requests at once included."""
IDLE_SECONDS = (0.01, 0.2)
"""Seconds between two steps in which nothing is computed: at first, and at most."""
Answer = TypeVar("Answer")


class Engine:
    """Serves `asks` by one cache at a time (see `adopt`)."""

    def __init__(self, plan: Plan, asks: list[Ask], loop: Loop, diary: Diary, contents: Contents) -> None:
        self.plan = plan
        self.cache: PrefixCache
        self.executor: SimExecutor
        self.to_come = asks[::-1]
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.ended: list[Request] = []
        self.counts: Counter[str] = Counter()
        self.steps = 0
        self._loop = loop
        self._diary = diary
        self._dice = Dice(plan.seed)
        self._contents = contents
        self.verifier = Verifier(contents, [each.kind for each in plan.config.kinds])
        self._idle = 0
        self._starved = False
        self._patience_s = 3 * plan.config.op_deadline_seconds + LONG_STEP_SECONDS
        """Nothing may wait longer: to ask, to read, to land, each with its deadline."""

    def adopt(self, cache: PrefixCache, executor: SimExecutor) -> None:
        """Go on with this cache; whoever was served by another one waits again."""
        self.cache, self.executor = cache, executor
        self.verifier.adopt(executor.device)
        for request in [*self.running, *self.waiting]:
            self._forget(request)
        self.waiting = sorted([*self.waiting, *self.running], key=lambda each: each.number)
        self.running = []

    def leave(self) -> None:
        """Let go of the cache."""
        del self.cache, self.executor
        self.verifier.leave()

    @property
    def busy(self) -> bool:
        """Whether anybody is still to be served."""
        return bool(self.to_come or self.waiting or self.running)

    def step(self) -> float:
        """One step. Returns after how many seconds the next one begins."""
        self.steps += 1
        now = self._loop.now
        self._call(0.0, self.cache.poll)
        while self.to_come and self.to_come[-1].arrives <= now:
            self.waiting.append(Request(self.to_come.pop()))
        for request in [*self.waiting, *self.running]:
            aborts = request.ask.aborts
            if aborts is not None and now >= request.ask.arrives + aborts:
                self._leave(request, "aborted")
        self._admit()
        tokens = 0
        for request in list(self.running):
            if request in self.running:
                tokens += self._advance(request)
        if self.plan.calm:
            return STEP_SECONDS
        self._idle = 0 if tokens else self._idle + 1
        if tokens:
            return STEP_SECONDS + tokens * self.plan.compute_s
        return min(IDLE_SECONDS[0] * self._idle, IDLE_SECONDS[1])

    def stop_all(self) -> None:
        """Nobody runs any more; all of them wait for their turn again."""
        for request in list(self.running):
            self._requeue(request)
        for request in self.waiting:
            self._let_go(request)

    def forget(self, namespace: str | None) -> None:
        """The cache is about to forget a namespace (None: all): leases of it are good for reading alone."""
        for request in self.running:
            if namespace in (None, request.ask.namespace):
                request.forgotten = True

    # -- calls of the cache -----------------------------------------------------------------------

    def _call(self, within_s: float, call: Callable[[], Answer]) -> Answer:
        """Call the cache, which may take so much virtual time and no more."""
        before = self._loop.now
        answer = call()
        if self._loop.now > before + within_s + 1e-6:
            took = self._loop.now - before
            raise Found("late call", f"a call took {took:.3f} s, its deadline was {within_s:.3f} s: {call}")
        return answer

    def _roll(self, habit: str, *about: str | int) -> bool:
        rate = self.plan.habits.get(habit)
        return rate is not None and self._dice.chance(rate, "does", habit, *about)

    # -- admission --------------------------------------------------------------------------------

    def _admit(self) -> None:
        now = self._loop.now
        for request in list(self.waiting):
            if request.not_before > now or not self._ready(request):
                continue
            if len(self.running) < self.plan.running_max and not (self._starved and self.running):
                self.waiting.remove(request)
                self.running.append(request)
                self._start(request)

    def _ready(self, request: Request) -> bool:
        """Whether its prefetch is over, or there is none."""
        cache, ask = self.cache, request.ask
        if request.key is None:
            request.key = cache.key(ask.tokens, ask.namespace)
        if not request.prefetched:
            request.prefetched = True
            key = request.key.head(min(request.key.pages, ask.prompt // self.plan.page_tokens))
            started = self._call(0.0, lambda: cache.prefetch(key))
            self._diary.note(f"request {ask.number} prefetches: {isinstance(started, Prefetch)}")
            request.prefetch = started if isinstance(started, Prefetch) else None
        fetch = request.prefetch
        if fetch is None:
            return True
        if self._roll("cancel_prefetch", ask.number, self.steps):
            self._call(0.0, lambda: cache.cancel(fetch))
        landed = self._call(0.0, lambda: cache.settle(fetch))
        if (landed is None) != (fetch.stage is not Stage.SETTLED):
            raise Found("prefetch", f"{fetch} settles as {landed}")
        if landed is not None:
            self.counts["prefetched_pages"] += landed
            request.prefetch = None
        elif self._loop.now > fetch.started + self._prefetch_s(fetch):
            raise Found("late prefetch", f"{fetch} of request {ask.number} began at {fetch.started:.3f} s")
        return landed is not None

    def _prefetch_s(self, fetch: Prefetch) -> float:
        """How long a prefetch may keep a request waiting."""
        rules = self.plan.config.prefetch
        if rules.stop_rule is StopRule.WAIT_COMPLETE:
            return self._patience_s
        if rules.stop_rule is StopRule.BEST_EFFORT:
            return 0.0
        tokens = fetch.wanted * self.plan.page_tokens
        return rules.base_seconds + rules.per_1024_tokens_seconds * tokens / 1024

    def _start(self, request: Request) -> None:
        cache, key, ask = self.cache, request.key, request.ask
        assert key is not None
        prompt = key.head(min(key.pages, ask.prompt // self.plan.page_tokens))
        look = cache.peek if self._roll("peek", ask.number, self.steps) else cache.match
        match = self._call(0.0, lambda: look(prompt))
        lease = self._call(0.0, lambda: cache.acquire(match))
        request.lease, request.layers, request.forgotten = lease, 0, False
        request.revision = cache.revision
        self._diary.note(
            f"request {ask.number} starts: {lease.device_boundary} {lease.memory_boundary} {prompt.pages}"
        )
        self.counts["started"] += 1
        self.counts["pages_asked"] += prompt.pages
        self.counts["pages_hit_on_device"] += lease.device_boundary
        self.verifier.lease(request)
        self._private_copies(request, lease)
        if lease.memory_boundary > lease.device_boundary:
            deadline = self.plan.allocate_s
            load = self._call(deadline, lambda: cache.load_back(lease, deadline))
            if isinstance(load, LoadBack):
                request.load, request.load_began = load, self._loop.now

    def _private_copies(self, request: Request, lease: Lease) -> None:
        """An engine that goes on from a cached state writes to a copy of it."""
        if not lease.device_boundary or not self._roll("copy_on_write", request.number, self.steps):
            return
        for each in self.plan.config.kinds:
            kind, deadline = each.kind, self.plan.allocate_s
            slots = self._call(deadline, lambda: self.cache.copy_on_write(lease, kind, deadline))  # noqa: B023
            if isinstance(slots, NoRoom):
                return
            window = lease.window(kind)
            pages = range(window.first, window.first + len(slots))
            self.verifier.pages(request, kind, slots, pages, "a private copy")
            request.private[kind] = slots
            self._contents.write(self.executor.device, kind, slots, [b"written over"] * len(slots))

    # -- running ----------------------------------------------------------------------------------

    def _advance(self, request: Request) -> int:
        """One step of one request. Returns how many tokens it has computed."""
        if request.not_before > self._loop.now + 1e-9:
            return 0
        if request.load is not None and not self._loaded(request, request.load):
            return 0
        if request.draft is not None and not self._insert(request, request.draft):
            return 0
        lease, key = request.lease, request.key
        assert lease is not None
        assert key is not None
        first = lease.device_boundary
        if first >= key.pages:
            self.verifier.lease(request)
            self._leave(request, "finished")
            return 1
        size, prompt = self.plan.page_tokens, request.ask.prompt
        stop = min(key.pages, first + (self.plan.chunk_pages if first < prompt // size else 1))
        if self._roll("release_window", request.number, self.steps):
            for each in self.plan.config.kinds:
                if each.kind not in lease.returned:
                    self._release_window(lease, each.kind)
        draft = self._allocate(request, lease, first, stop)
        if draft is None and len(self.running) == 1 and stop > first + 1:
            # Its own lease may hold pages that it cannot use (FULL without a window): less at a time fits.
            stop = first + 1
            draft = self._allocate(request, lease, first, stop)
        if draft is None:
            if lease.device_boundary == first:
                self._no_room(request)
            return 0
        request.draft = draft
        self._starved = False
        if self.plan.calm:
            request.not_before = self._loop.now + (stop - first) * STEP_SECONDS
            request.computed += stop - first
        return (stop - first) * size

    def _release_window(self, lease: Lease, kind: Kind) -> None:
        self._call(0.0, lambda: self.cache.release_window(lease, kind))

    def _loaded(self, request: Request, load: LoadBack) -> bool:
        """Whether the load-back is over, or this engine does not wait for it."""
        if load.state is Progress.PENDING:
            if self._loop.now > request.load_began + self._patience_s:
                raise Found("late load-back", f"{load} of request {request.number} does not end")
            layers = self.cache.layers_ready(load)
            if layers < request.layers:
                raise Found("layers", f"{layers} layers are ready after {request.layers} were")
            request.layers = layers
            if layers and not request.forgotten:
                self.verifier.layers(request, load, layers)
            if not self._roll("impatient", request.number, self.steps):
                return False
            self._call(0.0, lambda: self.cache.cancel(load))
        self.counts[f"load_back_{load.state}"] += 1
        if load.state is Progress.DONE:
            self.counts["pages_loaded_back"] += load.pages
            self.verifier.lease(request)
        request.load = None
        return True

    def _allocate(self, request: Request, lease: Lease, first: int, stop: int) -> Draft | None:
        """Slots for pages `first .. stop`; None, and nothing taken, where there is no room, or where they are
        not what is needed any more."""
        draft = Draft(first, stop, {}, {})
        counts = {FULL: stop - first}
        for each in self.plan.config.kinds:
            low = max(first, each.rules.since(stop, self.plan.page_tokens))
            draft.pages[each.kind] = list(range(low, stop))
            counts[each.kind] = stop - low
        for kind, count in counts.items():
            slots = self._take(lease, count, kind)
            if isinstance(slots, NoRoom):
                self._give_back(request, draft)
                return None
            draft.slots[kind] = slots
        if lease.device_boundary != first:  # a load-back came in while room was made
            self._give_back(request, draft)
            return None
        return draft

    def _take(self, lease: Lease, count: int, kind: Kind) -> Slots | NoRoom:
        deadline = self.plan.allocate_s
        return self._call(deadline, lambda: self.cache.allocate(count, lease, deadline, kind))

    def _give_back(self, request: Request, draft: Draft) -> None:
        for kind, slots in draft.slots.items():
            self.cache.free(slots, request.lease, kind)

    def _no_room(self, request: Request) -> None:
        """The youngest of those that run makes way, and nobody takes its place before somebody gets on: so
        the oldest one always does."""
        self._starved = True
        victim = max(self.running, key=lambda each: each.number)
        self.counts["preempted"] += 1
        self._diary.note(f"no room for request {request.number}: {victim.number} is preempted")
        self._requeue(victim)

    def _requeue(self, request: Request) -> None:
        self._let_go(request)
        self.running.remove(request)
        request.not_before = self._loop.now + 0.02
        self.waiting.append(request)
        self.waiting.sort(key=lambda each: each.number)

    def _insert(self, request: Request, draft: Draft) -> bool:
        """What was computed becomes part of the cache. False: the request has to begin again."""
        lease, key, ask = request.lease, request.key, request.ask
        assert lease is not None
        assert key is not None
        request.draft = None
        if lease.device_boundary != draft.first:
            self._give_back(request, draft)
            return True
        digests = self._contents.chain(ask.tokens, ask.namespace, request.revision, draft.stop)
        self._contents.write(self.executor.device, FULL, draft.slots[FULL], digests[draft.first : draft.stop])
        partial = {}
        for kind, pages in draft.pages.items():
            slots = np.full(draft.stop - draft.first, -1, np.int64)
            slots[np.array(pages, np.int64) - draft.first] = draft.slots[kind]
            self._contents.write(
                self.executor.device, kind, draft.slots[kind], [digests[page] for page in pages]
            )
            partial[kind] = slots
        head = key.head(draft.stop)
        done = self._call(0.0, lambda: self.cache.insert(head, draft.slots[FULL], lease, partial))
        self._diary.note(f"request {ask.number} inserts up to {draft.stop}: {isinstance(done, Inserted)}")
        if isinstance(done, Refused):
            if not request.forgotten:
                raise Found("insert", f"refused though nothing was cleared: {done.reason}")
            self._give_back(request, draft)
            self._requeue(request)
            return False
        if request.revision != self.cache.revision:
            raise Found("insert", "what old weights have computed is in the cache")
        request.forgotten = False
        self.counts["pages_computed"] += draft.stop - draft.first
        return True

    # -- leaving ----------------------------------------------------------------------------------

    def _leave(self, request: Request, how: str) -> None:
        self._diary.note(f"request {request.number} {how}")
        self.counts[how] += 1
        pages = request.key.pages if request.key is not None else 0
        self._let_go(request)
        (self.running if request in self.running else self.waiting).remove(request)
        request.ended = self._loop.now
        if self.plan.calm:
            request.ended += (pages - request.computed) * STEP_SECONDS
        self.ended.append(request)

    def _let_go(self, request: Request) -> None:
        """Give everything back."""
        cache, lease, fetch = self.cache, request.lease, request.prefetch
        if fetch is not None:
            self._call(0.0, lambda: cache.cancel(fetch))
        if lease is not None:
            for kind, slots in request.private.items():
                cache.free(slots, lease, kind)
            if self._dice.chance(0.5, "cancels", request.number, self.steps):
                self._call(0.0, lambda: cache.cancel(lease))
            else:
                self._call(0.0, lease.release)
        self._forget(request)

    @staticmethod
    def _forget(request: Request) -> None:
        request.key = request.prefetch = request.lease = request.load = request.draft = None
        request.prefetched = request.forgotten = False
        request.private = {}
