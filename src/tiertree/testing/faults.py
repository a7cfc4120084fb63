"""Executors for tests: nothing happens until the test says so, and then what the test says.

    cache ──submit──▶ pending ──complete / fail / progress──▶ done ──poll──▶ cache
                         │                                     ▲
                         └── any order, any time, never        └── duplicate: the same answer again

A page's content is any Python object, one per slot and kind, so that a test can write a page as a function of
all tokens before it and see at once when one stale or aliased slot comes back. What a transfer has not
finished is `JUNK`, as it may be on a real machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from ..executor import Memory
from ..storage.base import Storage
from ..storage.workers import answer
from ..tree.actions import Action, Cancel, Completion, Copy, Get, Put, Query, Span
from ..types import FULL, Kind, Slots, Tier

JUNK = "junk"
"""What a slot holds while a transfer may write to it, and after one has failed."""

POISON = "poison"
"""What a slot that nobody owns holds where debug poison is on."""

Contents = dict[Tier, list[object]]
"""What each slot of a tier holds."""


class Clock:
    """A clock that moves when told. Call it for the time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class _Contents:
    """The contents of one kind on one tier as `Memory`."""

    def __init__(self, contents: list[object]) -> None:
        self._contents = contents

    def poison(self, slots: Slots) -> None:
        """See `Memory.poison`."""
        for slot in slots.tolist():
            self._contents[slot] = POISON

    def stain(self, slots: Slots) -> str | None:
        """See `Memory.stain`. The content of a page is one object, not bytes."""
        contents = self._contents
        for slot in slots.tolist():
            if contents[slot] is not POISON:
                return f"slot {slot}, pool 'main', holds {contents[slot]!r:.200}, not poison"
        return None


