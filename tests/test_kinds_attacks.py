"""What somebody who tried to break further kinds has found: promises, slots, room and order under attack."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from rig import Rig, books
from test_kinds import PROMPT
from test_kinds_tiers import OTHER, to_host

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    InvalidSlots,
    KindConfig,
    Mamba,
    NoRoom,
    SlidingWindow,
    Tier,
)
from tiertree.tree.actions import Copy
from tiertree.types import Kind, Slots

DEVICE, HOST = Tier.DEVICE, Tier.HOST


# -- promises ---------------------------------------------------------------------------------------------


def test_a_state_that_arrives_before_its_pages_is_promised_from_host() -> None:
    rig = Rig(16, host=16, kinds=[KindConfig(rules=Mamba(), device=8, host=2)])
    rig.put(PROMPT, pages={MAMBA: [5, 7]})
    to_host(rig)
    first = rig.lease(PROMPT)
    rig.load(first)
    second = rig.lease(PROMPT[:6])
    rig.load(second)  # only its state is missing, and comes first
    rig.done(rig.running(Copy)[-1])
    rig.cache.check()
    third = rig.lease(PROMPT[:6])
    assert third.memory_boundary == 6
    rig.settle()
    first.release()
    second.release()
    for token in (100, 200):  # host has room for two states, and both places are wanted
        rig.put([token, token + 1])
        rig.settle()
    rig.evict(16)
    rig.settle()
    rig.cache.check()
    assert rig.where(PROMPT[:6])[1] == 6
    rig.load_all(third, PROMPT[:6])
    third.release()
    rig.empty_out()


def test_a_copy_on_write_is_of_the_boundary_that_the_lease_has_in_the_end() -> None:
    rig = Rig(8, host=8, kinds=[KindConfig(rules=Mamba(), device=3, host=8)])
    rig.put(PROMPT[:4], pages={MAMBA: [1, 3]})
    rig.settle()
    rig.evict(2)
    lease = rig.lease(PROMPT[:4])
    rig.load(lease)
    other = rig.cache.allocate(1, kind=MAMBA)
    assert (lease.device_boundary, rig.free(DEVICE, MAMBA)) == (2, 0)
    rig.executor.on_wait = rig.executor.complete_all  # the load-back comes in while room is made
    own = rig.cache.copy_on_write(lease, MAMBA)
    assert not isinstance(own, NoRoom)
    contents = rig.executor.of(MAMBA)[DEVICE]
    assert lease.device_boundary == 4
    assert [contents[slot] for slot in own] == [rig.page(PROMPT[:4], "", 3, MAMBA)]
    rig.cache.check()
    rig.cache.free(other, kind=MAMBA)
    lease.release()
    rig.empty_out()


# -- slots ------------------------------------------------------------------------------------------------


def minus_one(slots: Slots) -> None:
    slots[:] = -1


def shift(slots: Slots) -> None:
    slots += 100


def double(slots: Slots) -> None:
    slots[0] = slots[1]


@pytest.mark.parametrize("kind", [FULL, SWA])
@pytest.mark.parametrize("spoil", [minus_one, shift, double])
def test_release_gives_back_what_was_allocated_whatever_the_caller_wrote_there(
    kind: Kind, spoil: Callable[[Slots], None]
) -> None:
    rig = Rig(8, kinds=[SlidingWindow(window=2)])
    with rig.lease(PROMPT) as lease:
        for pages in (3, 5):  # all there are, so that −1 would be one of them
            spoil(rig.cache.allocate(pages, lease, kind=kind))
    rig.cache.check()
    assert sorted(rig.ledger(DEVICE, kind).free_slots()) == list(range(8))
    rig.empty_out()


def test_pages_marked_as_absent_in_the_array_of_allocate_go_back_with_the_lease() -> None:
    rig = Rig(8, kinds=[SlidingWindow(window=2)])
    with rig.lease(PROMPT[:4]) as lease:
        full, window = (rig.cache.allocate(4, lease, kind=kind) for kind in (FULL, SWA))
        window[:2] = -1
        rig.write(full, PROMPT[:4], "", 0)
        rig.write(window, PROMPT[:4], "", 0, SWA)
        rig.cache.insert(rig.cache.key(PROMPT[:4]), full, lease, partial={SWA: window})
    rig.cache.check()
    assert (rig.map(PROMPT[:4], SWA), rig.free(DEVICE, SWA)) == ("..DD", 6)
    rig.look_at(PROMPT[:4])
    rig.empty_out()


def test_slots_of_a_refused_insert_are_not_trusted_at_the_next() -> None:
    rig = Rig(16, kinds=[KindConfig(rules=SlidingWindow(window=2), device=8)])
    key, other = rig.cache.key(PROMPT[:4]), rig.cache.key(OTHER[:4])
    buffer, batch = (rig.cache.allocate(4, kind=SWA) for _ in range(2))
    unused, full = buffer.copy(), rig.cache.allocate(4)
    with pytest.raises(InvalidSlots):
        rig.cache.insert(key, full[:3], partial={SWA: buffer})
    buffer[:] = batch[::-1]  # the engine has one buffer per request
    rig.cache.insert(key, full, partial={SWA: buffer})
    full = rig.cache.allocate(4)
    before = books(rig)
    with pytest.raises(InvalidSlots):
        rig.cache.insert(other, full, partial={SWA: batch})
    assert books(rig) == before
    rig.cache.free(full)
    rig.cache.free(unused, kind=SWA)
    rig.cache.check()
    rig.empty_out()


def test_the_slots_that_a_load_back_names_are_read_only() -> None:
    rig = Rig(8, host=8, kinds=[Mamba()])
    rig.put(PROMPT)
    to_host(rig)
    with rig.lease(PROMPT) as lease:
        slots = rig.load(lease).window(MAMBA)
        with pytest.raises(ValueError, match="read-only"):
            slots += 100
        rig.settle()
        rig.cache.check()
    rig.empty_out()


@pytest.mark.parametrize("partial", [[SWA], "x", 3, {SWA}])
def test_partial_that_is_no_mapping_is_refused(partial: object) -> None:
    rig = Rig(8, kinds=[SlidingWindow(window=2)])
    slots = rig.cache.allocate(8)
    before = books(rig)
    with pytest.raises(InvalidSlots):
        rig.cache.insert(rig.cache.key(PROMPT), slots, partial=partial)
    assert books(rig) == before
    rig.cache.free(slots)
    rig.empty_out()
