"""Matches and leases: what a lookup found, and the receipt for what a request relies on.

    page      0 ······ device_boundary ······ memory_boundary ······ key.pages
    bytes     on device                on host (some kinds: or device)  nowhere
    a lease   locks device slots       locks host slots                 nothing

A `Match` is valid until the next call that changes the cache. A `Lease` lasts until it is released,
exactly once, and releases exactly what it locked, wherever splits have moved it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from ..types import LeaseReleased, Slots
from .key import Key
from .node import Hold, Node, fragments
from .radix import EMPTY

if TYPE_CHECKING:
    from .load import LoadBack


class Match:
    """How far a key is cached, in pages: `device_boundary` ≤ `memory_boundary`, each valid for every
    kind and counting READY pages only; `full_reach` is how far FULL alone reaches in memory."""

    __slots__ = ("device_boundary", "end", "full_reach", "key", "memory_boundary", "version")

    def __init__(self, key: Key, end: Node | None, device: int, memory: int, full: int, version: int) -> None:
        self.key = key
        self.end = end
        self.device_boundary = device
        self.memory_boundary = memory
        self.full_reach = full
        self.version = version

    def __repr__(self) -> str:
        return (
            f"Match(device {self.device_boundary}, memory {self.memory_boundary} of {self.key.pages} pages)"
        )


class Lease:
    """What one request may rely on. Use it as a context manager, or call `release` exactly once."""

    __slots__ = (
        "_close",
        "_slots",
        "allocated",
        "allocated_max",
        "device_boundary",
        "device_hold",
        "epoch",
        "host_hold",
        "key",
        "loading",
        "memory_boundary",
        "number",
        "released",
    )

    def __init__(self, number: int, key: Key, epoch: int, close: Callable[[Lease], None]) -> None:
        self.number = number
        self.epoch = epoch
        self.key = key
        self.device_boundary = 0
        self.memory_boundary = 0
        self.device_hold: Hold | None = None
        self.host_hold: Hold | None = None
        self.loading: LoadBack | None = None
        self.allocated: list[Slots] = []
        self.allocated_max = 64
        self.released = False
        self._slots: Slots | None = None
        self._close = close

    @property
    def slots(self) -> Slots:
        """Device slots of pages 0 .. device_boundary (int64, read-only). O(pages) after it has grown."""
        if self.released:
            raise LeaseReleased("this lease was released")
        if self._slots is None or len(self._slots) != self.device_boundary:
            self._slots = self._gather()
            self._slots.flags.writeable = False
        return self._slots

    def _gather(self) -> Slots:
        hold = self.device_hold
        if hold is None:
            return EMPTY.copy()
        parts = []
        for node, low, high in fragments(hold.end, 0, self.device_boundary):
            slots = node.lane(hold.lane).slots
            assert slots is not None
            parts.append(slots[low:high])
        return np.concatenate(parts[::-1])

    def forget_given_away(self, tags: Slots) -> None:
        """Drop what is not this lease's any more from the list of what was allocated for it."""
        slots = np.concatenate(self.allocated)
        self.allocated = [np.unique(slots[tags[slots] == self.number])]
        self.allocated_max = 64 + len(self.allocated[0])

    def release(self) -> None:
        """Unlock everything, and give back slots that were allocated for this lease and not inserted.
        Raises LeaseReleased the second time."""
        if self.released:
            raise LeaseReleased("this lease was released before")
        self._close(self)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.released:
            self.release()

    def __repr__(self) -> str:
        state = (
            "released" if self.released else f"device {self.device_boundary}, memory {self.memory_boundary}"
        )
        return f"Lease({self.number}, {state})"
