"""Every kind through the tiers: who goes first, what goes along, what comes back. For every set of kinds."""

from __future__ import annotations

import numpy as np
import pytest
from kinds import each_set
from rig import Rig
from test_kinds import PROMPT, Kinds, all_of, drawn, rig_of

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    KindConfig,
    LoadBackConfig,
    Mamba,
    Refused,
    SlidingWindow,
    Tier,
    WritePolicy,
)
from tiertree.testing.oracle import Oracle
from tiertree.tree.actions import Copy, Get, Put, Query
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST
OTHER = [100 + page for page in range(8)]

each_policy = pytest.mark.parametrize("policy", list(WritePolicy))


def kept(rig: Rig, kind: Kind) -> list[int]:
    """The pages of PROMPT, in one node, that are worth a place on host."""
    return np.flatnonzero(rig.kinds[kind].rules.kept(np.arange(8), 8, rig.page_size)).tolist()


def ages_with_node(rig: Rig, kind: Kind) -> list[int]:
    """The pages of PROMPT, in one node, that are not cold."""
    return np.flatnonzero(~rig.kinds[kind].rules.cold(np.arange(8), 8, rig.page_size)).tolist()


def to_host(rig: Rig, tokens: list[int] = PROMPT) -> None:
    """Everything of `tokens` that is worth it is copied to host, and nothing stays on device."""
    rig.cache.match(rig.cache.key(tokens))  # the hit that a selective policy waits for
    rig.settle()
    for _ in range(3):
        rig.evict(rig.sizes[0])
        rig.settle()
    assert rig.free() == rig.sizes[0]
    rig.cache.check()


def moved(rig: Rig, since: int) -> list[dict[str, int]]:
    """Of each copy submitted after the first `since` actions, how many pages of each kind it moves."""
    copies = [action for action in rig.executor.submitted[since:] if isinstance(action, Copy)]
    return [{move.kind: len(move.source) for move in copy.moves if len(move.source)} for copy in copies]


# -- who goes first ---------------------------------------------------------------------------------------


@each_set
def test_cold_pages_go_first_and_front_to_back(kinds: Kinds) -> None:
    for kind in kinds:
        rig = rig_of(kinds)
        rig.put(PROMPT, pages=all_of(kinds))
        warm = ages_with_node(rig, kind)
        cold = [page for page in range(8) if page not in warm]
        for gone, page in enumerate([*cold, *warm], 1):
            assert rig.evict(1, DEVICE, kind).freed == 1
            assert rig.map(PROMPT, kind)[page] == "."
            assert rig.map(PROMPT, kind).count("D") == 8 - gone
            rig.cache.check()
        assert rig.map(PROMPT) == "DDDDDDDD"


@each_set
def test_the_last_window_ages_with_its_node(kinds: Kinds) -> None:
    for kind in kinds:
        rig = rig_of(kinds, device=16)
        for tokens in (PROMPT, OTHER):
            rig.put(tokens, pages=all_of(kinds))
            rig.clock.advance(1)
        warm = ages_with_node(rig, kind)
        rig.look_at(PROMPT)  # the older one is used again
        rig.evict(2 * (8 - len(warm)), DEVICE, kind)
        for tokens in (PROMPT, OTHER):  # what was cold went from both, before either's last window
            assert rig.map(tokens, kind) == drawn(warm)
        rig.evict(len(warm), DEVICE, kind)
        assert rig.map(OTHER, kind) == "........"
        assert rig.map(PROMPT, kind) == drawn(warm)
        rig.cache.check()


def test_checkpoints_are_not_cold() -> None:
    rig = Rig(16, host=16, kinds=[SlidingWindow(window=2, checkpoint_tokens=4)])
    rig.put(range(10), pages=all_of([SWA], 10))
    rig.settle()
    assert rig.map(range(10), SWA) == "DDBBDDBBBB"
    rig.evict(4, DEVICE, SWA)
    to_host(rig, list(range(10)))
    assert rig.map(range(10), SWA) == "..HH..HHHH"
    assert [rig.where(range(b))[1] for b in range(1, 11)] == [0, 0, 0, 4, 4, 4, 4, 8, 9, 10]


