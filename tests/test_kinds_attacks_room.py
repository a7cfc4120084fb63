"""Further kinds under attack: who makes room, for what, in which order, and in how many steps."""

from __future__ import annotations

import pytest
from rig import Rig
from test_kinds import PROMPT
from test_kinds_tiers import OTHER, moved, to_host

from tiertree import (
    MAMBA,
    SWA,
    KindConfig,
    Mamba,
    NoRoom,
    Refused,
    SlidingWindow,
    Tier,
    WritePolicy,
)
from tiertree.tree.actions import Copy, Put
from tiertree.tree.partial import Partial
from tiertree.tree.victims import Victims

DEVICE, HOST = Tier.DEVICE, Tier.HOST


# -- room -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [(), (Mamba(),)], ids=["full", "full+mamba"])
def test_a_store_that_never_answers_does_not_keep_device_from_making_room(kinds: tuple[Mamba, ...]) -> None:
    tokens = range(24)
    rig = Rig(
        24, host=4, storage=1000, kinds=kinds, write_policy=WritePolicy.WRITE_BACK, op_deadline_seconds=30.0
    )
    rig.executor.on_wait = lambda: [rig.executor.complete(op) for op in rig.running(Copy)]
    rig.put(tokens)
    rig.cache.allocate(8)
    assert rig.running(Put)
    rig.clock.advance(31)
    rig.cache.poll()
    slots = rig.cache.allocate(8)
    assert not isinstance(slots, NoRoom), slots
    rig.cache.check()
    rig.cache.free(slots)
    rig.empty_out()


def test_a_load_back_that_cannot_be_had_costs_nobody_anything() -> None:
    rig = Rig(16, host=64, kinds=[KindConfig(rules=SlidingWindow(window=4), device=8, host=32)])
    tokens = list(range(12))
    rig.put(tokens)
    to_host(rig, tokens)
    mine = rig.cache.allocate(5, kind=SWA)
    rig.put(OTHER[:3])
    rig.settle()
    with rig.lease(tokens) as lease:
        for _ in range(2):
            assert isinstance(rig.cache.load_back(lease, deadline_s=0), Refused)
            assert (rig.map(OTHER[:3]), rig.map(OTHER[:3], SWA)) == ("BBB", "BBB")
            rig.cache.check()
        rig.cache.free(mine, kind=SWA)
        rig.load_all(lease, tokens)
    rig.empty_out()


def test_a_prefetch_that_cannot_be_had_costs_nobody_anything() -> None:
    window = SlidingWindow(window=4)
    rig = Rig(64, host=16, storage=1000, kinds=[KindConfig(rules=window, device=8, host=8)])
    tokens = range(16)
    rig.put(tokens)
    rig.settle()
    rig.options["kinds"] = (KindConfig(rules=window, device=8, host=3),)  # one page short of a window
    rig.restart()
    for prompt in (PROMPT, OTHER):
        rig.put([500, *prompt])
        rig.settle()
    assert rig.free(HOST) == 0
    fetch = rig.fetch(tokens)
    rig.settle()
    assert (rig.cache.settle(fetch), rig.free(HOST)) == (0, 0)
    rig.cache.check()
    rig.empty_out()


def test_one_page_of_room_saves_the_state_of_one_conversation() -> None:
    sizes = KindConfig(rules=Mamba(), device=5, host=5)
    rig = Rig(20, host=40, kinds=[sizes], write_policy=WritePolicy.WRITE_BACK)
    prompts = [[100 * number + page for page in range(4)] for number in range(5)]
    for tokens in prompts:
        rig.put(tokens)
    rig.evict(20)
    rig.settle()
    for tokens in prompts:
        with rig.lease(tokens) as lease:
            rig.load_all(lease, tokens)
        rig.clock.advance(1)
    rig.evict(5, HOST, MAMBA)  # host has let the states go, for others
    before = len(rig.executor.submitted)
    rig.executor.on_wait = rig.executor.complete_all
    slots = rig.cache.allocate(1)
    assert not isinstance(slots, NoRoom)
    assert moved(rig, before) == [{MAMBA: 1}]
    rig.cache.check()
    rig.cache.free(slots)
    rig.empty_out()


