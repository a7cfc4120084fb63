"""Debug poison: a page that nobody owns is full of a pattern, and must still be when somebody takes it.

    open    every slot                    ─▶ poisoned
    freed   FREE from now on              ─▶ poisoned     whoever still reads it sees the pattern
    taken   FREE until now                ─▶ verified     whoever has written to it shows here at the latest
    check   every slot that is FREE now   ─▶ verified     and after close once more

The ledger says what comes and goes (`tree.ledger.Observer`), the executor has the memory; this is what
stands between them. The pattern is one byte, 0xFF: NaN in every float type that a layout may have, wherever
in a number a read begins, so that one poisoned entry makes all of an attention's output NaN, and −1 or 255
in the integers. What it cannot show is a write of the pattern itself.

Only where `CacheConfig.debug_poison` asks for it. It writes each page once more when it is freed and reads it
once more when it is taken, and on a device it waits for both; the tests run with it.
"""

from __future__ import annotations

import os
from typing import Final

import numpy as np

from .config import CacheConfig
from .executor import Executor, Memory
from .tree.core import Core
from .tree.ledger import Ledger
from .types import FULL, InvariantViolated, Kind, Slots, Tier

VARIABLE: Final = "TIERTREE_DEBUG_POISON"
"""The environment variable that switches poison on ("1") where the configuration does not say."""


def wanted(config: CacheConfig) -> bool:
    """Whether a cache of this configuration is to poison its free pages."""
    if config.debug_poison is None:
        return os.environ.get(VARIABLE) == "1"
    return config.debug_poison


class Poison:
    """Keeps the free pages of one cache poisoned, from now on. O(bytes of all pools) to begin with, then
    O(bytes freed and taken). Pools without bytes are left alone."""

    def __init__(self, core: Core, executor: Executor) -> None:
        self._guards: list[_Guard] = []
        for kind in (FULL, *core.kinds):
            for tier in (Tier.DEVICE, Tier.HOST):
                ledger, memory = core.ledger(kind, tier), executor.memory(kind, tier)
                if memory is not None and ledger.capacity:
                    self._guards.append(_Guard(kind, tier, ledger, memory))

    def check(self) -> None:
        """Verify every free page. O(bytes free). Raises InvariantViolated."""
        for guard in self._guards:
            guard.taken(np.array(guard.ledger.free_slots(), np.int64))

    def stop(self) -> None:
        """Leave the ledgers alone from now on, and let go of the memory."""
        for guard in self._guards:
            guard.ledger.observer = None
        self._guards = []


class _Guard:
    """The `Observer` of one pool's ledger."""

    def __init__(self, kind: Kind, tier: Tier, ledger: Ledger, memory: Memory) -> None:
        self.ledger = ledger
        self._name = f"{kind} on {tier.name}"
        self._memory = memory
        memory.poison(np.array(ledger.free_slots(), np.int64))
        ledger.observer = self

    def freed(self, slots: Slots) -> None:
        """Poison them."""
        self._memory.poison(slots)

    def taken(self, slots: Slots) -> None:
        """Raise InvariantViolated if one of them is not as it was left."""
        stain = self._memory.stain(slots)
        if stain is not None:
            raise InvariantViolated(f"{self._name}: somebody has written to a page that nobody owns: {stain}")
