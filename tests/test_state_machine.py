"""Whatever happens, in whatever order: exact bytes or a miss, every invariant, every pool free at the end.

A Hypothesis state machine drives a small cache against the oracle (see `world.py`); a seeded campaign
takes the same steps by itself and proves by count that it went down every rare path. Sizes, policies and
the set of kinds differ from world to world.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest
from campaign import live
from draws import FORKS, HABITS, NAMESPACES, draw_options, prompt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from rare import RARE
from world import World

from tiertree import FULL, Tier
from tiertree.types import Kind

Line = tuple[int, int, int]
"""Where a prompt parts from its family, its pages, its tokens behind the last page."""

WORLDS, STEPS_EACH = 100, 200

lines = st.tuples(st.sampled_from(FORKS), st.integers(0, 8), st.integers(0, 1))
namespaces = st.sampled_from(NAMESPACES)
index = st.integers(0, 7)
tiers = st.sampled_from([Tier.DEVICE, Tier.HOST])
deadlines = st.sampled_from([0.0, 0.2])
habits = st.lists(st.sampled_from(HABITS), min_size=3, max_size=3)


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

    @rule(line=lines, namespace=namespaces, habits=habits, give_back=st.booleans())
    def insert(self, line: Line, namespace: str, habits: list[str], give_back: bool) -> None:
        self.it.insert(self.tokens(line), namespace, habits, give_back)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, more=st.lists(st.integers(0, 1), max_size=4), habits=habits, deadline=deadlines)
    def compute(self, which: int, more: list[int], habits: list[str], deadline: float) -> None:
        if self.request(which).draft is None:
            self.it.draft(self.request(which), more, habits)
        self.it.work(self.request(which), deadline)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, more=st.lists(st.integers(0, 1), max_size=4), habits=habits, kinds=st.integers(0, 3))
    def stall(self, which: int, more: list[int], habits: list[str], kinds: int) -> None:
        if self.request(which).draft is None:
            self.it.draft(self.request(which), more, habits)
            self.it.work(self.request(which), 0.0, stall=kinds)

    @precondition(lambda self: self.it.requests)
    @rule(which=index, pages=st.integers(0, 2), kind=index)
    def hoard(self, which: int, pages: int, kind: int) -> None:
        self.it.hoard(self.request(which), pages, self.kind(kind))

    @precondition(lambda self: self.it.requests and self.it.kinds)
    @rule(which=index, kind=index)
    def release_window(self, which: int, kind: int) -> None:
        self.it.release_window(self.request(which), self.partial_kind(kind))

    @precondition(lambda self: self.it.requests and self.it.kinds)
    @rule(which=index, kind=index, deadline=deadlines)
    def copy_on_write(self, which: int, kind: int, deadline: float) -> None:
        self.it.copy_on_write(self.request(which), self.partial_kind(kind), deadline)

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

    @rule()
    def restart(self) -> None:
        self.it.restart()

    @rule(pages=st.integers(0, 8), tier=tiers, kind=index, deadline=deadlines)
    def evict(self, pages: int, tier: Tier, kind: int, deadline: float) -> None:
        self.it.evict(pages, tier, self.kind(kind), deadline)

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
    @rule(which=index, pages=index, whole=st.booleans())
    def progress(self, which: int, pages: int, whole: bool) -> None:
        self.it.progress(self.op(which), pages, whole)

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

    def kind(self, which: int) -> Kind:
        kinds = [FULL, *self.it.kinds]
        return kinds[which % len(kinds)]

    def partial_kind(self, which: int) -> Kind:
        kinds = list(self.it.kinds)
        return kinds[which % len(kinds)]

    def op(self, which: int) -> int:
        pending = list(self.it.executor.pending)
        return pending[which % len(pending)]


CacheMachine.TestCase.settings = settings(
    max_examples=100, stateful_step_count=50, suppress_health_check=list(HealthCheck)
)
TestCacheMachine = CacheMachine.TestCase


def test_a_fixed_campaign_holds_and_meets_every_rare_path() -> None:
    seen: Counter[str] = Counter()
    for seed in range(WORLDS):
        seen += live(seed, STEPS_EACH)[0].seen
    assert not [path for path in RARE if not seen[path]], seen


@pytest.mark.soak
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = 0.5 * float(os.environ.get("SOAK_SECONDS", "600"))
    first = seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    seen: Counter[str] = Counter()
    moved, end = 0, time.monotonic() + seconds
    with capsys.disabled():
        print(f"\nSOAK_SEED={first}", flush=True)
        while time.monotonic() < end:
            world, more = live(seed, 300, count=True)
            seen, moved, seed = seen + world.seen, moved + more, seed + 1
        print(f"{seed - first} worlds, {moved} steps that changed state; of the rare paths")
        print("\n".join(f"{seen[path]:9}  {path}" for path in RARE))
