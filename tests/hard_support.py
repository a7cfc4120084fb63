"""What the tests of the five hard cases share: every combination, and a rig that looks after each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
from kinds import CHUNK, Chunked, name
from rig import WHAT_IT_NEEDS, Pages, Rig, Tokens

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    BlockStored,
    Component,
    Evicted,
    Inserted,
    KindConfig,
    Lease,
    LoadBack,
    Mamba,
    Refused,
    SlidingWindow,
    Tier,
    WritePolicy,
)
from tiertree.testing.oracle import Oracle, Page
from tiertree.tree.actions import Copy, Put
from tiertree.tree.check import nodes_of
from tiertree.tree.ledger import NODE_READY, State
from tiertree.tree.node import Node, fragments
from tiertree.types import Kind

DEVICE, HOST, STORAGE = Tier.DEVICE, Tier.HOST, Tier.STORAGE
BACK = WritePolicy.WRITE_BACK
THROUGH = (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE)

Kinds = tuple[Kind, ...]
SETS: tuple[Kinds, ...] = ((), (SWA,), (MAMBA,), (SWA, MAMBA), (SWA, MAMBA, CHUNK))
"""The sets of partial kinds; the last has one that is made up."""

Stored = tuple[tuple[bytes, ...], bytes | None]
"""Page hashes that one event announces, and the hash of the page before them."""


class Setup(NamedTuple):
    """One combination: partial kinds, write policy, page size."""

    kinds: Kinds
    policy: WritePolicy
    page_size: int

    def __str__(self) -> str:
        return f"{name(self.kinds)}-{self.policy}-{self.page_size}"

    def rules(self) -> list[Component]:
        """Windows of three pages, one state, chunks of four pages."""
        rules: dict[Kind, Component] = {
            SWA: SlidingWindow(window=3 * self.page_size),
            MAMBA: Mamba(),
            CHUNK: Chunked(pages=4),
        }
        return [rules[kind] for kind in self.kinds]

    def rig(
        self,
        device: int = 16,
        host: int = 16,
        storage: int = 0,
        of_kinds: int | None = None,
        **options: object,
    ) -> Case:
        """A rig of this combination; a page is backed up at its first hit where hits matter. `of_kinds`:
        host pages of each partial kind, if not as many as FULL has."""
        chosen = {"write_policy": self.policy, "page_size": self.page_size, "selective_hits": 1, **options}
        kinds = [KindConfig(rules=each, device=device, host=of_kinds or host) for each in self.rules()]
        return Case(device, host, storage, kinds=kinds, **chosen)

    def prompt(self, *pages: int) -> list[int]:
        """A prompt whose pages are named by numbers."""
        return [page * 10 + at for page in pages for at in range(self.page_size)]

    def nothing(self) -> Pages:
        """No page of any partial kind."""
        return dict.fromkeys(self.kinds, ())

    def all(self, pages: int) -> Pages:
        """Every one of so many pages of every partial kind."""
        return dict.fromkeys(self.kinds, range(pages))


def each(
    policies: Iterable[WritePolicy] = WritePolicy, kinds: Iterable[Kinds] = SETS
) -> Callable[[Any], Any]:
    """Once for each combination of partial kinds, policies and page sizes 1 and 2."""
    chosen = [Setup(*one) for one in product(kinds, policies, (1, 2))]
    return pytest.mark.parametrize("setup", chosen, ids=str)


class Case(Rig):
    """A rig that looks at everything after each step: `check`, contents, lookups, and the events so far,
    `heard`, which an oracle believes only in an order that is allowed."""

    def _open(self) -> None:
        super()._open()
        self.prompts: list[Tokens] = []
        self.heard: list[BlockStored] = []
        self.oracle = Oracle(self.page_size, [each.rules for each in self.kinds.values()])

    def knows(self, tokens: Tokens) -> None:
        """From now on `tokens` are looked up after each step."""
        if tokens not in self.prompts:
            self.prompts.append(tokens)

    # -- steps ------------------------------------------------------------------------------------

    def put(self, tokens: Tokens, namespace: str = "", pages: Pages = WHAT_IT_NEEDS) -> Inserted:
        self.knows(tokens)
        done = super().put(tokens, namespace, pages)
        self.look()
        return done

    def lease(self, tokens: Tokens, namespace: str = "") -> Lease:
        lease = super().lease(tokens, namespace)
        self.look()
        return lease

    def grow(self, lease: Lease, tokens: Tokens, pages: Pages = WHAT_IT_NEEDS) -> Inserted | Refused:
        self.knows(tokens)
        done = super().grow(lease, tokens, pages)
        self.look()
        return done

    def release(self, *leases: Lease) -> None:
        """The requests end."""
        for lease in leases:
            lease.release()
            self.look()

    def touch(self, *prompts: Tokens) -> None:
        """Somebody asks for each of these prompts."""
        for tokens in prompts:
            self.cache.match(self.cache.key(tokens))
            self.look()

    def load(self, lease: Lease) -> LoadBack:
        load = super().load(lease)
        self.look()
        return load

    def evict(self, pages: int, tier: Tier = DEVICE, kind: Kind = FULL, deadline_s: float = 0) -> Evicted:
        before = self.free(tier, kind)
        done = super().evict(pages, tier, kind, deadline_s)
        assert done.freed == self.free(tier, kind) - before
        self.look()
        return done

    def done(self, op: int | None = None) -> None:
        super().done(op)
        self.look()

    def failed(self, op: int | None = None) -> None:
        super().failed(op)
        self.look()

    def settle(self) -> None:
        while self.executor.pending or self.core.operations.in_flight:
            self.done()

    def to_host(self, *prompts: Tokens) -> None:
        """These prompts are all there is; they go to host by whatever way the policy has."""
        self.touch(*prompts)
        self.settle()
        for _ in range(20):
            if self.free() == self.sizes[0]:
                return
            self.evict(self.sizes[0])
            self.settle()
        raise AssertionError(f"{self.sizes[0] - self.free()} pages do not leave the device")

    # -- looking ----------------------------------------------------------------------------------

    def look(self) -> None:
        """The books are right, events are in order and say what is where, every page has its content, and
        a lookup finds what it should."""
        self.cache.check()
        policy = self.cache.config.write_policy
        closed = (DEVICE,) if policy is BACK else (DEVICE, HOST)
        changed = False
        for event in self.cache.take_events():
            self.oracle.apply(event, getattr(event, "medium", None) in closed)
            if isinstance(event, BlockStored):
                self.heard.append(event)
            changed = True
        self._look_at_pages()
        for tokens in self.prompts if changed else ():
            assert self.where(tokens) == self.oracle.match(tokens)[:2]

    def _look_at_pages(self) -> None:
        units: dict[Node | None, tuple[int, ...]] = {}
        pools = list(product((DEVICE, HOST), (FULL, *self.kinds)))
        there: dict[tuple[Tier, Kind], set[Page]] = {pool: set() for pool in pools}
        for node in nodes_of(self.core):
            edge = np.frombuffer(node.edge, self.core.radix.keys.dtype)
            units[node] = path = (*units.get(node.parent, ()), *edge.tolist())
            for tier, kind in pools:
                lane = self.lane(node, tier, kind)
                if lane.slots is None:
                    continue
                contents, book = self.executor.of(kind)[tier], self.ledger(tier, kind).book
                for at, slot in enumerate(lane.slots.tolist(), node.start):
                    if slot >= 0 and book[slot] == NODE_READY:
                        assert contents[slot] == self.page(path, "", at, kind), (tier, kind, at)
                        there[tier, kind].add(("", path[: (at + 1) * self.page_size], kind))
        for (tier, kind), pages in there.items():
            assert pages == self.oracle.on(tier, kind), (tier, kind)

    def slots(self, tokens: Tokens, tier: Tier, kind: Kind = FULL) -> dict[int, int]:
        """The slot of each page of `tokens` that is READY on `tier`."""
        end, depth = self.core.radix.find(self.cache.key(tokens))
        found: dict[int, int] = {}
        for node, low, high in fragments(end, 0, depth) if end is not None else ():
            slots, states = self.lane(node, tier, kind).slots, self.states(node, tier, kind)
            if slots is not None:
                ready = [at for at in range(low, high) if states[at] == State.READY]
                found |= {node.start + at: int(slots[at]) for at in ready}
        return found

    def drawn(self, pages: Iterable[int], of: int, letter: str) -> str:
        """What `map` says of a prompt of so many pages where `pages` are at `letter`, others nowhere."""
        there = set(pages)
        return "".join(letter if page in there else "." for page in range(of))

    def announced(self, tokens: Tokens, tier: Tier, kind: Kind = FULL) -> list[Stored]:
        """What has been announced of the pages of `tokens` on `tier`, event by event."""
        ours = set(self.page_hashes(tokens))
        events = (each for each in self.heard if (each.medium, each.kind) == (tier, kind))
        return [(each.block_hashes, each.parent_block_hash) for each in events if ours & {*each.block_hashes}]

    def puts(self) -> list[tuple[bytes, ...]]:
        """The pages of FULL that each Put so far has offered to storage."""
        return [each.spans[0].hashes for each in self.executor.submitted if isinstance(each, Put)]

    def copies(self) -> list[dict[Kind, int]]:
        """How many pages of each kind each copy so far moves."""
        copies = (each for each in self.executor.submitted if isinstance(each, Copy))
        return [{move.kind: len(move.source) for move in copy.moves if len(move.source)} for copy in copies]
