"""Random decisions that know nothing of each other.

    Dice(seed).roll("copy", 17, "late")      the same number for the same names, always and everywhere

A decision is a hash of the seed and of what it is about, so taking one away changes no other: that is
what lets a failing run be cut down to the requests and faults it needs. And it is the same on every
machine, version of Python and hash seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    """Dice of one seed. Every answer is a pure function of the seed and the names, O(1)."""

    __slots__ = ("_root",)

    def __init__(self, seed: int) -> None:
        self._root = blake2b(b"%d" % seed, digest_size=8)

    def roll(self, *names: str | int) -> float:
        """A number in [0, 1)."""
        rolled = self._root.copy()
        rolled.update(repr(names).encode())
        return (int.from_bytes(rolled.digest(), "little") >> 11) / 2**53

    def chance(self, probability: float, *names: str | int) -> bool:
        """True with this probability."""
        return self.roll(*names) < probability

    def below(self, stop: int, *names: str | int) -> int:
        """A whole number in 0 .. stop, stop left out."""
        return int(self.roll(*names) * stop)

    def pick(self, items: Sequence[Item], *names: str | int) -> Item:
        """One of `items`."""
        return items[self.below(len(items), *names)]

    def between(self, low: float, high: float, *names: str | int) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.roll(*names)
