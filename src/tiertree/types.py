"""Words that every layer shares: tiers, kinds, outcomes and named errors.

An *error* is a bug or bad input of the caller: it is raised, names what was wrong, and has changed
nothing. *Weather* (a full pool, a dead disk, a refusal) is a value: `NoRoom`, `Refused`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import NewType

import numpy as np
from numpy.typing import NDArray

Slots = NDArray[np.int64]
"""Indices into one pool, one per page (1-D, int64)."""

Kind = NewType("Kind", str)
"""The name of one kind of attention state. Kinds are open: a component may bring its own."""

FULL = Kind("full")
SWA = Kind("swa")
MAMBA = Kind("mamba")


class Tier(IntEnum):
    """Where a page is: device (L1), host (L2), storage (L3)."""

    DEVICE = 0
    HOST = 1
    STORAGE = 2


class WritePolicy(StrEnum):
    """When a page is backed up to host: on insert, on its n-th hit, or on eviction."""

    WRITE_THROUGH = "write_through"
    WRITE_THROUGH_SELECTIVE = "write_through_selective"
    WRITE_BACK = "write_back"


class StopRule(StrEnum):
    """When a prefetch stops waiting for storage."""

    BEST_EFFORT = "best_effort"
    WAIT_COMPLETE = "wait_complete"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True)
class NoRoom:
    """A pool could not give `wanted` slots: `free` are free, `reclaimable` more could be evicted, and
    `pending` of those are being copied away."""

    wanted: int
    free: int
    reclaimable: int
    pending: int


@dataclass(frozen=True, slots=True)
class Refused:
    """The cache declined to start something that was only ever optional; `reason` says why."""

    reason: str


class TiertreeError(Exception):
    """Base of every error that tiertree raises on purpose."""


class ConfigError(TiertreeError, ValueError):
    """A configuration that cannot work; the message names the field and what is allowed."""


class InvalidTokens(TiertreeError, ValueError):
    """Token ids that are negative, too large for the unit width, or not integers."""


class InvalidSlots(TiertreeError, ValueError):
    """Slots that do not belong to this caller, repeat, or do not match the pages they are for."""


class InvalidDeadline(TiertreeError, ValueError):
    """A deadline that is no finite number of seconds."""


class InvalidNamespace(TiertreeError, ValueError):
    """A namespace that is not a string, or is too long."""


class ForeignObject(TiertreeError, ValueError):
    """A key, match, lease, operation or kind that is not this cache's."""


class LeaseReleased(TiertreeError):
    """A lease was used, or released, after it had been released."""


class StaleMatch(TiertreeError):
    """A `Match` was used after the cache had changed; match again."""


class CacheClosed(TiertreeError):
    """The cache was used before open or after close."""


class WrongThread(TiertreeError):
    """A cache was called from a thread other than its owner."""


class ForkedCache(TiertreeError):
    """A cache was used in a child process after fork."""


class StorageError(TiertreeError):
    """A storage backend cannot do what was asked; the message says which and why."""


class StorageLocked(StorageError):
    """Another process has this directory open."""


class TraceError(TiertreeError, ValueError):
    """A trace that cannot be read; the message names file, line and field."""


class ViewError(TiertreeError, ValueError):
    """The file of a tree view cannot be read; the message names file and field."""


class InvariantViolated(TiertreeError, AssertionError):
    """`check()` found the cache's books wrong: always a bug in tiertree. Or debug poison found that somebody
    has written to a page that nobody owns: tiertree, or an engine that kept slots it had given back."""
