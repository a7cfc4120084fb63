"""Persist: every page whose backup is done is offered to storage, once, and nobody waits for it."""

from __future__ import annotations

from rig import Rig

from tiertree import Tier
from tiertree.tree.actions import Put

PROMPT = [1, 2, 3, 4]


def test_a_page_is_offered_to_storage_once_when_its_backup_is_done() -> None:
    rig = Rig(device=8, host=8, storage=100)
    rig.put(PROMPT)
    assert rig.running(Put) == []
    rig.done()
    assert len(rig.running(Put)) == 1
    rig.settle()
    rig.put(PROMPT)
    rig.cache.match(rig.cache.key(PROMPT))
    rig.settle()
    assert sum(isinstance(each, Put) for each in rig.executor.submitted) == 1
    assert (rig.cache.stats().offered, rig.cache.stats().persisted) == (4, 4)


def test_a_page_is_offered_wherever_splits_have_moved_it() -> None:
    rig = Rig(device=8, host=8, storage=100)
    rig.put(PROMPT)
    rig.cache.match(rig.cache.key(PROMPT[:1]))  # splits the node that is being backed up
    rig.put([*PROMPT[:3], 9])
    rig.done()
    rig.cache.match(rig.cache.key(PROMPT[:2]))  # splits it while it is being persisted
    rig.settle()
    assert set(rig.executor.stored) == {*rig.page_hashes(PROMPT), *rig.page_hashes([*PROMPT[:3], 9])}
    assert rig.mirror(Tier.STORAGE) == set(rig.executor.stored)


def test_what_storage_refuses_is_counted() -> None:
    rig = Rig(device=8, host=8, storage=3)
    rig.put(PROMPT)
    rig.settle()
    stats = rig.cache.stats()
    assert (stats.persisted, stats.persists_refused) == (3, 1)
    rig.put([7, 8])
    rig.done()
    rig.failed(rig.running(Put)[0])
    assert rig.cache.stats().persists_refused == 3
    assert rig.where([7, 8]) == (2, 2)


def test_host_pages_being_persisted_are_not_evicted() -> None:
    rig = Rig(device=8, host=8, storage=100)
    rig.put(PROMPT)
    rig.done()
    assert rig.cache.evict(8, Tier.HOST, deadline_s=0).freed == 0
    rig.settle()
    assert rig.cache.evict(8, Tier.HOST, deadline_s=0).freed == 4


def test_a_hanging_storage_keeps_nobody_waiting() -> None:
    rig = Rig(device=8, host=8, storage=100, op_deadline_seconds=5.0)
    rig.put(PROMPT)
    rig.done()  # the put hangs for ever
    rig.clock.advance(100)
    rig.cache.poll()
    with rig.lease([*PROMPT, 5]) as lease:
        rig.grow(lease, [*PROMPT, 5])
        assert lease.device_boundary == 5
    rig.cache.check()
