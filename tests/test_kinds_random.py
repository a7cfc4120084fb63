"""With room for everything no boundary is lost on the way down and up again, whatever the prompts share."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import each_set, rules
from rig import Rig
from test_kinds import Kinds

from tiertree import Tier, WritePolicy

ROOM = 100

prompts = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=12), st.sampled_from(["", "tenant"])),
    min_size=1,
    max_size=6,
)
"""Prompts that share beginnings, are beginnings of each other, or come twice."""


def roomy(kinds: Kinds, window: int, page_size: int, policy: WritePolicy) -> Rig:
    chosen = rules(window=window)
    return Rig(
        ROOM,
        host=ROOM,
        storage=1000,
        kinds=[chosen[kind] for kind in kinds],
        page_size=page_size,
        write_policy=policy,
    )


@each_set
@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
@settings(max_examples=12)
@given(asked=prompts, window=st.integers(1, 9), page_size=st.integers(1, 2))
def test_every_prompt_comes_back_whole_from_host_and_from_storage(
    kinds: Kinds, policy: WritePolicy, asked: list[tuple[list[int], str]], window: int, page_size: int
) -> None:
    rig = roomy(kinds, window, page_size, policy)
    for tokens, namespace in asked:
        rig.put(tokens, namespace)
        rig.settle()
    for tokens, namespace in asked:
        pages = len(tokens) // page_size
        assert rig.where(tokens, namespace) == (pages, pages)
        rig.look_at(tokens, namespace)
    while rig.evict(ROOM).freed or rig.executor.pending:
        rig.settle()
    assert rig.free() == ROOM
    for tokens, namespace in asked:
        assert rig.where(tokens, namespace) == (0, len(tokens) // page_size)
    rig.evict(ROOM, Tier.HOST)
    assert rig.cache.stats().nodes == 0
    for tokens, namespace in asked:
        if rig.where(tokens, namespace)[1] < len(tokens) // page_size:
            rig.fetch(tokens, namespace)
            rig.settle()
        with rig.lease(tokens, namespace) as lease:
            assert lease.memory_boundary == len(tokens) // page_size
            if lease.device_boundary < lease.memory_boundary:
                rig.load_all(lease, tokens)
        rig.cache.check()
    rig.settle()
    rig.empty_out()


@each_set
@settings(max_examples=12)
@given(asked=prompts, page_size=st.integers(1, 2))
def test_a_request_that_decodes_page_by_page_ends_where_one_insert_would(
    kinds: Kinds, asked: list[tuple[list[int], str]], page_size: int
) -> None:
    rig = roomy(kinds, 3, page_size, WritePolicy.WRITE_THROUGH)
    for tokens, namespace in asked:
        lease = rig.lease(tokens, namespace)
        while lease.device_boundary < len(tokens) // page_size:
            rig.grow(lease, tokens[: (lease.device_boundary + 1) * page_size])
            rig.verify_windows(lease)
        assert lease.device_boundary == len(tokens) // page_size
        lease.release()
    for tokens, namespace in asked:
        assert rig.where(tokens, namespace)[0] == len(tokens) // page_size
        rig.look_at(tokens, namespace)
    rig.settle()
    rig.empty_out()
