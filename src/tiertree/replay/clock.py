"""The clock of a replay: requests arrive one per second, and only waiting takes time.

    request        0            1            2                       3
    cache clock    0 ─▶ 0.0002  1 ─▶ 1.0001  2 ── a slow read ─▶ 3.4  4 ─▶ …

Recency depends on the order of requests alone, however fast the machine is, while stop rules and
deadlines count the seconds that really pass within one request, so that nothing can hang for ever.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable


class ReplayClock:
    """Seconds, never going back: a whole number at the start of each request, then real time."""

    __slots__ = ("_base", "_real", "_since")

    def __init__(self, real: Callable[[], float] = time.monotonic) -> None:
        self._real = real
        self._base = 0.0
        self._since = real()

    def __call__(self) -> float:
        return self._base + (self._real() - self._since)

    def next_request(self) -> None:
        """The next request arrives: at the next whole second."""
        self._base = math.floor(self()) + 1.0
        self._since = self._real()
