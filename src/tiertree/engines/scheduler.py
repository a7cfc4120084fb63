"""Who waits, who runs, and who gives way.

    waiting ──prefetch settled, room for all its known tokens──▶ running ──▶ finished
       ▲                                                            │
       └── gave way: no page left, or for somebody's first token ───┘   its pages stay cached: on device
                                                                        while there is room, then on host

In line come: requests without a first token, and those that have been overtaken often enough, by age; then
those that gave way, by age. The first one that has its prefetch settled and finds no room blocks the rest,
so large requests do not starve.
"""

from __future__ import annotations

from collections.abc import Callable

from ..cache import PrefixCache
from ..types import NoRoom, Refused
from .request import Limits
from .sequence import Lacking, Sequence

PREFETCHES_MAX = 32
"""Waiting requests, from the front of the line, that are read ahead from storage at the same time."""


class Scheduler:
    """The two queues over one cache. A pass computes at most `chunk` tokens of a prompt."""

    def __init__(self, cache: PrefixCache, limits: Limits, chunk: int, clock: Callable[[], float]) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._cache = cache
        self._limits = limits
        self._chunk = chunk
        self._clock = clock

    # -- admission --------------------------------------------------------------------------------

    def admit(self) -> list[tuple[Sequence, Lacking]]:
        """Let waiting requests run as far as there is room; never waits. Returns who will find none."""
        self.waiting.sort(key=self._place)
        line = self.waiting[:PREFETCHES_MAX]
        for sequence in line:
            self._prefetch(sequence)
        for sequence in line:
            if len(self.running) >= self._limits.max_running:
                break
            if sequence.prefetch is not None:
                continue
            lacking = sequence.admit(self._chunk)
            while lacking is not None and self._make_way(sequence, lacking[1]):
                lacking = sequence.admit(self._chunk)
            if lacking is not None:
                return [(sequence, lacking)] if self._starves(sequence, lacking[1]) else []
            self._admitted(sequence)
        return []

    def _place(self, sequence: Sequence) -> tuple[bool, int]:
        started = sequence.reply.first_token is not None
        return started and sequence.overtaken < self._limits.yields, sequence.reply.number

    def _admitted(self, sequence: Sequence) -> None:
        sequence.starving_since = None
        self.waiting.remove(sequence)
        self.running.append(sequence)
        for other in self.waiting:
            other.overtaken += other.reply.number < sequence.reply.number

    def _prefetch(self, sequence: Sequence) -> None:
        """Begin to read from storage what memory lacks of it, once; and look whether that is over."""
        cache = self._cache
        if not sequence.prefetched:
            sequence.prefetched = True
            key = sequence.key(len(sequence.tokens) - 1)
            if cache.peek(key).memory_boundary < key.pages:
                started = cache.prefetch(key)
                sequence.prefetch = None if isinstance(started, Refused) else started
        if sequence.prefetch is not None:
            landed = cache.settle(sequence.prefetch)
            if landed is not None:
                sequence.prefetch, sequence.landed = None, landed

    def _starves(self, sequence: Sequence, refusal: NoRoom) -> bool:
        """Whether nobody is left who could make room for it, and nothing has come home for so long that
        nothing will. Before that it tries without a load-back: what that would need may be in its own way,
        since its lease holds pages beyond its device boundary then."""
        if self.running or refusal.pending:
            sequence.starving_since = None
            return False
        now, deadline = self._clock(), self._cache.config.op_deadline_seconds
        if sequence.starving_since is None:
            sequence.starving_since = now
        starving = now - sequence.starving_since
        if starving > deadline or self._cache.drain(0):
            sequence.may_load = False
        return starving > 2 * deadline

    def readmit(self, sequence: Sequence) -> bool:
        """Admit `sequence`, which runs, anew, for what the cache has of it by now. False: it waits again."""
        sequence.release()
        if sequence.admit(self._chunk) is None:
            return True
        self.requeue(sequence)
        return False

    # -- giving way -------------------------------------------------------------------------------

    def _make_way(self, sequence: Sequence, refusal: NoRoom) -> bool:
        """Interrupt who is decoding, the youngest first, for the first token of `sequence`: as many as it
        takes, and nobody if all of them are not enough. Their pages go to host as room is needed."""
        if self._cache.config.host is None or sequence.reply.first_token is not None or refusal.pending:
            return False
        victims = [
            each
            for each in self.running
            if each.decoding and not each.closing and each.reply.preemptions < self._limits.yields
        ]
        page = self._cache.config.page_size
        wanted = refusal.wanted - refusal.free - refusal.reclaimable
        chosen: list[Sequence] = []
        for victim in sorted(victims, key=lambda each: -each.reply.number):
            if wanted <= 0:
                break
            chosen.append(victim)
            wanted -= -(-len(victim.tokens) // page)
        if not chosen or wanted > 0:
            return False
        for victim in chosen:
            self.preempt(victim)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """`sequence` waits again. Its whole computed pages stay in the cache."""
        sequence.hand_over()
        if sequence.closing:
            self.drop(sequence)
        else:
            sequence.reply.preemptions += 1
            sequence.may_load = True
            self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """`sequence` begins again, with what the cache has of it."""
        sequence.release()
        sequence.forget_prefetch()
        self.running.remove(sequence)
        self.waiting.append(sequence)

    def drop(self, sequence: Sequence) -> None:
        """`sequence` is over, wherever it is."""
        sequence.release()
        sequence.forget_prefetch()
        (self.running if sequence in self.running else self.waiting).remove(sequence)

    def ready(self, sequence: Sequence, count: int) -> bool:
        """Take what the next `count` tokens of `sequence` need on device. Without room the youngest of those
        that run gives way, which may be `sequence` itself; False: not in this step."""
        while (lacking := sequence.ensure(count)) is not None:
            _, refusal = lacking
            if refusal.pending:
                return False
            victim = max(self.running, key=lambda each: each.reply.number)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True


def lacks(lacking: Lacking) -> str:
    """A refusal in words."""
    kind, room = lacking
    return f"no room for {room.wanted} pages of {kind} on device: {room.free} are free"