# -- what is kept -----------------------------------------------------------------------------------------


def test_a_state_saved_at_the_branching_point_is_backed_up() -> None:
    rig = Rig(64, host=64, storage=1000, kinds=[Mamba()])
    first, second, third = ([*PROMPT, *range(start, start + 8)] for start in (100, 200, 300))
    rig.put(first)
    rig.settle()
    assert rig.cache.peek(rig.cache.key(second)).branching_point == 8
    with rig.lease(second) as lease:
        rig.grow(lease, second, pages={MAMBA: [7, 15]})
        rig.settle()
    assert rig.map(second, MAMBA) == ".......B.......B"
    to_host(rig, second)
    assert rig.where(third) == (0, 8)
    with rig.lease(third) as lease:
        rig.load_all(lease, third)
    rig.empty_out()


def turns(rig: Rig, tokens: list[int], *ends: int) -> None:
    """A conversation that grows, with what each turn's end needs; each turn has a node of its own."""
    for end in ends:
        with rig.lease(tokens[:end]) as lease:
            rig.grow(lease, tokens[:end])
        rig.settle()
        rig.look_at(tokens[:end])
        rig.clock.advance(1)


def test_the_state_of_an_earlier_turn_goes_before_the_last_of_another_conversation() -> None:
    rig = Rig(32, kinds=[Mamba()])
    rig.put(OTHER)
    rig.clock.advance(1)
    turns(rig, PROMPT, 4, 8)
    assert rig.map(PROMPT, MAMBA) == "...D...D"
    rig.evict(1, DEVICE, MAMBA)
    assert (rig.map(PROMPT, MAMBA), rig.map(OTHER, MAMBA)) == (".......D", ".......D")
    rig.evict(1, DEVICE, MAMBA)
    assert (rig.map(PROMPT, MAMBA), rig.map(OTHER, MAMBA)) == (".......D", "........")
    rig.cache.check()
    rig.empty_out()


def test_pages_that_the_next_turn_looks_back_into_are_as_young_as_it_is() -> None:
    rig = Rig(32, kinds=[SlidingWindow(window=4)])
    rig.put(OTHER)
    rig.clock.advance(1)
    turns(rig, PROMPT, 6, 8)
    mine = rig.map(PROMPT, SWA)
    rig.evict(4, DEVICE, SWA)
    assert (rig.map(PROMPT, SWA), rig.map(OTHER, SWA)) == (mine, "........")
    assert rig.where(PROMPT) == (8, 8)
    rig.cache.check()
    rig.empty_out()


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE])
def test_states_per_path_holds_on_host_too(policy: WritePolicy) -> None:
    rig = Rig(64, host=64, kinds=[Mamba(states_per_path=1)], write_policy=policy)
    tokens = list(range(12))
    turns(rig, tokens, 2, 4, 6, 8, 10, 12)
    drawn = rig.map(tokens, MAMBA)
    assert set(drawn[:9]) == {"."}, drawn  # the state at 10 was leased when the one at 12 came
    assert drawn[11] in "BD"
    rig.cache.check()
    rig.empty_out()


# -- steps ------------------------------------------------------------------------------------------------


def test_what_a_chain_of_nodes_costs_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 0

    def counted(owner: type, name: str) -> None:
        plain = getattr(owner, name)

        def wrapper(*args: object) -> object:
            nonlocal steps
            steps += 1
            return plain(*args)

        monkeypatch.setattr(owner, name, wrapper)

    counted(Victims, "push")
    counted(Partial, "since")

    def load_chain(nodes: int) -> int:
        """How many steps it takes to bring back the windows of so many nodes, all inside one window."""
        rig = Rig(nodes, host=nodes, kinds=[SlidingWindow(window=1000)])
        tokens = list(range(nodes))
        turns(rig, tokens, *range(1, nodes + 1))
        assert rig.cache.stats().nodes == nodes
        rig.evict(nodes, DEVICE, SWA)
        with rig.lease(tokens) as lease:
            rig.load(lease)
            before = steps
            rig.done()
            done = steps - before
            assert lease.device_boundary == nodes
        rig.empty_out()
        return done

    assert load_chain(64) < 2.5 * load_chain(32)
