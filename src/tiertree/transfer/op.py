"""What a transfer engine is asked, and what it answers: plain data.

    Transfer(op) ─┬─ PoolMove  main pool      source_slots[i] ──▶ target_slots[i]
                  ├─ PoolMove  sidecar        same slots, other pools
                  └─ …                        all or nothing
    Transferred(op, error)                    exactly one per transfer that was taken

From `submit` until `poll` gives its `Transferred`, an engine may touch every slot a transfer names; after
it, none. After an error the content of the target slots is void.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ..pools.group import PoolGroup
from ..pools.paged import Pool
from ..types import InvalidSlots, Kind, Slots

CANCELLED: Final = "cancelled"
"""The error of a transfer that `cancel` stopped."""


@dataclass(frozen=True, slots=True)
class PoolMove:
    """Copy pages pairwise, `source_slots[i]` to `target_slots[i]`, converting the memory order.

    Raises `InvalidSlots` for slots outside their pool, of unequal number, or targets that repeat, and
    ValueError for pools of different layouts. Both arrays are copied. One pool may be source and target
    if no slot is both. O(n log n)."""

    source: Pool
    source_slots: Slots
    target: Pool
    target_slots: Slots

    def __post_init__(self) -> None:
        if self.source.layout != self.target.layout:
            raise ValueError(f"layouts differ: {self.source.layout} and {self.target.layout}")
        object.__setattr__(self, "source_slots", self.source_slots.copy())
        object.__setattr__(self, "target_slots", self.target_slots.copy())
        self.source.check(self.source_slots)
        self.target.check(self.target_slots)
        if self.source_slots.size != self.target_slots.size:
            raise InvalidSlots(
                f"{self.source_slots.size} source slots, {self.target_slots.size} target slots"
            )
        if np.unique(self.target_slots).size != self.target_slots.size:
            raise InvalidSlots("target slots repeat")


@dataclass(frozen=True, slots=True)
class Transfer:
    """One operation: all of its moves, or an error. `op` is the caller's number, unique while in flight."""

    op: int
    moves: tuple[PoolMove, ...]


@dataclass(frozen=True, slots=True)
class Transferred:
    """A transfer is over: `error` is None when every byte arrived, and otherwise says why not."""

    op: int
    error: str | None = None


def moves_between(
    source: PoolGroup, target: PoolGroup, kind: Kind, source_slots: Slots, target_slots: Slots
) -> tuple[PoolMove, ...]:
    """The moves that copy pages of `kind` with all their sidecars from one tier to another."""
    pairs = source.pairs(kind, target)
    return tuple(PoolMove(here, source_slots, there, target_slots) for here, there in pairs)
