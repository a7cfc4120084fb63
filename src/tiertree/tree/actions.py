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
    """Store pages that are READY on host (persist). The first span is FULL's, and may be empty."""

    op: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Query:
    """Which of these pages does storage hold? One (kind, page hashes) per kind, FULL's first; of FULL
    only the leading ones count, of the others each by itself."""

    op: int
    asked: tuple[tuple[Kind, tuple[bytes, ...]], ...]


@dataclass(frozen=True, slots=True)
class Get:
    """Read pages from storage into host slots. The first span is FULL's, and may be empty: it is read
    last, in order, and says how far it has come; of the others each is worth something only whole."""

    op: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop `op` if it can be stopped. Its own final `Completion` still follows, sooner or later. `late`: it
    is past its deadline, so whoever works on it may be stuck there."""

    op: int
    late: bool = False


Action = Copy | Put | Query | Get | Cancel


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to an operation.

    `pages` counts leading pages of FULL: copied (all kinds together), stored (Put), held (Query), or
    arrived and verified (Get). `error` is None when all was well, and otherwise says why it is less than
    what was asked. `stored` are the page hashes of FULL that a Put made new on storage, `evicted` those
    it pushed out there.

    `others` says the same of the further spans of a Put, Get or Query, one entry each: for Put how many
    pages are stored, for Get how many leading ones have arrived. For a Query `held` has one entry each:
    a byte per page, 1 where storage holds it.

    `broken` and `declined` tell two kinds of `error` from all others. `broken`: storage itself failed, it
    raised or answered nonsense (a page that is not there is no failure). `declined`: nobody has begun with
    it, because a queue is full or there is nothing to ask.
    """

    op: int
    pages: int
    error: str | None = None
    final: bool = True
    stored: tuple[bytes, ...] = ()
    evicted: tuple[bytes, ...] = ()
    others: tuple[int, ...] = ()
    held: tuple[bytes, ...] = ()
    broken: bool = False
    declined: bool = False
