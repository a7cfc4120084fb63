"""Prefetch: what storage holds of a prompt comes to host, by three stop rules, and lands where it can."""

from __future__ import annotations

import pytest
from rig import Rig

from tiertree import PrefetchConfig, Refused, StopRule, Tier, WritePolicy
from tiertree.tree.actions import Copy, Get, Query
from tiertree.tree.fetch import Stage

PROMPT = [1, 2, 3, 4]


def stored(tokens: list[int] = PROMPT, device: int = 8, host: int = 8, **options: object) -> Rig:
    """A cache whose storage holds `tokens`, and whose memory holds nothing."""
    rig = Rig(device=device, host=host, storage=100, **options)
    rig.put(tokens)
    rig.settle()
    if not rig.executor.stored:  # write_back stores what it evicts
        rig.cache.evict(device, deadline_s=0)
        rig.settle()
    rig.cache.clear()
    assert rig.where(tokens) == (0, 0)
    assert len(rig.executor.stored) == len(tokens) // rig.page_size
    return rig


def rules(rule: StopRule, **options: object) -> PrefetchConfig:
    return PrefetchConfig(stop_rule=rule, **{"min_tokens": 0, **options})


# -- from start to end ------------------------------------------------------------------------------------


def test_a_prefetch_brings_pages_from_storage_to_host_where_load_back_finds_them() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    assert rig.cache.settle(fetch) is None
    rig.settle()
    assert rig.cache.settle(fetch) == 4
    assert rig.where(PROMPT) == (0, 4)
    lease = rig.lease(PROMPT)
    rig.load(lease)
    rig.settle()
    rig.verify(lease, PROMPT)
    lease.release()
    assert rig.cache.stats().prefetched == 4
    rig.empty_out()


def test_host_memory_is_taken_only_when_the_hit_length_is_known() -> None:
    rig = stored()
    rig.fetch([*PROMPT[:2], 9, 9, 9])
    assert rig.free(Tier.HOST) == 8
    rig.done(rig.running(Query)[0])
    assert rig.free(Tier.HOST) == 6  # two of five pages are there


def test_only_what_memory_lacks_is_asked_for() -> None:
    rig = stored()
    rig.put(PROMPT[:3])
    rig.settle()
    fetch = rig.fetch(PROMPT)
    assert fetch.wanted == 1
    rig.settle()
    assert rig.where(PROMPT) == (3, 4)
    rig.look_at(PROMPT)


def test_a_prompt_that_is_in_memory_is_not_worth_a_prefetch() -> None:
    rig = stored()
    rig.put(PROMPT)
    assert isinstance(rig.cache.prefetch(rig.cache.key(PROMPT)), Refused)


@pytest.mark.parametrize(("tokens", "started"), [(7, False), (8, True)])
def test_fewer_tokens_than_the_minimum_are_not_worth_a_prefetch(tokens: int, started: bool) -> None:
    rig = Rig(device=8, host=8, storage=9, page_size=2, prefetch=rules(StopRule.BEST_EFFORT, min_tokens=7))
    assert isinstance(rig.cache.prefetch(rig.cache.key([1] * tokens)), Refused) != started


def test_a_hit_shorter_than_the_minimum_is_not_read() -> None:
    rig = stored(prefetch=rules(StopRule.WAIT_COMPLETE, min_tokens=4))
    fetch = rig.fetch([*PROMPT[:3], 9, 9])
    rig.settle()
    assert rig.cache.settle(fetch) == 0
    assert not any(isinstance(each, Get) for each in rig.executor.submitted)


def test_a_miss_settles_with_nothing() -> None:
    rig = stored()
    fetch = rig.fetch([9, 9])
    rig.done()
    assert rig.cache.settle(fetch) == 0
    assert rig.free(Tier.HOST) == 8


def test_pages_in_flight_are_bounded_and_free_up_when_one_is_settled() -> None:
    rig = stored(prefetch=rules(StopRule.WAIT_COMPLETE, max_pages_in_flight=5))
    first = rig.fetch(PROMPT)
    assert isinstance(rig.cache.prefetch(rig.cache.key([7, 7])), Refused)
    rig.fetch([7])
    rig.settle()
    assert rig.cache.settle(first) == 4
    rig.fetch([7, 7])


