"""What every kind owes the tree, shown for every set of kinds, one of them made up in `kinds.py`."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import CHUNK, Chunked, each_set, every_set, name, rules
from rig import Pages, Rig

from tiertree import (
    FULL,
    MAMBA,
    SWA,
    CacheConfig,
    KindConfig,
    LeaseReleased,
    Mamba,
    NoRoom,
    SlidingWindow,
    Tier,
)
from tiertree.testing.oracle import Oracle
from tiertree.types import Kind

DEVICE, HOST = Tier.DEVICE, Tier.HOST
Kinds = tuple[Kind, ...]
PROMPT = list(range(8))


def rig_of(kinds: Iterable[Kind], device: int = 8, host: int = 0, storage: int = 0, **options: object) -> Rig:
    """A rig with these partial kinds by the rules of `kinds.rules`: pages of one token, windows of two."""
    return Rig(device, host, storage, kinds=[rules()[kind] for kind in kinds], **options)


def all_of(kinds: Iterable[Kind], pages: int = len(PROMPT)) -> Pages:
    """Every page of every kind."""
    return {kind: range(pages) for kind in kinds}


def drawn(pages: Iterable[int], of: int = len(PROMPT), letter: str = "D") -> str:
    """What `Rig.map` says where only `pages` are there."""
    there = set(pages)
    return "".join(letter if page in there else "." for page in range(of))


# -- match ------------------------------------------------------------------------------------------------


@each_set
def test_a_match_ends_only_where_every_kind_can_continue(kinds: Kinds) -> None:
    for kind in kinds:
        for missing in range(8):
            rig = rig_of(kinds)
            rest = [page for page in range(8) if page != missing]
            rig.put(PROMPT, pages={**all_of(kinds), kind: rest})
            valid = [b for b in range(1, 9) if missing not in rig.needed(kind, b)]
            assert rig.where(PROMPT) == (max(valid), max(valid)), (kind, missing)
            rig.look_at(PROMPT)


@each_set
@given(data=st.data())
def test_with_any_holes_match_is_exactly_the_oracles(kinds: Kinds, data: st.DataObject) -> None:
    page_size = data.draw(st.integers(1, 3))
    window, grid = data.draw(st.integers(1, 7)), data.draw(st.sampled_from([None, 1, 2]))
    chosen = rules(window=window, grid=grid and grid * page_size)
    rig = Rig(30, kinds=[chosen[kind] for kind in kinds], page_size=page_size)
    oracle = Oracle(page_size, [chosen[kind] for kind in kinds])
    prompts = [[int(at == fork) for at in range(8 * page_size)] for fork in (-1, 5)]
    for tokens in prompts:
        pages = {kind: data.draw(st.sets(st.integers(0, 7))) for kind in kinds}
        rig.put(tokens, pages=pages)
        oracle.put(tokens)
        for kind in kinds:
            every = oracle.pages(tokens, kind=kind)
            for page in pages[kind]:
                if (page + 1) % chosen[kind].grid(page_size) == 0:
                    oracle.where.setdefault(every[page], set()).add(DEVICE)
    for tokens in prompts:
        found = rig.cache.peek(rig.cache.key(tokens))
        answer = (found.device_boundary, found.memory_boundary, found.full_reach, found.branching_point)
        assert answer == oracle.match(tokens)
        rig.look_at(tokens)
    rig.cache.check()


@each_set
def test_insert_accepts_a_prefix_whose_early_pages_are_let_go(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    for kind in kinds:
        assert rig.map(PROMPT, kind) == drawn(rig.needed(kind, 8))
    assert rig.where(PROMPT) == (8, 8)
    rig.look_at(PROMPT)
    assert rig.where(PROMPT[:3]) == (0, 0)  # no kind but FULL has anything that early
    rig.cache.check()


@each_set
def test_a_split_leaves_each_page_where_it_is(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(PROMPT, pages=all_of(kinds))
    rig.put([0, 1, 2, 3, 40, 50])
    for kind in (FULL, *kinds):
        assert rig.map(PROMPT, kind) == "D" * 8
    for pages in range(9):
        assert rig.where(PROMPT[:pages]) == (pages, pages)
    rig.look_at(PROMPT)
    rig.cache.check()


@each_set
def test_events_name_the_kind_and_replay_to_what_is_there(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=8)
    rig.put(PROMPT, pages=all_of(kinds))
    rig.settle()
    for step in range(3):
        for kind in (FULL, *kinds):
            hashes, drawing = rig.page_hashes(PROMPT), rig.map(PROMPT, kind)
            for tier, letter in ((DEVICE, "D"), (HOST, "H")):
                there = {page for page, at in zip(hashes, drawing, strict=True) if at in ("B", letter)}
                assert rig.mirror(tier, kind) == there
        rig.evict(3, DEVICE, kinds[0] if step == 0 else FULL)
        rig.settle()


# -- tombstones -------------------------------------------------------------------------------------------


@each_set
def test_a_tombstone_is_filled_again_and_leased_pages_stay_where_they_are(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    held = lease.slots.tolist()
    for kind in kinds:
        rig.cache.release_window(lease, kind)
        rig.evict(16, DEVICE, kind)
        assert rig.map(PROMPT, kind) == "........"
    assert rig.map(PROMPT) == "DDDDDDDD"
    assert rig.where(PROMPT) == (0, 0)

    assert rig.put(PROMPT).existing == 8
    assert lease.slots.tolist() == held
    rig.verify(lease, PROMPT)
    assert rig.where(PROMPT) == (8, 8)
    for kind in kinds:
        assert rig.map(PROMPT, kind) == drawn(rig.needed(kind, 8))
        assert rig.cache.stats().kinds[kind].recovered == len(rig.needed(kind, 8))
        assert rig.free(kind=kind) == 16 - len(rig.needed(kind, 8))
    rig.look_at(PROMPT)
    lease.release()
    rig.empty_out()


@each_set
def test_what_is_there_already_is_kept_and_what_came_for_it_is_freed(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(PROMPT, pages=all_of(kinds))
    with rig.lease(PROMPT) as lease:
        windows = {kind: lease.window(kind).slots.tolist() for kind in kinds}
        rig.put(PROMPT, pages=all_of(kinds))
        assert {kind: lease.window(kind).slots.tolist() for kind in kinds} == windows
    for kind in kinds:
        assert rig.free(kind=kind) == 8
        assert rig.cache.stats().kinds[kind].recovered == 0


# -- leases -----------------------------------------------------------------------------------------------


@each_set
def test_a_lease_locks_the_window_behind_its_boundary_and_nothing_else(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT, pages=all_of(kinds))
    lease = rig.lease(PROMPT)
    for kind in kinds:
        rig.evict(8, DEVICE, kind)
        assert rig.map(PROMPT, kind) == drawn(rig.needed(kind, 8))
    rig.verify_windows(lease)
    lease.release()
    for kind in kinds:
        rig.evict(8, DEVICE, kind)
        assert rig.map(PROMPT, kind) == "........"
    rig.cache.check()


@each_set
def test_a_window_is_given_back_early_exactly_once(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    lease, kept = rig.lease(PROMPT), kinds[1:]
    rig.cache.release_window(lease, kinds[0])
    with pytest.raises(LeaseReleased):
        rig.cache.release_window(lease, kinds[0])
    assert rig.evict(8, DEVICE, kinds[0]).freed == len(rig.needed(kinds[0], 8))
    for kind in kept:  # the others are locked as before
        assert rig.evict(8, DEVICE, kind).freed == 0
    rig.verify(lease, PROMPT)
    rig.cache.check()
    lease.release()
    with pytest.raises(LeaseReleased):
        rig.cache.release_window(lease, kinds[-1])
    rig.empty_out()


@each_set
def test_a_request_that_grows_locks_its_new_window_and_may_give_that_back_too(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(PROMPT[:4])
    lease = rig.lease(PROMPT[:4])
    rig.cache.release_window(lease, kinds[0])
    rig.grow(lease, PROMPT)
    for kind in kinds:
        rig.evict(16, DEVICE, kind)
        there = [page for page in rig.needed(kind, 8) if kind != kinds[0] or page >= 4]
        window = lease.window(kind)
        assert [window.first + at for at, slot in enumerate(window.slots) if slot >= 0] == there
        assert rig.map(PROMPT, kind) == drawn(there)
    rig.cache.release_window(lease, kinds[0])
    rig.evict(16, DEVICE, kinds[0])
    assert rig.map(PROMPT, kinds[0]) == "........"
    rig.cache.check()
    lease.release()
    rig.empty_out()


@each_set
def test_a_copy_is_the_requests_own(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    for kind in kinds:
        count = len(rig.needed(kind, 8))
        copy = rig.cache.copy_on_write(lease, kind)
        contents = rig.executor.of(kind)[DEVICE]
        assert [contents[slot] for slot in copy] == [
            rig.page(PROMPT, "", p, kind) for p in rig.needed(kind, 8)
        ]
        assert rig.free(kind=kind) == 8 - 2 * count
        for slot in copy:
            contents[slot] = "written over"
        rig.verify(lease, PROMPT)
        rig.cache.free(copy[:1], lease, kind=kind)
        rig.cache.allocate(rig.free(kind=kind), lease, kind=kind)
        assert isinstance(rig.cache.copy_on_write(lease, kind, deadline_s=0), NoRoom)
    rig.cache.check()
    lease.release()
    for kind in kinds:
        assert rig.free(kind=kind) == 8 - len(rig.needed(kind, 8))
    rig.look_at(PROMPT)


# -- states: branching point, grid, cap -------------------------------------------------------------------


@each_set
def test_a_match_says_how_far_full_goes_and_where_to_save_a_state(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT, pages=dict.fromkeys(kinds, ()))
    found = rig.cache.peek(rig.cache.key(PROMPT))
    assert (found.memory_boundary, found.full_reach, found.branching_point) == (0, 8, 8)
    rig.put(PROMPT)
    found = rig.cache.match(rig.cache.key(PROMPT))
    assert (found.memory_boundary, found.full_reach, found.branching_point) == (8, 8, None)


@pytest.mark.parametrize("kinds", [each for each in every_set() if MAMBA in each], ids=name)
def test_the_branching_point_is_on_the_grid(kinds: Kinds) -> None:
    rig = Rig(8, kinds=[rules(grid=3)[kind] for kind in kinds])
    rig.put(PROMPT, pages=dict.fromkeys(kinds, ()))
    for reach, point in enumerate([None, None, None, 3, 3, 3, 6, 6, 6]):
        found = rig.cache.peek(rig.cache.key(PROMPT[:reach]))
        assert (found.full_reach, found.branching_point) == (reach, point)


def test_a_state_off_the_grid_is_let_go() -> None:
    rig = Rig(16, page_size=2, kinds=[Mamba(grid_tokens=4)])
    rig.put(range(16), pages={MAMBA: range(8)})
    assert rig.map(range(16), MAMBA) == ".D.D.D.D"
    assert rig.free(kind=MAMBA) == 12
    assert rig.cache.stats().kinds[MAMBA].declined == 4
    rig.cache.check()


def test_a_path_keeps_its_last_states_up_to_the_cap() -> None:
    rig = Rig(16, kinds=[Mamba(states_per_path=2)])
    rig.put(PROMPT, pages={MAMBA: [0, 2, 4]})
    assert rig.map(PROMPT, MAMBA) == "..D.D..."
    rig.put([*PROMPT[:6], 60, 70], pages={MAMBA: [6]})
    assert rig.map(PROMPT, MAMBA) == "....D..."
    assert rig.cache.stats().kinds[MAMBA].declined == 2
    rig.cache.check()


def test_a_leased_state_outlives_the_cap() -> None:
    rig = Rig(16, kinds=[Mamba(states_per_path=1)])
    rig.put(PROMPT[:2])
    lease = rig.lease(PROMPT[:2])
    rig.put(PROMPT)
    assert rig.map(PROMPT, MAMBA) == ".D.....D"
    rig.verify_windows(lease)
    rig.cache.check()


def test_two_windows_of_different_sizes_are_two_kinds() -> None:
    long = Kind("swa-long")
    rig = Rig(8, kinds=[SlidingWindow(window=2), SlidingWindow(window=5, name="swa-long")])
    rig.put(PROMPT)
    assert rig.map(PROMPT, SWA) == "......DD"
    assert rig.map(PROMPT, long) == "...DDDDD"
    rig.evict(1, DEVICE, long)
    assert rig.where(PROMPT) == (0, 0)


# -- a kind from outside ----------------------------------------------------------------------------------


def test_a_kind_that_was_registered_can_be_named_in_a_file() -> None:
    config = CacheConfig.from_mapping(
        {"device": {"size": 8}, "kinds": [{"device": 4, "rules": {"kind": "chunk", "pages": 3}}]}
    )
    assert config.kinds == (KindConfig(rules=Chunked(pages=3), device=4),)
    assert config.kinds[0].kind == CHUNK
