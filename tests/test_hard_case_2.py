"""Hard case 2, a window boundary inside an insert: the new path has a part whose window was already let go,
and a part that has it. Both go to host, the first part first; the second never without it.

What makes these fail when it is taken out:

- `Backup._bare` begins at the first page of the path that host lacks, not at the node that was inserted;
- `Backup._start` takes partial kinds along, those that `Backup._unsaved` finds in nodes before it too,
  but only as far as FULL finds room, and lets go of its holds where nothing does;
- `Arrivals.arrive` parks a copy that is done before the one of its parent, and fails it with that.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hard_support import HOST, SETS, THROUGH, Case, Kinds, Setup, each

from tiertree import FULL, Lease, WritePolicy
from tiertree.tree.actions import Copy

PAGES = 6
AT = 3
"""The page from which the window of the whole prompt is there."""

WAYS = ("one node", "split there by another insert", "two inserts", "parted inside the window")
some = SETS[1:]
"""The sets that have a window, a state or a chunk to lack."""


def whole(setup: Setup) -> list[int]:
    """A prompt of six pages."""
    return setup.prompt(*range(1, PAGES + 1))


def front(setup: Setup, way: str) -> list[int]:
    """Its part without a window, as the parent node has it."""
    pages = AT + 1 if way == "parted inside the window" else AT
    return whole(setup)[: pages * setup.page_size]


def insert(rig: Case, setup: Setup, way: str) -> None:
    """A prompt is inserted whose early pages of partial kinds are −1, and copies of it are under way."""
    prompts = [whole(setup)]
    if way in WAYS[2:]:
        prompts.insert(0, front(setup, way))
    for tokens in prompts:
        rig.put(tokens, pages=setup.nothing() if tokens is not prompts[-1] else {})
        if way != "split there by another insert":
            rig.touch(tokens)
    if way == "split there by another insert":
        rig.put([*front(setup, way), *setup.prompt(9)], pages=setup.nothing())
        rig.touch(whole(setup))
    end = rig.cache.peek(rig.cache.key(whole(setup))).end
    assert end is not None
    assert end.start == (0 if way == "one node" else len(front(setup, way)) // setup.page_size)


def both_parts(rig: Case, setup: Setup, at: str) -> None:
    """FULL is all there, of the others what continuing at the end needs."""
    assert rig.map(whole(setup)) == at * PAGES
    for kind in setup.kinds:
        assert rig.map(whole(setup), kind) == rig.drawn(rig.needed(kind, PAGES), PAGES, at)


@pytest.mark.parametrize("newest_first", [False, True], ids=["oldest", "newest"])
@pytest.mark.parametrize("way", WAYS)
@each(THROUGH, some)
def test_both_parts_are_backed_up_parent_first(setup: Setup, way: str, newest_first: bool) -> None:
    rig = setup.rig()
    insert(rig, setup, way)
    while pending := rig.running(Copy):
        rig.done(pending[-1 if newest_first else 0])
    both_parts(rig, setup, "B")
    hashes, cut = rig.page_hashes(whole(setup)), len(front(setup, way)) // setup.page_size
    announced = rig.announced(whole(setup), HOST)
    if way == "one node":
        assert announced == [(hashes, None)]
    else:
        assert announced[0] == (hashes[:cut], None)
        assert (hashes[cut:], hashes[cut - 1]) in announced[1:]
    assert rig.cache.stats().backups_dropped == 0
    rig.empty_out()


@pytest.mark.parametrize("way", WAYS)
@each(kinds=some)
def test_evicting_the_device_demotes_both_parts_and_loses_none(setup: Setup, way: str) -> None:
    rig = setup.rig()
    insert(rig, setup, way)
    rig.settle()
    while rig.free() < 16:
        rig.evict(1)  # one by one, so that each is looked at
        rig.settle()
    both_parts(rig, setup, "H")
    assert rig.where(whole(setup)) == (0, PAGES)
    assert rig.where(front(setup, way)) == (0, 0)
    assert rig.cache.stats().dropped == 0
    with rig.lease(whole(setup)) as lease:
        rig.load_all(lease, whole(setup))
        rig.look()
    rig.empty_out()


# -- the parent cannot be backed up -----------------------------------------------------------------------


def hoard(setup: Setup) -> list[int]:
    """The prompt of somebody else, who has leased it."""
    return setup.prompt(*range(11, 11 + PAGES))


def crowded(setup: Setup, room: int = 0) -> tuple[Case, Lease]:
    """All but `room` pages of host are leased."""
    rig = setup.rig(16, PAGES + room, of_kinds=PAGES)
    rig.put(hoard(setup))
    rig.to_host(hoard(setup))
    lease = rig.lease(hoard(setup))
    assert rig.free(HOST) == room
    return rig, lease


def room_on_host(rig: Case, kinds: Kinds) -> list[int]:
    """Free host slots of every kind."""
    return [rig.free(HOST, kind) for kind in (FULL, *kinds)]


@pytest.mark.parametrize("way", WAYS)
@each(THROUGH, some)
def test_where_host_is_full_of_leased_pages_neither_part_goes_there(setup: Setup, way: str) -> None:
    rig, hoarder = crowded(setup)
    before, copies = room_on_host(rig, setup.kinds), len(rig.copies())
    insert(rig, setup, way)
    rig.touch(whole(setup))
    assert len(rig.copies()) == copies
    assert room_on_host(rig, setup.kinds) == before
    assert rig.cache.stats().backups_dropped >= PAGES
    both_parts(rig, setup, "D")

    rig.evict(16)
    assert rig.map(whole(setup)) == "......"
    assert all(rig.free(kind=kind) == 16 for kind in (FULL, *setup.kinds))
    rig.load_all(hoarder, hoard(setup))
    rig.release(hoarder)
    rig.empty_out()


@pytest.mark.parametrize("way", WAYS[2:])
@each(THROUGH, some)
def test_where_host_has_room_for_a_piece_of_the_parent_the_child_stays_away(setup: Setup, way: str) -> None:
    rig, hoarder = crowded(setup, room=2)
    before = room_on_host(rig, setup.kinds)[1:]
    insert(rig, setup, way)
    rig.settle()
    rig.touch(whole(setup))
    assert rig.map(whole(setup)) == "BBDDDD"
    assert room_on_host(rig, setup.kinds) == [0, *before]
    rig.release(hoarder)
    rig.empty_out()


@pytest.mark.parametrize("way", WAYS[2:])
@each(THROUGH, some)
def test_once_there_is_room_the_child_brings_its_parent_along(setup: Setup, way: str) -> None:
    rig, hoarder = crowded(setup)
    rig.put(front(setup, way), pages=setup.nothing())
    rig.touch(front(setup, way))
    rig.release(hoarder)
    copies = len(rig.copies())
    rig.put(whole(setup))
    rig.touch(whole(setup))
    started = rig.copies()[copies:]
    wanted = {FULL: PAGES, **{kind: len(rig.needed(kind, PAGES)) for kind in setup.kinds}}
    assert sum(map(Counter, started), Counter()) == wanted
    assert len(started) == 1 or setup.policy is not WritePolicy.WRITE_THROUGH
    rig.settle()
    both_parts(rig, setup, "B")
    rig.empty_out()


@pytest.mark.parametrize("child_is_done", [True, False], ids=["done", "running"])
@pytest.mark.parametrize("way", WAYS[2:])
@each(THROUGH, some)
def test_a_child_whose_parent_fails_comes_to_nothing(setup: Setup, way: str, child_is_done: bool) -> None:
    rig = setup.rig()
    insert(rig, setup, way)
    parent, *_, child = rig.running(Copy)
    if child_is_done:
        rig.done(child)
        assert rig.announced(whole(setup), HOST) == []
    rig.failed(parent)
    rig.settle()
    assert rig.free(HOST) == 16
    for kind in setup.kinds:  # what a hit on the parent has brought to host by itself may stay
        behind = rig.map(whole(setup), kind)[len(front(setup, way)) // setup.page_size :]
        assert "B" not in behind
        assert rig.free(HOST, kind) == 16 - rig.map(whole(setup), kind).count("B")
    assert rig.map(whole(setup)) == "D" * PAGES

    rig.touch(whole(setup))
    rig.settle()
    both_parts(rig, setup, "B")
    rig.evict(16)
    both_parts(rig, setup, "H")
    rig.empty_out()
