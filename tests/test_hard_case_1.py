"""Hard case 1, write-back eviction of a leaf, while its parent is leased and not backed up.

What makes these fail when it is taken out:

- `Evictor._demote` counts copied pages as pending, `finish_demotion` frees device slots only then (I10);
- `Arrivals._page_before` asks nothing of the page before where host is not prefix-closed;
- `check.host_closed` (I4) asks for prefix-closed host under the write-through policies, and only there;
- `Evictor._copy_out` takes along what makes the leaf's boundary usable for every kind.
"""

from __future__ import annotations

import pytest
from hard_support import BACK, DEVICE, HOST, THROUGH, Case, Setup, each
from rig import Tokens

from tiertree import FULL, InvariantViolated, Lease
from tiertree.tree.actions import Copy


def family(setup: Setup) -> tuple[list[int], list[int]]:
    """A parent of two pages, and itself with a leaf of two more."""
    return setup.prompt(1, 2), setup.prompt(1, 2, 3, 4)


def leased_parent(setup: Setup) -> tuple[Case, Lease]:
    """Parent and leaf on device, the parent leased, nothing on host."""
    rig = setup.rig(8, 8)
    for tokens in family(setup):
        rig.put(tokens)
    lease = rig.lease(family(setup)[0])
    assert (rig.free(), rig.free(HOST), rig.copies()) == (4, 8, [])
    return rig, lease


def stands(rig: Case, tokens: Tokens, parent: str, leaf: str) -> None:
    """Where the pages of parent and leaf are, of each kind all that it has ever had of them."""
    assert rig.map(tokens) == 2 * parent + 2 * leaf
    for kind in rig.kinds:
        there = {*rig.needed(kind, 2), *rig.needed(kind, 4)}
        assert rig.map(tokens, kind) == "".join(
            at if page in there else "." for page, at in enumerate(2 * parent + 2 * leaf)
        )


@each([BACK])
def test_the_leaf_ends_on_host_and_its_parent_does_not(setup: Setup) -> None:
    rig, lease = leased_parent(setup)
    _, whole = family(setup)
    rig.evict(8)
    stands(rig, whole, "D", "D")
    rig.settle()
    stands(rig, whole, "D", "H")
    assert rig.where(whole) == (2, 4)
    rig.verify(lease, family(setup)[0])
    rig.release(lease)
    rig.empty_out()


@each([BACK])
def test_check_accepts_it_under_write_back_and_rejects_the_same_books_under_write_through(
    setup: Setup,
) -> None:
    rig, _ = leased_parent(setup)
    rig.evict(8)
    rig.settle()
    rig.cache.check()
    rig.core.radix.host_prefix_closed = True
    with pytest.raises(InvariantViolated) as caught:
        rig.cache.check()
    assert {line[:4] for line in str(caught.value).splitlines()} == {"I4: "}
    rig.core.radix.host_prefix_closed = False
    rig.cache.check()


@each(THROUGH)
def test_under_write_through_the_leaf_of_a_parent_that_is_not_on_host_goes_nowhere(setup: Setup) -> None:
    rig = setup.rig(8, 8)
    parent, whole = family(setup)
    for tokens in (parent, whole):
        rig.put(tokens)
        rig.touch(tokens)
    lease = rig.lease(parent)
    while rig.running(Copy):
        rig.failed()
    assert (rig.evict(8).freed, rig.map(whole)) == (2, "DD..")
    assert all(rig.free(HOST, kind) == 8 for kind in (FULL, *setup.kinds))
    rig.release(lease)
    rig.empty_out()


@each([BACK])
def test_evict_counts_pages_only_when_they_are_on_host_and_their_slots_are_free(setup: Setup) -> None:
    rig, _ = leased_parent(setup)
    _, whole = family(setup)
    free: list[int] = []
    rig.executor.on_wait = lambda: free.append(rig.free())
    assert rig.core.evict(DEVICE, 2, rig.clock.now) == (0, 2)  # the tree itself says so too
    rig.cache.poll()
    done = rig.evict(2, deadline_s=0.5)  # nobody answers
    assert (done.freed, done.pending, rig.clock.now) == (0, 2, 0.5)
    stands(rig, whole, "D", "D")

    answers = [rig.executor.fail, rig.executor.complete]

    def answer() -> None:
        free.append(rig.free())
        answers.pop(0)()

    rig.executor.on_wait = answer
    done = rig.evict(2, deadline_s=5)  # the first copy fails, the next one does not
    assert (done.freed, done.pending, answers, rig.free()) == (2, 0, [], 6)
    assert set(free) == {4}
    stands(rig, whole, "D", "H")
    assert rig.cache.stats().dropped == 0


@each([BACK])
def test_evict_of_a_partial_kind_counts_in_the_same_way(setup: Setup) -> None:
    rig, _ = leased_parent(setup)
    _, whole = family(setup)
    for kind in setup.kinds:
        leaf = [page for page in rig.needed(kind, 4) if page >= 2]
        assert rig.core.evict(DEVICE, 8, rig.clock.now, kind) == (0, len(leaf))
        done = rig.evict(8, kind=kind)
        assert (done.freed, done.pending) == (0, len(leaf))
        rig.done(*rig.running(Copy))
        assert rig.free(kind=kind) == 8 - len(rig.needed(kind, 2))
        on_host = [page for page, at in enumerate(rig.map(whole, kind)) if at == "H"]
        assert on_host == leaf
    assert rig.map(whole) == "DDDD"
    assert rig.where(whole)[1] == 4


@each([BACK])
def test_then_the_parent_goes_too_and_both_come_back(setup: Setup) -> None:
    rig, lease = leased_parent(setup)
    parent, whole = family(setup)
    rig.evict(8)
    rig.settle()
    rig.release(lease)
    done = rig.evict(8)
    assert (done.freed, done.pending) == (0, 2)
    rig.settle()
    stands(rig, whole, "H", "H")
    assert (rig.where(parent), rig.where(whole)) == ((0, 2), (0, 4))
    assert rig.free() == 8
    leases = [rig.lease(tokens) for tokens in (parent, whole)]
    for tokens, lease in zip((parent, whole), leases, strict=True):
        rig.load_all(lease, tokens)
        rig.look()
    assert rig.where(whole) == (4, 4)
    rig.release(*leases)
    rig.empty_out()
