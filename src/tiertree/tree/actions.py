"""What the tree wants done, and what it is told was done: plain data, nothing else.

    tree ──Copy Put Query Get Cancel──▶ executor        (taken from the tree after each call)
    tree ◀────────Completion─────────── executor        (takes effect only in poll())

Every action carries the number of its operation; exactly one `Completion` with `final=True` answers
each operation, whatever happened to it, cancelled ones included. Until then the executor may touch
every slot the action names; after it, none. Only a `Get` may send earlier, non-final completions.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..types import Kind, Slots, Tier


@dataclass(frozen=True, slots=True)
class Move:
    """Slots of one kind to copy, pairwise, `source[i]` to `target[i]`; sidecars ride along."""

    kind: Kind
    source: Slots
    target: Slots


@dataclass(frozen=True, slots=True)
class Span:
    """Pages of one kind by page hash (32 bytes each), with the host slot of each."""

    kind: Kind
    hashes: tuple[bytes, ...]
    slots: Slots


@dataclass(frozen=True, slots=True)
class Copy:
    """Move pages between the two in-memory tiers. All or nothing."""

    op: int
    source: Tier
    target: Tier
    moves: tuple[Move, ...]


@dataclass(frozen=True, slots=True)
class Put:
    """Store pages that are READY on host (persist)."""

    op: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """How many leading pages of `hashes` does storage hold, for every kind named?"""

    op: int
    hashes: tuple[bytes, ...]
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True)
class Get:
    """Read pages from storage into host slots, in order."""

    op: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop `op` if it can be stopped. Its own final `Completion` still follows, sooner or later."""

    op: int


Action = Copy | Put | Query | Get | Cancel


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to an operation.

    `pages` counts leading pages: copied, stored (Put), held (Query), or arrived and verified (Get).
    `error` is None when all was well, and otherwise says why `pages` is less than what was asked.
    `stored` are the page hashes that a Put made new on storage, `evicted` those it pushed out there.
    """

    op: int
    pages: int
    error: str | None = None
    final: bool = True
    stored: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
