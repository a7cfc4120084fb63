"""When a page is backed up, and what goes when there is no room: the three write policies, and LRU."""

from __future__ import annotations

import pytest
from rig import Rig

from tiertree import Tier, WritePolicy
from tiertree.policy.eviction import LRU, POLICIES, make_policy
from tiertree.policy.prefetch import patience_seconds
from tiertree.tree.actions import Copy, Put
from tiertree.types import StopRule

BACK = WritePolicy.WRITE_BACK
SELECTIVE = WritePolicy.WRITE_THROUGH_SELECTIVE


def on_host(rig: Rig, tokens: list[int]) -> list[int]:
    """Which pages of `tokens` are READY on host."""
    pages = rig.page_hashes(tokens)
    return [index for index, page in enumerate(pages) if page in rig.mirror(Tier.HOST)]


# -- write_through ----------------------------------------------------------------------------------------


def test_write_through_backs_up_on_insert() -> None:
    rig = Rig(device=4, host=4)
    rig.put([1, 2])
    (op,) = rig.running(Copy)
    assert rig.where([1, 2]) == (2, 2)
    rig.done(op)
    assert on_host(rig, [1, 2]) == [0, 1]
    rig.cache.evict(4)
    assert rig.where([1, 2]) == (0, 2)


def test_a_page_that_is_being_backed_up_is_not_evicted() -> None:
    rig = Rig(device=4, host=4)
    rig.put([1, 2])
    assert rig.cache.evict(4, deadline_s=0).freed == 0
    rig.settle()
    assert rig.cache.evict(4, deadline_s=0).freed == 2


def test_a_dropped_backup_is_counted_and_offered_again_when_touched() -> None:
    rig = Rig(device=8, host=2)
    rig.put([1, 2])
    rig.settle()
    rig.cache.evict(8)
    lease = rig.lease([1, 2])  # pins both host pages
    rig.put([3, 4])
    assert rig.running(Copy) == []
    assert rig.cache.stats().backups_dropped == 2
    lease.release()
    rig.cache.match(rig.cache.key([3, 4]))
    rig.settle()
    assert on_host(rig, [3, 4]) == [0, 1]
    rig.empty_out()


def test_of_a_path_that_does_not_fit_the_head_is_backed_up() -> None:
    rig = Rig(device=8, host=2)
    rig.put([1, 2, 3])
    rig.settle()
    assert on_host(rig, [1, 2, 3]) == [0, 1]
    assert rig.cache.stats().backups_dropped == 1


def test_a_backup_starts_with_the_first_page_that_host_lacks() -> None:
    rig = Rig(device=8, host=4)
    rig.put([1, 2])
    rig.failed()
    rig.put([1, 2, 3])
    (op,) = rig.running(Copy)
    action = rig.executor.pending[op]
    assert isinstance(action, Copy)
    assert len(action.moves[0].source) == 3
    rig.settle()
    assert on_host(rig, [1, 2, 3]) == [0, 1, 2]


def test_a_backup_whose_parent_failed_brings_nothing() -> None:
    rig = Rig(device=8, host=8)
    with rig.lease([1, 2]) as lease:
        rig.grow(lease, [1])
        rig.grow(lease, [1, 2])
    parent, child = rig.running(Copy)
    rig.done(child)
    assert on_host(rig, [1, 2]) == []  # waits for its parent
    rig.failed(parent)
    assert on_host(rig, [1, 2]) == []
    assert rig.where([1, 2]) == (2, 2)
    rig.cache.check()
    rig.empty_out()


def test_a_backup_that_lost_its_place_to_another_is_not_offered_to_storage() -> None:
    rig = Rig(device=8, host=8, storage=10)
    with rig.lease([1, 2]) as lease:
        rig.grow(lease, [1])
        rig.grow(lease, [1, 2])
    parent, child = rig.running(Copy)
    rig.failed(parent)  # takes the child's host slots out of the tree too
    rig.cache.match(rig.cache.key([1, 2]))  # both pages are backed up anew
    (again,) = (op for op in rig.running(Copy) if op != child)
    rig.done(again)
    rig.done(child)
    (put,) = rig.running(Put)
    action = rig.executor.pending[put]
    assert isinstance(action, Put)
    assert len(action.spans[0].hashes) == 2
    assert rig.cache.stats().backed_up == 2
    rig.empty_out()


@pytest.mark.parametrize("first", ["evict", "split"])
def test_a_page_being_persisted_survives_whatever_happens_behind_it(first: str) -> None:
    rig = Rig(device=4, host=1, storage=10)
    rig.put([1, 2, 3])  # host has room for the first page only
    rig.done()
    assert rig.running(Put)
    if first == "split":
        rig.cache.match(rig.cache.key([1, 2]))
    rig.cache.evict(4, deadline_s=0)
    rig.cache.check()
    rig.settle()
    rig.cache.check()
    rig.empty_out()


