"""Whatever happens, in whatever order: exact bytes or a miss, every invariant, every pool free at the end.

A Hypothesis state machine drives a small cache against the oracle (see `world.py`); a seeded campaign
takes the same steps by itself and proves by count that it went down every rare path.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from world import FORKS, NAMESPACES, Request, World, draw_options, prompt

from tiertree import Tier
from tiertree.tree.actions import Get, Query

Line = tuple[int, int, int]
"""Where a prompt parts from its family, its pages, its tokens behind the last page."""

RARE = (
    "split under backup",
    "landing parked",
    "dropped victim",
    "lease held over clear",
    "late operation home",
    "joined load-back",
    "both full",
    "insert refused after clear",
    "canonical slots",
    "landed",
    "no room",
)
"""What the campaign must have met."""

WORLDS, STEPS_EACH = 120, 200

lines = st.tuples(st.sampled_from(FORKS), st.integers(0, 8), st.integers(0, 1))
namespaces = st.sampled_from(NAMESPACES)
index = st.integers(0, 7)
tiers = st.sampled_from([Tier.DEVICE, Tier.HOST])
deadlines = st.sampled_from([0.0, 0.2])


class CacheMachine(RuleBasedStateMachine):
    """Steps drawn and shrunk by Hypothesis."""

    world: World | None = None

    @initialize(seed=st.integers(0, 1 << 16))
    def start(self, seed: int) -> None:
        self.world = World(**draw_options(random.Random(seed)))

    @property
    def it(self) -> World:
        assert self.world is not None
        return self.world

    @rule(line=lines, namespace=namespaces)
    def match(self, line: Line, namespace: str) -> None:
        self.it.match(self.tokens(line), namespace)

    @rule(line=lines, namespace=namespaces, peek=st.booleans())
    def begin(self, line: Line, namespace: str, peek: bool) -> None:
        self.it.begin(self.tokens(line), namespace, peek)

    @rule(line=lines, namespace=namespaces, give_back=st.booleans())
    def insert(self, line: Line, namespace: str, give_back: bool) -> None:
        self.it.insert(self.tokens(line), namespace, give_back)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, more=st.lists(st.integers(0, 1), max_size=4), deadline=deadlines)
    def compute(self, which: int, more: list[int], deadline: float) -> None:
        self.it.compute(self.request(which), more, deadline)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, pages=st.integers(0, 2))
    def hoard(self, which: int, pages: int) -> None:
        self.it.hoard(self.request(which), pages)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, deadline=deadlines)
    def load_back(self, which: int, deadline: float) -> None:
        self.it.load_back(self.request(which), deadline)

    @precondition(lambda self: self.it.requests)
    @rule(which=index)
    def stop_loading(self, which: int) -> None:
        self.it.stop_loading(self.request(which))

    @precondition(lambda self: self.it.requests)
    @rule(which=index, cancel=st.booleans())
    def finish(self, which: int, cancel: bool) -> None:
        self.it.finish(self.request(which), cancel)

    @rule(line=lines, namespace=namespaces)
    def prefetch(self, line: Line, namespace: str) -> None:
        self.it.prefetch(self.tokens(line), namespace)

    @precondition(lambda self: self.it.fetches)
    @rule(which=index, cancel=st.booleans())
    def look_after(self, which: int, cancel: bool) -> None:
        self.it.look_after(self.it.fetches[which % len(self.it.fetches)], cancel)

    @rule()
    def switch_storage(self) -> None:
        self.it.switch_storage()

    @rule(pages=st.integers(0, 8), tier=tiers, deadline=deadlines)
    def evict(self, pages: int, tier: Tier, deadline: float) -> None:
        self.it.evict(pages, tier, deadline)

    @rule(namespace=st.sampled_from([None, *NAMESPACES]))
    def clear(self, namespace: str | None) -> None:
        self.it.clear(namespace, None)

    @rule(revision=st.sampled_from(["a", "b"]))
    def invalidate(self, revision: str) -> None:
        if revision != self.it.cache.revision:
            self.it.clear(None, revision)

    @precondition(lambda self: self.it.executor.pending)
    @rule(which=index, well=st.booleans(), pages=index)
    def answer(self, which: int, well: bool, pages: int) -> None:
        self.it.answer(self.op(which), well, pages)

    @precondition(lambda self: self.it.executor.pending)
    @rule(which=index, pages=index)
    def progress(self, which: int, pages: int) -> None:
        self.it.progress(self.op(which), pages)

    @precondition(lambda self: self.it.executor.answers)
    @rule(which=index)
    def duplicate(self, which: int) -> None:
        answers = list(self.it.executor.answers)
        self.it.executor.duplicate(answers[which % len(answers)])

    @rule(seconds=st.sampled_from([0.0, 0.3, 2.0]))
    def poll(self, seconds: float) -> None:
        self.it.clock.advance(seconds)
        self.it.cache.poll()

    @invariant()
    def examine(self) -> None:
        if self.world is not None:
            self.world.examine()

    def teardown(self) -> None:
        if self.world is not None:
            self.world.farewell()

    def tokens(self, line: Line) -> list[int]:
        fork, pages, odd = line
        return prompt(fork, pages, self.it.page_size, odd)

    def request(self, which: int):  # type: ignore[no-untyped-def]
        return self.it.requests[which % len(self.it.requests)]

    def op(self, which: int) -> int:
        pending = list(self.it.executor.pending)
        return pending[which % len(pending)]


CacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestCacheMachine = CacheMachine.TestCase


# -- the campaign: the same steps from a seeded generator ---------------------------------------------

Step = Callable[[World, random.Random], None]


def some_line(world: World, rng: random.Random) -> tuple[list[int], str]:
    """Tokens and a namespace: often those of a prompt that was computed not long ago."""
    if world.computed and rng.random() < 0.4:
        return rng.choice(world.computed)
    tokens = prompt(rng.choice(FORKS), rng.choice([1, 2, 3, 3, 4, 5]), world.page_size, rng.randrange(2))
    return tokens, rng.choice([NAMESPACES[0], *NAMESPACES])


def some_deadline(rng: random.Random) -> float:
    return rng.choice([0.0, 0.2])


def of_a_request(act: Callable[[World, Request, random.Random], None]) -> Step:
    return lambda world, rng: act(world, rng.choice(world.requests), rng) if world.requests else None


def of_an_operation(act: Callable[[World, int, random.Random], None]) -> Step:
    def step(world: World, rng: random.Random) -> None:
        if world.executor.pending:
            act(world, rng.choice(list(world.executor.pending)), rng)

    return step


def look_after(world: World, rng: random.Random) -> None:
    if world.fetches:
        world.look_after(rng.choice(world.fetches), cancel=rng.random() < 0.1)


def rush(world: World, rng: random.Random) -> None:
    """Several requests for the same prompt arrive at once, and all of them want its host pages."""
    tokens, namespace = some_line(world, rng)
    for _ in range(2):
        world.begin(tokens, namespace)
        world.load_back(world.requests[-1], deadline=0.0)


def duplicate(world: World, rng: random.Random) -> None:
    if world.executor.answers:
        world.executor.duplicate(rng.choice(list(world.executor.answers)))


def comeback(world: World, rng: random.Random) -> None:
    """Host loses everything and device a tail; then the prompt is read from storage without delay."""
    tokens, namespace = some_line(world, rng)
    world.evict(16, Tier.HOST, deadline=0.0)
    world.evict(rng.choice([1, 2]), Tier.DEVICE, deadline=0.0)
    world.prefetch(tokens, namespace)
    for kind in (Query, Get):
        for op in world.running(kind):
            world.answer(op, well=True, pages=0)
        world.cache.poll()


def evict(world: World, rng: random.Random) -> None:
    tier = rng.choice([Tier.DEVICE, Tier.DEVICE, Tier.DEVICE, Tier.HOST])
    world.evict(rng.choice([1, 2, 4, 9]), tier, some_deadline(rng))


def poll(world: World, rng: random.Random) -> None:
    world.clock.advance(rng.choice([0.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.1, 0.3, 2.0]))
    world.cache.poll()


STEPS: dict[str, tuple[float, Step]] = {
    "match": (2, lambda w, r: w.match(*some_line(w, r))),
    "begin": (16, lambda w, r: w.begin(*some_line(w, r), r.random() < 0.2)),
    "insert": (6, lambda w, r: w.insert(*some_line(w, r), r.random() < 0.1)),
    "compute": (24, of_a_request(lambda w, q, r: w.compute(q, [1] * r.randrange(4), some_deadline(r)))),
    "rush": (3, rush),
    "comeback": (2, comeback),
    "hoard": (1, of_a_request(lambda w, q, r: w.hoard(q, r.randrange(3)))),
    "load back": (14, of_a_request(lambda w, q, r: w.load_back(q, some_deadline(r)))),
    "stop loading": (1, of_a_request(lambda w, q, r: w.stop_loading(q))),
    "finish": (8, of_a_request(lambda w, q, r: w.finish(q, r.random() < 0.3))),
    "prefetch": (12, lambda w, r: w.prefetch(*some_line(w, r))),
    "look after": (3, look_after),
    "evict": (8, evict),
    "clear": (0.7, lambda w, r: w.clear(r.choice([None, *NAMESPACES]), None)),
    "invalidate": (0.3, lambda w, r: w.clear(None, f"weights {r.random()}")),
    "switch storage": (0.3, lambda w, r: w.switch_storage()),
    "succeed": (24, of_an_operation(lambda w, op, r: w.answer(op, True, 0))),
    "fail": (3, of_an_operation(lambda w, op, r: w.answer(op, False, r.randrange(8)))),
    "progress": (2, of_an_operation(lambda w, op, r: w.progress(op, r.randrange(8)))),
    "duplicate": (1, duplicate),
    "poll": (14, poll),
}
"""What can happen, and how often."""


def live(seed: int, steps: int) -> World:
    """One world from `seed`, from its first step to its end. Each has its own habits: what is rare in
    one is common in another."""
    rng = random.Random(seed)
    world = World(**draw_options(rng))
    names = list(STEPS)
    weights = [usual * rng.choice([0.1, 1, 1, 3]) for usual, _ in STEPS.values()]
    try:
        for name in rng.choices(names, weights, k=steps):
            STEPS[name][1](world, rng)
            world.examine()
        world.farewell()
    except BaseException as error:
        error.add_note(f"repeat with: live(seed={seed}, steps={steps})")
        raise
    return world


def test_a_fixed_campaign_holds_and_meets_every_rare_path() -> None:
    seen: Counter[str] = Counter()
    for seed in range(WORLDS):
        seen += live(seed, STEPS_EACH).seen
    assert not [path for path in RARE if not seen[path]], seen


@pytest.mark.soak
def test_soak() -> None:
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    first = seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"SOAK_SEED={first}")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        live(seed, 300)
        seed += 1
    print(f"{seed - first} worlds from SOAK_SEED={first} on")
