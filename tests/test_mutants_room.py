"""What arrives and what goes: rules that hold anyhow in most runs, each seen where breaking it shows."""

from __future__ import annotations

from typing import Any

import pytest
from kinds import rules
from rig import Rig

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    KindConfig,
    Mamba,
    Prefetch,
    PrefetchConfig,
    Refused,
    StopRule,
    Tier,
    WritePolicy,
)
from tiertree.components import SlidingWindow
from tiertree.tree.actions import Copy, Put
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def kinds_of(*names: Kind) -> list[Any]:
    return [rules(window=2)[name] for name in names]


# -- operations ------------------------------------------------------------------------------------


def test_with_one_operation_at_most_a_copy_and_a_put_are_under_way() -> None:
    rig = Rig(4, 4, 10, max_operations=1)
    rig.put([1])
    assert (len(rig.running(Copy)), len(rig.running(Put))) == (1, 0)
    rig.done()
    rig.put([2])
    assert (len(rig.running(Copy)), len(rig.running(Put))) == (1, 1)
    rig.settle()
    assert rig.storage is not None
    rig.empty_out()


def test_what_a_partial_kind_drops_at_once_is_not_pending() -> None:
    for policy in (WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK):
        rig = Rig(4, 4, kinds=kinds_of(SWA), write_policy=policy)
        rig.put([1, 2, 3])
        rig.settle()
        for tier in (HOST, DEVICE):
            there = rig.ledger(tier, SWA).capacity - rig.free(tier, SWA)
            done = rig.evict(4, tier, SWA)
            assert done.freed + done.pending == there
            assert done.pending == 0 or (tier, policy) == (DEVICE, WritePolicy.WRITE_BACK)
        rig.settle()
        rig.empty_out()


def test_what_cannot_be_had_is_not_pending_either() -> None:
    for host in (0, 4):
        rig = Rig(4, host, kinds=kinds_of(SWA))
        rig.put([1, 2, 3])
        rig.settle()
        with rig.lease([1, 2, 3]):
            for kind in (FULL, SWA):
                done = rig.evict(4, DEVICE, kind)
                assert (done.freed, done.pending) == (0, 0)
        rig.empty_out()


def test_a_load_back_that_failed_has_no_slots_of_any_kind() -> None:
    rig = Rig(4, 4, kinds=kinds_of(SWA))
    rig.put([1, 2, 3])
    rig.settle()
    rig.evict(4)
    lease = rig.lease([1, 2, 3])
    load = rig.load(lease)
    assert (len(load.slots), len(load.window(SWA)), len(load.window(FULL))) == (3, 2, 0)
    rig.failed()
    assert (len(load.slots), len(load.window(SWA))) == (0, 0)
    lease.release()
    rig.empty_out()


# -- landing ---------------------------------------------------------------------------------------


def test_what_arrives_from_storage_fills_the_holes_of_a_node_that_host_has_in_part() -> None:
    prompt = [1, 2, 3, 4]
    rig = Rig(8, 4, 100)
    rig.put(prompt)
    rig.settle()
    rig.cache.clear()
    lease = rig.lease(prompt)
    rig.grow(lease, prompt[:2])
    rig.settle()
    rig.fetch(prompt)
    rig.done()
    rig.grow(lease, prompt)
    assert rig.map(prompt) == "BBDD"
    assert rig.core.radix.nodes == 1
    rig.settle()
    assert rig.map(prompt) == "BBBB"
    assert rig.cache.stats().prefetched == 2
    rig.verify(lease, prompt)
    lease.release()
    rig.evict(8)
    with rig.lease(prompt) as again:
        rig.load_all(again, prompt)
    rig.settle()
    rig.empty_out()


def test_what_arrives_from_storage_lands_behind_a_path_of_several_nodes() -> None:
    prompt = [1, 2, 3, 5, 6]
    rig = Rig(12, 12, 100)
    rig.put(prompt)
    rig.settle()
    rig.cache.clear()
    rig.put([1, 2, 3])
    rig.put([1, 2, 4])
    rig.settle()
    assert rig.map(prompt) == "BBB.."
    fetch = rig.fetch(prompt)
    rig.settle()
    assert fetch.landed == 2
    assert rig.map(prompt) == "BBBHH"
    rig.empty_out()


def test_what_arrives_from_storage_has_no_place_when_the_page_before_it_is_gone() -> None:
    prompt = [1, 2, 3]
    rig = Rig(4, 4, 100)
    rig.put(prompt)
    rig.settle()
    rig.evict(2, DEVICE)
    rig.evict(2, HOST)
    assert rig.map(prompt) == "B.."
    fetch = rig.fetch(prompt)
    rig.done()
    rig.evict(4, DEVICE)
    rig.evict(4, HOST)
    rig.settle()
    rig.cache.check()
    assert fetch.landed == 0
    assert rig.map(prompt) == "..."
    rig.empty_out()


def test_what_arrives_from_storage_lands_on_nodes_that_were_made_meanwhile() -> None:
    prompt = [1, 2, 3, 4]
    rig = Rig(8, 4, 100)
    rig.put(prompt)
    rig.settle()
    rig.cache.clear()
    fetch = rig.fetch(prompt)
    rig.done()
    rig.put(prompt[:2])
    rig.put(prompt)
    assert (rig.core.radix.nodes, rig.map(prompt)) == (2, "DDDD")
    rig.settle()
    assert fetch.landed == 4
    assert rig.map(prompt) == "BBBB"
    rig.evict(8)
    with rig.lease(prompt) as lease:
        rig.load_all(lease, prompt)
    rig.settle()
    rig.empty_out()