def test_without_storage_there_is_no_prefetch() -> None:
    rig = stored()
    rig.cache.detach_storage()
    assert isinstance(rig.cache.prefetch(rig.cache.key(PROMPT)), Refused)


def test_as_much_is_read_as_host_has_room_for() -> None:
    rig = stored(host=4)
    rig.put([8, 9])
    rig.settle()
    rig.cache.evict(8)
    held = rig.lease([8, 9])
    fetch = rig.fetch(PROMPT)
    rig.settle()
    assert rig.cache.settle(fetch) == 2
    assert rig.where(PROMPT) == (0, 2)
    rig.verify(held, [8, 9])


def test_room_on_host_is_not_made_of_the_path_that_the_pages_belong_to() -> None:
    rig = stored(device=8, host=4)
    rig.put(PROMPT[:2])
    rig.settle()
    rig.cache.evict(8)
    fetch = rig.fetch([*PROMPT, 5])
    rig.settle()
    assert rig.cache.settle(fetch) == 2
    assert rig.where(PROMPT) == (0, 4)
    rig.look_at(PROMPT)


# -- what arrives ---------------------------------------------------------------------------------------


def test_of_a_read_that_fails_the_contiguous_prefix_is_used() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    rig.done()
    (read,) = rig.running(Get)
    rig.executor.fail(read, pages=3)
    rig.cache.poll()
    assert rig.cache.settle(fetch) == 3
    assert rig.where(PROMPT) == (0, 3)
    rig.look_at(PROMPT)
    assert rig.free(Tier.HOST) == 5


def test_a_query_that_fails_is_a_miss() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    rig.failed()
    assert rig.cache.settle(fetch) == 0
    rig.empty_out()


# -- the three stop rules -------------------------------------------------------------------------------


def test_best_effort_uses_what_has_arrived_when_it_is_asked() -> None:
    rig = stored(prefetch=rules(StopRule.BEST_EFFORT))
    fetch = rig.fetch(PROMPT)
    rig.done()
    (read,) = rig.running(Get)
    rig.executor.progress(read, 2)
    rig.cache.poll()
    assert rig.cache.settle(fetch) == 2
    assert read in rig.executor.cancelled
    assert rig.where(PROMPT) == (0, 2)
    assert rig.free(Tier.HOST) == 4  # the read may still write to the other two
    rig.executor.fail(read, pages=2)
    rig.cache.poll()
    assert rig.free(Tier.HOST) == 6
    rig.look_at(PROMPT)


def test_best_effort_does_not_even_wait_for_the_hit_length() -> None:
    rig = stored(prefetch=rules(StopRule.BEST_EFFORT))
    fetch = rig.fetch(PROMPT)
    assert rig.cache.settle(fetch) == 0
    rig.settle()
    assert rig.where(PROMPT) == (0, 0)


def test_wait_complete_waits_as_long_as_the_operation_may_take() -> None:
    rig = stored(prefetch=rules(StopRule.WAIT_COMPLETE), op_deadline_seconds=60.0)
    fetch = rig.fetch(PROMPT)
    rig.done()
    (read,) = rig.running(Get)
    rig.executor.progress(read, 1)
    rig.clock.advance(59)
    rig.cache.poll()
    assert rig.cache.settle(fetch) is None
    rig.clock.advance(2)  # now the operation itself is late: what has arrived is used
    rig.cache.poll()
    assert rig.cache.settle(fetch) == 1
    assert rig.cache.stats().host.lost == 3
    rig.done(read)
    assert (rig.cache.stats().host.lost, rig.free(Tier.HOST)) == (0, 7)
    rig.look_at(PROMPT)


def test_timeout_waits_a_base_and_so_much_per_1024_tokens() -> None:
    rig = stored(
        tokens=[1] * 2048,
        page_size=512,
        prefetch=rules(StopRule.TIMEOUT, base_seconds=1.0, per_1024_tokens_seconds=0.5),
    )
    fetch = rig.fetch([1] * 2048)
    rig.done()
    rig.executor.progress(rig.running(Get)[0], 3)
    rig.cache.poll()
    rig.clock.advance(1.9)
    assert rig.cache.settle(fetch) is None
    rig.clock.advance(0.2)
    assert rig.cache.settle(fetch) == 3
    assert rig.where([1] * 2048) == (0, 3)


