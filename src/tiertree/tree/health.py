"""Whether copies to host are worth starting: a tier that fails must not be tried at every eviction.

well ── 3 failures in a row, or 1 that is late ──▶ sick for 1 s ── the next copy fails ──▶ sick for 2 s …
  ▲                                                     │
  └────────────────── a copy succeeds ──────────────────┘        at most 60 s, then one more try
"""

from __future__ import annotations

FAILURES_MAX = 3
SICK_SECONDS_MAX = 60.0


class Health:
    """Of the copies to host. Pure: time comes as an argument."""

    __slots__ = ("_bouts", "_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._bouts = 0
        self._until = 0.0

    def well(self, now: float) -> bool:
        """Whether a copy may be started."""
        return now >= self._until

    def ended(self, ok: bool, now: float) -> None:
        """A copy has arrived, or failed."""
        if not ok:
            self.failed(now)
            return
        self._failures = self._bouts = 0
        self._until = 0.0

    def failed(self, now: float, late: bool = False) -> None:
        """A copy has failed, or is late."""
        self._failures += 1
        if late or self._failures >= FAILURES_MAX:
            self._until = now + min(2.0**self._bouts, SICK_SECONDS_MAX)
            self._bouts = min(self._bouts + 1, 8)