class ManualExecutor:
    """An `Executor` that a test works by hand.

    `pending` are the actions not answered yet, by operation, oldest first; `submitted` are all there
    ever were. `contents[tier][slot]` is what a slot of FULL holds, `of(kind)[tier][slot]` one of any kind;
    `kinds` has the slots on device and host of those beside FULL. `stored` is what storage was given, by
    page hash for FULL, by kind and page hash for the others.
    Bytes move when an action is completed, not before: a source that is reused too early shows.
    `on_wait` is called when the cache waits; the clock then moves by as long as it wanted to wait.
    """

    def __init__(
        self,
        device_pages: int,
        host_pages: int,
        clock: Clock,
        kinds: Mapping[Kind, tuple[int, int]] | None = None,
    ) -> None:
        self._contents: dict[Kind, Contents] = {
            kind: {Tier.DEVICE: [None] * device, Tier.HOST: [None] * host}
            for kind, (device, host) in {FULL: (device_pages, host_pages), **(kinds or {})}.items()
        }
        self.contents = self.of(FULL)
        self.stored: dict[bytes | tuple[Kind, bytes], object] = {}
        self.pending: dict[int, Action] = {}
        self.submitted: list[Action] = []
        self.cancelled: set[int] = set()
        self.answers: dict[int, Completion] = {}
        self.storage: Storage | None = None
        self.layers: dict[int, int] = {}
        self.on_wait: Callable[[], None] = lambda: None
        self._clock = clock
        self._done: list[Completion] = []
        self._arrived: dict[int, tuple[int, ...]] = {}
        """Of a Get that has told of progress: what it has read of each span, and does not touch again."""

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
                self._spoil(move.kind, action.target, move.target)
        elif isinstance(action, Get):
            for span in action.spans:
                self._spoil(span.kind, Tier.HOST, span.slots)

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

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        """Copy device slots of `kind`, at once."""
        self._move(kind, (Tier.DEVICE, source), (Tier.DEVICE, target))

    def memory(self, kind: Kind, tier: Tier) -> Memory | None:
        """The contents, to be poisoned."""
        return _Contents(self.of(kind)[tier])

    def attach(self, storage: Storage | None) -> None:
        """Which keys there are is for `storage` to say (see `KeyStorage`); contents are in `stored`."""
        self.storage = storage

    def stuck_threads(self) -> int:
        """There are no threads."""
        return 0

    def close(self, deadline_s: float) -> tuple[int, ...]:
        """Whatever is pending is abandoned."""
        return tuple(self.pending)

    # -- what the test calls ----------------------------------------------------------------------

    def complete(self, op: int | None = None) -> None:
        """Do `op` (None: the oldest) and answer that all went well, as far as storage has the pages."""
        action = self._take(op)
        if isinstance(action, Copy):
            for move in action.moves:
                self._move(move.kind, (action.source, move.source), (action.target, move.target))
            self._answer(Completion(action.op, sum(len(move.source) for move in action.moves)))
        elif self.storage is None:
            self._answer(Completion(action.op, 0, "no storage is attached", declined=True))
        elif isinstance(action, Query):
            self._answer(answer(action, self.storage))
        else:
            self._answer(self._carry(action, [len(span.hashes) for span in action.spans]))

    def fail(
        self,
        op: int | None = None,
        pages: int = 0,
        error: str = "failed",
        others: Sequence[int] | None = None,
        broken: bool = True,
    ) -> None:
        """Answer `op` (None: the oldest) with `error`, after `pages` leading pages of a Put or Get, and
        `others` of its further spans, which come before (None: all of them, unless `pages` is 0). `broken`:
        a Put, Get or Query ends so because storage itself failed."""
        action = self._take(op)
        done = Completion(action.op, 0)
        if self.storage is not None and isinstance(action, Put | Get):
            if others is None:
                others = [len(span.hashes) * (pages > 0) for span in action.spans[1:]]
            done = self._carry(action, [pages, *others])
        self._answer(replace(done, error=error, broken=broken and not isinstance(action, Copy)))

    def progress(self, op: int, pages: int, others: Sequence[int] | None = None) -> None:
        """`pages` leading pages of the Get `op` have arrived, the rest is still to come. Further spans come
        before: `others` of theirs (None: what storage has) stay what the first progress says."""
        action = self.pending[op]
        assert isinstance(action, Get)
        further = [len(span.hashes) for span in action.spans[1:]] if others is None else others
        done = self._carry(action, [pages, *further])
        self._arrived[op] = (done.pages, *done.others)
        self._done.append(replace(done, error=None, final=False))

    def duplicate(self, op: int) -> None:
        """Give the final answer of `op` once more."""
        self._done.append(self.answers[op])

    def complete_all(self) -> None:
        """Complete what is pending now, oldest first."""
        for op in list(self.pending):
            self.complete(op)

    # -- contents ---------------------------------------------------------------------------------

    def of(self, kind: Kind) -> Contents:
        """What each slot of `kind` holds, by tier."""
        return self._contents[kind]

    def _answer(self, completion: Completion) -> None:
        self.answers[completion.op] = completion
        self._done.append(completion)

    def _take(self, op: int | None) -> Copy | Put | Query | Get:
        action = self.pending.pop(next(iter(self.pending)) if op is None else op)
        assert not isinstance(action, Cancel)
        return action

    def _spoil(self, kind: Kind, tier: Tier, slots: Slots) -> None:
        for slot in slots.tolist():
            self.of(kind)[tier][slot] = JUNK

    def _move(self, kind: Kind, source: tuple[Tier, Slots], target: tuple[Tier, Slots]) -> None:
        here, there = (self.of(kind)[tier] for tier, _ in (source, target))
        for old, new in zip(source[1].tolist(), target[1].tolist(), strict=True):
            there[new] = here[old]

    def _carry(self, action: Put | Get, pages: Sequence[int]) -> Completion:
        """Store or read so many leading pages of each span, as far as storage takes or has them. Pages
        that a progress has told of are not touched again: they may have another owner."""
        assert self.storage is not None
        heads = tuple(_head(span, most) for span, most in zip(action.spans, pages, strict=True))
        done = answer(replace(action, spans=heads), self.storage)
        before = self._arrived.pop(action.op, None)
        arrived = (done.pages, *done.others)
        if before is not None:
            arrived = (max(before[0], arrived[0]), *before[1:])
        for span, low, high in zip(action.spans, before or [0] * len(arrived), arrived, strict=True):
            self._carry_span(span, low, high, isinstance(action, Put))
        return replace(done, pages=arrived[0], others=arrived[1:])

    def _carry_span(self, span: Span, low: int, high: int, put: bool) -> None:
        host = self.of(span.kind)[Tier.HOST]
        for page_hash, slot in zip(span.hashes[low:high], span.slots[low:high].tolist(), strict=True):
            key = page_hash if span.kind == FULL else (span.kind, page_hash)
            if put:
                self.stored[key] = host[slot]
            else:
                host[slot] = self.stored[key]


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
        kinds: Mapping[Kind, tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(device_pages, host_pages, clock, kinds)
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
        pages, *others = _some_of(action, rng)
        if isinstance(action, Get) and self.storage is not None and rng.random() < 0.3:
            self.progress(op, pages, others if rng.random() < self._failing else None)
        elif op in self.cancelled:
            self.fail(op, pages, "cancelled", others, broken=False)
        elif rng.random() < self._failing:
            self.fail(op, pages, others=others)
        else:
            self.complete(op)


def _some_of(action: Action, rng: random.Random) -> list[int]:
    """How many leading pages of each span to do of an action that fails, or has come so far."""
    if isinstance(action, Put | Get):
        return [rng.randrange(len(span.hashes) + 1) for span in action.spans]
    return [0]
