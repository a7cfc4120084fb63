"""Rules of the tree that hold anyhow in most runs: each is seen here where breaking it shows."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kinds import each_set, rules
from rig import Rig

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    InvalidTokens,
    InvariantViolated,
    Mamba,
    StaleMatch,
    Tier,
)
from tiertree.components import SlidingWindow
from tiertree.tree.actions import Copy
from tiertree.tree.check import device_closed, host_closed, structure
from tiertree.tree.check_partial import _lane, boundaries
from tiertree.tree.ledger import NODE_FILLING, NODE_READY, Owner
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST


def kinds_of(*names: Kind) -> list[Any]:
    return [rules(window=2)[name] for name in names]


# -- rules of kinds --------------------------------------------------------------------------------


def test_every_state_but_the_last_of_a_node_is_cold() -> None:
    for count in range(4):
        pages = np.arange(2, 2 + count)
        assert Mamba().cold(pages, 9, 1).tolist() == [True] * (count - 1) + [False] * min(count, 1)


def test_a_page_of_a_window_is_cold_when_it_is_in_none_worth_keeping() -> None:
    window = SlidingWindow(window=4)
    assert window.cold(np.arange(8), 8, 2).tolist() == [True] * 6 + [False] * 2


# -- counters --------------------------------------------------------------------------------------


def test_nothing_is_counted_before_it_happens_and_everything_once() -> None:
    rig = Rig(6, 6, 100, kinds=kinds_of(SWA, MAMBA))
    totals = {"evicted", "dropped", "persisted", "prefetched", "loaded_back", "backups_dropped"}
    stats = rig.cache.stats()
    for counts in (stats, *stats.kinds.values()):
        named = {name: getattr(counts, name) for name in totals if hasattr(counts, name)}
        assert named
        assert not any(np.ravel(list(named.values())).tolist()), named
        assert (counts.device.evicted, counts.host.evicted) == (0, 0)
    gauges = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
    assert [name for name, value in gauges.items() if type(value) is int and value] == []
    rig.put([1, 2, 3])
    rig.settle()
    rig.evict(3, DEVICE)
    rig.evict(2, HOST)
    stats = rig.cache.stats()
    assert (stats.device.evicted, stats.host.evicted) == (3, 2)
    swa = stats.kinds[SWA]
    assert (swa.device.evicted, swa.host.evicted) == (2, 2)


def test_an_operation_that_fails_is_counted_once() -> None:
    rig = Rig(4, 4, 10)
    rig.put([1, 2])
    rig.failed()
    assert rig.cache.stats().failed_operations == 1
    rig.put([3])
    rig.settle()
    assert rig.cache.stats().failed_operations == 1


# -- roots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("events", [False, True])
@pytest.mark.parametrize("names", [(), (SWA,), (SWA, MAMBA)], ids=len)
def test_a_namespace_without_pages_is_forgotten(names: tuple[Kind, ...], events: bool) -> None:
    rig = Rig(8, kinds=kinds_of(*names), events=events)
    rig.put([1, 2], "a")
    rig.put([3, 4, 5], "b")
    assert list(rig.core.radix.roots) == ["a", "b"]
    assert rig.evict(2).freed == 2
    assert list(rig.core.radix.roots) == ["b"]
    assert rig.evict(8).freed == 3
    assert not rig.core.radix.roots
    rig.cache.check()
    rig.empty_out()


def wander(rig: Rig, rng: random.Random) -> None:
    """One step of somebody who puts, leases, looks, evicts and clears as it comes."""
    tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 6))]
    space = rng.choice(["", "", "tenant"])
    kinds = [FULL, *rig.kinds]
    match rng.randrange(8):
        case 0 | 1 | 2:
            for kind in kinds:
                rig.evict(
                    len(tokens) - rig.free(kind=kind) if len(tokens) > rig.free(kind=kind) else 0, kind=kind
                )
            if min(rig.free(kind=kind) for kind in kinds) >= len(tokens):
                rig.put(tokens, space)
        case 3 | 4:
            rig.evict(rng.randrange(1, 5), kind=rng.choice(kinds))
        case 5:
            rig.look_at(tokens, space)
        case 6:
            rig.lease(tokens, space)
            if len(rig.core.leases) > 2:
                rng.choice(list(rig.core.leases.values())).release()
        case 7 if not rng.randrange(8):
            rig.cache.clear(rng.choice([None, "", "tenant"]))


@each_set
def test_a_tree_on_device_alone_that_nobody_listens_to_keeps_its_books(kinds: tuple[Kind, ...]) -> None:
    """Where there is neither host nor events whole leaves go in one step, with all that kinds have there."""
    for seed in range(4):
        for names in ((), kinds):
            rng = random.Random(seed)
            rig = Rig(8, kinds=kinds_of(*names), events=False)
            for step in range(60):
                wander(rig, rng)
                try:
                    rig.cache.check()
                except InvariantViolated as error:
                    error.add_note(f"seed {seed}, step {step}")
                    raise
            for lease in list(rig.core.leases.values()):
                lease.release()
            assert rig.cache.stats().device.evicted > 20, seed
            rig.empty_out()


def test_of_leaves_that_go_in_one_step_every_page_is_counted() -> None:
    rig = Rig(6, kinds=kinds_of(SWA, MAMBA), events=False)
    rig.put([1, 2, 3])
    rig.put([1, 2, 4])
    version = rig.core.radix.version
    assert rig.evict(1).freed == 1
    assert rig.core.radix.version > version
    rig.evict(6)
    stats = rig.cache.stats()
    assert (stats.nodes, stats.device.evicted, stats.device.free) == (0, 4, 6)
    assert [(stats.kinds[kind].device.free, stats.kinds[kind].device.evicted) for kind in (SWA, MAMBA)] == [
        (6, 3),
        (6, 2),
    ]


# -- check -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", [DEVICE, HOST])
@pytest.mark.parametrize("owner", [Owner.NODE, Owner.OPERATION])
def test_i12_a_slot_of_a_partial_kind_that_nobody_will_give_back(owner: Owner, tier: Tier) -> None:
    rig = Rig(4, 4, kinds=kinds_of(SWA))
    rig.put([1, 2, 3])
    rig.settle()
    rig.cache.check()
    rig.ledger(tier, SWA).take(1, owner)
    with pytest.raises(InvariantViolated, match=f"I12: {SWA} on {tier.name}: not everything"):
        rig.cache.check()


@pytest.mark.parametrize("kind", [FULL, SWA])
@pytest.mark.parametrize("tier", [DEVICE, HOST])
def test_i12_a_page_that_is_filling_though_nothing_is_in_flight(kind: Kind, tier: Tier) -> None:
    rig = Rig(4, 4, kinds=kinds_of(SWA))
    rig.put([1, 2, 3])
    rig.settle()
    rig.cache.check()
    book = rig.ledger(tier, kind).book
    book[np.flatnonzero(book == NODE_READY)[0]] = NODE_FILLING
    with pytest.raises(InvariantViolated, match=r"I12: .*a slot is FILLING though nothing is in flight"):
        rig.cache.check()


@pytest.mark.parametrize("wrong", ["pages", "edge", "detached"])
def test_i1_a_node_that_is_empty_torn_or_detached(wrong: str) -> None:
    rig = Rig(4)
    rig.put([1, 2])
    end = rig.cache.peek(rig.cache.key([1, 2])).end
    assert end is not None
    if wrong == "pages":
        end.pages, end.end = 0, 0
    elif wrong == "edge":
        end.edge += b"\0"
    else:
        end.detached = True
    assert "is empty, torn or detached" in "\n".join(structure(rig.core))


@pytest.mark.parametrize("tier", [DEVICE, HOST])
def test_i3_and_i4_a_page_on_its_way_behind_one_that_is_not_there(tier: Tier) -> None:
    rig = Rig(4, 4)
    rig.put([1, 2, 3])
    rig.settle()
    closed = device_closed if tier == DEVICE else host_closed
    assert not list(closed(rig.core))
    end = rig.cache.peek(rig.cache.key([1, 2, 3])).end
    assert end is not None
    lane = end.lane(tier)
    assert lane.slots is not None
    rig.ledger(tier).book[lane.slots[2]] = NODE_FILLING
    lane.filling = 1
    assert not list(closed(rig.core))
    lane.slots[1] = -1
    assert "behind one that is not there" in "\n".join(closed(rig.core))


@pytest.mark.parametrize("page", [0, 1])
def test_i8_a_window_of_which_a_page_is_not_pinned(page: int) -> None:
    rig = Rig(4, kinds=kinds_of(SWA))
    rig.put([1, 2])
    lease = rig.lease([1, 2])
    assert sorted(lease.window(SWA).slots.tolist()) == [0, 1]
    assert not list(boundaries(rig.core))
    rig.ledger(DEVICE, SWA).pins[lease.window(SWA).slots[page]] = 0
    assert "not pinned" in "\n".join(boundaries(rig.core))


@pytest.mark.parametrize("wrong", ["count", "filling", "locks", "below", "slots", "unsaved"])
@pytest.mark.parametrize("tier", [DEVICE, HOST])
def test_a_lane_of_a_partial_kind_that_counts_wrongly(tier: Tier, wrong: str) -> None:
    rig = Rig(4, 4, kinds=kinds_of(SWA))
    rig.put([1, 2])
    rig.settle()
    end = rig.cache.peek(rig.cache.key([1, 2])).end
    assert end is not None
    partial, lane = rig.kinds[SWA], rig.lane(end, tier, SWA)
    assert not list(_lane(partial, end, tier))
    if wrong == "slots":
        lane.slots, lane.count = np.full(2, -1, np.int64), 0
    elif wrong == "unsaved":
        rig.lane(end, HOST, SWA).slots = None
        rig.lane(end, HOST, SWA).count = 0
        end.partial.unsaved = True
        assert not list(_lane(partial, end, tier))
        end.partial.unsaved = False
    else:
        setattr(lane, wrong, getattr(lane, wrong) + 1)
    assert bool(list(_lane(partial, end, tier))) == (wrong != "unsaved" or tier == DEVICE)


# -- versions ---------------------------------------------------------------------------------------


def test_every_change_makes_every_match_of_before_stale() -> None:
    rig = Rig(6, 6, 100, kinds=kinds_of(SWA))
    rig.put([1, 2, 3])
    rig.settle()
    changes: list[Callable[[], Any]] = [
        lambda: rig.put([1, 2, 4]),
        lambda: rig.evict(1),
        lambda: rig.evict(1, kind=SWA),
        lambda: rig.evict(1, HOST),
        lambda: rig.evict(1, HOST, kind=SWA),
        lambda: rig.put([5]),
        rig.cache.clear,
    ]
    matches = []
    for change in changes:
        matches.append(rig.cache.match(rig.cache.key([1, 2, 3])))
        change()
        for match in matches:
            with pytest.raises(StaleMatch):
                rig.cache.acquire(match)
        rig.settle()


def test_a_match_that_starts_an_owed_backup_makes_others_stale() -> None:
    rig = Rig(6, 6, max_operations=2)
    rig.put([1])
    rig.put([2])
    assert len(rig.running(Copy)) == 1
    rig.settle()
    assert (rig.map([1]), rig.map([2])) == ("B", "D")
    other, version = rig.cache.match(rig.cache.key([1])), rig.core.radix.version
    own = rig.cache.match(rig.cache.key([2]))
    assert rig.core.radix.version > version, "versions never go back"
    assert len(rig.running(Copy)) == 1
    rig.cache.acquire(own).release()
    with pytest.raises(StaleMatch):
        rig.cache.acquire(other)
    rig.settle()
    rig.empty_out()


def test_what_arrives_and_what_is_asked_for_makes_matches_stale() -> None:
    rig = Rig(6, 6, 100)
    rig.put([1, 2])
    before = rig.cache.match(rig.cache.key([1, 2]))
    rig.done()
    with pytest.raises(StaleMatch):
        rig.cache.acquire(before)
    rig.settle()
    rig.evict(2)
    lease = rig.lease([1, 2])
    before = rig.cache.match(rig.cache.key([1, 2]))
    rig.load(lease)
    with pytest.raises(StaleMatch):
        rig.cache.acquire(before)
    rig.settle()
    lease.release()
    rig.empty_out()


def test_a_bigram_is_made_of_two_tokens_that_fit_into_it() -> None:
    rig = Rig(4, unit_bits=64, bigram=True)
    assert rig.cache.key([2**31 - 1, 2**31 - 1]).pages == 1
    for tokens in ([2**31, 1], [1, 2**31], [2**32, 1]):
        with pytest.raises(InvalidTokens, match=f"not in 0..{2**31 - 1}"):
            rig.cache.key(tokens)
