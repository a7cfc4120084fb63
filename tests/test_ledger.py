"""The ledger: every transition of the table and no other, pins, LOST slots, and a plain model beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tiertree.tree.ledger import (
    FREE,
    NEXT,
    NODE_FILLING,
    NODE_READY,
    OPERATION_FILLING,
    OPERATION_LOST,
    OPERATION_READY,
    REQUEST_FILLING,
    Ledger,
    LedgerError,
    Owner,
    State,
    entry,
)

CODES = {
    "FREE": FREE,
    "NODE_FILLING": NODE_FILLING,
    "NODE_READY": NODE_READY,
    "REQUEST_FILLING": REQUEST_FILLING,
    "OPERATION_FILLING": OPERATION_FILLING,
    "OPERATION_READY": OPERATION_READY,
    "OPERATION_LOST": OPERATION_LOST,
}

# What becomes of a slot, pinned or not, under each verb. What is not here raises and changes nothing.
TABLE = {
    ("NODE_FILLING", False, "ready"): "NODE_READY",
    ("NODE_FILLING", True, "ready"): "NODE_READY",
    ("REQUEST_FILLING", False, "ready"): "NODE_READY",
    ("REQUEST_FILLING", True, "ready"): "NODE_READY",
    ("OPERATION_FILLING", False, "ready"): "NODE_READY",
    ("OPERATION_FILLING", True, "ready"): "NODE_READY",
    ("NODE_FILLING", False, "drop"): "FREE",
    ("NODE_FILLING", True, "drop"): "OPERATION_FILLING",
    ("NODE_READY", False, "drop"): "FREE",
    ("NODE_READY", True, "drop"): "OPERATION_READY",
    ("REQUEST_FILLING", False, "drop"): "FREE",
    ("REQUEST_FILLING", True, "drop"): "OPERATION_FILLING",
    ("NODE_FILLING", True, "lose"): "OPERATION_LOST",
    ("OPERATION_FILLING", True, "lose"): "OPERATION_LOST",
    ("OPERATION_READY", True, "lose"): "OPERATION_LOST",
    ("NODE_FILLING", True, "unpin"): "NODE_FILLING",
    ("NODE_READY", True, "unpin"): "NODE_READY",
    ("REQUEST_FILLING", True, "unpin"): "REQUEST_FILLING",
    ("OPERATION_FILLING", True, "unpin"): "FREE",
    ("OPERATION_READY", True, "unpin"): "FREE",
    ("OPERATION_LOST", True, "unpin"): "FREE",
    **{(code, pinned, "pin"): code for code in CODES if code != "FREE" for pinned in (False, True)},
}

VERBS: dict[str, Callable[[Ledger, Any], object]] = {
    "ready": lambda ledger, slots: ledger.ready(slots, int(ledger.book[slots[0]])),
    "drop": lambda ledger, slots: ledger.drop(slots),
    "lose": lambda ledger, slots: ledger.lose(slots),
    "pin": lambda ledger, slots: ledger.pin(slots),
    "unpin": lambda ledger, slots: ledger.unpin(slots),
}


def ledger_with(code: str, pinned: bool) -> tuple[Ledger, Any]:
    """A ledger of four slots, two of which are in state `code`."""
    ledger = Ledger(4)
    if code == "FREE":
        return ledger, np.array([0, 1])
    slots = ledger.take(2, Owner.NODE)
    assert slots is not None
    ledger.book[slots] = CODES[code]
    ledger.pins[slots] = int(pinned)
    return ledger, slots


def books(ledger: Ledger) -> tuple[Any, ...]:
    """Everything a ledger knows."""
    return ledger.free, ledger.book.tolist(), ledger.pins.tolist(), ledger.tags.tolist(), ledger.free_slots()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("code", "pinned"),
    [(code, pinned) for code in CODES for pinned in (False, True) if code != "FREE" or not pinned],
)
def test_a_slot_goes_where_the_table_says_and_nowhere_else(code: str, pinned: bool, verb: str) -> None:
    ledger, slots = ledger_with(code, pinned)
    before = books(ledger)
    target = TABLE.get((code, pinned, verb))
    if target is None:
        with pytest.raises(LedgerError):
            VERBS[verb](ledger, slots)
        assert books(ledger) == before
        return
    VERBS[verb](ledger, slots)
    assert [int(ledger.book[slot]) for slot in slots] == [CODES[target]] * 2
    assert ledger.free == (4 if target == "FREE" else 2)
    pins = {"pin": int(pinned) + 1, "unpin": 0}.get(verb, int(pinned))
    assert ledger.pins[slots].tolist() == [pins] * 2


def test_the_codes_table_covers_every_state_and_owner_that_can_be_reached() -> None:
    assert set(NEXT.values()) | {code for code, _ in NEXT} | {FREE} == set(CODES.values())


@pytest.mark.parametrize("verb", ["drop", "lose", "pin", "unpin"])
def test_one_wrong_slot_among_good_ones_changes_nothing(verb: str) -> None:
    ledger, good = ledger_with("NODE_FILLING", pinned=verb in ("lose", "unpin"))
    wrong = np.append(good, 3)  # slot 3 is free
    before = books(ledger)
    with pytest.raises(LedgerError):
        VERBS[verb](ledger, wrong)
    assert books(ledger) == before


def test_ready_refuses_slots_that_are_not_all_what_the_caller_thinks() -> None:
    ledger = Ledger(4)
    node, request = ledger.take(1, Owner.NODE), ledger.take(1, Owner.REQUEST)
    assert node is not None
    assert request is not None
    before = books(ledger)
    with pytest.raises(LedgerError):
        ledger.ready(np.concatenate([node, request]), NODE_FILLING)
    assert books(ledger) == before


def test_take_gives_all_or_nothing() -> None:
    ledger = Ledger(3)
    assert ledger.take(4, Owner.NODE) is None
    assert ledger.free == 3
    slots = ledger.take(3, Owner.REQUEST, tag=7)
    assert slots is not None
    assert sorted(slots.tolist()) == [0, 1, 2]
    assert ledger.tags.tolist() == [7, 7, 7]
    assert ledger.take(1, Owner.NODE) is None


def test_a_pinned_slot_that_is_dropped_comes_home_at_its_last_unpin() -> None:
    ledger = Ledger(1)
    slots = ledger.take(1, Owner.NODE)
    assert slots is not None
    ledger.pin(slots)
    ledger.pin(slots)
    assert ledger.drop(slots) == 0
    assert ledger.unpin(slots) == 0
    assert ledger.take(1, Owner.NODE) is None
    assert ledger.unpin(slots) == 1
    assert ledger.take(1, Owner.NODE) is not None


def test_a_lost_slot_is_nobodys_until_its_operation_comes_home() -> None:
    ledger = Ledger(1)
    slots = ledger.take(1, Owner.NODE)
    assert slots is not None
    ledger.pin(slots)
    ledger.lose(slots)
    assert ledger.count(State.LOST) == 1
    for verb in ("ready", "drop", "lose"):
        with pytest.raises(LedgerError):
            VERBS[verb](ledger, slots)
    assert ledger.unpin(slots) == 1
    assert ledger.count(State.LOST) == 0
    assert ledger.free == 1


def test_tags_are_forgotten_when_a_slot_is_inserted_or_freed() -> None:
    ledger = Ledger(2)
    slots = ledger.take(2, Owner.REQUEST, tag=9)
    assert slots is not None
    ledger.ready(slots[:1], REQUEST_FILLING)
    ledger.drop(slots[1:])
    assert ledger.tags.tolist() == [0, 0]


class Counting(np.ndarray):
    """An array that counts how often it is indexed."""

    touched = 0

    def __getitem__(self, index: Any) -> Any:
        Counting.touched += 1
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        Counting.touched += 1
        super().__setitem__(index, value)


def test_cost_in_operations_does_not_depend_on_how_many_slots_there_are() -> None:
    def operations(count: int) -> int:
        ledger = Ledger(count)
        for name in ("book", "pins", "tags", "_stack"):
            setattr(ledger, name, getattr(ledger, name).view(Counting))
        Counting.touched = 0
        slots = ledger.take(count, Owner.REQUEST, tag=3)
        assert slots is not None
        slots = np.asarray(slots)
        ledger.pin(slots)
        ledger.ready(slots, REQUEST_FILLING)
        ledger.drop(slots)
        ledger.unpin(slots)
        return Counting.touched

    assert operations(4) == operations(4000) < 60


class LedgerMachine(RuleBasedStateMachine):
    """A ledger of six slots beside a dict from slot to (state, owner, pins)."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(6)
        self.model: dict[int, list[int]] = {}

    def some(self, which: list[int], *codes: int, pinned: bool | None = None) -> Any:
        """Those of `which` that are in one of `codes` and pinned or not, as the model knows."""
        good = [
            slot
            for slot in dict.fromkeys(which)
            if slot in self.model
            and (not codes or self.model[slot][0] in codes)
            and pinned in (None, self.model[slot][1] > 0)
        ]
        return np.array(good, np.int64)

    @rule(count=st.integers(0, 4), owner=st.sampled_from([Owner.NODE, Owner.REQUEST, Owner.OPERATION]))
    def take(self, count: int, owner: Owner) -> None:
        slots = self.ledger.take(count, owner)
        assert (slots is None) == (count > 6 - len(self.model))
        for slot in [] if slots is None else slots.tolist():
            assert slot not in self.model
            self.model[slot] = [entry(State.FILLING, owner), int(owner == Owner.OPERATION)]
            if owner == Owner.OPERATION:
                self.ledger.pin(np.array([slot]))

    @precondition(lambda self: self.model)
    @rule(
        verb=st.sampled_from(["ready", "drop", "lose", "pin", "unpin"]),
        which=st.lists(st.integers(0, 5), max_size=6),
        code=st.sampled_from([NODE_FILLING, REQUEST_FILLING, OPERATION_FILLING]),
    )
    def do(self, verb: str, which: list[int], code: int) -> None:
        if verb == "ready":
            slots = self.some(which, code)
            self.ledger.ready(slots, code)
        elif verb == "drop":
            slots = self.some(which, NODE_FILLING, NODE_READY, REQUEST_FILLING)
            unpinned = sum(self.model[slot][1] == 0 for slot in slots.tolist())
            assert self.ledger.drop(slots) == unpinned
        elif verb == "lose":
            slots = self.some(which, NODE_FILLING, OPERATION_FILLING, OPERATION_READY, pinned=True)
            self.ledger.lose(slots)
        elif verb == "pin":
            slots = self.some(which)
            self.ledger.pin(slots)
        else:
            slots = self.some(which, pinned=True)
            self.ledger.unpin(slots)
        for slot in slots.tolist():
            self.follow(slot, verb)

    def follow(self, slot: int, verb: str) -> None:
        """What the table says of one slot."""
        state = self.model[slot]
        name = next(name for name, code in CODES.items() if code == state[0])
        pinned = state[1] > 0
        state[1] += {"pin": 1, "unpin": -1}.get(verb, 0)
        if verb == "unpin" and state[1]:
            return
        state[0] = CODES[TABLE[name, pinned, verb]]
        if state[0] == FREE:
            del self.model[slot]

    @invariant()
    def agrees(self) -> None:
        for slot in range(6):
            code, pins = self.model.get(slot, [FREE, 0])
            assert (int(self.ledger.book[slot]), int(self.ledger.pins[slot])) == (code, pins)
        assert self.ledger.free == 6 - len(self.model)
        assert set(self.ledger.free_slots()) == set(range(6)) - set(self.model)


TestLedgerMachine = LedgerMachine.TestCase
