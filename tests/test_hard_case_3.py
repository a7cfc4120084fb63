"""Hard case 3, a split under a running backup: what is copied as one node arrives as two or more.

What makes these fail when it is taken out:

- `fragments` finds all pieces of an operation from its end, so that `Arrivals._ours`, `Backup.backed_up` and
  `Backup.persisted` see every one, parents first;
- `Lane.split` gives the new node the same locks, and counts what is FILLING on both sides;
- `located` finds the pages that partial kinds sent along, wherever splits have put them;
- `Arrivals.arrive` parks what is behind a page that is still being copied, and `_woken` finds all that wait;
- `Evictor.finish_demotion` keeps pages of which `Carrier.leaves_behind` says that the copy lacks something.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
from hard_support import BACK, HOST, STORAGE, THROUGH, Case, Setup, Stored, each
from rig import Tokens

from tiertree import FULL
from tiertree.tree.actions import Copy, Put

each_order = pytest.mark.parametrize("order", ["oldest", "newest", "inside out"])


def copying(setup: Setup, *pages: int) -> tuple[Case, list[int]]:
    """A prompt of these pages, in one node, is on its way to host."""
    rig, tokens = setup.rig(32, 32, storage=1000), setup.prompt(*pages)
    rig.put(tokens, pages=setup.all(len(pages)))
    send(rig, tokens)
    assert [copy[FULL] for copy in rig.copies()] == [len(pages)]
    return rig, tokens


def branches(setup: Setup, tokens: list[int], *at: int) -> list[list[int]]:
    """Prompts that leave `tokens` after so many pages, and have one more of their own."""
    return [
        [*tokens[: pages * setup.page_size], *setup.prompt(90 + number)] for number, pages in enumerate(at)
    ]


def send(rig: Case, *prompts: Tokens) -> None:
    """Whatever is not on its way to host yet goes there now."""
    if rig.cache.config.write_policy is BACK:
        rig.evict(32)
    else:
        rig.touch(*prompts)


def answer(rig: Case, order: str) -> None:
    """Every copy is acknowledged, and nothing else."""
    while pending := rig.running(Copy):
        at = {"oldest": 0, "newest": -1, "inside out": len(pending) // 2}[order]
        rig.done(pending[at])


def pieces(rig: Case, tokens: Tokens, *cuts: int) -> list[Stored]:
    """How the pages of `tokens` are announced if nodes end at `cuts`."""
    hashes = rig.page_hashes(tokens)
    bounds = [0, *cuts, len(hashes)]
    return [(hashes[low:high], hashes[low - 1] if low else None) for low, high in pairwise(bounds)]


def persisted(rig: Case, *prompts: Tokens) -> None:
    """Everything on host has been offered to storage once and stored there with its content."""
    offered = [page for put in rig.puts() for page in put]
    wanted = {page for tokens in prompts for page in rig.page_hashes(tokens)}
    assert sorted(offered) == sorted(wanted)
    rig.settle()
    for tokens in prompts:
        assert rig.page_hashes(tokens)
        for page, at in enumerate(rig.page_hashes(tokens)):
            assert rig.executor.stored[at] == rig.page(tokens, "", page)
        for kind in rig.kinds:
            for page in rig.slots(tokens, HOST, kind):
                key = (kind, rig.page_hashes(tokens)[page])
                assert rig.executor.stored[key] == rig.page(tokens, "", page, kind)
    assert rig.cache.stats().persisted == len(wanted)


def comes_back(rig: Case, *prompts: Tokens) -> None:
    """From host alone every prompt can be continued, to its last page."""
    rig.to_host(*rig.prompts)
    for tokens in prompts:
        lease = rig.lease(tokens)
        assert lease.memory_boundary == len(tokens) // rig.page_size
        if lease.device_boundary < lease.memory_boundary:
            rig.load_all(lease, tokens)
        rig.release(lease)
    rig.empty_out()


@each()
def test_both_halves_are_announced_once_with_the_right_parent_and_offered_to_storage(setup: Setup) -> None:
    rig, tokens = copying(setup, 1, 2, 3, 4)
    (first,) = rig.running(Copy)
    other = setup.prompt(1, 2, 5, 6)
    rig.put(other)
    end = rig.cache.peek(rig.cache.key(tokens)).end
    assert end is not None
    assert (end.start, end.end) == (2, 4)
    assert rig.announced(tokens, HOST) == []
    rig.evict(4)  # what is being copied does not go meanwhile
    assert rig.map(tokens) == "DDDD"
    rig.put(other)  # it may have gone, where it waits for a hit

    rig.done(first)
    assert rig.announced(tokens, HOST) == pieces(rig, tokens, 2)
    assert rig.puts() == [rig.page_hashes(tokens)]
    put, *_ = rig.running(Put)
    rig.done(put)
    assert rig.announced(tokens, STORAGE) == pieces(rig, tokens, 2)
    assert rig.cache.stats().persisted == 4

    send(rig, other)
    answer(rig, "oldest")
    assert rig.announced(other, HOST) == [pieces(rig, tokens, 2)[0], pieces(rig, other, 2)[1]]
    rig.settle()
    persisted(rig, tokens, other)
    comes_back(rig, tokens, other)


@each_order
@each()
def test_nested_splits_under_several_pending_backups(setup: Setup, order: str) -> None:
    rig, tokens = copying(setup, *range(1, 9))
    forks = branches(setup, tokens, 4, 2, 2, 6, 1)  # the second splits what the first has split off
    for fork in forks:
        rig.put(fork)
        send(rig, fork)
    assert rig.announced(tokens, HOST) == []
    assert len(rig.running(Copy)) >= 1 + len(forks)

    answer(rig, order)
    assert rig.announced(tokens, HOST) == pieces(rig, tokens, 1, 2, 4, 6)
    for fork in forks:
        assert pieces(rig, fork, len(fork) // setup.page_size - 1)[-1] in rig.announced(fork, HOST)
    persisted(rig, tokens, *forks)
    assert rig.announced(tokens, STORAGE) == pieces(rig, tokens, 1, 2, 4, 6)
    comes_back(rig, tokens, forks[0])


@each_order
@each(THROUGH)
def test_a_chain_of_pending_backups_each_split(setup: Setup, order: str) -> None:
    rig = setup.rig(32, 32, storage=1000)
    prompts = [setup.prompt(*range(1, pages + 1)) for pages in (2, 4, 6)]
    for tokens in prompts:
        rig.put(tokens)
        send(rig, tokens)
    tokens = prompts[-1]
    forks = branches(setup, tokens, 3, 1, 5)
    for fork in forks:
        rig.put(fork)
        send(rig, fork)
    answer(rig, order)
    assert rig.announced(tokens, HOST) == pieces(rig, tokens, 1, 2, 3, 4, 5)
    persisted(rig, tokens, *forks)
    comes_back(rig, tokens, forks[0])


@each()
def test_a_hit_that_splits_what_is_being_copied_does_not_lose_its_boundary(setup: Setup) -> None:
    rig, tokens = copying(setup, 1, 2, 3, 4)
    half = tokens[: 2 * setup.page_size]
    rig.touch(half)
    assert rig.where(half) == (2, 2)
    rig.settle()
    assert rig.announced(tokens, HOST) == pieces(rig, tokens, 2)
    assert rig.where(half)[1] == 2
    comes_back(rig, tokens, half)


@each()
def test_a_copy_that_fails_after_the_split_leaves_nothing_on_host(setup: Setup) -> None:
    rig, tokens = copying(setup, 1, 2, 3, 4)
    (first,) = rig.running(Copy)
    other = setup.prompt(1, 2, 5, 6)
    rig.put(other)
    send(rig, other)
    for op in rig.running(Copy):
        if op != first:
            rig.done(op)
    rig.failed(first)
    announced = [] if setup.policy is not BACK else pieces(rig, other, 2)[1:]
    assert rig.announced(other, HOST) == announced  # what is behind it comes to nothing too, but for
    assert rig.announced(tokens, HOST) == []  # write_back, where host need not be prefix-closed
    assert rig.map(tokens) == "DDDD"
    comes_back(rig, tokens, other)


@each()
def test_a_copy_that_is_late_after_the_split_comes_home(setup: Setup) -> None:
    rig, tokens = copying(setup, 1, 2, 3, 4)
    other = setup.prompt(1, 2, 5, 6)
    rig.put(other)
    rig.clock.advance(rig.cache.config.op_deadline_seconds + 1)
    rig.cache.poll()
    rig.look()
    assert rig.announced(tokens, HOST) == []
    assert rig.cache.stats().host.lost >= 4
    rig.settle()
    assert rig.cache.stats().host.lost == 0
    assert rig.announced(tokens, HOST) == rig.puts() == []
    assert rig.map(tokens) == "DDDD"
    rig.clock.advance(100)  # until host is trusted again
    comes_back(rig, tokens, other)
