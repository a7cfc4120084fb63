"""The books of one pool: for every slot its state, the class of its owner, and its pins.

      take            ready             drop
  FREE ────▶ FILLING ───────▶ READY ──────────▶ FREE
               │ drop (the fill failed)            ▲
               ├───────────────────────────────────┤
               │ lose (its operation is late)      │ unpin (the operation came home)
               └────────────▶ LOST ────────────────┘

  owner      who                              ends when
  NODE       a node of the tree               drop
  REQUEST    a request, by its tag            ready (insert) or drop
  OPERATION  an operation, nobody else        the last pin goes: then the slot is FREE by itself

A request's slots carry its *tag* (1 for nobody in particular, otherwise the number of its lease); all
other slots have tag 0. A *pin* is held by an operation that may touch the slot's bytes. A pinned slot
never becomes FREE: dropping it only hands it to the OPERATION class, and it goes home at its last unpin.
So no caller can make a slot reusable while a transfer may still read or write it. What is not in the
tables below raises and changes nothing.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..types import Slots


class State(IntEnum):
    """What a slot's bytes are worth."""

    FREE = 0
    FILLING = 1
    READY = 2
    LOST = 3


class Owner(IntEnum):
    """The class of whoever will give the slot back."""

    NOBODY = 0
    NODE = 1
    REQUEST = 2
    OPERATION = 3


def entry(state: State, owner: Owner) -> int:
    """State and owner of one slot as one byte of the book."""
    return int(state) * 4 + int(owner)


FREE = entry(State.FREE, Owner.NOBODY)
NODE_FILLING = entry(State.FILLING, Owner.NODE)
NODE_READY = entry(State.READY, Owner.NODE)
REQUEST_FILLING = entry(State.FILLING, Owner.REQUEST)
OPERATION_FILLING = entry(State.FILLING, Owner.OPERATION)
OPERATION_READY = entry(State.READY, Owner.OPERATION)
OPERATION_LOST = entry(State.LOST, Owner.OPERATION)
OF_NODE, OF_OPERATION = int(Owner.NODE), int(Owner.OPERATION)

NEXT: dict[tuple[int, str], int] = {
    (NODE_FILLING, "ready"): NODE_READY,
    (REQUEST_FILLING, "ready"): NODE_READY,
    (OPERATION_FILLING, "ready"): NODE_READY,
    (NODE_FILLING, "disown"): OPERATION_FILLING,
    (NODE_READY, "disown"): OPERATION_READY,
    (REQUEST_FILLING, "disown"): OPERATION_FILLING,
    (NODE_FILLING, "lose"): OPERATION_LOST,
    (OPERATION_FILLING, "lose"): OPERATION_LOST,
    (OPERATION_READY, "lose"): OPERATION_LOST,
}
"""Where a verb takes a slot. `drop` is `disown` for pinned slots and FREE for all others."""


ANYBODY = 1
"""The tag of a request that has no lease."""


class LedgerError(AssertionError):
    """A transition that is not in the table: a bug in the caller, and nothing has changed."""


class Observer(Protocol):
    """Who wants to know which slots come and go (see `poison`)."""

    def freed(self, slots: Slots) -> None:
        """`slots` are FREE from now on: nobody may read or write them."""
        ...

    def taken(self, slots: Slots) -> None:
        """`slots` are about to be taken. What it raises keeps them FREE."""
        ...


