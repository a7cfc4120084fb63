"""What every eviction policy must be: a pure score of a node, and fit for a real cache.

    by itself    nodes of every state that a tree can have, each of them scored again and again
    at work      a small cache under a seeded load, every invariant checked after each step, twice

The load runs under write_through and write_back, with full attention alone and with a window beside it.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...cache import PrefixCache
from ...components import SlidingWindow
from ...config import CacheConfig, DeviceConfig, HostConfig, KindConfig, LoadBackConfig
from ...policy.eviction import POLICIES
from ...tree.lease import Lease
from ...tree.node import Node
from ...tree.radix import DEVICE, HOST
from ...tree.victims import Policy
from ...types import FULL, Kind, NoRoom, Tier, WritePolicy
from ..faults import Clock, ManualExecutor
from .hang import ends
from .policy_nodes import cut, nodes, picture

STEPS = 250
_DEVICE_PAGES, _HOST_PAGES = 10, 12
_WINDOW_PAGES = 6
_NAME = "conformance-policy"


def check_policy(policy: Policy, seed: int = 0) -> None:
    """Run every check of an eviction policy. `seed` is that of the load: 4 × 2 runs of 250 steps, about a
    second. A load that fails names its seed."""
    assert isinstance(policy.name, str), "a policy has a name"
    assert policy.name, "a policy has a name"
    unasked = copy.deepcopy(policy)
    for node in nodes():
        _scores(policy, node)
    _same_for_equal_nodes(policy, unasked)
    _touch_makes_no_older(policy)
    _less_makes_no_older(policy)
    for write_policy in (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK):
        for window in (False, True):
            first, second = (
                _Load(policy, seed, write_policy, window),
                _Load(policy, seed, write_policy, window),
            )
            ends(first.name, first.run)
            ends(second.name, second.run)
            assert first.story == second.story, f"the same load makes the same evictions: {first.name}"


def _score(policy: Policy, node: Node) -> float:
    try:
        return policy.score(node)
    except Exception as error:
        raise AssertionError(
            f"score copes with every node, but for {picture(node)} it raised {error!r}"
        ) from error


def _scores(policy: Policy, node: Node) -> None:
    """One node gets one finite score, and is what it was."""
    before = picture(node)
    score = _score(policy, node)
    assert isinstance(score, int | float), f"a score is a number, not {score!r}"
    assert not isinstance(score, bool), f"a score is a number, not {score!r}"
    assert math.isfinite(score), f"a score is finite, not {score}: scores have one order"
    assert picture(node) == before, f"score has changed the node: {before} is now {picture(node)}"


def _same_for_equal_nodes(policy: Policy, unasked: Policy) -> None:
    """Asked again, in another order, and for other objects that are equal, it says the same, and so does
    one that was never asked anything."""
    kept = nodes()
    there = [_score(policy, node) for node in nodes()]
    back = [_score(unasked, node) for node in reversed(kept)]
    again = [_score(policy, node) for node in kept]
    for node, *scores in zip(kept, there, reversed(back), again, strict=True):
        assert len(set(scores)) == 1, f"score is pure, but gave {scores} to equal nodes {picture(node)}"


def _touch_makes_no_older(policy: Policy) -> None:
    """What a match does to a node that stays a candidate never lowers its score."""
    for node in nodes():
        for later in (0.001, 1.0, 1e6):
            before = _score(policy, node)
            node.last_used += later
            node.hits += 1
            after = _score(policy, node)
            assert after >= before, (
                f"a touch makes no node older, but {picture(node)} fell from {before} to {after}"
            )


def _less_makes_no_older(policy: Policy) -> None:
    """A split takes pages off a node's front, an eviction from the other tier off its tail."""
    for front in (True, False):
        for node in nodes():
            if node.pages > 1:
                before = _score(policy, node)
                cut(node, front)
                after = _score(policy, node)
                less = "a node that becomes shorter gets no older"
                assert after >= before, f"{less}, but {picture(node)} fell from {before} to {after}"


@contextmanager
def _registered(policy: Policy) -> Iterator[None]:
    POLICIES[_NAME] = lambda: policy
    try:
        yield
    finally:
        del POLICIES[_NAME]


