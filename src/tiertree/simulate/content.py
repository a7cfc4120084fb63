"""What the bytes of every page must be: a function of all tokens before it, its namespace and the weights.

    weights, namespace ──▶ root ──page 0──▶ digest ──page 1──▶ digest ── …
                                                └─ kind, sidecar ──▶ the bytes of that page in that pool

So one stale, foreign, torn or half-copied page shows as wrong bytes, wherever it went in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from ..pools.group import PoolGroup
from ..tree.core import Core
from ..tree.ledger import State
from ..tree.node import Node, subtree
from ..types import FULL, Kind, Slots, Tier

Bytes = NDArray[np.uint8]


class Contents:
    """Makes and compares pages of `page_tokens` token units."""

    def __init__(self, page_tokens: int) -> None:
        self._page_tokens = page_tokens
        self._known: dict[tuple[bytes, bytes], bytes] = {}
        self.verified = 0
        """Pages compared so far, one for each pool of each."""

    def chain(self, tokens: Sequence[int], namespace: str, revision: str, stop: int) -> list[bytes]:
        """The digests of pages 0 .. stop. O(pages)."""
        size, at, found = self._page_tokens, self.root(namespace, revision), []
        for page in range(stop):
            at = self.follow(at, tokens[page * size : (page + 1) * size])
            found.append(at)
        return found

    @staticmethod
    def root(namespace: str, revision: str) -> bytes:
        """What the chain of a namespace begins with."""
        return repr((namespace, revision)).encode()

    def follow(self, before: bytes, page: Sequence[int]) -> bytes:
        """The digest of the page of these tokens behind one."""
        step = before, np.asarray(page, np.uint32).tobytes()
        if step not in self._known:
            self._known[step] = blake2b(step[1], key=blake2b(before).digest(), digest_size=32).digest()
        return self._known[step]

    @staticmethod
    def pages(digests: Sequence[bytes], kind: Kind, pool: int, page_bytes: int) -> Bytes:
        """The bytes of the pages of these digests in pool number `pool` (0 the main one) of `kind`: uint8,
        [len(digests), page_bytes], at most 64 bytes a page."""
        mark = f"{kind}/{pool}".encode()
        text = b"".join(blake2b(each, key=mark, digest_size=page_bytes).digest() for each in digests)
        return np.frombuffer(text, np.uint8).reshape(len(digests), page_bytes)

    def write(self, group: PoolGroup, kind: Kind, slots: Slots, digests: Sequence[bytes]) -> None:
        """The model computes these pages."""
        for index, pool in enumerate(group[kind]):
            pool.write_pages(slots, self.pages(digests, kind, index, pool.page_bytes))

    def wrong(self, group: PoolGroup, kind: Kind, slots: Slots, digests: Sequence[bytes]) -> list[int]:
        """Which of these pages are not what they must be, by position; counts what it compares."""
        wrong: set[int] = set()
        for index, pool in enumerate(group[kind]):
            found = np.empty((len(slots), pool.page_bytes), np.uint8)
            pool.read_pages(slots, found)
            expected = self.pages(digests, kind, index, pool.page_bytes)
            self.verified += len(slots)
            if not np.array_equal(found, expected):
                wrong.update(np.flatnonzero((found != expected).any(axis=1)).tolist())
        return sorted(wrong)

    def wrong_layers(
        self, group: PoolGroup, slots: Slots, digests: Sequence[bytes], layers: int
    ) -> list[int]:
        """The same for the leading `layers` layers of FULL's main pool."""
        pool = group[FULL].main
        found = np.empty((len(slots), pool.page_bytes), np.uint8)
        pool.read_pages(slots, found)
        stop = pool.page_bytes * layers // pool.layout.layers
        expected = self.pages(digests, FULL, 0, pool.page_bytes)
        return np.flatnonzero((found[:, :stop] != expected[:, :stop]).any(axis=1)).tolist()


def wrong_in_tree(
    core: Core, groups: Mapping[Tier, PoolGroup | None], contents: Contents, revision: str
) -> Iterator[str]:
    """Every READY page of the tree, in every kind and tier, that is not what it must be. O(pages)."""
    size, dtype = core.radix.keys.page_size, core.radix.keys.dtype
    for name, root in core.radix.roots.items():
        last = {id(root): contents.root(name, revision)}
        for node in subtree(root):
            at, own = last[id(node.parent)], []
            units = np.frombuffer(node.edge, dtype).tolist()
            for page in range(node.pages):
                at = contents.follow(at, units[page * size : (page + 1) * size])
                own.append(at)
            last[id(node)] = at
            for tier, group in groups.items():
                if group is not None:
                    yield from _wrong_in_node(core, node, own, tier, group, contents)


def _wrong_in_node(
    core: Core, node: Node, digests: Sequence[bytes], tier: Tier, group: PoolGroup, contents: Contents
) -> Iterator[str]:
    lanes = [(FULL, core.radix.ledgers[tier], node.lane(tier))]
    lanes += [(each.kind, each.ledgers[tier], each.lane(node, tier)) for each in core.radix.partials]
    for kind, ledger, lane in lanes:
        if lane.slots is None:
            continue
        there = np.flatnonzero(lane.slots >= 0)
        ready = there[ledger.states(lane.slots[there]) == State.READY]
        for at in contents.wrong(group, kind, lane.slots[ready], [digests[page] for page in ready.tolist()]):
            yield f"{kind} of page {node.start + int(ready[at])} is wrong on {tier.name.lower()}, in {node}"
