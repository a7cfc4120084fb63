"""What each call of `PrefixCache` promises, on caches small enough to see everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rig import Rig, books

from tiertree import InvalidTokens, NoRoom, Refused, Tier
from tiertree.testing.oracle import Oracle

# -- match and peek ---------------------------------------------------------------------------------------

prompts = st.lists(
    st.tuples(st.lists(st.integers(0, 2), max_size=12), st.sampled_from(["", "tenant"])), max_size=12
)


@given(inserted=prompts, asked=prompts, page_size=st.integers(1, 4))
def test_with_room_for_everything_match_is_exactly_the_oracles(
    inserted: list[tuple[list[int], str]], asked: list[tuple[list[int], str]], page_size: int
) -> None:
    rig, oracle = Rig(device=200, page_size=page_size), Oracle(page_size)
    for tokens, namespace in inserted:
        rig.put(tokens, namespace)
        oracle.put(tokens, namespace)
    for tokens, namespace in [*asked, *inserted]:
        assert rig.where(tokens, namespace) == oracle.match(tokens, namespace)[:2]
        with rig.lease(tokens, namespace) as lease:
            assert lease.device_boundary == oracle.match(tokens, namespace)[0]
    rig.cache.check()


@pytest.mark.parametrize("page_size", range(1, 65))
def test_every_page_size_counts_whole_pages_only(page_size: int) -> None:
    rig = Rig(device=4, page_size=page_size)
    tokens = list(range(100, 100 + 3 * page_size))
    rig.put([*tokens, 7][: 3 * page_size + (page_size > 1)])
    assert rig.where(tokens) == (3, 3)
    assert rig.where(tokens[:-1]) == (2, 2)
    assert rig.where([*tokens[:-1], 0]) == (2, 2)
    assert rig.where([0, *tokens[1:]]) == (0, 0)
    rig.lease(tokens).release()
    rig.empty_out()


def test_bigram_pages_match_only_where_the_next_token_agrees_too() -> None:
    rig = Rig(device=8, page_size=2, unit_bits=64, bigram=True)
    key = rig.cache.key([1, 2, 3, 4, 5])  # units 12 23 34 45
    assert key.pages == 2
    rig.cache.insert(key, rig.cache.allocate(2))
    assert rig.where([1, 2, 3, 9, 9]) == (1, 1)  # 12 23 | 39 99
    assert rig.where([1, 2, 9, 4, 5]) == (0, 0)  # 12 29
    assert rig.where([1, 2]) == (0, 0)
    with pytest.raises(InvalidTokens):
        rig.cache.extend_key(key, [6])
    rig.cache.check()


def test_a_key_can_be_extended_by_whole_pages() -> None:
    rig = Rig(device=8, page_size=2)
    longer = rig.cache.extend_key(rig.cache.key([1, 2], "tenant"), [3, 4, 5])
    assert (longer.pages, longer.namespace) == (2, "tenant")
    assert longer.units == rig.cache.key([1, 2, 3, 4]).units


def test_a_match_that_ends_inside_a_node_splits_it_and_a_peek_does_not() -> None:
    rig = Rig(device=8)
    rig.put([1, 2, 3, 4])
    before = books(rig)
    assert rig.where([1, 2, 9]) == (2, 2)
    assert books(rig) == before
    rig.cache.match(rig.cache.key([1, 2, 9]))
    assert rig.core.radix.nodes == 2


@pytest.mark.parametrize(("look", "survivor"), [("match", [1]), ("peek", [2])])
def test_a_match_refreshes_recency_and_a_peek_does_not(look: str, survivor: list[int]) -> None:
    rig = Rig(device=2)
    for token in (1, 2):
        rig.clock.advance(1)
        rig.put([token])
    rig.clock.advance(1)
    getattr(rig.cache, look)(rig.cache.key([1]))
    rig.cache.evict(1)
    assert rig.where(survivor) == (1, 1)
    assert rig.cache.stats().device.resident == 1


def test_a_lease_can_be_taken_of_a_peek_that_ends_inside_a_node() -> None:
    rig = Rig(device=8)
    rig.put([1, 2, 3, 4])
    with rig.cache.acquire(rig.cache.peek(rig.cache.key([1, 2]))) as lease:
        rig.verify(lease, [1, 2])
        assert rig.cache.evict(4).freed == 2
        rig.verify(lease, [1, 2])


# -- allocate and evict -----------------------------------------------------------------------------------


def test_allocate_evicts_the_least_recently_used_and_gives_exactly_what_was_asked() -> None:
    rig = Rig(device=4)
    rig.put([1, 1])
    rig.clock.advance(1)
    rig.put([2, 2])
    slots = rig.cache.allocate(1)
    assert len(slots) == 1
    assert (rig.where([1, 1]), rig.where([2, 2])) == ((1, 1), (2, 2))
    rig.cache.free(slots)


def test_an_allocation_that_cannot_be_met_takes_nothing() -> None:
    rig = Rig(device=4)
    rig.put([1, 2, 3])
    with rig.lease([1, 2, 3]) as lease:
        done = rig.cache.allocate(2, lease)
        assert isinstance(done, NoRoom)
        assert (done.wanted, done.free, done.pending) == (2, 1, 0)
        assert rig.cache.stats().device.requests == 0
        rig.verify(lease, [1, 2, 3])


def test_an_allocation_larger_than_the_pool_evicts_nothing() -> None:
    rig = Rig(device=4)
    rig.put([1, 2, 3])
    assert isinstance(rig.cache.allocate(5), NoRoom)
    assert rig.where([1, 2, 3]) == (3, 3)


def test_an_allocation_does_not_wait_for_operations_that_cannot_give_it_room() -> None:
    rig = Rig(device=2, host=2, storage=10)
    rig.put([1, 2])
    rig.settle()
    with rig.lease([1, 2]):
        rig.fetch([1, 2, 3])  # storage does not answer
        before = rig.clock.now
        assert isinstance(rig.cache.allocate(1), NoRoom)
        assert rig.clock.now == before


def test_an_allocation_waits_for_a_backup_that_holds_what_it_needs() -> None:
    rig = Rig(device=2, host=2)
    rig.put([1, 2])  # its backup has pinned both pages
    assert isinstance(rig.cache.allocate(1, deadline_s=0), NoRoom)
    rig.executor.on_wait = rig.executor.complete_all
    assert len(rig.cache.allocate(1)) == 1
    assert 0 < rig.clock.now < 1


def test_nothing_pages_can_be_allocated_and_inserted() -> None:
    rig = Rig(device=1)
    assert len(rig.cache.allocate(0)) == 0
    done = rig.cache.insert(rig.cache.key([]), np.empty(0, np.int64))
    assert (done.pages, done.existing) == (0, 0)
    assert rig.cache.stats().namespaces == 0


def test_evict_frees_pages_from_the_tail_and_counts_what_is_free() -> None:
    rig = Rig(device=6)
    rig.put([1, 2, 3, 4])
    done = rig.cache.evict(3)
    assert (done.freed, done.pending) == (3, 0)
    assert rig.where([1, 2, 3, 4]) == (1, 1)
    assert rig.cache.evict(100).freed == 1


def test_slots_that_were_not_inserted_go_back_with_the_lease() -> None:
    rig = Rig(device=4)
    lease = rig.lease([1, 2])
    slots = rig.cache.allocate(3, lease)
    rig.cache.free(slots[2:], lease)
    rig.write(slots[:1], [1], "", 0)
    rig.cache.insert(rig.cache.key([1]), slots[:1], lease)
    lease.release()
    assert (rig.free(), rig.where([1])) == (3, (1, 1))
    rig.cache.check()


# -- namespaces, clear, invalidate ------------------------------------------------------------------------


def test_namespaces_never_share_a_page() -> None:
    rig = Rig(device=8)
    rig.put([1, 2], "a")
    for other in ("", "b", "A", "a\0", "aa"):
        assert rig.where([1, 2], other) == (0, 0)
    rig.put([1, 2], "b")
    ours, theirs = rig.lease([1, 2], "a"), rig.lease([1, 2], "b")
    assert not set(ours.slots.tolist()) & set(theirs.slots.tolist())
    hashes = [rig.core.radix.hashes.of_key(rig.cache.key([1, 2], name)) for name in ("", "a", "b", "a\0")]
    assert len(set(itertools.chain(*hashes))) == 8


def test_clear_forgets_one_namespace_or_all() -> None:
    rig = Rig(device=8)
    for name in ("a", "b"):
        rig.put([1, 2], name)
    rig.cache.clear("a")
    assert (rig.where([1, 2], "a"), rig.where([1, 2], "b")) == ((0, 0), (2, 2))
    rig.cache.clear("nobody")
    rig.cache.clear()
    assert rig.where([1, 2], "b") == (0, 0)
    assert rig.free() == 8


def test_a_lease_held_over_a_clear_reads_its_slots_and_gives_them_back_at_the_end() -> None:
    rig = Rig(device=6, host=6)
    rig.put([1, 2, 3])
    rig.settle()
    lease = rig.lease([1, 2])
    rig.cache.clear()
    assert rig.free() == 4  # the third page was nobody's
    rig.put([1, 2, 3, 4])
    rig.verify(lease, [1, 2])
    rig.cache.check()
    lease.release()
    rig.settle()
    assert rig.free() == 2
    rig.empty_out()


def test_a_request_whose_prefix_was_cleared_is_refused_its_insert_and_keeps_its_slots() -> None:
    rig = Rig(device=6)
    rig.put([1, 2])
    lease = rig.lease([1, 2])
    rig.cache.clear()
    slots = rig.cache.allocate(1, lease)
    assert isinstance(rig.cache.insert(rig.cache.key([1, 2, 3]), slots, lease), Refused)
    assert rig.cache.stats().device.requests == 1
    lease.release()
    assert rig.free() == 6
    rig.cache.check()


def test_after_invalidate_nothing_computed_with_other_weights_is_hit() -> None:
    rig = Rig(device=6, host=6, storage=100, revision="1")
    rig.put([1, 2])
    rig.settle()
    rig.cache.invalidate("2")
    assert rig.where([1, 2]) == (0, 0)
    fetch = rig.fetch([1, 2])  # storage holds these tokens, of weights 1
    rig.settle()
    assert rig.cache.settle(fetch) == 0
    assert rig.where([1, 2]) == (0, 0)
    rig.cache.invalidate("1")
    fetch = rig.fetch([1, 2])
    rig.settle()
    assert rig.cache.settle(fetch) == 2


@pytest.mark.parametrize("matched", [[], [1]], ids=["nothing matched", "a prefix matched"])
def test_a_request_from_before_invalidate_cannot_insert_what_it_computed(matched: list[int]) -> None:
    rig = Rig(device=6, revision="1")
    rig.put(matched)
    lease = rig.lease([1, 2])
    slots = rig.cache.allocate(2 - lease.device_boundary, lease)
    rig.cache.invalidate("2")
    assert isinstance(rig.cache.insert(rig.cache.key([1, 2]), slots, lease), Refused)
    assert rig.where([1, 2]) == (0, 0)
    lease.release()
    assert rig.free() == 6


# -- cancel -----------------------------------------------------------------------------------------------


def test_cancelling_a_lease_releases_it_and_stops_its_load_back() -> None:
    rig = Rig(device=4, host=4)
    rig.put([1, 2])
    rig.settle()
    rig.cache.evict(4)
    lease = rig.lease([1, 2])
    load = rig.load(lease)
    rig.cache.cancel(lease)
    assert lease.released
    assert load.state == "failed"
    rig.settle()
    rig.empty_out()


def test_cancelling_a_load_back_leaves_the_request_where_it_was() -> None:
    rig = Rig(device=4, host=4)
    rig.put([1, 2])
    rig.settle()
    rig.cache.evict(4)
    with rig.lease([1, 2]) as lease:
        load = rig.load(lease)
        rig.cache.cancel(load)
        rig.cache.cancel(load)
        rig.settle()
        assert (load.state, lease.device_boundary, lease.memory_boundary) == ("failed", 0, 2)
        rig.verify(lease, [1, 2])
        rig.load(lease)
        rig.settle()
        assert lease.device_boundary == 2
    rig.empty_out()


def test_a_cancelled_prefetch_frees_whatever_arrives() -> None:
    rig = Rig(device=4, host=4, storage=10)
    rig.put([1, 2])
    rig.settle()
    rig.cache.clear()
    fetch = rig.fetch([1, 2])
    rig.done()  # the query: host slots are taken now
    assert rig.free(Tier.HOST) == 2
    rig.cache.cancel(fetch)
    rig.cache.cancel(fetch)
    assert rig.cache.settle(fetch) == 0
    assert rig.free(Tier.HOST) == 2  # the read may still write there
    rig.settle()
    assert rig.free(Tier.HOST) == 4
    assert rig.where([1, 2]) == (0, 0)