class _Load:
    """A small cache under `policy`, with what its requests have leased. A page's content is what it is of."""

    def __init__(self, policy: Policy, seed: int, write_policy: WritePolicy, window: bool) -> None:
        self.story: list[str] = []
        self.name = f"seed {seed}, {write_policy}, {'with' if window else 'without'} a window"
        self._random = random.Random(self.name)
        self._clock = Clock()
        rules = SlidingWindow(window=2)
        kinds = (KindConfig(rules=rules, device=_WINDOW_PAGES, host=_WINDOW_PAGES),) if window else ()
        sizes: dict[Kind, tuple[int, int]] = {each.kind: (_WINDOW_PAGES, _WINDOW_PAGES) for each in kinds}
        self._kinds = [each.kind for each in kinds]
        self._executor = ManualExecutor(_DEVICE_PAGES, _HOST_PAGES, self._clock, sizes)
        self._leases: list[tuple[Lease, list[int]]] = []
        self._config = CacheConfig(
            page_size=1,
            device=DeviceConfig(size=_DEVICE_PAGES),
            host=HostConfig(size=_HOST_PAGES),
            kinds=kinds,
            write_policy=write_policy,
            eviction=_NAME,
            load_back=LoadBackConfig(min_tokens=0),
        )
        with _registered(policy):
            self.cache = PrefixCache(self._config, executor=self._executor, clock=self._clock)

    def run(self) -> None:
        """STEPS steps, and then everything goes."""
        try:
            with self.cache:
                for _ in range(STEPS):
                    self.step()
                self.empty()
        except AssertionError as error:
            where = f"{self.name}, step {len(self.story)}"
            raise AssertionError(f"{error} ({where})") from error

    def step(self) -> None:
        """Something happens; then everything is as it must be."""
        self._clock.advance(self._random.choice((0.0, 0.5, 3.0)))
        what = self._random.choice(self._STEPS)
        self.story.append(what.__name__)
        what(self)
        self._settle()
        self._intact()

    def empty(self) -> None:
        """Everything is given back; then everything goes (I12)."""
        while self._leases:
            self._release()
        pools = [(tier, kind) for kind in (FULL, *self._kinds) for tier in (DEVICE, HOST)]
        before: list[int] = []
        while before != (before := [self._left(*pool) for pool in pools]):
            for pool in pools:
                self._evict_all(*pool)
        stay = {f"{kind} on {tier.name}": self._left(tier, kind) for tier, kind in pools}
        assert not any(stay.values()), f"everything goes when nobody holds it, but of {stay} pages some stay"

    def _left(self, tier: Tier, kind: Kind) -> int:
        ledger = self.cache._core.ledger(kind, tier)
        return ledger.capacity - ledger.free

    def _evict_all(self, tier: Tier, kind: Kind) -> None:
        self.cache.evict(_DEVICE_PAGES + _HOST_PAGES, tier, deadline_s=0, kind=kind)
        self._settle()
        self._intact()

    def _settle(self) -> None:
        while self._executor.pending:
            self._executor.complete_all()
            self.cache.poll()

    def _intact(self) -> None:
        """Every invariant holds, and every page that is leased has its own content."""
        self.cache.check()
        for lease, tokens in self._leases:
            contents = self._executor.contents[DEVICE]
            pages = [contents[slot] for slot in lease.slots.tolist()]
            wanted = [_page(tokens, page) for page in range(len(pages))]
            assert pages == wanted, f"a leased page was evicted: {lease}"

    def _prompt(self) -> list[int]:
        return [self._random.randrange(3) for _ in range(self._random.randrange(1, 7))]

    # -- steps --------------------------------------------------------------------------------------

    def _insert(self) -> None:
        """A request computes a prompt."""
        tokens = self._prompt()
        key = self.cache.key(tokens)
        slots = self.cache.allocate(key.pages, deadline_s=0)
        if isinstance(slots, NoRoom):
            return
        for page, slot in enumerate(slots.tolist()):
            self._executor.contents[DEVICE][slot] = _page(tokens, page)
        partial = {}
        for kind in self._kinds:
            own = self.cache.allocate(key.pages, deadline_s=0, kind=kind)
            if not isinstance(own, NoRoom):
                partial[kind] = own
        self.cache.insert(key, slots, partial=partial)

    def _match(self) -> None:
        """A lookup."""
        self.cache.match(self.cache.key(self._prompt()))

    def _lease(self) -> None:
        """A request holds what there is of a prompt, and may want it all on device."""
        tokens = self._prompt()
        lease = self.cache.acquire(self.cache.match(self.cache.key(tokens)))
        self._leases.append((lease, tokens))
        if self._random.random() < 0.5:
            self.cache.load_back(lease, deadline_s=0)
        if len(self._leases) > 2:
            self._release()

    def _release(self) -> None:
        """The oldest request ends."""
        if self._leases:
            self._leases.pop(0)[0].release()

    def _evict(self) -> None:
        """Room is asked for. Of FULL under write_through exactly as much as is asked for must come, as far as
        there is any that nobody holds; never more than that under any."""
        cache, core = self.cache, self.cache._core
        tier, kind = self._random.choice((DEVICE, HOST)), self._random.choice((FULL, *self._kinds))
        pages = self._random.randrange(1, 6)
        ledger, could = core.ledger(kind, tier), core.reclaimable(tier, kind)
        before = ledger.free
        done = cache.evict(pages, tier, deadline_s=0, kind=kind)
        freed = ledger.free - before
        self.story.append(f"{kind} on {tier.name}: {sorted(ledger.free_slots())}")
        assert freed == done.freed, f"evict says what it freed: {done.freed}, not {freed}"
        asked = f"evict frees exactly what it is asked for: {freed} of {pages} with {could} to be had"
        assert freed <= pages, asked
        if cache.config.write_policy is WritePolicy.WRITE_THROUGH:
            assert freed == min(pages, could), asked

    _STEPS: tuple[Callable[[_Load], None], ...] = (_insert, _insert, _match, _lease, _release, _evict, _evict)


def _page(tokens: list[int], page: int) -> object:
    return tuple(tokens[: page + 1])
