"""Virtual time: what happens, and when.

    engine events     arrivals, steps of the scheduler            run by `run`
    deeper events     transfers and storage answering             run by `run`, and while the cache waits

Only a cache that waits lets time pass inside a call, and then only deeper events happen: the engine is
one thread, and that thread is waiting. Events of the same time happen in the order in which they were
planned. No real time passes.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable

Event = Callable[[], None]
STILL_MAX = 10_000
"""Waits in which no time passes, one after another: whoever waits so often does not look at what is there."""


class Loop:
    """A clock, to be called for the seconds, and the events to come."""

    def __init__(self) -> None:
        self.now = 0.0
        self._planned = 0
        self._still = 0
        self._waited_at = -1.0
        self._queues: tuple[list[tuple[float, int, Event]], list[tuple[float, int, Event]]] = ([], [])

    def __call__(self) -> float:
        return self.now

    def at(self, time: float, event: Event, deep: bool = False) -> None:
        """Plan `event`, at once if `time` has passed already."""
        self._planned += 1
        heapq.heappush(self._queues[deep], (max(time, self.now), self._planned, event))

    def forget(self) -> None:
        """Nothing that was planned happens any more."""
        for queue in self._queues:
            queue.clear()

    def step(self) -> bool:
        """Let the next event happen. False if there is none."""
        queues = [queue for queue in self._queues if queue]
        if not queues:
            return False
        self._run(min(queues, key=lambda queue: queue[0][:2]))
        return True

    def wait(self, seconds: float, enough: Callable[[], bool]) -> None:
        """Let deeper events happen for `seconds`, or until there are enough."""
        self._still = self._still + 1 if self.now == self._waited_at else 0
        self._waited_at = self.now
        if self._still > STILL_MAX:
            raise RuntimeError(f"somebody waits for ever at {self.now:.6f} s")
        end, deep = self.now + seconds, self._queues[True]
        while deep and deep[0][0] <= end and not enough():
            self._run(deep)
        if not enough():
            self.now = max(self.now, end)

    def _run(self, queue: list[tuple[float, int, Event]]) -> None:
        time, _, event = heapq.heappop(queue)
        self.now = max(self.now, time)
        event()


class Diary:
    """Every decision in order: a running SHA-256 of all of them, and the text of the last ones.

    `lines_max` is how many lines are kept; 0 keeps none, which is what a campaign wants."""

    def __init__(self, clock: Loop, lines_max: int = 0) -> None:
        self._clock = clock
        self._hash = hashlib.sha256()
        self._lines_max = lines_max
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        """Something was decided."""
        line = f"{self._clock.now:.6f} {text}"
        self._hash.update(line.encode() + b"\n")
        if self._lines_max:
            self.lines.append(line)
            if len(self.lines) > 2 * self._lines_max:
                del self.lines[: -self._lines_max]

    @property
    def digest(self) -> str:
        """Of everything noted so far, as hexadecimal text."""
        return self._hash.hexdigest()
