"""When something goes wrong, and how: asked by the executor and the storage, answered by dice.

fault            what it does
copy_error       a copy between device and host fails, half done
copy_slow        it takes a hundred times as long; others overtake it
copy_hang        it never answers, and writes to its target slots long after
copy_twice       it answers twice
copy_refused     the transfer queue is full
store_error      a call of the backend raises
store_short      it answers for fewer pages than it was asked about
store_flips      one bit of a stored page flips
store_slow       it takes a hundred times as long
store_hang       it never answers, and reads or writes its slots long after
store_twice      it answers twice
store_full       it refuses every page for a while
store_forgets    a page that was acknowledged is gone
store_liar       it lies about which pages it holds
store_outage     for a while every call raises or hangs
cancel_deaf      what was cancelled does not stop
process_death    the process dies, and another one opens the storage
power_loss       the machine does, and the disk keeps what was synced and some of the rest
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from .dice import Dice

OUTAGE_SECONDS = 4.0
"""How long the storage is out of order, or full, at a time."""
NEVER = 1e9
"""Seconds to something that does not happen by itself."""


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one operation. Seconds count from its start."""

    works_s: float
    """When it touches bytes."""
    answers_s: float
    """When it answers; NEVER: when the faults are over."""
    pause_s: float
    """Between two batches of a storage call that are told as progress."""
    fails: bool
    twice: bool


class Faults:
    """The faults of one run. `rates` as in a Plan; `injected` counts what was done, by name."""

    def __init__(self, dice: Dice, rates: Mapping[str, float]) -> None:
        self._dice = dice
        self._rates = dict(rates)
        self.injected: Counter[str] = Counter()

    def heal(self) -> None:
        """From now on nothing goes wrong any more."""
        self._rates.clear()

    def strikes(self, name: str, *about: str | int) -> bool:
        """Whether fault `name` strikes here; if so it is counted, and the caller does it."""
        rate = self._rates.get(name)
        if rate is None or not self._dice.chance(rate, name, *about):
            return False
        self.injected[name] += 1
        return True

    def spell(self, name: str, now: float) -> bool:
        """Whether a lasting fault is on at this time."""
        rate = self._rates.get(name)
        return rate is not None and self._dice.chance(rate, name, int(now / OUTAGE_SECONDS))

    def fate(self, what: str, life: int, op: int, now: float) -> Fate:
        """Of operation `op` of the process's life number `life`: `what` is "copy" or "store"."""
        names = life, op
        usual = self._dice.between(0.001, 0.02, what, "time", *names)
        works = answers = usual
        if self.strikes(f"{what}_slow", *names):
            works = answers = usual * 100
        hangs = self.strikes(f"{what}_hang", *names)
        if what == "store" and self.spell("store_outage", now) and self._dice.chance(0.3, "outage", *names):
            self.injected["store_outage"] += 1
            hangs = True
        if hangs:
            works, answers = self._dice.pick((usual, 3.0, 30.0, NEVER), what, "hangs", *names), NEVER
        return Fate(
            works_s=works * self._dice.pick((0.3, 1.0), what, "works", *names),
            answers_s=answers,
            pause_s=usual / 4,
            fails=what == "copy" and self.strikes("copy_error", *names),
            twice=self.strikes(f"{what}_twice", *names),
        )

    def below(self, stop: int, *about: str | int) -> int:
        """A whole number below `stop`, for the details of a fault."""
        return self._dice.below(stop, *about)
