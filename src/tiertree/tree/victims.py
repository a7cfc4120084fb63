"""Candidates for eviction from one lane, in the order of a score.

    run    0.1 0.4 0.4 0.7 1.2 …     a queue in ascending order: scores mostly come in order
    heap   0.3 0.9 …                 a binary heap for those that do not
    new    · · ·                     a list of those without a score yet: they get one, and go into run
                                     or heap, when somebody asks for candidates

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
from typing import Protocol

from .node import Lane, Node


class Policy(Protocol):
    """Which candidate goes first. Pure: no clock, no randomness, no I/O."""

    name: str

    def score(self, node: Node) -> float:
        """The node whose score is lowest goes first. A score may only grow while a node is a candidate."""
        ...


class Victims:
    """The candidates of one lane. `lazy`: new candidates get their scores when somebody asks for candidates;
    most have gone by then."""

    __slots__ = ("_heap", "_lane_of", "_lazy", "_new", "_run", "_score", "_ticket", "live")

    def __init__(
        self,
        lane_of: Callable[[Node], Lane],
        score: Callable[[Node], float],
        lazy: bool = False,
    ) -> None:
        self._heap: list[tuple[float, int, Node]] = []
        self._run: deque[tuple[float, int, Node]] = deque()
        self._new: list[tuple[int, Node]] = []
        self._lane_of = lane_of
        self._score = score
        self._lazy = lazy
        self._ticket = 0
        self.live = 0

    def __len__(self) -> int:
        return len(self._heap) + len(self._run) + len(self._new)

    def push(self, node: Node, later: bool = False) -> None:
        """`node` is a candidate now; it has no live entry. `later`: it gets its score when somebody asks."""
        self._ticket += 1
        self._lane_of(node).ticket = self._ticket
        self.live += 1
        if later or self._lazy:
            self._new.append((self._ticket, node))
        else:
            self._put((self._score(node), self._ticket, node))

    def _put(self, item: tuple[float, int, Node]) -> None:
        run = self._run
        if not run or run[-1] < item:
            run.append(item)
        else:
            heappush(self._heap, item)

    def candidates(self) -> Iterator[tuple[Node, Lane]]:
        """Candidates in the order of the policy, each taken out as it is given. More may be pushed
        meanwhile; whatever is no candidate any more (I7) is passed over."""
        lane_of, score, new = self._lane_of, self._score, self._new
        while True:
            if new:
                self._admit()
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

    def _admit(self) -> None:
        """Score the new candidates."""
        for ticket, node in self._new:
            if self._lane_of(node).ticket == ticket:
                self._put((self._score(node), ticket, node))
        self._new.clear()

    def refresh(self, node: Node) -> None:
        """`node` is a candidate, and its score may have fallen: it gets a new one when somebody asks. O(1)
        amortised."""
        if self._lane_of(node).ticket:
            self.discard(node)
        self.push(node, True)

    def discard(self, node: Node) -> None:
        """`node` is no candidate any more; its entry dies where it lies."""
        lane = self._lane_of(node)
        if lane.ticket:
            lane.ticket = 0
            self.live -= 1
            if len(self) > 64 + 2 * self.live:
                self._compact()

    def _compact(self) -> None:
        lane_of = self._lane_of
        self._new[:] = [item for item in self._new if lane_of(item[1]).ticket == item[0]]
        alive = self._alive()
        self._heap = []
        self._run = deque(sorted(alive))

    def _alive(self) -> list[tuple[float, int, Node]]:
        lane_of = self._lane_of
        return [item for item in (*self._run, *self._heap) if lane_of(item[2]).ticket == item[1]]

    def scores(self) -> Iterator[tuple[Node, float, float]]:
        """Every live candidate with the score it is queued with and the one it has now. O(n)."""
        self._admit()
        for score, _, node in self._alive():
            yield node, score, self._score(node)

    def items(self) -> list[Node]:
        """Every live candidate, in no order. O(n)."""
        self._admit()
        return [node for _, _, node in self._alive()]