def test_a_held_host_page_survives_a_leaf_that_grows_and_shrinks_behind_it() -> None:
    rig = Rig(device=6, host=2)
    rig.put([1, 2])
    rig.settle()
    rig.cache.evict(6)
    held = rig.lease([1, 2])  # holds both pages on host
    with rig.cache.acquire(rig.cache.peek(rig.cache.key([5]))) as lease:
        rig.grow(lease, [1, 2])  # back on device
        rig.grow(lease, [1, 2, 3, 4])
    rig.cache.match(rig.cache.key([1, 2, 3]))
    rig.settle()
    rig.cache.evict(6, deadline_s=0)
    rig.cache.check()
    rig.verify(held, [1, 2])
    held.release()
    rig.empty_out()


# -- write_through_selective ------------------------------------------------------------------------------


@pytest.mark.parametrize("hits", [1, 2, 3])
def test_selective_backs_up_on_the_nth_match(hits: int) -> None:
    rig = Rig(device=4, host=4, write_policy=SELECTIVE, selective_hits=hits)
    rig.put([1, 2])
    for _ in range(hits):
        assert rig.running(Copy) == []
        rig.cache.match(rig.cache.key([1, 2]))
    assert len(rig.running(Copy)) == 1


def test_selective_backs_up_the_pages_that_were_hit_and_no_others() -> None:
    rig = Rig(device=4, host=4, write_policy=SELECTIVE, selective_hits=2)
    rig.put([1, 2, 3])
    for tokens in ([1, 2, 3], [1, 2]):
        rig.cache.match(rig.cache.key(tokens))
    rig.settle()
    assert on_host(rig, [1, 2, 3]) == [0, 1]


def test_a_page_inserted_behind_one_that_was_hit_waits_for_a_hit_of_its_own() -> None:
    rig = Rig(device=4, host=4, write_policy=SELECTIVE, selective_hits=1)
    rig.put([1])
    with rig.lease([1]) as lease:
        rig.grow(lease, [1, 2])
    rig.settle()
    assert on_host(rig, [1, 2]) == [0]
    rig.cache.match(rig.cache.key([1, 2]))
    rig.settle()
    assert on_host(rig, [1, 2]) == [0, 1]


def test_a_peek_is_no_hit() -> None:
    rig = Rig(device=4, host=4, write_policy=SELECTIVE, selective_hits=1)
    rig.put([1])
    rig.where([1])
    assert rig.running(Copy) == []


def test_evicting_a_page_that_was_never_backed_up_forgets_it() -> None:
    rig = Rig(device=4, host=4, write_policy=SELECTIVE, selective_hits=5)
    rig.put([1, 2])
    rig.cache.evict(1)
    assert rig.where([1, 2]) == (1, 1)


# -- write_back -------------------------------------------------------------------------------------------


def test_write_back_copies_a_page_to_host_before_its_device_slot_is_free() -> None:
    rig = Rig(device=4, host=4, write_policy=BACK)
    rig.put([1, 2, 3])
    rig.cache.match(rig.cache.key([1, 2, 3]))
    assert rig.running(Copy) == []
    done = rig.cache.evict(2, deadline_s=0)
    assert (done.freed, done.pending, rig.free()) == (0, 2, 1)
    assert rig.where([1, 2, 3]) == (3, 3)  # still there to be hit
    rig.settle()
    assert rig.free() == 3
    assert rig.where([1, 2, 3]) == (1, 3)
    rig.look_at([1, 2, 3])


def test_a_page_that_is_wanted_again_while_it_is_copied_away_stays() -> None:
    rig = Rig(device=4, host=4, write_policy=BACK)
    rig.put([1, 2, 3])
    rig.cache.evict(2, deadline_s=0)
    lease = rig.lease([1, 2, 3])
    rig.settle()
    assert rig.where([1, 2, 3]) == (3, 3)
    rig.verify(lease, [1, 2, 3])
    lease.release()
    rig.cache.evict(2, deadline_s=0)  # host has them already
    assert rig.running(Copy) == []
    assert rig.where([1, 2, 3]) == (1, 3)


def test_a_failed_demotion_keeps_the_page_on_device() -> None:
    rig = Rig(device=4, host=4, write_policy=BACK)
    rig.put([1, 2])
    rig.cache.evict(2, deadline_s=0)
    rig.failed()
    assert rig.where([1, 2]) == (2, 2)
    assert rig.free(Tier.HOST) == 4
    rig.empty_out()


def test_a_full_host_gives_up_duplicates_first() -> None:
    rig = Rig(device=4, host=2, write_policy=BACK)
    rig.put([1])
    rig.put([7])
    rig.cache.evict(2, deadline_s=0)
    rig.settle()  # 1 and 7 are on host only
    rig.clock.advance(1)
    with rig.lease([7]) as lease:
        rig.load(lease)
        rig.settle()  # 7 is a duplicate, and the most recently used
    rig.put([8])
    rig.clock.advance(1)
    rig.cache.match(rig.cache.key([7]))
    rig.cache.evict(1, deadline_s=0)  # 8 must go to host
    rig.settle()
    assert (rig.where([1]), rig.where([7]), rig.where([8])) == ((0, 1), (1, 1), (0, 1))
    assert on_host(rig, [7]) == []