@each_set
def test_pages_behind_the_last_valid_boundary_go_before_any_that_is_older(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(OTHER)
    rig.clock.advance(1)
    rig.put(PROMPT, pages={kind: range(5) for kind in kinds})
    rig.clock.advance(1)
    assert rig.where(PROMPT) == (5, 5)
    rig.evict(3)
    assert rig.map(PROMPT) == "DDDDD..."
    assert rig.where(OTHER) == (8, 8)
    rig.evict(1)
    assert rig.map(OTHER) == "DDDDDDD."
    rig.cache.check()


@each_set
def test_pages_become_dead_when_what_they_need_goes(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(OTHER)
    rig.clock.advance(1)
    rig.put(PROMPT)
    rig.clock.advance(1)
    rig.look_at(OTHER)
    rig.clock.advance(1)
    rig.look_at(PROMPT)
    kind = kinds[-1]
    lease = rig.lease(OTHER)
    rig.evict(16, DEVICE, kind)  # what is not leased of one kind
    lease.release()
    assert rig.where(PROMPT) == (0, 0)
    rig.evict(8)
    assert (rig.map(PROMPT), rig.map(OTHER)) == ("........", "DDDDDDDD")
    rig.cache.check()


@each_set
def test_a_prefix_that_can_be_continued_further_down_is_not_dead(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=24, host=32)
    rig.put(OTHER)
    rig.settle()
    rig.clock.advance(1)
    rig.put(PROMPT[:4], pages=dict.fromkeys(kinds, ()))
    rig.put(PROMPT)
    rig.settle()
    with rig.lease(OTHER):
        rig.evict(4)
    assert (rig.map(PROMPT), rig.map(OTHER), rig.where(PROMPT)) == ("BBBBHHHH", "BBBBBBBB", (0, 8))
    rig.clock.advance(1)
    rig.look_at(PROMPT)
    rig.evict(8)
    assert (rig.map(PROMPT), rig.map(OTHER)) == ("BBBBHHHH", "HHHHHHHH")


# -- what goes along --------------------------------------------------------------------------------------


@each_set
def test_a_page_of_full_takes_the_other_kinds_along(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT, pages=all_of(kinds))
    for left in range(7, -1, -1):
        assert rig.evict(1).freed == 1
        for kind in (FULL, *kinds):
            assert rig.map(PROMPT, kind) == drawn(range(left))
            assert rig.free(kind=kind) == 8 - left
        rig.cache.check()


@each_set
@each_policy
def test_host_takes_along_too(kinds: Kinds, policy: WritePolicy) -> None:
    rig = rig_of(kinds, host=16, write_policy=policy)
    rig.put(PROMPT, pages=all_of(kinds))
    to_host(rig)
    for kind in kinds:
        assert rig.map(PROMPT, kind) == drawn(kept(rig, kind), letter="H")
    rig.evict(16, HOST)
    assert rig.cache.stats().nodes == 0
    assert all(rig.free(HOST, kind) == 16 for kind in (FULL, *kinds))
    rig.cache.check()


# -- down and up ------------------------------------------------------------------------------------------


@each_set
@each_policy
def test_backup_carries_what_is_kept_and_load_back_brings_one_window(
    kinds: Kinds, policy: WritePolicy
) -> None:
    rig = rig_of(kinds, host=16, write_policy=policy)
    rig.put(PROMPT, pages=all_of(kinds))
    to_host(rig)
    assert rig.map(PROMPT) == "HHHHHHHH"
    for kind in kinds:
        assert rig.map(PROMPT, kind) == drawn(kept(rig, kind), letter="H")
        assert rig.cache.stats().kinds[kind].backed_up == len(kept(rig, kind))
    lease = rig.lease(PROMPT)
    assert (lease.device_boundary, lease.memory_boundary) == (0, 8)
    before = len(rig.executor.submitted)
    rig.load_all(lease, PROMPT)
    wanted = {FULL: 8, **{kind: len(rig.needed(kind, 8)) for kind in kinds}}
    assert moved(rig, before) == [wanted]
    for kind in kinds:
        on_device = [page for page, at in enumerate(rig.map(PROMPT, kind)) if at in "DB"]
        assert on_device == list(rig.needed(kind, 8))
        assert rig.cache.stats().kinds[kind].loaded_back == len(rig.needed(kind, 8))
    rig.cache.check()
    lease.release()
    rig.empty_out()


@each_set
@each_policy
def test_load_back_of_what_one_kind_lacks_brings_that_alone(kinds: Kinds, policy: WritePolicy) -> None:
    rig = rig_of(kinds, host=16, write_policy=policy)
    rig.put(PROMPT)
    rig.look_at(PROMPT)
    rig.settle()
    kind = kinds[0]
    rig.evict(8, DEVICE, kind)
    rig.settle()
    assert rig.map(PROMPT, kind) == drawn(rig.needed(kind, 8), letter="H")
    assert rig.where(PROMPT) == (0, 8)
    lease = rig.lease(PROMPT)
    assert (lease.device_boundary, lease.reach, lease.memory_boundary) == (0, 8, 8)
    before = len(rig.executor.submitted)
    rig.load_all(lease, PROMPT)
    assert moved(rig, before) == [{kind: len(rig.needed(kind, 8))}]
    lease.release()
    rig.empty_out()


@each_set
def test_load_back_stops_at_the_last_boundary_that_all_kinds_accept(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=16)
    rig.put(PROMPT[:5])
    rig.settle()
    rig.put(PROMPT, pages=dict.fromkeys(kinds, ()))
    to_host(rig)
    lease = rig.lease(PROMPT)
    assert (lease.device_boundary, lease.memory_boundary) == (0, 5)
    before = len(rig.executor.submitted)
    rig.load_all(lease, PROMPT)
    assert moved(rig, before) == [{FULL: 5, **{kind: len(rig.needed(kind, 5)) for kind in kinds}}]
    assert rig.map(PROMPT) == "BBBBBHHH"
    rig.cache.check()


@each_set
def test_a_load_back_that_is_refused_or_fails_leaves_the_lease_as_it_was(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=16, load_back=LoadBackConfig(min_tokens=9))
    rig.put(PROMPT)
    to_host(rig)
    with rig.lease(PROMPT) as lease:
        assert isinstance(rig.cache.load_back(lease), Refused)
        assert (lease.device_boundary, lease.memory_boundary) == (0, 8)
    rig = rig_of(kinds, host=16)
    rig.put(PROMPT)
    to_host(rig)
    with rig.lease(PROMPT) as lease:
        rig.load(lease)
        rig.failed()
        assert (lease.device_boundary, lease.memory_boundary) == (0, 8)
        assert all(rig.free(kind=kind) == 8 for kind in (FULL, *kinds))
        rig.load_all(lease, PROMPT)
    rig.empty_out()


@each_set
def test_a_load_back_without_room_for_one_kind_brings_nothing(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=16)
    rig.put(PROMPT)
    to_host(rig)
    hoard = rig.cache.allocate(8, kind=kinds[-1])
    lease = rig.lease(PROMPT)
    assert isinstance(rig.cache.load_back(lease, deadline_s=0), Refused)
    assert rig.free() == 8
    rig.cache.free(hoard, kind=kinds[-1])
    rig.load_all(lease, PROMPT)
    rig.cache.check()


# -- storage ----------------------------------------------------------------------------------------------


def persisted(kinds: Kinds, policy: WritePolicy = WritePolicy.WRITE_THROUGH) -> Rig:
    """PROMPT is in storage and nowhere else."""
    rig = rig_of(kinds, host=16, storage=1000, write_policy=policy)
    rig.put(PROMPT)
    to_host(rig)
    rig.evict(16, HOST)
    rig.settle()
    assert (rig.cache.stats().nodes, rig.where(PROMPT)) == (0, (0, 0))
    return rig


@each_set
@each_policy
def test_what_was_persisted_is_prefetched_as_far_as_it_is_needed(kinds: Kinds, policy: WritePolicy) -> None:
    rig = persisted(kinds, policy)
    puts = [action for action in rig.executor.submitted if isinstance(action, Put)]
    for kind in kinds:
        count = sum(len(span.hashes) for put in puts for span in put.spans if span.kind == kind)
        assert count == len(rig.needed(kind, 8)) == rig.cache.stats().kinds[kind].persisted
    fetch = rig.fetch(PROMPT)
    rig.settle()
    assert rig.cache.settle(fetch) == 8
    assert rig.map(PROMPT) == "HHHHHHHH"
    for kind in kinds:
        assert rig.map(PROMPT, kind) == drawn(rig.needed(kind, 8), letter="H")
    assert rig.where(PROMPT) == (0, 8)
    with rig.lease(PROMPT) as lease:
        rig.load_all(lease, PROMPT)
    rig.empty_out()


@each_set
def test_every_kind_has_its_own_storage_key(kinds: Kinds) -> None:
    rig = persisted(kinds)
    assert rig.storage is not None
    assert rig.storage.stats().pages == 8 + sum(len(rig.needed(kind, 8)) for kind in kinds)


@each_set
def test_what_arrives_in_part_is_used_as_far_as_every_kind_can_continue(kinds: Kinds) -> None:
    for spoiled, kind in enumerate(kinds):
        rig = persisted(kinds)
        rig.fetch(PROMPT)
        rig.done(*rig.running(Query))
        others = [len(rig.needed(each, 8)) for each in kinds]
        others[spoiled] -= 1  # its last page is not there
        oracle = Oracle(1, [rig.kinds[each].rules for each in kinds])
        oracle.put(PROMPT, tier=HOST)
        for each, count in zip(kinds, others, strict=True):
            for page in rig.needed(each, 8)[:count]:
                oracle.where[oracle.pages(PROMPT, kind=each)[page]] = {HOST}
        rig.executor.fail(*rig.running(Get), 8, others=others)
        rig.cache.poll()
        boundary = oracle.match(PROMPT).memory_boundary
        assert rig.where(PROMPT) == (0, boundary)
        assert rig.map(PROMPT) == drawn(range(boundary), letter="H")  # and what is no use is not kept
        if not boundary:
            assert all(rig.free(HOST, each) == 16 for each in kinds), kind
        rig.cache.check()
        rig.empty_out()


@each_set
def test_prefetch_of_a_kind_alone_where_full_is_in_memory(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=16, storage=1000)
    rig.put(PROMPT)
    rig.settle()
    for tier in (DEVICE, HOST):
        for kind in kinds:
            rig.evict(16, tier, kind)
    assert (rig.map(PROMPT), rig.where(PROMPT)) == ("BBBBBBBB", (0, 0))
    rig.fetch(PROMPT)
    rig.settle()
    gets = [action for action in rig.executor.submitted if isinstance(action, Get)]
    assert [len(span.hashes) for span in gets[0].spans] == [0, *(len(rig.needed(kind, 8)) for kind in kinds)]
    assert rig.where(PROMPT) == (0, 8)
    with rig.lease(PROMPT) as lease:
        rig.load_all(lease, PROMPT)
    rig.cache.check()


@each_set
def test_a_restart_finds_every_kind_again(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=16, storage=1000)
    rig.put(PROMPT)
    rig.settle()
    rig.restart()
    assert rig.where(PROMPT) == (0, 0)
    rig.fetch(PROMPT)
    rig.settle()
    assert rig.where(PROMPT) == (0, 8)
    with rig.lease(PROMPT) as lease:
        rig.load_all(lease, PROMPT)


@each_policy
def test_a_full_host_pool_of_one_kind_costs_that_kind_alone(policy: WritePolicy) -> None:
    rig = Rig(16, host=32, write_policy=policy, kinds=[KindConfig(rules=Mamba(), device=8, host=1)])
    rig.put(PROMPT)
    to_host(rig)
    with rig.lease(PROMPT):  # it has the only state that host can hold
        rig.put(OTHER)
        to_host(rig, OTHER)
        assert (rig.map(OTHER), rig.map(OTHER, MAMBA)) == ("HHHHHHHH", "........")
        assert rig.where(PROMPT) == (0, 8)
        found = rig.cache.peek(rig.cache.key(OTHER))
        assert (found.memory_boundary, found.full_reach, found.branching_point) == (0, 8, 8)
        counted = rig.cache.stats().kinds[MAMBA]
        assert counted.dropped + counted.backups_dropped >= 1
    rig.empty_out()
