"""Hard case 4, a page that is on host and again on device.

What makes these fail when it is taken out:

- `Lane.below` keeps a host page from going before those behind it: `Holdings.offer`, `Victims.candidates`;
  `Holdings._vacate` offers a parent when the last page behind it has gone;
- `Holdings.offer` notes duplicates under write_back alone (I7b), and there whatever is behind them;
- `Evictor._duplicates` looks again whether the page is still READY on device, and never at a locked node.
"""

from __future__ import annotations

import pytest
from hard_support import BACK, DEVICE, HOST, THROUGH, Case, Setup, each

from tiertree import Inserted, Lease, NoRoom
from tiertree.tree.actions import Copy, Put
from tiertree.tree.node import Node


def family(setup: Setup) -> tuple[list[int], list[int]]:
    """A parent of two pages, and itself with a child of two more."""
    return setup.prompt(1, 2), setup.prompt(1, 2, 3, 4)


def on_host(setup: Setup, **options: int) -> Case:
    """Parent and child, two nodes, are on host alone."""
    rig = setup.rig(**options)
    for tokens in family(setup):
        rig.put(tokens)
    rig.to_host(*family(setup))
    assert rig.map(family(setup)[1]) == "HHHH"
    return rig


def load(rig: Case, tokens: list[int]) -> None:
    """Bring these pages back to device, and let go of them."""
    lease = rig.lease(tokens)
    rig.load(lease)
    rig.done(*rig.running(Copy))
    rig.verify(lease, tokens)
    rig.release(lease)


def nodes(rig: Case, setup: Setup) -> tuple[Node, Node]:
    """The nodes of parent and child."""
    child = rig.cache.peek(rig.cache.key(family(setup)[1])).end
    assert child is not None
    assert child.parent is not None
    assert (child.start, child.parent.start) == (2, 0)
    return child.parent, child


def parent_is_oldest(rig: Case, setup: Setup) -> None:
    """By the policy alone the parent would be the first to go."""
    parent, child = nodes(rig, setup)
    rig.clock.advance(100)
    rig.touch(family(setup)[1])
    parent.last_used = -1.0
    assert child.last_used == 100


def host_of(rig: Case, setup: Setup) -> str:
    """Which pages of FULL have a host slot."""
    return "".join("H" if at in "HB" else "." for at in rig.map(family(setup)[1]))


@pytest.mark.parametrize("again", [True, False], ids=["on device again", "host only"])
@each(THROUGH)
def test_the_parents_host_slot_cannot_go_while_the_childs_stands(setup: Setup, again: bool) -> None:
    rig = on_host(setup)
    if again:
        load(rig, family(setup)[1])
        assert rig.map(family(setup)[1]) == "BBBB"
    parent_is_oldest(rig, setup)
    for left in ("HHH.", "HH..", "H...", "...."):
        assert rig.evict(1, HOST).freed == 1
        assert host_of(rig, setup) == left
    assert rig.map(family(setup)[1]) == ("DDDD" if again else "....")
    rig.empty_out()


@each(THROUGH)
def test_nor_can_it_where_the_child_is_held_and_it_can_when_the_child_goes(setup: Setup) -> None:
    rig = on_host(setup)
    parent, whole = family(setup)
    lease = rig.lease(whole)
    rig.load(lease)
    assert rig.evict(16, HOST).freed == 0  # the bytes of all four are being read
    rig.settle()
    rig.verify(lease, whole)
    assert rig.evict(2, HOST).freed == 2  # leased on device, and so of no more use on host
    assert rig.map(whole) == "BBDD"
    assert rig.evict(2, HOST).freed == 2
    assert rig.map(whole) == "DDDD"
    rig.verify(lease, whole)
    rig.release(lease)
    assert rig.where(parent)[0] in (0, 2)
    rig.empty_out()


