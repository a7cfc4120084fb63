"""Executors for tests: nothing happens until the test says so, and then what the test says.

    cache ──submit──▶ pending ──complete / fail / progress──▶ done ──poll──▶ cache
                         │                                     ▲
                         └── any order, any time, never        └── duplicate: the same answer again

A page's content is any Python object, one per slot, so that a test can write a page as a function of
all tokens before it and see at once when one stale or aliased slot comes back. What a transfer has not
finished is `JUNK`, as it may be on a real machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from ..storage.base import Storage
from ..storage.workers import answer
from ..tree.actions import Action, Cancel, Completion, Copy, Get, Put, Query, Span
from ..types import Tier

JUNK = "junk"
"""What a slot holds while a transfer may write to it, and after one has failed."""


class Clock:
    """A clock that moves when told. Call it for the time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class ManualExecutor:
    """An `Executor` that a test works by hand.

    `pending` are the actions not answered yet, by operation, oldest first; `submitted` are all there
    ever were. `contents[tier][slot]` is what a slot holds, `stored[page hash]` what storage was given.
    Bytes move when an action is completed, not before: a source that is reused too early shows.
    `on_wait` is called when the cache waits; the clock then moves by as long as it wanted to wait.
    """

    def __init__(self, device_pages: int, host_pages: int, clock: Clock) -> None:
        self.contents: dict[Tier, list[object]] = {
            Tier.DEVICE: [None] * device_pages,
            Tier.HOST: [None] * host_pages,
        }
        self.stored: dict[bytes, object] = {}
        self.pending: dict[int, Action] = {}
        self.submitted: list[Action] = []
        self.cancelled: set[int] = set()
        self.answers: dict[int, Completion] = {}
        self.storage: Storage | None = None
        self.layers: dict[int, int] = {}
        self.on_wait: Callable[[], None] = lambda: None
        self._clock = clock
        self._done: list[Completion] = []

    # -- what the cache calls ---------------------------------------------------------------------

    def submit(self, action: Action) -> None:
        """Take `action`; the slots it writes to are JUNK from now on."""
        self.submitted.append(action)
        if isinstance(action, Cancel):
            self.cancelled.add(action.op)
            return
        self.pending[action.op] = action
        if isinstance(action, Copy):
            for move in action.moves:
                self._spoil(action.target, move.target.tolist())
        elif isinstance(action, Get):
            self._spoil(Tier.HOST, action.spans[0].slots.tolist())

    def poll(self) -> list[Completion]:
        """Every answer given since the last call."""
        done, self._done = self._done, []
        return done

    def wait(self, seconds: float) -> None:
        """Nobody sleeps: the clock moves by `seconds`."""
        self._clock.advance(seconds)
        self.on_wait()

    def ring(self) -> None:
        """Nobody sleeps, so nobody is woken."""

    def fileno(self) -> int:
        """There is no descriptor to wait on."""
        return -1

    def layers_done(self, op: int) -> int:
        """What the test has put into `layers`."""
        return self.layers.get(op, 0)

    def attach(self, storage: Storage | None) -> None:
        """Which keys there are is for `storage` to say (see `KeyStorage`); contents are in `stored`."""
        self.storage = storage

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Whatever is pending is abandoned."""
        return tuple(self.pending)

    # -- what the test calls ----------------------------------------------------------------------

    def complete(self, op: int | None = None) -> None:
        """Do `op` (None: the oldest) and answer that all went well, as far as storage has the pages."""
        action = self.pending.pop(next(iter(self.pending)) if op is None else op)
        if isinstance(action, Copy):
            self._copy(action)
            self._answer(Completion(action.op, sum(len(move.source) for move in action.moves)))
        elif self.storage is None:
            self._answer(Completion(action.op, 0, "no storage is attached"))
        else:
            assert not isinstance(action, Cancel)
            completion = answer(action, self.storage)
            if isinstance(action, Put):
                self._keep(action.spans[0], completion.pages)
            elif isinstance(action, Get):
                self._fill(action.spans[0], completion.pages)
            self._answer(completion)

    def fail(self, op: int | None = None, pages: int = 0, error: str = "failed") -> None:
        """Answer `op` (None: the oldest) with `error`, after `pages` leading pages of a Put or Get."""
        action = self.pending.pop(next(iter(self.pending)) if op is None else op)
        done = Completion(action.op, 0, error)
        if self.storage is not None and pages and isinstance(action, Put | Get):
            done = self._partly(action, pages, error)
        self._answer(done)

    def progress(self, op: int, pages: int) -> None:
        """`pages` leading pages of the Get `op` have arrived, the rest is still to come."""
        action = self.pending[op]
        assert isinstance(action, Get)
        assert self.storage is not None
        part = answer(Get(op, (_head(action.spans[0], pages),)), self.storage)
        self._fill(action.spans[0], part.pages)
        self._done.append(Completion(op, part.pages, None, final=False))

    def duplicate(self, op: int) -> None:
        """Give the final answer of `op` once more."""
        self._done.append(self.answers[op])

    def complete_all(self) -> None:
        """Complete what is pending now, oldest first."""
        for op in list(self.pending):
            self.complete(op)

    # -- contents ---------------------------------------------------------------------------------

    def _answer(self, completion: Completion) -> None:
        self.answers[completion.op] = completion
        self._done.append(completion)

    def _spoil(self, tier: Tier, slots: list[int]) -> None:
        for slot in slots:
            self.contents[tier][slot] = JUNK

    def _copy(self, action: Copy) -> None:
        source, target = self.contents[action.source], self.contents[action.target]
        for move in action.moves:
            for here, there in zip(move.source.tolist(), move.target.tolist(), strict=True):
                target[there] = source[here]

    def _partly(self, action: Put | Get, pages: int, error: str) -> Completion:
        assert self.storage is not None
        span = _head(action.spans[0], pages)
        part = answer(type(action)(action.op, (span,)), self.storage)
        if isinstance(action, Put):
            self._keep(span, part.pages)
        else:
            self._fill(span, part.pages)
        return Completion(action.op, part.pages, error, True, part.stored, part.evicted)

    def _keep(self, span: Span, pages: int) -> None:
        for page_hash, slot in zip(span.hashes[:pages], span.slots.tolist(), strict=False):
            self.stored[page_hash] = self.contents[Tier.HOST][slot]

    def _fill(self, span: Span, pages: int) -> None:
        for page_hash, slot in zip(span.hashes[:pages], span.slots.tolist(), strict=False):
            self.contents[Tier.HOST][slot] = self.stored[page_hash]


def _head(span: Span, pages: int) -> Span:
    return Span(span.kind, span.hashes[:pages], span.slots[:pages])


class FaultyExecutor(ManualExecutor):
    """A `ManualExecutor` that works by itself, badly: late, out of order, failing, repeating itself.

    `step` answers one pending action; every wait of the cache makes one. With the same seed and the
    same calls it does the same. `failing` and `repeating` are probabilities from 0 to 1.
    """

    def __init__(
        self,
        device_pages: int,
        host_pages: int,
        clock: Clock,
        seed: int,
        failing: float = 0.2,
        repeating: float = 0.05,
    ) -> None:
        super().__init__(device_pages, host_pages, clock)
        self._rng = random.Random(seed)
        self._failing = failing
        self._repeating = repeating
        self.on_wait = self.step

    def step(self) -> None:
        """Answer one action that is pending, well or badly; now and then repeat an old answer."""
        rng = self._rng
        if self.answers and rng.random() < self._repeating:
            self.duplicate(rng.choice(list(self.answers)))
        if not self.pending:
            return
        op = rng.choice(list(self.pending))
        action = self.pending[op]
        if isinstance(action, Get) and self.storage is not None and rng.random() < 0.3:
            self.progress(op, rng.randint(0, len(action.spans[0].hashes)))
        elif rng.random() < self._failing or op in self.cancelled:
            self.fail(op, _some_of(action, rng))
        else:
            self.complete(op)


def _some_of(action: Action, rng: random.Random) -> int:
    """How many pages of a failing action to do."""
    if isinstance(action, Put | Get):
        return rng.randrange(len(action.spans[0].hashes) + 1)
    assert isinstance(action, Copy | Query)
    return 0
