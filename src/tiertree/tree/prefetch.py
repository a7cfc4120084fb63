"""What a caller sees of a prefetch: how far it is, and what it has brought."""

from __future__ import annotations

from enum import StrEnum

from ..types import Slots
from .key import Key
from .operation import Operation, Part
from .partial import Partial
from .radix import EMPTY


class Stage(StrEnum):
    """Where a prefetch is."""

    ASKING = "asking"
    READING = "reading"
    LANDING = "landing"
    SETTLED = "settled"


class Prefetch:
    """One prefetch for `key`: pages `first ..` of FULL (`hashes`), and what partial kinds need. `wanted`
    pages would be won, `landed` have been: FULL pages that are in the tree, or, where there are partial
    kinds, by how much the key's memory boundary has grown.

    `parcel` and `parts` are the slots that have arrived and wait for their place, still pinned.
    """

    __slots__ = (
        "arrived",
        "asked",
        "asked_parent",
        "first",
        "hashes",
        "key",
        "landed",
        "low",
        "operation",
        "others",
        "parcel",
        "parts",
        "stage",
        "started",
        "unwanted",
        "wanted",
    )

    def __init__(self, key: Key, first: int, low: int, hashes: tuple[bytes, ...], started: float) -> None:
        self.key = key
        self.first = first
        self.low = low
        """The depth of the first of `hashes`; less than `first` where partial kinds lack pages before it."""
        self.hashes = hashes
        self.asked: list[tuple[Partial, Slots]] = []
        """Pages (ascending depths) of each partial kind that memory lacks, as storage was asked for them."""
        self.wanted = 0
        self.started = started
        self.arrived = 0
        self.others: tuple[int, ...] = ()
        self.landed = 0
        self.parcel: Slots = EMPTY
        self.parts: tuple[Part, ...] = ()
        self.stage = Stage.ASKING
        self.operation: Operation | None = None
        self.asked_parent = False
        self.unwanted = False

    def of(self, pages: Slots) -> tuple[bytes, ...]:
        """The page hashes of `pages` (depths)."""
        return tuple(self.hashes[page - self.low] for page in pages.tolist())

    def __repr__(self) -> str:
        return f"Prefetch({self.stage}, {self.landed} of {self.wanted} pages from page {self.first})"