@each([BACK])
def test_under_write_back_a_parent_on_host_only_cannot_go_before_its_child(setup: Setup) -> None:
    rig = on_host(setup)
    parent, whole = family(setup)
    load(rig, parent)  # it was a duplicate for a while
    rig.evict(16)
    rig.settle()
    assert rig.map(whole) == "HHHH"
    parent_is_oldest(rig, setup)
    for left in ("HHH.", "HH..", "H...", "...."):
        assert rig.evict(1, HOST).freed == 1
        assert host_of(rig, setup) == left
    assert rig.cache.stats().nodes == 0
    rig.empty_out()


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "being stored"])
@pytest.mark.parametrize("child", ["H", "B"], ids=["host only", "a duplicate"])
@each([BACK])
def test_a_parent_that_is_a_duplicate_can_go_whatever_its_child_holds(
    setup: Setup, child: str, stored: bool
) -> None:
    rig = setup.rig(storage=1000)
    parent, whole = family(setup)
    rig.put(parent)
    rig.evict(16)
    rig.settle()
    load(rig, parent)
    rig.put(whole)
    rig.evict(2)
    rig.done()
    if child == "B":
        load(rig, whole)
        rig.core.radix.duplicates.move_to_end(nodes(rig, setup)[1])  # the oldest duplicate goes first
    if stored:
        rig.settle()
    assert nodes(rig, setup)[1].host.locks == len(rig.running(Put)) == (not stored)
    assert rig.map(whole) == "BB" + 2 * child
    assert rig.evict(2, HOST).freed == 2
    assert rig.map(whole) == "DD" + 2 * child
    if child == "H":
        load(rig, whole)
    assert rig.where(whole) == (4, 4)
    rig.settle()
    rig.empty_out()


@each([BACK])
def test_a_duplicate_that_is_leased_on_host_stays(setup: Setup) -> None:
    rig = on_host(setup)
    parent, whole = family(setup)
    lease = rig.lease(whole)  # all four of them on host
    load(rig, parent)
    assert rig.map(whole) == "BBHH"
    assert rig.evict(16, HOST).freed == 0
    rig.verify(lease, whole)
    rig.release(lease)
    assert rig.evict(2, HOST).freed == 2
    assert rig.map(whole) == "DDHH"
    rig.empty_out()


# -- memory pressure in both tiers at once ----------------------------------------------------------------


def duplicates_everywhere(setup: Setup, held: str) -> tuple[Case, list[tuple[Lease, list[int]]]]:
    """Both tiers are full of the same eight pages, in three nodes; some of them may be leased."""
    rig = setup.rig(8, 8)
    prompts = [setup.prompt(1, 2), setup.prompt(1, 2, 3, 4, 5), setup.prompt(1, 2, 6, 7, 8)]
    for tokens in prompts:
        rig.put(tokens)
        rig.to_host(tokens)
    leases = []
    for tokens in prompts:
        lease = rig.lease(tokens)
        rig.load_all(lease, tokens)
        leases.append((lease, tokens))
    assert rig.free() == rig.free(HOST) == 0
    keep = {"nobody": (), "the parent": (0,), "a child": (1,), "everybody": (0, 1, 2)}[held]
    rig.release(*(lease for at, (lease, _) in enumerate(leases) if at not in keep))
    return rig, [leases[at] for at in keep]


def newcomer(rig: Case, setup: Setup, number: int) -> bool:
    """Whether somebody gets one page on device, and on host as far as the policy wants that too."""
    tokens = setup.prompt(100 + number)
    slots = rig.cache.allocate(1, deadline_s=0)
    rig.look()
    if isinstance(slots, NoRoom):
        return False
    rig.write(slots, tokens, "", 0)
    rig.knows(tokens)
    assert isinstance(rig.cache.insert(rig.cache.key(tokens), slots), Inserted)
    rig.touch(tokens)
    return True


@pytest.mark.parametrize("held", ["nobody", "the parent", "a child", "everybody"])
@each()
def test_both_tiers_are_full_and_both_must_make_room(setup: Setup, held: str) -> None:
    rig, leases = duplicates_everywhere(setup, held)
    promised = [(lease, tokens, lease.slots.tolist()) for lease, tokens in leases]
    came = 0
    for number in range(4):
        for tier in (DEVICE, HOST)[:: 1 - 2 * (number % 2)] if number else ():
            rig.evict(1, tier)
        came += newcomer(rig, setup, number)
        if number % 2:  # until then copies are under way, and the newest is done first
            while pending := rig.running(Copy):
                rig.done(pending[-1])
        for lease, tokens, slots in promised:
            assert lease.slots.tolist() == slots
            rig.verify(lease, tokens)
    assert (came > 0) == (held != "everybody")
    rig.release(*(lease for lease, _ in leases))
    rig.settle()
    rig.empty_out()
