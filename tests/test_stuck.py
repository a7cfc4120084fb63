"""Operations that are late and have not come home are named, with whatever is known of them."""

from __future__ import annotations

import dataclasses

import pytest
from kinds import CHUNK, Chunked
from rig import Rig

from tiertree import (
    MAMBA,
    SWA,
    ForeignObject,
    LeaseReleased,
    Mamba,
    PrefetchConfig,
    SlidingWindow,
    StopRule,
    Stuck,
    Tier,
)
from tiertree.tree.actions import Copy, Get, Put, Query

PROMPT = [1, 2, 3, 4]
TENANT = "tenant"


def rig(**options: object) -> Rig:
    rules = PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE)
    return Rig(device=8, host=8, storage=100, prefetch=rules, op_deadline_seconds=5.0, **options)  # type: ignore[arg-type]


def late(it: Rig, seconds: float = 6.0) -> Stuck:
    """Time passes; what one operation is then stuck."""
    it.clock.advance(seconds)
    it.cache.poll()
    (stuck,) = it.cache.stuck()
    assert it.cache.stats().stuck == 1
    it.cache.check()
    return stuck


def home(it: Rig) -> None:
    """Everything comes home: nothing is stuck, nothing is lost."""
    it.settle()
    assert it.cache.stuck() == ()
    assert it.cache.stats().stuck == 0
    it.empty_out()


def test_nothing_is_stuck_before_its_deadline() -> None:
    it = rig()
    it.put(PROMPT)
    it.clock.advance(4.9)
    it.cache.poll()
    assert it.cache.stuck() == ()
    assert it.cache.stats().stuck == 0
    home(it)


def test_a_backup() -> None:
    it = rig()
    it.put(PROMPT, TENANT)
    (op,) = it.running(Copy)
    stuck = late(it)
    first = it.page_hashes(PROMPT, TENANT)[0].hex()
    assert stuck == Stuck(op, "backup", TENANT, first, "tree", 4, 6.0, 4)
    assert str(stuck) == (
        f"op {op}: backup of 4 pages of namespace 'tenant', the first is {first}, for tree: "
        "6.0 s, 4 slots LOST"
    )
    assert stuck.lost == it.cache.stats().host.lost
    it.clock.advance(1.0)
    assert it.cache.stuck() == (dataclasses.replace(stuck, age_seconds=7.0),)
    home(it)


def test_a_put_keeps_its_slots_but_they_are_not_lost() -> None:
    it = rig()
    it.put(PROMPT)
    it.done()
    (op,) = it.running(Put)
    stuck = late(it)
    assert stuck == Stuck(op, "persist", "", it.page_hashes(PROMPT)[0].hex(), "tree", 4, 6.0, 0)
    assert it.cache.stats().host.lost == 0
    it.cache.clear()
    assert it.cache.stuck() == (stuck,), "what it was for is remembered"
    home(it)


@pytest.mark.parametrize("arrived", [0, 3])
def test_a_prefetch(arrived: int) -> None:
    it = rig()
    it.put(PROMPT, TENANT)
    it.settle()
    it.cache.clear()
    it.fetch(PROMPT, TENANT)
    (query,) = it.running(Query)
    stuck = late(it)
    first = it.page_hashes(PROMPT, TENANT)[0].hex()
    assert stuck == Stuck(query, "query", TENANT, first, "prefetch", 4, 6.0, 0)
    it.done(query)
    assert it.cache.stuck() == ()
    it.clock.advance(1.0)
    it.fetch(PROMPT, TENANT)
    it.done(it.running(Query)[0])
    (get,) = it.running(Get)
    if arrived:
        it.executor.progress(get, arrived)
    stuck = late(it)
    assert (stuck.op, stuck.purpose, stuck.namespace, stuck.page_hash) == (get, "fetch", TENANT, first)
    assert (stuck.owner, stuck.pages, stuck.lost) == ("prefetch", 4, 4 - arrived)
    assert stuck.lost == it.cache.stats().host.lost
    assert it.where(PROMPT, TENANT) == (0, arrived)
    home(it)