class Ledger:
    """The books of one pool of `capacity` slots. Every method is vectorised, O(slots given)."""

    __slots__ = (
        "_batches",
        "_proven",
        "_stack",
        "book",
        "capacity",
        "free",
        "observer",
        "pinned",
        "pins",
        "tags",
    )

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.free = capacity
        self.pinned = 0
        """Slots that a node owns and somebody has pinned."""
        self.observer: Observer | None = None
        """Is told of every slot that becomes FREE or is taken; None where nobody asks."""
        self.book: NDArray[np.uint8] = np.full(capacity, FREE, np.uint8)
        self.pins: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self.tags: NDArray[np.int64] = np.zeros(capacity, np.int64)
        self._batches: dict[int, tuple[int, bytes]] = {}
        self._proven: Slots | None = None
        self._stack: Slots = np.arange(capacity - 1, -1, -1, dtype=np.int64)

    def take(self, count: int, owner: Owner, tag: int = ANYBODY) -> Slots | None:
        """`count` FREE slots, now FILLING for `owner` (a request by its `tag`); None if there are not as
        many."""
        if count > self.free:
            return None
        slots = self._stack[self.free - count : self.free][::-1].copy()
        if self.observer is not None:
            self.observer.taken(slots)
        self.free -= count
        self.book[slots] = entry(State.FILLING, owner)
        if owner is Owner.REQUEST and count:
            self.tags[slots] = tag
            self._batches[slots.item(0)] = (tag, slots.tobytes())
        return slots

    def not_of(self, slots: Slots, tag: int) -> str | None:
        """What is wrong with the claim that these are distinct slots of request `tag`, which will give all
        of them away now; None if it is true.

        Slots that come back just as they were taken are recognised by their bytes. Others are proved
        one by one: each carries the tag, and when every slot's position is written over its tag, all
        positions are still there."""
        count = len(slots)
        self._proven = None
        if not count:
            return None
        batch = self._batches.get(slots.item(0))
        if batch is not None and batch[0] == tag and batch[1] == slots.tobytes():
            del self._batches[slots.item(0)]
            self._proven = slots
            return None
        if slots.view(np.uint64).max() >= self.capacity:
            return f"slots must be in 0..{self.capacity - 1}"
        if np.count_nonzero(self.tags[slots] == tag) != count:
            return "some slots are not this request's: allocate them for it, insert them once"
        positions = np.arange(count)
        self.tags[slots] = positions
        distinct = np.count_nonzero(self.tags[slots] == positions) == count
        self.tags[slots] = tag
        return None if distinct else "a slot is named twice"

    def all_are(self, slots: Slots, code: int) -> bool:
        """Whether the book says `code` of every slot."""
        return self.book[slots].tobytes().count(code) == len(slots)

    def ready(self, slots: Slots, was: int) -> None:
        """FILLING → READY, and from now on a node's. Raises LedgerError unless all were `was`. Slots that
        `not_of` has just recognised as one batch need no further proof."""
        after = NEXT.get((was, "ready"))
        whole = slots is self._proven and was == REQUEST_FILLING
        if after is None or not (whole or self.all_are(slots, was)):
            raise LedgerError(f"ready: slots {slots.tolist()[:8]} are not all {was}")
        self.book[slots] = after
        if was == OPERATION_FILLING:
            self.pinned += int(np.count_nonzero(self.pins[slots]))
        if whole:
            self.tags[slots] = 0
            self._proven = None
        elif was == REQUEST_FILLING:
            self._untag(slots)

    def _untag(self, slots: Slots) -> None:
        """No request has these slots any more, and no batch may be recognised that they were part of."""
        self.tags[slots] = 0
        self._proven = None
        self._batches.clear()

    def drop(self, slots: Slots) -> int:
        """Their owner lets go of `slots`. Returns how many are FREE now; the pinned ones follow when
        their operations come home."""
        codes = self.book[slots].tobytes()
        if codes.count(NODE_READY) != len(slots):
            owners = self.book[slots] & 3
            if ((owners == Owner.NOBODY) | (owners == Owner.OPERATION)).any():
                raise LedgerError(f"drop: slots {slots.tolist()[:8]} have no owner to let go of them")
            if (owners == Owner.REQUEST).any():
                self._untag(slots)
        pins = self.pins[slots]
        if np.count_nonzero(pins):
            self.pinned -= self._of_nodes(slots[pins > 0])
            self._verb(slots[pins > 0], "disown")
            slots = slots[pins == 0]
        self._release(slots)
        return len(slots)

    def lose(self, slots: Slots) -> None:
        """The operation of these pinned slots is late: nobody may use them until it comes home."""
        if not (self.pins[slots] > 0).all():
            raise LedgerError(f"lose: slots {slots.tolist()[:8]} are not all pinned")
        self.pinned -= self._of_nodes(slots)
        self._verb(slots, "lose")

    def pin(self, slots: Slots) -> None:
        """An operation may touch these slots from now on. They are distinct and not FREE."""
        if not self.book[slots].all():
            raise LedgerError(f"pin: some of slots {slots.tolist()[:8]} are free")
        before = self.pins[slots]
        self.pinned += self._of_nodes(slots[before == 0] if before.any() else slots)
        self.pins[slots] = before + 1

    def unpin(self, slots: Slots) -> int:
        """An operation is done with `slots`. Returns how many went FREE because nobody else had them."""
        before = self.pins[slots]
        if not before.all():
            raise LedgerError(f"unpin: slots {slots.tolist()[:8]} are not all pinned")
        self.pins[slots] = before - 1
        last = slots[before == 1]
        self.pinned -= self._of_nodes(last)
        orphans = last[(self.book[last] & 3) == OF_OPERATION]
        self._release(orphans)
        return len(orphans)

    def _of_nodes(self, slots: Slots) -> int:
        return int(np.count_nonzero((self.book[slots] & 3) == OF_NODE))

    def states(self, slots: Slots) -> NDArray[np.uint8]:
        """The `State` of each slot; −1 in `slots` is not allowed."""
        states: NDArray[np.uint8] = self.book[slots] >> np.uint8(2)
        return states

    def free_slots(self) -> list[int]:
        """The free slots, the next to be taken last. O(free)."""
        free: list[int] = self._stack[: self.free].tolist()
        return free

    def count(self, state: State | None = None, owner: Owner | None = None) -> int:
        """How many slots are in `state` and belong to `owner` (None: any). O(capacity)."""
        chosen = np.ones(self.capacity, bool)
        if state is not None:
            chosen &= (self.book >> 2) == state
        if owner is not None:
            chosen &= (self.book & 3) == owner
        return int(chosen.sum())

    def _verb(self, slots: Slots, verb: str) -> None:
        codes = self.book[slots]
        after = codes.copy()
        for code in np.unique(codes).tolist():
            target = NEXT.get((code, verb))
            if target is None:
                raise LedgerError(f"{verb}: a slot of {slots.tolist()[:8]} is in state {code}")
            after[codes == code] = target
        self.book[slots] = after

    def _release(self, slots: Slots) -> None:
        count = len(slots)
        if not count:
            return
        self.book[slots] = FREE
        self._stack[self.free : self.free + count] = slots
        self.free += count
        if self.observer is not None:
            self.observer.freed(slots)
