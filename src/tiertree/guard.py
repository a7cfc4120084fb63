"""Whether an argument is what a cache can take: one of its own objects, of the right type."""

from __future__ import annotations

import numpy as np

from .tree.key import Key, KeyMaker
from .tree.lease import Lease, Match
from .tree.load import LoadBack
from .tree.prefetch import Prefetch
from .types import ForeignObject, InvalidDeadline, InvalidSlots, LeaseReleased
from .validate import refused, shown

DEADLINE_SECONDS_MAX = 1e9
"""The longest deadline, about thirty years: what the operating system can still wait for."""


class Guard:
    """Checks arguments for the cache whose keys `maker` makes. Every check raises, or changes nothing."""

    __slots__ = ("_maker",)

    def __init__(self, maker: KeyMaker) -> None:
        self._maker = maker

    def key(self, key: Key) -> None:
        """`key` was made by this cache. Raises ForeignObject."""
        if not isinstance(key, Key) or key.maker is not self._maker:
            raise ForeignObject(
                "this key was not made by this cache" if isinstance(key, Key) else _needs("Key", key)
            )

    def match(self, match: Match) -> None:
        """`match` was made by this cache. Raises ForeignObject."""
        if not isinstance(match, Match):
            raise ForeignObject(_needs("Match", match))
        self.key(match.key)

    def lease(self, lease: Lease) -> None:
        """`lease` is this cache's and still held. Raises ForeignObject, LeaseReleased."""
        if not isinstance(lease, Lease):
            raise ForeignObject(_needs("Lease", lease))
        self.key(lease.key)
        if lease.released:
            raise LeaseReleased("this lease was released")

    def load_back(self, load_back: LoadBack) -> None:
        """`load_back` is this cache's. Raises ForeignObject."""
        if not isinstance(load_back, LoadBack):
            raise ForeignObject(_needs("LoadBack", load_back))
        self.key(load_back.lease.key)

    def prefetch(self, prefetch: Prefetch) -> None:
        """`prefetch` is this cache's. Raises ForeignObject."""
        if not isinstance(prefetch, Prefetch):
            raise ForeignObject(_needs("Prefetch", prefetch))
        self.key(prefetch.key)


def count(name: str, value: int) -> int:
    """`value` as an int, if it is an integer of at least 0. Raises InvalidSlots."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 0:
        raise InvalidSlots(f"{name} must be an integer of at least 0, got {shown(value)}")
    return int(value)


def optional_deadline(seconds: float | None) -> float | None:
    """`deadline`, where None may be given and stays None."""
    return None if seconds is None else deadline(seconds)


def deadline(seconds: float) -> float:
    """`seconds` as a float from 0 to `DEADLINE_SECONDS_MAX`, less or more taken as that. Raises
    InvalidDeadline for what is no finite number."""
    number = isinstance(seconds, int | float | np.integer | np.floating) and not isinstance(seconds, bool)
    if not number or not -np.inf < seconds < np.inf:
        raise InvalidDeadline(f"a deadline must be a finite number of seconds, got {shown(seconds)}")
    return float(min(max(seconds, 0.0), DEADLINE_SECONDS_MAX))


def text(name: str, value: str) -> str:
    """`value`, if it is a text. Raises ConfigError."""
    if not isinstance(value, str):
        raise refused(name, value, "text")
    return value


def _needs(wanted: str, got: object) -> str:
    return f"a {wanted} of this cache is needed, got {shown(got)}"
