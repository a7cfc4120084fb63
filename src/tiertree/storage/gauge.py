"""The statistics of a storage that may not answer.

    read ──▶ a thread asks the backend ──▶ within WAIT_SECONDS: new, 0 seconds old
                                       └─▶ not yet: what it said last, and how old that is
    read again while that thread still waits: the same, at once

One thread at most is ever waiting, so a backend that hangs costs one short wait and one thread.
"""

from __future__ import annotations

import threading

from .base import Storage, StorageStats

WAIT_SECONDS = 0.5
"""How long a backend gets to tell its statistics before older ones do."""


class Gauge:
    """What `storage` says of itself, as far as it answers. Read by one thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._said: tuple[StorageStats, float] | None = None
        self._asking: threading.Thread | None = None

    def read(self, now: float) -> tuple[StorageStats | None, float | None]:
        """What the backend has said last, and how many seconds before `now` it was asked for that; None of
        both if it has never answered. A backend that raises has not answered. Waits for at most
        `WAIT_SECONDS`, and not at all while an earlier question is open."""
        if self._asking is None or not self._asking.is_alive():
            name = "tiertree-storage-stats"
            self._asking = threading.Thread(target=self._ask, args=(now,), name=name, daemon=True)
            self._asking.start()
            self._asking.join(WAIT_SECONDS)
        if self._said is None:
            return None, None
        said, when = self._said
        return said, max(0.0, now - when)

    def _ask(self, now: float) -> None:
        try:
            self._said = self._storage.stats(), now
        except Exception:
            return