def test_storage_is_asked_for_states_where_the_grid_has_them() -> None:
    prompt = [1, 2, 3, 4, 5, 6]
    rig = Rig(8, 8, 100, kinds=[Mamba(grid_tokens=3)])
    rig.put(prompt, pages={MAMBA: [2, 5]})
    rig.settle()
    rig.cache.clear()
    rig.fetch(prompt)
    rig.settle()
    assert rig.map(prompt) == "HHHHHH"
    assert rig.map(prompt, MAMBA) == ".....H"
    assert rig.where(prompt) == (0, 6)
    rig.empty_out()


def test_a_prefetch_gets_the_places_of_others_windows_on_host() -> None:
    rig = Rig(8, 8, 100, kinds=[KindConfig(rules=SlidingWindow(window=2), device=8, host=2)])
    rig.put([1, 2, 3])
    rig.settle()
    rig.cache.clear()
    rig.put([7, 8])
    rig.settle()
    assert rig.free(HOST, SWA) == 0
    rig.fetch([1, 2, 3])
    rig.settle()
    assert rig.where([1, 2, 3]) == (0, 3)
    rig.empty_out()


# -- making room under write_back ---------------------------------------------------------------------


def test_a_duplicate_that_is_held_does_not_keep_the_others_from_going_first() -> None:
    """Duplicates go before what is on host alone, however long nobody has asked for that."""
    rig = Rig(8, 6, write_policy=WritePolicy.WRITE_BACK)
    alone, held, spare = [5, 6], [1, 2], [3, 4]
    for tokens in (alone, held, spare):
        rig.put(tokens)
    rig.evict(6)
    rig.settle()
    assert rig.map(alone) == rig.map(held) == rig.map(spare) == "HH"
    leases = [rig.lease(tokens) for tokens in (held, spare)]
    for lease, tokens in zip(leases, (held, spare), strict=True):
        rig.load_all(lease, tokens)
    leases[1].release()
    assert rig.map(held) == rig.map(spare) == "BB"
    assert leases[0].device_hold is not None
    lock = rig.core.radix.hold(leases[0].device_hold.end, HOST)
    rig.evict(2, HOST)
    assert (rig.map(alone), rig.map(held), rig.map(spare)) == ("HH", "BB", "DD")
    rig.core.radix.unhold(lock)
    leases[0].release()
    rig.settle()
    rig.empty_out()


def test_a_prefetch_that_is_not_worth_it_evicts_nothing() -> None:
    config = PrefetchConfig(min_tokens=3, stop_rule=StopRule.WAIT_COMPLETE)
    rig = Rig(8, 4, 100, prefetch=config)
    rig.put([1, 2, 3, 4])
    rig.settle()
    rig.cache.clear()
    rig.put([1, 2])
    rig.put([8, 9])
    rig.settle()
    before = rig.cache.stats().host
    assert (before.free, before.evicted) == (0, 0)
    started = rig.cache.prefetch(rig.cache.key([1, 2, 3, 4, 5]))
    assert isinstance(started, Prefetch)
    rig.settle()
    assert started.landed == 0
    assert rig.cache.stats().host == before
    rig.empty_out()


def test_a_page_that_is_dropped_takes_every_page_after_it_along() -> None:
    rig = Rig(4, 4, write_policy=WritePolicy.WRITE_BACK)
    prompt = [1, 2, 3, 4]
    rig.put(prompt)
    rig.evict(3)
    rig.settle()
    assert rig.map(prompt) == "DHHH"
    rig.cache.match(rig.cache.key(prompt[:1]))
    assert rig.core.radix.nodes == 2
    for page in range(10, 13):  # three copies fail, and host is left alone
        rig.put([page])
        rig.evict(1)
        rig.failed()
    assert rig.cache.stats().breakers["copies_to_host"].opened == 1
    while rig.map(prompt) != "....":
        assert rig.evict(1).freed == 1
        rig.cache.check()
    assert rig.free(HOST) == 4
    rig.empty_out()


def test_a_copy_that_succeeds_begins_the_count_of_failures_anew() -> None:
    rig = Rig(16, 16)
    for page, well in enumerate([False, False, True, False, False, True]):
        rig.put([page])
        assert rig.running(Copy), page
        if well:
            rig.settle()
        else:
            rig.failed()
            rig.cache.evict(1, deadline_s=0)
    assert rig.cache.stats().breakers["copies_to_host"].opened == 0


def test_the_hashes_of_a_range_are_those_of_its_pages_and_no_others() -> None:
    rig = Rig(8)
    prompt = [1, 2, 3, 4, 5]
    rig.put(prompt)
    rig.put([1, 2, 9])
    end, hashes = rig.cache.peek(rig.cache.key(prompt)).end, rig.page_hashes(prompt)
    assert end is not None
    for first in range(5):
        for count in range(1, 6 - first):
            found = rig.core.radix.hashes.of_range(end, first, count)
            assert tuple(found) == hashes[first : first + count]


# -- candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), (SWA, MAMBA)], ids=len)
def test_heaps_of_candidates_stay_in_proportion_to_what_is_alive(names: tuple[Kind, ...]) -> None:
    rig = Rig(16, 16, kinds=kinds_of(*names))
    for tokens in ([1, 2], [1, 3], [4]):
        rig.put(tokens)
    rig.settle()
    for _ in range(300):
        for tokens in ([1, 2], [1, 3], [4]):
            rig.look_at(tokens)
    for owner in (rig.core.radix, *rig.core.radix.partials):
        for victims in owner.victims:
            assert len(victims) <= 65 + 2 * victims.live
    rig.empty_out()


def test_a_prefetch_of_what_memory_has_is_refused() -> None:
    rig = Rig(4, 4, 100)
    rig.put([1, 2])
    rig.settle()
    assert isinstance(rig.cache.prefetch(rig.cache.key([1, 2])), Refused)