def test_a_load_back_names_every_lease_that_waited_for_it() -> None:
    it = rig()
    it.put(PROMPT)
    it.settle()
    it.cache.evict(8)
    leases = [it.lease(PROMPT) for _ in range(3)]
    it.load(leases[0])
    it.load(leases[2])
    stuck = late(it)
    first = it.page_hashes(PROMPT)[0].hex()
    owner = f"lease {leases[0].number}, {leases[2].number}"
    assert (stuck.purpose, stuck.owner, stuck.page_hash, stuck.lost) == ("load_back", owner, first, 4)
    for lease in leases:
        lease.release()
    assert it.cache.stuck() == (stuck,)
    home(it)


def test_a_load_back_does_not_name_a_lease_that_waits_for_another() -> None:
    it = rig()
    it.put(PROMPT)
    it.put([7, 8])
    it.settle()
    it.cache.evict(8)
    first, second = it.lease(PROMPT), it.lease([7, 8])
    it.load(first)
    it.load(second)
    it.clock.advance(6.0)
    it.cache.poll()
    assert [each.owner for each in it.cache.stuck()] == [f"lease {first.number}", f"lease {second.number}"]
    first.release()
    second.release()
    home(it)


def test_pages_of_a_prefix_that_was_cleared_have_no_name() -> None:
    it = rig()
    it.put(PROMPT, TENANT)
    it.cache.clear()
    stuck = late(it)
    assert (stuck.purpose, stuck.namespace, stuck.page_hash, stuck.lost) == ("backup", TENANT, None, 4)
    assert "the first is" not in str(stuck)
    home(it)


def test_all_kinds_count() -> None:
    it = rig(kinds=[SlidingWindow(window=2), Mamba(), Chunked(pages=2)])
    it.put(PROMPT)
    stuck = late(it)
    assert it.core.operations.in_flight[stuck.op].parts
    kinds = it.cache.stats().kinds
    lost = it.cache.stats().host.lost + sum(kinds[str(kind)].host.lost for kind in (SWA, MAMBA, CHUNK))
    assert stuck.lost == stuck.pages == lost == 4 + 2 + 1 + 2
    home(it)


def test_a_copy_of_a_state_alone_is_named_after_its_page() -> None:
    it = rig(kinds=[Mamba()])
    it.put(PROMPT)
    it.settle()
    it.evict(8, Tier.DEVICE, MAMBA)
    lease = it.lease(PROMPT)
    it.load(lease)
    stuck = late(it)
    assert (stuck.pages, stuck.lost) == (1, 1)
    assert stuck.page_hash == it.page_hashes(PROMPT)[3].hex()
    assert stuck.owner == f"lease {lease.number}"
    lease.release()
    home(it)


def test_many_are_named_oldest_first() -> None:
    it = rig()
    for token in range(5):
        it.put([100 + token])
        it.clock.advance(0.5)
    it.clock.advance(6.0)
    it.cache.poll()
    stuck = it.cache.stuck()
    assert [each.op for each in stuck] == sorted(each.op for each in stuck)
    assert [each.age_seconds for each in stuck] == [8.5, 8.0, 7.5, 7.0, 6.5]
    home(it)


@pytest.mark.parametrize("kind", [["full"], {}, 3, b"full", None, "nothing"], ids=repr)
def test_a_kind_that_is_none_is_refused_by_name(kind: object) -> None:
    it = rig(kinds=[Mamba()])
    it.put(PROMPT)
    lease = it.lease(PROMPT)
    slots = it.cache.allocate(1)
    before = it.cache.stats()
    for call in (
        lambda: it.cache.allocate(1, kind=kind),  # type: ignore[arg-type]
        lambda: it.cache.evict(1, kind=kind),  # type: ignore[arg-type]
        lambda: it.cache.free(slots, kind=kind),  # type: ignore[arg-type]
        lambda: lease.window(kind),  # type: ignore[arg-type]
        lambda: it.cache.release_window(lease, kind),  # type: ignore[arg-type]
        lambda: it.cache.copy_on_write(lease, kind),  # type: ignore[arg-type]
    ):
        with pytest.raises(ForeignObject):
            call()
        assert it.cache.stats() == before
    lease.release()
    with pytest.raises(LeaseReleased):
        lease.window(MAMBA)
