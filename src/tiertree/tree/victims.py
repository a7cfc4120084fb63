"""Candidates for eviction from one lane, in the order a policy gives them.

    run    0.1 0.4 0.4 0.7 1.2 …     a queue in ascending order: scores mostly come in order
    heap   0.3 0.9 …                 a binary heap for those that do not

Entries are (score, ticket, node). Only *candidates* enter: nodes whose tail page I7 lets go. A touch of
a node writes `last_used` and nothing else, so an entry's score may be stale; it is corrected when it
comes up. A node has at most one live entry, the one whose ticket its lane carries.

    push        O(1) in order, else O(log n)   when a node becomes a candidate
    candidates  O(log n) amortised each        every stale entry met is paid for by a touch
    compact     O(n log n)                     when more than half of the entries are dead
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from heapq import heappop, heappush
from operator import attrgetter
from typing import Protocol

from .node import Lane, Node


class Policy(Protocol):
    """Which candidate goes first. Pure: no clock, no randomness, no I/O."""

    name: str

    def score(self, node: Node) -> float:
        """The node whose score is lowest goes first. A score may only grow while a node is a candidate."""
        ...


class Victims:
    """The candidates of one lane."""

    __slots__ = ("_heap", "_lane_of", "_policy", "_run", "_ticket", "live")

    def __init__(self, lane: int, policy: Policy) -> None:
        self._heap: list[tuple[float, int, Node]] = []
        self._run: deque[tuple[float, int, Node]] = deque()
        self._lane_of: Callable[[Node], Lane] = attrgetter("host" if lane else "device")
        self._policy = policy
        self._ticket = 0
        self.live = 0

    def __len__(self) -> int:
        return len(self._heap) + len(self._run)

    def push(self, node: Node) -> None:
        """`node` is a candidate now; it has no live entry."""
        self._ticket += 1
        self._lane_of(node).ticket = self._ticket
        self.live += 1
        self._put((self._policy.score(node), self._ticket, node))

    def _put(self, item: tuple[float, int, Node]) -> None:
        run = self._run
        if not run or run[-1] < item:
            run.append(item)
        else:
            heappush(self._heap, item)

    def candidates(self) -> Iterator[tuple[Node, Lane]]:
        """Candidates in the order of the policy, each taken out as it is given. More may be pushed
        meanwhile; whatever is no candidate any more (I7) is passed over."""
        lane_of, score = self._lane_of, self._policy.score
        while True:
            heap, run = self._heap, self._run
            if heap and (not run or heap[0] < run[0]):
                old, ticket, node = heappop(heap)
            elif run:
                old, ticket, node = run.popleft()
            else:
                return
            lane = lane_of(node)
            if lane.ticket != ticket:
                continue
            now = score(node)
            if now > old and ((run and run[0][0] < now) or (heap and heap[0][0] < now)):
                self._put((now, ticket, node))
                continue
            lane.ticket = 0
            self.live -= 1
            if lane.count and not lane.below and not lane.locks:
                yield node, lane

    def discard(self, node: Node) -> None:
        """`node` is no candidate any more; its entry dies where it lies."""
        lane = self._lane_of(node)
        if lane.ticket:
            lane.ticket = 0
            self.live -= 1
            if len(self) > 64 + 2 * self.live:
                self._compact()

    def _compact(self) -> None:
        alive = self._alive()
        self._heap = []
        self._run = deque(sorted(alive))

    def _alive(self) -> list[tuple[float, int, Node]]:
        lane_of = self._lane_of
        return [item for item in (*self._run, *self._heap) if lane_of(item[2]).ticket == item[1]]

    def items(self) -> list[Node]:
        """Every live candidate, in no order. O(n)."""
        return [node for _, _, node in self._alive()]
