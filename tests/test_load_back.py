"""Load-back: host pages return to device, all of what was planned or nothing, and nobody loads twice."""

from __future__ import annotations

import pytest
from rig import Rig

from tiertree import SWA, LoadBackConfig, Refused, SlidingWindow, Tier, WritePolicy
from tiertree.tree.actions import Copy

PROMPT = [1, 2, 3, 4]


def on_host(device: int = 8, host: int = 8, tokens: list[int] = PROMPT, **options: object) -> Rig:
    """A cache whose pages of `tokens` are all on host and none on device."""
    rig = Rig(device=device, host=host, **options)
    rig.put(tokens)
    rig.settle()
    rig.cache.evict(device)
    assert rig.where(tokens) == (0, len(tokens) // rig.page_size)
    return rig


def test_a_load_back_moves_the_device_boundary_when_it_is_done_and_not_before() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    assert (load.pages, load.state, lease.device_boundary) == (4, "pending", 0)
    assert rig.where(PROMPT) == (0, 4)  # being filled is not being there
    rig.settle()
    assert (load.state, lease.device_boundary, lease.memory_boundary) == ("done", 4, 4)
    rig.verify(lease, PROMPT)
    assert rig.cache.stats().loaded_back == 4
    lease.release()
    rig.empty_out()


def test_it_trades_host_locks_for_device_locks() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    assert rig.cache.evict(8, Tier.HOST).freed == 0
    rig.load(lease)
    rig.settle()
    assert rig.cache.evict(8, Tier.HOST).freed == 4
    assert rig.cache.evict(8).freed == 0
    rig.verify(lease, PROMPT)


def test_only_what_device_lacks_is_copied() -> None:
    rig = on_host()
    rig.put(PROMPT[:1])
    lease = rig.lease(PROMPT)
    assert (lease.device_boundary, lease.memory_boundary) == (1, 4)
    rig.load(lease)
    (op,) = rig.running(Copy)
    action = rig.executor.pending[op]
    assert isinstance(action, Copy)
    assert len(action.moves[0].source) == 3
    rig.settle()
    rig.verify(lease, PROMPT)


@pytest.mark.parametrize(("minimum", "refused"), [(4, False), (5, True)])
def test_fewer_tokens_than_the_minimum_are_better_computed(minimum: int, refused: bool) -> None:
    rig = on_host(load_back=LoadBackConfig(min_tokens=minimum))
    before = rig.free()
    assert isinstance(rig.cache.load_back(rig.lease(PROMPT)), Refused) == refused
    assert rig.free() == (before if refused else before - 4)


def test_a_minimum_that_is_no_whole_number_of_pages_is_rounded_up() -> None:
    rig = on_host(tokens=[1, 2, 3, 4], page_size=2, load_back=LoadBackConfig(min_tokens=3))
    assert rig.load(rig.lease([1, 2, 3, 4])).pages == 2
    rig = on_host(tokens=[1, 2], page_size=2, load_back=LoadBackConfig(min_tokens=3))
    assert isinstance(rig.cache.load_back(rig.lease([1, 2])), Refused)


def test_a_quota_bounds_one_load_back_and_the_next_one_goes_on() -> None:
    rig = on_host(load_back=LoadBackConfig(min_tokens=0, max_pages=3))
    lease = rig.lease(PROMPT)
    for boundary in (3, 4):
        rig.load(lease)
        rig.settle()
        assert lease.device_boundary == boundary
        rig.verify(lease, PROMPT)
    assert isinstance(rig.cache.load_back(lease), Refused)


def test_it_loads_the_deepest_boundary_that_there_is_room_for() -> None:
    rig = on_host(device=6)
    rig.put([7, 8, 9])
    rig.settle()
    other = rig.lease([7, 8, 9])
    lease = rig.lease(PROMPT)
    assert rig.load(lease).pages == 3
    rig.settle()
    assert (lease.device_boundary, lease.memory_boundary) == (3, 4)
    rig.verify(lease, PROMPT)
    rig.verify(other, [7, 8, 9])


def test_without_room_for_the_minimum_nothing_is_loaded() -> None:
    rig = on_host(device=6, load_back=LoadBackConfig(min_tokens=4))
    rig.put([7, 8, 9])
    rig.settle()
    held = rig.lease([7, 8, 9])
    lease = rig.lease(PROMPT)
    assert isinstance(rig.cache.load_back(lease), Refused)
    assert rig.running(Copy) == []
    assert (rig.free(), lease.device_boundary) == (3, 0)
    rig.verify(held, [7, 8, 9])


def test_the_sources_are_held_before_anything_is_evicted_to_make_room() -> None:
    """Under write_back room on device is made by copying to host, which is full of the pages to load."""
    rig = Rig(device=4, host=4, write_policy=WritePolicy.WRITE_BACK)
    rig.put(PROMPT)
    rig.cache.evict(4, deadline_s=0)
    rig.settle()
    rig.put([6, 7, 8, 9])
    lease = rig.lease(PROMPT)
    rig.executor.on_wait = rig.executor.complete_all
    rig.load(lease)
    rig.settle()
    assert lease.device_boundary == 4
    rig.verify(lease, PROMPT)
    assert rig.cache.stats().dropped == 4  # 6 7 8 9 found no room on host
    lease.release()
    rig.empty_out()


def test_of_pages_that_are_loading_already_a_second_request_joins_the_operation() -> None:
    rig = on_host()
    first, second = rig.lease(PROMPT), rig.lease(PROMPT)
    one = rig.load(first)
    free = rig.free()
    two = rig.load(second)
    assert rig.free() == free
    assert two.operations == one.operations
    rig.settle()
    assert (one.state, two.state) == ("done", "done")
    assert second.slots.tolist() == first.slots.tolist()
    rig.verify(second, PROMPT)
    for lease in (first, second):
        lease.release()
    rig.empty_out()


def test_a_longer_request_joins_and_loads_the_rest_itself() -> None:
    rig = on_host()
    first, second = rig.lease(PROMPT[:2]), rig.lease(PROMPT)
    rig.load(first)
    load = rig.load(second)
    start, rest = rig.running(Copy)
    assert load.operations == (start, rest)
    rig.done(rest)
    assert load.state == "pending"  # its pages wait for those before them
    rig.done(start)
    assert load.state == "done"
    rig.verify(second, PROMPT)


@pytest.mark.parametrize("leaver", [0, 1])
def test_when_one_of_two_goes_the_other_gets_its_pages(leaver: int) -> None:
    rig = on_host()
    leases = [rig.lease(PROMPT), rig.lease(PROMPT)]
    for lease in leases:
        rig.load(lease)
    rig.cache.cancel(leases.pop(leaver))
    rig.settle()
    assert leases[0].device_boundary == 4
    rig.verify(leases[0], PROMPT)
    leases[0].release()
    rig.empty_out()


def test_a_failed_load_back_keeps_the_host_pages_and_may_be_tried_again() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    rig.failed()
    assert (load.state, lease.device_boundary, lease.memory_boundary) == ("failed", 0, 4)
    assert rig.free() == 8
    assert rig.cache.evict(8, Tier.HOST).freed == 0
    rig.verify(lease, PROMPT)
    rig.load(lease)
    rig.settle()
    assert lease.device_boundary == 4
    lease.release()
    rig.empty_out()


def test_a_failed_operation_fails_everybody_who_joined_it() -> None:
    rig = on_host()
    first, second = rig.lease(PROMPT[:2]), rig.lease(PROMPT)
    loads = [rig.load(first), rig.load(second)]
    start, rest = rig.running(Copy)
    rig.failed(start)
    rig.done(rest)
    assert [load.state for load in loads] == ["failed", "failed"]
    assert rig.where(PROMPT) == (0, 4)
    assert rig.free() == 8
    rig.cache.check()


def test_a_late_load_back_is_a_miss_its_slots_are_lost_and_come_home_with_it() -> None:
    rig = on_host(op_deadline_seconds=5.0)
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    (op,) = rig.running(Copy)
    rig.clock.advance(6)
    rig.cache.poll()
    stats = rig.cache.stats()
    assert (load.state, stats.device.lost, stats.late_operations) == ("failed", 4, 1)
    assert op in rig.executor.cancelled
    assert rig.free() == 4
    again = rig.load(lease)  # with other slots
    rig.done(op)
    assert (rig.cache.stats().device.lost, rig.free()) == (0, 4)
    assert again.state == "pending"
    rig.settle()
    rig.verify(lease, PROMPT)
    lease.release()
    rig.empty_out()


def test_a_page_computed_while_it_is_loading_is_used_at_once() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    rig.put(PROMPT[:2])
    assert rig.where(PROMPT) == (2, 4)
    rig.look_at(PROMPT[:2])
    rig.settle()
    assert load.state == "done"
    rig.verify(lease, PROMPT)


def test_its_slots_are_where_its_pages_are_now() -> None:
    """Somebody else's insert brings pages that are being loaded: their old slots are not theirs any more."""
    rig = on_host()
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    before = load.slots.tolist()
    rig.put(PROMPT[:2])
    theirs = rig.lease(PROMPT[:2])
    assert load.slots.tolist() == [*theirs.slots.tolist(), *before[2:]]
    assert not set(before[:2]) & set(load.slots.tolist())
    rig.settle()
    assert (load.state, load.slots.tolist()) == ("done", lease.slots.tolist())


def test_so_are_those_of_a_window_and_it_fails_where_one_is_gone() -> None:
    rig = on_host(kinds=[SlidingWindow(window=2)])
    rig.cache.evict(8, kind=SWA)
    lease = rig.lease(PROMPT)
    assert (lease.device_boundary, lease.memory_boundary) == (0, 4)
    load = rig.load(lease)
    before = load.window(SWA).tolist()
    assert min(before) >= 0
    rig.put(PROMPT)
    theirs = rig.lease(PROMPT)
    now = load.window(SWA).tolist()
    assert now == theirs.window(SWA).slots.tolist() != before
    theirs.release()
    rig.cache.evict(8, deadline_s=0, kind=SWA)
    assert -1 in load.window(SWA)
    rig.settle()
    assert (load.state, len(load.window(SWA)), len(load.slots)) == ("failed", 0, 0)
    lease.release()
    rig.empty_out()


def test_a_clear_ends_a_load_back() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    load = rig.load(lease)
    rig.cache.clear()
    rig.settle()
    assert (load.state, lease.device_boundary) == ("failed", 0)
    assert isinstance(rig.cache.load_back(lease), Refused)
    rig.verify(lease, PROMPT)
    lease.release()
    rig.empty_out()


def test_nothing_to_load_is_refused() -> None:
    rig = Rig(device=8, host=8)
    rig.put(PROMPT)
    rig.settle()
    for tokens in (PROMPT, [9], []):
        assert isinstance(rig.cache.load_back(rig.lease(tokens)), Refused)
    rig.cache.evict(0)
    lease = rig.lease([9])
    assert isinstance(rig.cache.load_back(lease), Refused)


def test_a_second_load_back_of_the_same_lease_waits_for_the_first() -> None:
    rig = on_host()
    lease = rig.lease(PROMPT)
    rig.load(lease)
    assert isinstance(rig.cache.load_back(lease), Refused)


def test_layers_ready_is_the_progress_of_the_slowest_operation() -> None:
    rig = on_host()
    first, second = rig.lease(PROMPT[:2]), rig.lease(PROMPT)
    rig.load(first)
    load = rig.load(second)
    start, rest = rig.running(Copy)
    rig.executor.layers = {start: 3, rest: 1}
    assert rig.cache.layers_ready(load) == 1
    rig.done(rest)
    assert rig.cache.layers_ready(load) in (1, 3)