def test_without_duplicates_the_least_recently_used_host_page_goes() -> None:
    rig = Rig(device=4, host=3, write_policy=BACK)
    rig.put([1, 2, 3])
    rig.cache.evict(2, deadline_s=0)
    rig.settle()  # host: pages 1 and 2 of this prompt
    rig.put([9])
    rig.clock.advance(1)
    rig.cache.match(rig.cache.key([1, 2, 3]))
    rig.cache.evict(1, deadline_s=0)
    rig.settle()  # host: 9 as well, full now, and 9 is the least recently used
    assert rig.where([9]) == (0, 1)
    rig.cache.evict(1, deadline_s=0)  # the victim is page 0; 9 goes for it, not the pages behind it
    rig.settle()
    assert (rig.where([1, 2, 3]), rig.where([9])) == ((0, 3), (0, 0))
    rig.put([4])
    rig.clock.advance(1)
    rig.cache.match(rig.cache.key([1, 2]))
    rig.cache.evict(1, deadline_s=0)  # now the tail that was not matched is the oldest
    rig.settle()
    assert (rig.where([1, 2]), rig.where([9]), rig.where([4])) == ((0, 2), (0, 0), (0, 1))


def test_when_host_cannot_make_room_exactly_the_victim_page_is_dropped_and_counted() -> None:
    rig = Rig(device=4, host=1, write_policy=BACK)
    rig.put([9])
    rig.cache.evict(1, deadline_s=0)
    rig.settle()
    held = rig.lease([9])  # pins the only host page
    rig.put([1, 2, 3])
    done = rig.cache.evict(1, deadline_s=0)
    assert (done.freed, rig.cache.stats().dropped) == (1, 1)
    assert rig.where([1, 2, 3]) == (2, 2)
    held.release()
    rig.empty_out()


def test_a_full_list_of_operations_drops_nothing() -> None:
    rig = Rig(device=4, host=4, write_policy=BACK, max_operations=1)
    rig.put([1])
    rig.put([2])
    rig.cache.evict(2, deadline_s=0)
    assert rig.cache.stats().dropped == 0
    rig.settle()
    assert (rig.where([1])[1], rig.where([2])[1]) == (1, 1)


def test_a_victim_with_a_pinned_page_after_it_is_skipped_and_evict_returns_short() -> None:
    rig = Rig(device=4, host=1, storage=10, write_policy=BACK)
    rig.put([1, 2])
    rig.cache.evict(1, deadline_s=0)
    rig.done()  # page 1 is on host, which is full, and is being persisted
    assert rig.running(Put)
    done = rig.cache.evict(1, deadline_s=0)  # page 0 could only be dropped together with page 1
    assert (done.freed, rig.cache.stats().dropped) == (0, 0)
    assert rig.where([1, 2]) == (1, 2)
    rig.put([7])
    assert rig.cache.evict(2, deadline_s=0).freed == 1  # 7 has nothing behind it and is dropped
    rig.look_at([1, 2])
    rig.settle()
    rig.empty_out()


# -- eviction policies ------------------------------------------------------------------------------------


def test_lru_is_there_and_its_docstring_says_when_not_to_use_it() -> None:
    assert isinstance(make_policy("lru"), LRU)
    for name, policy in POLICIES.items():
        assert policy.name == name
        assert "Not for" in (policy.__doc__ or "")


def test_lru_evicts_in_the_order_of_the_last_use_whatever_the_order_of_arrival() -> None:
    rig = Rig(device=8)
    for token in range(4):
        rig.put([token, 9])
    for at, token in enumerate([2, 0, 3, 1], 1):
        rig.clock.now = at
        rig.cache.match(rig.cache.key([token, 9]))
    order = []
    for _ in range(4):
        rig.cache.evict(2)
        order.append(next(token for token in range(4) if token not in order and rig.where([token]) == (0, 0)))
    assert order == [2, 0, 3, 1]


def test_a_leaf_goes_before_the_prefix_that_it_shares_with_others() -> None:
    rig = Rig(device=8)
    rig.put([1, 2, 3])
    rig.clock.advance(1)
    rig.put([1, 2, 4])
    rig.cache.evict(1)
    assert (rig.where([1, 2, 3]), rig.where([1, 2, 4])) == ((2, 2), (3, 3))
    rig.cache.evict(1)
    assert rig.where([1, 2, 4]) == (2, 2)


@pytest.mark.parametrize(
    ("rule", "seconds"),
    [(StopRule.BEST_EFFORT, 0.0), (StopRule.WAIT_COMPLETE, float("inf")), (StopRule.TIMEOUT, 2.5)],
)
def test_patience_of_each_stop_rule(rule: StopRule, seconds: float) -> None:
    assert patience_seconds(rule, 2.0, 0.25, 2048) == seconds
