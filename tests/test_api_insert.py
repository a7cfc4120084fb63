"""Requests that go on: chunked prefill, two that compute the same, decoding page by page."""

from __future__ import annotations

import pytest
from rig import Rig

from tiertree import Refused
from tiertree.tree import radix as radix_module
from tiertree.tree.node import Node
from tiertree.tree.radix import Radix


def test_chunked_prefill_inserts_a_growing_prefix_and_the_lease_follows() -> None:
    rig = Rig(device=8, page_size=2)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    with rig.lease(prompt) as lease:
        for stop in (2, 5, 7):
            rig.grow(lease, prompt[:stop])
            assert lease.device_boundary == lease.memory_boundary == stop // 2
            assert rig.where(prompt) == (stop // 2, stop // 2)
        assert rig.cache.evict(8).freed == 0
    rig.empty_out()


def test_two_requests_that_computed_the_same_pages_end_up_on_the_same_slots() -> None:
    rig = Rig(device=8)
    first, second = rig.lease([1, 2, 3]), rig.lease([1, 2, 3])
    rig.grow(first, [1, 2, 3])
    free = rig.free()
    done = rig.grow(second, [1, 2, 3, 4])
    assert not isinstance(done, Refused)
    assert (done.pages, done.existing) == (4, 3)
    assert second.slots[:3].tolist() == first.slots.tolist()
    assert rig.free() == free - 1  # three duplicates came back
    for lease in (first, second):
        lease.release()
    rig.empty_out()


def test_an_insert_without_a_lease_keeps_the_slots_that_were_there() -> None:
    rig = Rig(device=8)
    rig.put([1, 2])
    with rig.lease([1, 2]) as lease:
        mine = lease.slots.tolist()
        assert rig.put([1, 2, 3]).existing == 2
        assert lease.slots.tolist() == mine
        assert rig.free() == 5


def test_decoding_page_by_page_makes_one_node_and_copies_a_bounded_number_of_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tiertree.tree.insert.EDGE_BYTES_MAX", 256)  # 64 pages of one token
    copied: list[int] = []
    lengthen = Radix.lengthen

    def counted(self: Radix, node: Node, more: bytes) -> None:
        copied.append(len(node.edge))
        lengthen(self, node, more)

    monkeypatch.setattr(radix_module.Radix, "lengthen", counted)
    rig = Rig(device=1000)
    prompt = [9] * 100
    with rig.lease(prompt) as lease:
        rig.grow(lease, prompt)
        for token in range(256):
            prompt.append(token)
            key = rig.cache.key(prompt)
            slots = rig.cache.allocate(1, lease)
            rig.write(slots, prompt, "", len(prompt) - 1)
            rig.cache.insert(key, slots, lease)
        rig.verify(lease, prompt)
        assert rig.core.radix.nodes == 1 + 256 // 64
        assert max(copied) <= 256
    rig.cache.check()


def test_a_grown_leaf_still_ends_where_others_left_it() -> None:
    rig = Rig(device=16)
    first = rig.lease([1])
    rig.grow(first, [1, 2])
    other = rig.lease([1, 2])
    rig.grow(first, [1, 2, 3, 4])
    rig.grow(other, [1, 2, 7])
    rig.verify(first, [1, 2, 3, 4])
    rig.verify(other, [1, 2, 7])
    for lease in (first, other):
        lease.release()
    rig.empty_out()
