"""A seeded random world for the reference engine: any kinds, sizes and policies, requests that come and go,
transfers that are late, fail, or hang, storage, clears, restarts, and a model that breaks now and then.

After every step the books are checked; every answer is compared with what the model says to its prompt; and
nobody may have found more in the cache than somebody of the same namespace has had in common with it.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from engine_support import HIDDEN, VOCAB, Bench, Shelf, make_config, sized, units_of

from tiertree import (
    SWA,
    LoadBack,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    Refused,
    SlidingWindow,
    StopRule,
    Tier,
    WritePolicy,
)
from tiertree.engines import sequence as sequences
from tiertree.engines.engine import Engine
from tiertree.engines.request import GREEDY, Finish, Overloaded, Reply, Request, Sampling, Span
from tiertree.tree.actions import Copy
from tiertree.tree.load import Progress
from tiertree.types import ConfigError

RARE = (
    "lost",
    "load-back failed",
    "gave way for a first token",
    "gave way for want of room",
    "came back from host",
    "orphan after a clear",
    "window passed",
    "state saved at a branching point",
    "closing",
    "prefetch landed",
    "computed while loading",
    "hit on device",
    "hit on host",
    "hit in storage",
    "span shared",
    "aborted while waiting",
    "aborted while running",
    "runner broke",
    "not finite",
    "overloaded",
    "restart",
)
"""What a soak must have met. That slots of a pending load change is counted too; it is rarer."""

SCOPES = (("", ""), ("", ""), ("tenant", ""), ("", "lora"))
"""Namespace and adapter; most share the first."""


class Broken(Exception):
    """What the model raises in these worlds."""


class Adapters(Engine):
    """An engine whose adapters are part of the namespace."""

    def scope(self, request: Request) -> str:
        return f"{request.adapter}/{request.namespace}"


class World:
    """One world from `seed`. `seen` counts what it has met."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.seen: Counter[str] = Counter()
        self.steps = 0
        self.work = 0
        self._loads: list[LoadBack] = []
        self._branching: dict[int, int] = {}
        self.page = rng.choice((1, 2, 3, 4))
        self.shelf = Shelf(rng.choice((30, 1000))) if rng.random() < 0.6 else None
        self.failing = rng.choice((0.0, 0.0, 0.1, 0.3))
        self.hanging = rng.choice((0.0, 0.0, 0.0, 0.02))
        self.pace = rng.choice((0.2, 0.6, 1.0))
        self.breaking = rng.choice((0.0, 0.0, 0.01))
        self.aborting = rng.choice((0.02, 0.1, 0.3))
        self.device = rng.choice((8, 12, 24, 60))
        self.config = self._config()
        self.limits = {
            "chunk_tokens": self.page * rng.choice((1, 2, 5)),
            "max_running": rng.choice((1, 3, 8)),
            "max_waiting": rng.choice((4, 100)),
            "burst_tokens": rng.choice((1, 8, 64)),
            "yields": rng.choice((0, 1, 2, 5)),
            "seed": rng.randrange(10),
        }
        self.heads = [self._tokens(1, 5 * self.page) for _ in range(3)]
        self.images = [torch.full((rng.randrange(1, 2 + self.page), HIDDEN), float(each)) for each in (1, 2)]
        self.past: list[Reply] = []
        self._open()

    # -- what it is made of -----------------------------------------------------------------------

    def _config(self) -> Any:
        rng, page = self.rng, self.page
        host = rng.choice((None, 6, self.device, 150))
        if self.shelf is not None and host is None:
            host = 40
        while True:
            kinds = []
            if rng.random() < 0.5:
                size = rng.choice((4, 8, 20, 60))
                rules: Any = SlidingWindow(
                    window=rng.choice((1, page, 2 * page + 1)),
                    checkpoint_tokens=rng.choice((None, None, 3 * page)),
                )
                kinds.append(sized(rules, size, host and rng.choice((4, 60)), page))
            if rng.random() < 0.5:
                rules = Mamba(
                    grid_tokens=rng.choice((None, None, 2 * page)), states_per_path=rng.choice((None, 1, 2))
                )
                kinds.append(sized(rules, rng.choice((3, 6, 20)), host and rng.choice((3, 20)), page))
            options = {
                "load_back": LoadBackConfig(
                    min_tokens=rng.choice((0, 2 * page)), max_pages=rng.choice((None, None, 2))
                ),
                "prefetch": PrefetchConfig(
                    min_tokens=rng.choice((0, page)),
                    stop_rule=rng.choice((*StopRule, StopRule.WAIT_COMPLETE)),
                    base_seconds=0.1,
                ),
                "op_deadline_seconds": 1.0,
                "max_operations": rng.choice((4, 100)),
                "selective_hits": 2,
            }
            policy = rng.choice((*WritePolicy,))
            try:
                return make_config(self.device, host, page, policy, kinds=tuple(kinds), **options)
            except ConfigError:
                continue

    def _open(self) -> None:
        while True:
            try:
                self.bench = Bench(
                    self.config,
                    self.limits,
                    self.shelf,
                    Adapters,
                    seed=self.rng.randrange(1 << 30),
                    failing=self.failing,
                )
            except ConfigError:  # windows or states that are too few for any request
                self.config = self._config()
                continue
            break
        self.bench.executor.on_poll = self._weather
        self.bench.executor.on_wait = self._weather
        self._spy()
        runner = self.bench.runner
        runner.before, runner.after = self._before, self._after

    def _weather(self) -> None:
        """Some of what is under way gets somewhere."""
        executor, rng = self.bench.executor, self.rng
        self.bench.clock.advance(0.01)
        for op, action in list(executor.pending.items()):
            draw = rng.random()
            if draw < self.pace / 2 and isinstance(action, Copy) and executor.layers.get(op, 0) < 2:
                executor.layer(op)
            elif draw < self.pace and rng.random() >= self.hanging * 20:
                executor.step()
                break

    def _before(self, rows: Any) -> None:
        if self.rng.random() < self.breaking:
            self.seen["runner broke"] += 1
            raise Broken("on purpose")

    def _after(self, logits: torch.Tensor) -> torch.Tensor:
        if self.rng.random() < self.breaking:
            self.seen["not finite"] += 1
            logits[self.rng.randrange(len(logits)), self.rng.choice((0, VOCAB - 1))] = float("nan")
        return logits

    # -- looking on -------------------------------------------------------------------------------

    def _spy(self) -> None:
        """Count what the engine asks of its cache."""
        cache, engine, seen = self.bench.cache, self.bench.engine, self.seen
        states = [each.kind for each in self.config.kinds if sequences.is_state(each)]

        def spied(owner: Any, name: str, look: Callable[..., None]) -> None:
            method = getattr(owner, name)

            def call(*given: Any) -> Any:
                result = method(*given)
                look(result, *given)
                return result

            setattr(owner, name, call)

        def insert(done: Any, key: Any, slots: Any, lease: Any, partial: Any) -> None:
            seen["orphan after a clear"] += isinstance(done, Refused)
            for kind in states:
                at = (partial[kind] >= 0).nonzero()[0] + key.pages - len(slots) + 1
                seen["state saved at a branching point"] += self._branching.get(lease.number, -1) in at

        def acquire(lease: Any, match: Any) -> None:
            if match.branching_point is not None:
                self._branching[lease.number] = match.branching_point

        def freed(done: None, slots: Any, lease: Any, kind: Any) -> None:
            seen["window passed"] += kind == SWA

        def loaded(load: Any, *given: Any) -> None:
            if isinstance(load, LoadBack):
                self._loads.append(load)
                waits = [each for each in engine._scheduler.waiting if each.lease is given[0]]
                seen["came back from host"] += bool(waits and waits[0].reply.preemptions)

        def landed(pages: Any, *given: Any) -> None:
            seen["prefetch landed"] += bool(pages)

        def gave_way(yes: bool, *given: Any) -> None:
            seen["gave way for a first token"] += yes

        def ready(yes: bool, asking: Any, count: int) -> None:
            seen["gave way for want of room"] += not yes and asking.lease is None

        spied(cache, "insert", insert)
        spied(cache, "acquire", acquire)
        spied(cache, "free", freed)
        spied(cache, "load_back", loaded)
        spied(cache, "settle", landed)
        spied(engine, "_restart", lambda done, *given: seen.update(["lost"]))
        spied(engine._scheduler, "_make_way", gave_way)
        spied(engine._scheduler, "ready", ready)

    def _look(self) -> None:
        """Count what can be seen between steps."""
        for each in self.bench.engine._scheduler.running:
            self.seen["closing"] += each.closing
            if each.load is not None and each.load.state is Progress.PENDING:
                was, now = each._shared.tolist(), each.load.slots.tolist()
                self.seen["slots of a pending load changed"] += was[len(was) - len(now) :] != now

    # -- what happens -----------------------------------------------------------------------------

    def _tokens(self, low: int, high: int, alphabet: int = VOCAB) -> list[int]:
        return [self.rng.randrange(alphabet) for _ in range(self.rng.randint(low, high))]

    def submit(self) -> None:
        """Somebody asks: often what others have asked, or how an answer went on."""
        rng = self.rng
        tokens = list(rng.choice(self.heads))
        if self.past and rng.random() < 0.3:
            before = rng.choice(self.past)
            tokens = [*before.request.tokens, *before.tokens][: rng.randint(1, 6 * self.page)]
        tokens += self._tokens(0, 4 * self.page, 3)
        spans: tuple[Span, ...] = ()
        if rng.random() < 0.3:
            image = rng.choice(self.images)
            start = rng.choice((0, 1, self.page))
            if start + len(image) <= len(tokens):
                spans = (Span(start=start, vectors=image),)
        namespace, adapter = rng.choice(SCOPES)
        sampling = GREEDY
        if rng.random() < 0.3:
            sampling = Sampling(
                temperature=1.0, top_p=0.9, top_k=rng.choice((0, 5)), seed=rng.choice((None, 7))
            )
        stop = self._tokens(0, 3)
        room = self.device * self.page - len(tokens)
        if room < 1:
            return
        count = min(room, rng.choice((1, 2, self.page, 4 * self.page)))
        options = {"namespace": namespace, "adapter": adapter, "spans": spans, "stop": stop}
        try:
            reply = self.bench.submit(tokens, count, sampling=sampling, **options)
        except Overloaded:
            self.seen["overloaded"] += 1
            return
        self.past.append(reply)
        self.work += len(tokens) + count + 4

    def abort(self) -> None:
        """Somebody has had enough, wherever it is."""
        going = [each for each in self.bench.replies if each.finish is None]
        if going:
            reply = self.rng.choice(going)
            waits = any(each.reply is reply for each in self.bench.engine._scheduler.waiting)
            self.seen["aborted while waiting" if waits else "aborted while running"] += 1
            self.bench.engine.abort(reply)

    def step(self) -> None:
        """One step of the engine."""
        self.steps += 1
        try:
            self.bench.step()
        except Broken:
            self.bench.cache.check()
        self._look()

    def disturb(self) -> None:
        """Something happens to the cache under the engine."""
        rng, cache = self.rng, self.bench.cache
        draw = rng.random()
        if draw < 0.5:
            kind = rng.choice([*self.config.kind_pages(Tier.DEVICE)])
            cache.evict(rng.choice((1, 3, 50)), rng.choice((Tier.DEVICE, Tier.HOST)), 0.0, kind)
        elif draw < 0.9:
            cache.clear(rng.choice((None, "/", "/tenant")))
        elif self.shelf is not None:
            self.finish()
            self.seen["restart"] += 1
            self._open()

    def live(self, requests: int) -> None:
        """From the first request to the end."""
        rng, asked = self.rng, 0
        while asked < requests:
            asked += 1
            self.submit()
            for _ in range(rng.choice((0, 0, 1, 2, 5, 12))):
                self.step()
            if rng.random() < self.aborting:
                self.abort()
            if rng.random() < 0.05:
                self.disturb()
        self.finish()

    def finish(self) -> None:
        """Serve who is left, verify all answers, and close."""
        bound = 500 + 60 * self.work
        while self.bench.engine.busy:
            self.step()
            assert self.steps < bound, f"{self.steps} steps for {self.work} tokens"
        self._verify()
        with self.bench:
            pass
        self._count()

    def _verify(self) -> None:
        self.bench.verify()
        for reply in self.bench.replies:
            if reply.finish is Finish.ERROR:
                expected = ("Broken", "NaN") + ("no room",) * bool(self.hanging)
                assert any(word in (reply.error or "") for word in expected), reply
            assert reply.finish is not None
            assert reply.cached.total < len(reply.request.tokens)
            if reply.cached.total:
                common = max(
                    (self._common(reply, each) for each in self.past if each is not reply), default=0
                )
                assert reply.cached.total <= common, (reply, common)

    @staticmethod
    def _common(one: Reply, other: Reply) -> int:
        """Leading units that two requests may share."""
        asked, past = one.request, other.request
        if (asked.namespace, asked.adapter) != (past.namespace, past.adapter):
            return 0
        here = units_of(asked.tokens, asked.spans)
        there = [*units_of(past.tokens, past.spans), *other.tokens]
        count = 0
        while count < min(len(here), len(there)) and here[count] == there[count]:
            count += 1
        return count

    def _count(self) -> None:
        seen = self.seen
        for reply in self.bench.replies:
            seen["hit on device"] += reply.cached.device > 0
            seen["hit on host"] += reply.cached.host > 0
            seen["hit in storage"] += reply.cached.storage > 0
            spans = reply.request.spans
            seen["span shared"] += bool(spans) and reply.cached.total >= spans[0].stop
        seen["computed while loading"] += self.bench.runner.loading
        seen["load-back failed"] += sum(load.state is Progress.FAILED for load in self._loads)
        self._loads.clear()


def live(seed: int, requests: int = 25) -> World:
    """One world from its first request to its end."""
    before, sequences.LAYER_SECONDS = sequences.LAYER_SECONDS, 0.0  # time moves when somebody polls
    try:
        world = World(seed)
        world.live(requests)
    except BaseException as error:
        error.add_note(f"repeat with: live(seed={seed}, requests={requests})")
        raise
    finally:
        sequences.LAYER_SECONDS = before
    return world


def seconds(part: float) -> float:
    """A part of SOAK_SECONDS."""
    return part * float(os.environ.get("SOAK_SECONDS", "600"))
