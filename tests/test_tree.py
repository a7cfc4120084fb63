"""`check()` can fail: for each invariant the books are corrupted by hand, and it says which one broke.

And the tree by itself: what a split leaves behind, when a leaf grows, which page hash a page has.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from rig import Rig

from tiertree import InvariantViolated, Tier, WritePolicy
from tiertree.tree import pagehash
from tiertree.tree.check import INVARIANTS, nodes_of
from tiertree.tree.ledger import FREE, NODE_FILLING, Owner
from tiertree.tree.node import Node

A = [1, 1, 1, 1]
B = [1, 1, 2, 2]
C = [3, 3, 3]


@pytest.fixture
def rig() -> Rig:
    """Two prompts that share two pages and one that shares nothing, all of them on device and host."""
    rig = Rig(device=12, host=12)
    for tokens in (A, B, C):
        rig.put(tokens)
    rig.settle()
    rig.cache.check()
    return rig


def leaf(rig: Rig, tokens: list[int]) -> Node:
    """The node that `tokens` end at."""
    node = rig.cache.peek(rig.cache.key(tokens)).end
    assert node is not None
    return node


@contextmanager
def breaks(rig: Rig, invariant: str) -> Iterator[None]:
    """The body corrupts the books; then `check` must name `invariant`."""
    rig.cache.check()
    yield
    with pytest.raises(InvariantViolated) as caught:
        rig.cache.check()
    assert f"{invariant}: " in str(caught.value)


def lose_slots(rig: Rig, node: Node, tier: Tier, low: int, high: int) -> None:
    """Pages of `node` lose their slots on `tier`, properly by all the other books."""
    rig.core.radix.drop(tier, rig.core.radix.detach(node, tier, low, high))


# -- one test for each invariant ------------------------------------------------------------------------


def test_every_invariant_of_the_design_has_a_rule_of_its_own() -> None:
    assert list(INVARIANTS) == [f"I{number}" for number in range(1, 13)]
    assert len(set(INVARIANTS.values())) == 12


def test_i1_a_child_under_a_first_page_that_is_not_its_own(rig: Rig) -> None:
    node = leaf(rig, A)
    assert node.parent is not None
    with breaks(rig, "I1"):
        node.parent.children[b"\7\0\0\0"] = node.parent.children.pop(node.edge[:4])


def test_i1_parent_and_child_disagree(rig: Rig) -> None:
    with breaks(rig, "I1"):
        leaf(rig, A).parent = leaf(rig, C)


def test_i1_a_node_that_does_not_begin_where_its_parent_ends(rig: Rig) -> None:
    with breaks(rig, "I1"):
        leaf(rig, C).end += 1


def test_i1_an_empty_root(rig: Rig) -> None:
    with breaks(rig, "I1"):
        rig.core.radix.root("nobody was here")


def test_i1_a_wrong_number_of_nodes(rig: Rig) -> None:
    with breaks(rig, "I1"):
        rig.core.radix.nodes += 1


def test_i2_a_page_that_is_nowhere(rig: Rig) -> None:
    with breaks(rig, "I2"):
        for tier in (Tier.DEVICE, Tier.HOST):
            lose_slots(rig, leaf(rig, C), tier, 2, 3)


def test_i3_a_device_page_behind_a_missing_one(rig: Rig) -> None:
    with breaks(rig, "I3"):
        lose_slots(rig, leaf(rig, C), Tier.DEVICE, 0, 1)


def test_i3_a_device_page_whose_parent_node_is_gone_from_device(rig: Rig) -> None:
    parent = leaf(rig, A).parent
    assert parent is not None
    with breaks(rig, "I3"):
        lose_slots(rig, parent, Tier.DEVICE, 1, 2)


def test_i4_a_host_page_behind_a_missing_one(rig: Rig) -> None:
    with breaks(rig, "I4"):
        lose_slots(rig, leaf(rig, C), Tier.HOST, 0, 1)


def test_i4_does_not_bind_write_back() -> None:
    rig = Rig(device=4, host=4, write_policy=WritePolicy.WRITE_BACK)
    rig.put(C)
    rig.cache.evict(2, deadline_s=0)
    rig.settle()
    assert rig.where(C) == (1, 3)
    rig.cache.check()  # pages 1 and 2 are on host, page 0 is not


def test_i5_a_slot_in_two_nodes(rig: Rig) -> None:
    ours, theirs = leaf(rig, A).device.slots, leaf(rig, C).device.slots
    assert ours is not None
    assert theirs is not None
    with breaks(rig, "I5"):
        ours[0] = theirs[0]


def test_i5_a_slot_on_the_free_list_twice(rig: Rig) -> None:
    ledger = rig.core.radix.ledgers[Tier.DEVICE]
    with breaks(rig, "I5"):
        ledger._stack[0] = ledger._stack[1]


def test_i5_a_slot_that_the_ledger_gives_to_a_node_and_no_node_has(rig: Rig) -> None:
    with breaks(rig, "I5"):
        rig.core.radix.ledgers[Tier.HOST].take(1, Owner.NODE)


def test_i5_a_slot_that_is_free_and_not_on_the_free_list(rig: Rig) -> None:
    with breaks(rig, "I5"):
        rig.core.radix.ledgers[Tier.DEVICE].free -= 1


def test_i6_a_lock_without_a_holder(rig: Rig) -> None:
    with breaks(rig, "I6"):
        leaf(rig, A).host.locks += 1


def test_i6_a_holder_without_a_lock(rig: Rig) -> None:
    lease = rig.lease(A)
    with breaks(rig, "I6"):
        leaf(rig, A).device.locks -= 1
    assert lease.device_boundary == 4


def test_i6_a_pin_without_an_operation(rig: Rig) -> None:
    with breaks(rig, "I6"):
        rig.core.radix.ledgers[Tier.HOST].pin(leaf(rig, C).host.slots)


def test_i6_a_pinned_slot_that_is_free() -> None:
    rig = Rig(device=4, host=4)
    rig.put(C)  # its backup is running
    with breaks(rig, "I6"):
        rig.core.radix.ledgers[Tier.DEVICE].book[leaf(rig, C).device.slots] = FREE


def test_i7_a_node_that_may_go_and_cannot_be_found(rig: Rig) -> None:
    with breaks(rig, "I7"):
        rig.core.radix.victims[Tier.DEVICE].discard(leaf(rig, C))


def test_i7_duplicates_that_cannot_be_found() -> None:
    rig = Rig(device=4, host=4, write_policy=WritePolicy.WRITE_BACK)
    rig.put(C)
    rig.cache.evict(3, deadline_s=0)
    rig.settle()
    with rig.lease(C) as lease:
        rig.load(lease)
        rig.settle()
    with breaks(rig, "I7"):
        rig.core.radix.duplicates.clear()


def test_i8_a_lease_that_was_promised_a_page_that_is_not_ready(rig: Rig) -> None:
    lease = rig.lease(A)
    with breaks(rig, "I8"):
        rig.core.radix.ledgers[Tier.DEVICE].book[lease.slots[1]] = NODE_FILLING


def test_i8_a_lease_that_was_promised_host_pages_that_are_gone(rig: Rig) -> None:
    rig.cache.evict(12, deadline_s=0)
    lease = rig.lease(A)
    assert (lease.device_boundary, lease.memory_boundary) == (0, 4)
    with breaks(rig, "I8"):
        lose_slots(rig, leaf(rig, A), Tier.HOST, 1, 2)


def test_i9_a_page_hash_that_is_not_chained_from_its_prefix(rig: Rig) -> None:
    node = leaf(rig, A)
    with breaks(rig, "I9"):
        node.hashes = bytes(len(node.hashes))


def test_i10_a_demotion_whose_source_is_gone_before_its_bytes_are_on_host() -> None:
    rig = Rig(device=4, host=4, write_policy=WritePolicy.WRITE_BACK)
    rig.put(C)
    rig.cache.evict(1, deadline_s=0)
    (operation,) = rig.core.operations.in_flight.values()
    with breaks(rig, "I10"):
        rig.core.radix.ledgers[Tier.DEVICE].book[operation.source] = NODE_FILLING


@pytest.mark.parametrize("tier", [Tier.DEVICE, Tier.HOST])
@pytest.mark.parametrize("counter", ["resident", "protected"])
def test_i11_a_total_that_is_not_the_sum(rig: Rig, counter: str, tier: Tier) -> None:
    with breaks(rig, "I11"):
        getattr(rig.core.radix, counter)[tier] += 1


@pytest.mark.parametrize("counter", ["count", "filling", "below"])
def test_i11_a_node_that_counts_wrongly(rig: Rig, counter: str) -> None:
    lane = leaf(rig, C).host
    with breaks(rig, "I11"):
        setattr(lane, counter, getattr(lane, counter) + 1)


def test_i12_a_slot_that_nobody_will_ever_give_back(rig: Rig) -> None:
    with breaks(rig, "I12"):
        rig.core.radix.ledgers[Tier.DEVICE].take(1, Owner.OPERATION)


def test_i12_a_detached_node_that_nobody_holds(rig: Rig) -> None:
    stray = Node(b"\7\0\0\0", 1, 1, None, leaf(rig, C).lanes)
    with breaks(rig, "I12"):
        rig.core.radix.detached.add(stray)


def test_one_check_reports_every_invariant_that_is_broken(rig: Rig) -> None:
    rig.core.radix.nodes += 1
    rig.core.radix.resident[Tier.HOST] += 1
    with pytest.raises(InvariantViolated) as caught:
        rig.cache.check()
    assert "I1: " in str(caught.value)
    assert "I11: " in str(caught.value)


# -- the tree by itself ---------------------------------------------------------------------------------


def test_a_split_keeps_the_object_that_others_refer_to_as_the_suffix() -> None:
    rig = Rig(device=8)
    rig.put([1, 2, 3, 4])
    node = leaf(rig, [1, 2, 3, 4])
    slots = node.device.slots
    assert slots is not None
    rig.put([1, 2, 9])
    assert leaf(rig, [1, 2, 3, 4]) is node
    assert (node.start, node.end, node.parent) == (2, 4, leaf(rig, [1, 2]))
    upper = leaf(rig, [1, 2]).device.slots
    lower = node.device.slots
    assert upper is not None
    assert lower is not None
    assert [*upper.tolist(), *lower.tolist()] == slots.tolist()
    assert upper.base is None
    assert lower.base is None


def test_siblings_that_differ_only_inside_their_first_page_are_not_split() -> None:
    rig = Rig(device=8, page_size=3)
    rig.put([1, 2, 3, 4, 5, 6])
    rig.put([1, 2, 3, 4, 5, 7])
    assert rig.where([1, 2, 3, 4, 5, 6]) == (2, 2)
    assert rig.where([1, 2, 3, 4, 5, 7]) == (2, 2)
    assert rig.where([1, 2, 3, 4, 9, 9]) == (1, 1)
    assert rig.core.radix.nodes == 3


def test_a_root_without_pages_is_removed() -> None:
    rig = Rig(device=4)
    rig.put([1], "tenant")
    assert rig.cache.stats().namespaces == 1
    rig.cache.evict(1)
    assert rig.cache.stats().namespaces == 0


# -- page hashes ----------------------------------------------------------------------------------------


def expected_hashes(
    units: list[int], namespace: str, page_size: int, unit_bytes: int, fingerprint: bytes
) -> list[bytes]:
    """Page hashes as the docstring of `pagehash` says, in plain hashlib."""
    parts = [
        b"tiertree page hash 1",
        fingerprint,
        f"{page_size},{unit_bytes},0".encode(),
        namespace.encode(),
    ]
    before = hashlib.sha256(b"".join(len(part).to_bytes(8, "little") + part for part in parts)).digest()
    hashes = []
    for at in range(0, len(units), page_size):
        page = b"".join(unit.to_bytes(unit_bytes, "little") for unit in units[at : at + page_size])
        before = hashlib.sha256(before + page).digest()
        hashes.append(before)
    return hashes


@pytest.mark.parametrize(("page_size", "unit_bits"), [(1, 32), (2, 64), (3, 32)])
def test_page_hashes_are_the_documented_chain_wherever_splits_have_been(
    page_size: int, unit_bits: int
) -> None:
    rig = Rig(device=16, page_size=page_size, unit_bits=unit_bits, model="m", revision="7")
    long = [5] * (4 * page_size)
    rig.put(long, "tenant")
    rig.put([*long[: 2 * page_size], *([6] * page_size)], "tenant")
    fingerprint = rig.core.radix.hashes.fingerprint
    assert fingerprint == hashlib.sha256(b'["m", "7"]').digest()
    end = rig.cache.peek(rig.cache.key(long, "tenant")).end
    assert end is not None
    want = expected_hashes(long, "tenant", page_size, unit_bits // 8, fingerprint)
    assert list(rig.core.radix.hashes.of_range(end, 0, 4)) == want
    assert list(rig.core.radix.hashes.of_key(rig.cache.key(long, "tenant"))) == want


def test_a_page_is_hashed_when_first_needed_and_never_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(device=16, host=16, events=False)
    hashed: list[bytes] = []
    monkeypatch.setattr(
        pagehash.hashlib, "sha256", lambda data: hashed.append(data) or hashlib.new("sha256", data)
    )
    rig.put([1, 2, 3, 4])
    rig.lease([1, 2]).release()
    rig.settle()
    assert hashed == []  # nobody has asked for one
    end = leaf(rig, [1, 2, 3, 4])
    first = rig.core.radix.hashes.of_range(end, 0, 4)
    count = len(hashed)
    assert count == 5  # the root and four pages
    rig.put([1, 2, 9])
    assert rig.core.radix.hashes.of_range(end, 0, 4) == first
    rig.core.radix.hashes.of_range(leaf(rig, [1, 2, 9]), 0, 3)
    assert len(hashed) == count + 1


def test_nodes_are_listed_parents_first(rig: Rig) -> None:
    seen: set[int] = set()
    for node in nodes_of(rig.core):
        assert node.parent is not None
        assert not node.parent.pages or id(node.parent) in seen
        seen.add(id(node))
    assert len(seen) == 4
    assert np.sum([node.pages for node in nodes_of(rig.core)]) == 9
