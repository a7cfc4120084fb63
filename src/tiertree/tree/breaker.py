"""Whether a tier is worth asking: one that fails must not be asked for ever.

                 N failures in a row, or one that is late           wait over
      CLOSED ───────────────────────────────────────────▶ OPEN ─────────────────▶ HALF_OPEN
        ▲ ▲                                                ▲                     a probe may start
        │ └──────────────── the probe is GOOD ─────────────┼──────────────────────────┤
        │                                                  └── it is BAD or LATE ─────┘
        │                                                      twice the wait, up to a most

    verdict     CLOSED                            the probe of HALF_OPEN
    GOOD        failures = 0, wait = base         CLOSED, failures = 0, wait = base
    ANSWERED    nothing                           CLOSED, failures and wait stay as they are
    BAD         failures + 1, perhaps OPEN        OPEN, twice the wait
    LATE        OPEN                              OPEN, twice the wait
    NOTHING     nothing                           another probe may start

ANSWERED is for a store that says "not there": it is alive, but has not shown that it can be read. As long
as nothing was GOOD since the last opening, one more BAD opens the breaker again, with twice the wait; so
a store that answers every question and fails every read is left alone too.

Where a breaker lets operations through `alone` there is one probe at a time, and everything else waits for
what it comes to. Otherwise all that start in HALF_OPEN are probes, and the first to end decides.

Every operation belongs to the *round* in which it was admitted, and every opening begins a new round.
What an operation of an earlier round comes to says nothing about now, and is not heard.
"""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    """What a breaker lets through: everything, nothing, a probe."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Verdict(StrEnum):
    """What an operation has shown of the tier that it asked."""

    GOOD = "good"
    ANSWERED = "answered"
    BAD = "bad"
    LATE = "late"
    NOTHING = "nothing"
    """It was cancelled, or never begun."""


class Breaker:
    """Of one way to one tier, `name` in messages. Pure: time comes as an argument. Every method is O(1).

    Opens after `failures_max` failures in a row, at first for `base_seconds`, at most for `max_seconds`.
    `alone`: one probe at a time.
    """

    __slots__ = (
        "_alone",
        "_base_seconds",
        "_failures_max",
        "_max_seconds",
        "_proven",
        "_round",
        "_until",
        "_wait_seconds",
        "failures",
        "name",
        "opened",
        "probing",
    )

    def __init__(
        self, name: str, failures_max: int, base_seconds: float, max_seconds: float, alone: bool = True
    ) -> None:
        self.name = name
        self._alone = alone
        self._failures_max = failures_max
        self._base_seconds = base_seconds
        self._max_seconds = max_seconds
        self._wait_seconds = base_seconds
        """How long it stays open the next time."""
        self._proven = True
        """Whether anything was GOOD since it opened the last time."""
        self._until: float | None = None
        self._round = 0
        self.failures = 0
        """Failures in a row."""
        self.opened = 0
        """How often it has opened."""
        self.probing = False
        """Whether a probe of HALF_OPEN is under way."""

    def state(self, now: float) -> State:
        """What it is at `now`."""
        if self._until is None:
            return State.CLOSED
        return State.OPEN if now < self._until else State.HALF_OPEN

    def admits(self, now: float) -> bool:
        """Whether an operation may start at `now`. Changes nothing."""
        return self._until is None or (now >= self._until and not (self._alone and self.probing))

    def admit(self, now: float) -> int:
        """An operation starts that `admits` has allowed, or the next step of the probe. Returns the round
        that it belongs to."""
        self.probing = self._until is not None
        return self._round

    def current(self, number: int) -> bool:
        """Whether what was admitted in round `number` may still go on to a next step."""
        return number == self._round

    def hear(self, number: int, verdict: Verdict, now: float) -> None:
        """What an operation of round `number` has come to; see the table above."""
        if number != self._round:
            return
        if verdict in (Verdict.BAD, Verdict.LATE):
            self._bad(verdict, now)
            return
        if verdict is Verdict.GOOD:
            self._forgive()
        if verdict is not Verdict.NOTHING:
            self._until = None
        self.probing = False

    def _bad(self, verdict: Verdict, now: float) -> None:
        self.failures += 1
        if verdict is Verdict.BAD and self._proven and self.failures < self._failures_max:
            return
        self._until = now + self._wait_seconds
        self._wait_seconds = min(2 * self._wait_seconds, self._max_seconds)
        self.opened += 1
        self._round += 1
        self._proven = self.probing = False

    def _forgive(self) -> None:
        self.failures = 0
        self._wait_seconds = self._base_seconds
        self._proven = True

    def reset(self) -> None:
        """The tier is another one now: CLOSED, and nothing that began before is heard."""
        self._forgive()
        self._until = None
        self._round += 1
        self.probing = False

    def seconds_left(self, now: float) -> float:
        """Seconds until the next operation may be tried; 0 unless OPEN."""
        return 0.0 if self._until is None else max(0.0, self._until - now)

    def refusal(self, now: float) -> str:
        """Why it does not admit anything at `now`, and for how long."""
        if self.probing:
            return f"the breaker of {self.name} is half open: one operation is trying whether it is well"
        return f"the breaker of {self.name} is open: it tries again in {self.seconds_left(now):.3g} s"


class Breakers:
    """One for each way that may fail by itself: a full disk still reads well. Copies to host are probed
    by as many as come: each is quick, and what is not copied may be lost."""

    __slots__ = ("reads", "to_host", "writes")

    def __init__(self, failures_max: int, base_seconds: float, max_seconds: float) -> None:
        limits = failures_max, base_seconds, max_seconds
        self.to_host = Breaker("copies to host", *limits, alone=False)
        self.writes = Breaker("storage writes", *limits)
        self.reads = Breaker("storage reads", *limits)

    @property
    def all(self) -> tuple[Breaker, ...]:
        """Each of them."""
        return self.to_host, self.writes, self.reads

    def storage_changed(self) -> None:
        """Another storage is attached: nothing is known of it."""
        self.writes.reset()
        self.reads.reset()