def test_settling_twice_gives_the_same_answer() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    rig.settle()
    assert rig.cache.settle(fetch) == rig.cache.settle(fetch) == 4


# -- landing --------------------------------------------------------------------------------------------


def test_pages_that_came_to_host_meanwhile_are_not_replaced() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    rig.done()
    rig.put(PROMPT[:2])
    rig.settle()  # both: the backup of two pages, the read of four
    assert rig.cache.settle(fetch) is not None
    assert rig.where(PROMPT) == (2, 4)
    assert rig.free(Tier.HOST) == 4
    rig.cache.evict(8)
    rig.look_at(PROMPT)
    rig.empty_out()


def test_pages_on_device_gain_a_host_copy() -> None:
    rig = stored(write_policy=WritePolicy.WRITE_BACK)
    fetch = rig.fetch(PROMPT)
    rig.done()
    rig.put(PROMPT[:2])
    rig.settle()
    assert rig.cache.settle(fetch) == 4
    rig.cache.evict(8, deadline_s=0)
    assert rig.running(Copy) == []
    assert rig.where(PROMPT) == (0, 4)
    rig.look_at(PROMPT)


def test_pages_whose_place_is_gone_are_freed() -> None:
    rig = stored()
    rig.put(PROMPT[:2])
    rig.settle()
    fetch = rig.fetch(PROMPT)  # of pages 2 and 3
    rig.done()
    for tier in (Tier.DEVICE, Tier.HOST):
        rig.cache.evict(8, tier, deadline_s=0)
    rig.settle()
    assert rig.cache.settle(fetch) == 0
    assert rig.where(PROMPT) == (0, 0)
    assert rig.free(Tier.HOST) == 8
    assert rig.cache.stats().prefetch_discarded == 2


def test_a_clear_while_reading_lets_nothing_land() -> None:
    rig = stored()
    fetch = rig.fetch(PROMPT)
    rig.done()
    rig.cache.clear()
    assert rig.cache.settle(fetch) == 0
    rig.settle()
    assert rig.where(PROMPT) == (0, 0)
    rig.empty_out()


def parent_not_on_host() -> Rig:
    """Storage holds the prompt; device holds its first two pages, which host had no room for before."""
    rig = stored(host=4)
    rig.put([6, 7, 8, 9])
    rig.settle()
    rig.cache.evict(4)
    held = rig.lease([6, 7, 8, 9])
    rig.put(PROMPT[:2])
    assert rig.cache.stats().backups_dropped == 2
    held.release()
    return rig


def test_pages_whose_parent_is_not_on_host_wait_for_its_backup() -> None:
    rig = parent_not_on_host()
    fetch = rig.fetch(PROMPT)
    for _ in range(2):
        rig.done()
    assert (fetch.stage, rig.cache.settle(fetch)) == (Stage.LANDING, None)
    assert len(rig.running(Copy)) == 1  # the parent is being backed up first (I4)
    rig.cache.check()
    rig.settle()
    assert rig.cache.settle(fetch) == 2
    assert rig.where(PROMPT) == (2, 4)
    rig.look_at(PROMPT)
    rig.empty_out()


def test_when_the_parents_backup_fails_the_pages_are_freed() -> None:
    rig = parent_not_on_host()
    fetch = rig.fetch(PROMPT)
    for _ in range(2):
        rig.done()
    rig.failed(rig.running(Copy)[0])
    rig.settle()
    assert rig.cache.settle(fetch) == 0
    assert rig.where(PROMPT) == (2, 2)
    rig.cache.check()
    rig.empty_out()


def test_pages_that_wait_for_their_parent_can_be_cancelled() -> None:
    rig = parent_not_on_host()
    fetch = rig.fetch(PROMPT)
    for _ in range(2):
        rig.done()
    rig.cache.cancel(fetch)
    rig.settle()
    assert rig.cache.settle(fetch) == 0
    assert rig.where(PROMPT) == (2, 2)
    rig.empty_out()
