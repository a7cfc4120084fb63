"""KV events: what happened on each medium, in order, and an oracle that refuses any other order (I9)."""

from __future__ import annotations

import pytest
from rig import Rig

from tiertree import AllBlocksCleared, BlockRemoved, BlockStored, EventsLost, Tier, WritePolicy
from tiertree.testing.oracle import EventsOutOfOrder, Oracle
from tiertree.tree.actions import Copy

PROMPT = [1, 2, 3]


def shorthand(rig: Rig) -> list[tuple[str, str, int]]:
    """The events since the last call as (what, medium, pages)."""
    names = {BlockStored: "stored", BlockRemoved: "removed"}
    return [
        ("cleared", event.medium.name, 0)
        if isinstance(event, AllBlocksCleared)
        else (names[type(event)], event.medium.name, len(event.block_hashes))
        for event in rig.cache.take_events()
    ]


def test_an_insert_announces_its_pages_with_their_tokens_and_their_parent() -> None:
    rig = Rig(device=8, page_size=2)
    rig.put([1, 2, 3, 4], "tenant")
    rig.put([1, 2, 3, 4, 5, 6], "tenant")
    hashes = rig.page_hashes([1, 2, 3, 4, 5, 6], "tenant")
    assert rig.cache.take_events() == [
        BlockStored(Tier.DEVICE, "tenant", hashes[:2], None, (1, 2, 3, 4), 2),
        BlockStored(Tier.DEVICE, "tenant", hashes[2:], hashes[1], (5, 6), 2),
    ]
    assert rig.cache.take_events() == []


def test_eviction_announces_the_last_page_first() -> None:
    rig = Rig(device=8)
    rig.put(PROMPT)
    rig.cache.take_events()
    rig.cache.evict(2)
    hashes = rig.page_hashes(PROMPT)
    assert rig.cache.take_events() == [BlockRemoved(Tier.DEVICE, (hashes[2], hashes[1]))]


def test_pages_that_were_there_already_are_not_announced_again() -> None:
    rig = Rig(device=8)
    rig.put(PROMPT)
    rig.put(PROMPT)
    rig.cache.match(rig.cache.key(PROMPT[:1]))  # a split is nobody's business
    rig.look_at(PROMPT)
    assert shorthand(rig) == [("stored", "DEVICE", 3)]


def test_host_pages_are_announced_when_ready_and_parents_first_whatever_finishes_first() -> None:
    rig = Rig(device=8, host=8)
    with rig.lease(PROMPT) as lease:
        for stop in (1, 2, 3):
            rig.grow(lease, PROMPT[:stop])
    rig.cache.take_events()
    for op in reversed(rig.running(Copy)):
        assert shorthand(rig) == []
        rig.done(op)
    stored = rig.cache.take_events()
    assert [each.block_hashes[0] for each in stored] == list(rig.page_hashes(PROMPT))


def test_write_back_announces_host_before_it_takes_the_page_from_device() -> None:
    rig = Rig(device=8, host=8, write_policy=WritePolicy.WRITE_BACK)
    rig.put(PROMPT)
    rig.cache.evict(2, deadline_s=0)
    rig.settle()
    assert shorthand(rig) == [("stored", "DEVICE", 3), ("stored", "HOST", 2), ("removed", "DEVICE", 2)]


def test_a_load_back_is_announced_when_done_and_a_failed_one_not_at_all() -> None:
    rig = Rig(device=8, host=8)
    rig.put(PROMPT)
    rig.settle()
    rig.cache.evict(8)
    rig.cache.take_events()
    lease = rig.lease(PROMPT)
    rig.load(lease)
    rig.failed()
    assert shorthand(rig) == []
    rig.load(lease)
    rig.done()
    assert shorthand(rig) == [("stored", "DEVICE", 3)]


def test_a_clear_announces_what_goes_and_the_late_release_of_a_lease_nothing_more() -> None:
    rig = Rig(device=8)
    rig.put(PROMPT)
    rig.put([1, 2, 9])
    lease = rig.lease(PROMPT)
    rig.cache.take_events()
    rig.cache.clear()
    gone = [each for event in rig.cache.take_events() for each in event.block_hashes]
    ours, theirs = rig.page_hashes(PROMPT), rig.page_hashes([1, 2, 9])
    assert sorted(gone) == sorted({*ours, *theirs})
    assert gone.index(ours[2]) < gone.index(ours[1]) < gone.index(ours[0])
    lease.release()
    assert shorthand(rig) == []


def test_storage_announces_what_it_took_and_what_it_pushed_out() -> None:
    rig = Rig(device=8, host=8, storage=3)
    rig.put(PROMPT)
    rig.settle()
    rig.put([7, 8])
    rig.settle()
    events = [event for event in rig.cache.take_events() if event.medium is Tier.STORAGE]
    hashes = rig.page_hashes(PROMPT)
    assert [type(event) for event in events] == [BlockStored, BlockStored, BlockRemoved] or [
        type(event) for event in events
    ] == [BlockStored, BlockRemoved, BlockStored]
    (removed,) = (event for event in events if isinstance(event, BlockRemoved))
    assert removed.block_hashes == hashes[:2]


@pytest.mark.parametrize("how", ["clear_storage", "detach_storage"])
def test_a_storage_that_is_cleared_or_detached_holds_nothing_any_more(how: str) -> None:
    rig = Rig(device=8, host=8, storage=9)
    rig.put(PROMPT)
    rig.settle()
    rig.cache.take_events()
    getattr(rig.cache, how)()
    assert rig.cache.take_events() == [AllBlocksCleared(Tier.STORAGE)]


def test_without_events_in_the_configuration_there_are_none_and_nothing_is_hashed() -> None:
    rig = Rig(device=8, host=8, events=False)
    rig.put(PROMPT)
    rig.settle()
    assert rig.cache.take_events() == []
    end = rig.cache.peek(rig.cache.key(PROMPT)).end
    assert end is not None
    assert end.hashes == b""


def test_events_that_nobody_takes_are_dropped_oldest_first_and_counted() -> None:
    rig = Rig(device=8, events_max=2)
    for token in range(5):
        rig.put([token])
    lost, *rest = rig.cache.take_events()
    assert lost == EventsLost(3)
    assert [event.token_ids for event in rest] == [(3,), (4,)]
    rig.put([7])
    assert len(rig.cache.take_events()) == 1


# -- the oracle can say no --------------------------------------------------------------------------------


def stored(pages: str, parent: str | None = None, medium: Tier = Tier.DEVICE) -> BlockStored:
    """An event for one-token pages named by letters."""
    hashes = tuple(each.encode() for each in pages)
    return BlockStored(medium, "", hashes, parent and parent.encode(), tuple(map(ord, pages)), 1)


def test_the_oracle_believes_a_good_stream() -> None:
    oracle = Oracle(1)
    for event in (stored("ab"), stored("c", "b"), stored("abc", medium=Tier.HOST)):
        oracle.apply(event, parents_first=True)
    oracle.apply(BlockRemoved(Tier.DEVICE, (b"c", b"b")))
    assert oracle.match([*b"abcd"])[:2] == (1, 3)
    oracle.apply(AllBlocksCleared(Tier.HOST))
    assert oracle.match([*b"abcd"])[:2] == (1, 1)
    assert oracle.match([*b"xab"])[:2] == (0, 0)


def test_the_oracle_refuses_a_page_stored_twice() -> None:
    oracle = Oracle(1)
    oracle.apply(stored("ab"))
    with pytest.raises(EventsOutOfOrder, match="twice"):
        oracle.apply(stored("b", "a"))


def test_the_oracle_refuses_a_page_removed_that_was_not_there() -> None:
    oracle = Oracle(1)
    oracle.apply(stored("a"))
    for hashes in ((b"b",), (b"a", b"a")):
        with pytest.raises(EventsOutOfOrder, match="not there"):
            oracle.apply(BlockRemoved(Tier.DEVICE, hashes))
        oracle.put([ord("a")])


def test_the_oracle_refuses_a_child_before_its_parent() -> None:
    oracle = Oracle(1)
    oracle.apply(stored("ab", medium=Tier.HOST))
    oracle.apply(stored("b", "a"))  # allowed where parents need not come first
    with pytest.raises(EventsOutOfOrder, match="before its parent"):
        oracle.apply(stored("c", "a"), parents_first=True)


def test_the_oracle_refuses_events_that_were_lost() -> None:
    with pytest.raises(EventsOutOfOrder):
        Oracle(1).apply(EventsLost(1))
