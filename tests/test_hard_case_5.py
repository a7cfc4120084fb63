"""Hard case 5, load-back from the validated boundary: FULL on host reaches deeper than the others accept.

    page     0       DEEP=3     VALID=5          8
    FULL     device and host │ host    │ host             device as far as 5 or 8 in one test
    others   up to 3         │ up to 5 │ nothing

What makes these fail when it is taken out:

- `reach` ends the memory boundary where every kind agrees; `Loads.plan` starts from the lease's end there;
- `Core.acquire` splits at both boundaries, holds device up to `reach` and host from there (from the root, if
  host is prefix-closed), pins windows and `pin_beyond`; `Core.release` and `_move` give back exactly that;
- `Loads.plan` and `start` refuse before anything is taken; `Loads._lacking` asks for one window, no more;
- `Core._move` and `Arrivals.fail` abandon a load-back, and the lease keeps what it had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hard_support import BACK, DEVICE, HOST, SETS, Case, Setup, each

from tiertree import FULL, SWA, Inserted, Lease, LoadBackConfig, Refused, Tier
from tiertree.tree.actions import Copy
from tiertree.tree.node import subtree
from tiertree.types import Kind

DEEP, VALID, PAGES = 3, 5, 8

each_way = pytest.mark.parametrize("steps", [(DEEP, VALID), (VALID,)], ids=["in steps", "in one"])
"""Whether a node ends where the device part does."""

Pins = dict[tuple[Kind, Tier], Counter[int]]


def prompt(setup: Setup, pages: int = PAGES) -> list[int]:
    """The first pages of the prompt."""
    return setup.prompt(*range(1, pages + 1))


def grown(setup: Setup, steps: tuple[int, ...] = (DEEP, VALID), **options: Any) -> Case:
    """The prompt came in steps; at the end of the last there is nothing of the partial kinds."""
    rig = setup.rig(**options)
    for pages in steps:
        rig.put(prompt(setup, pages), pages={} if len(steps) > 1 else setup.all(pages))
    rig.put(prompt(setup), pages=setup.nothing())
    rig.touch(*(prompt(setup, pages) for pages in (*steps, PAGES)))
    rig.settle()
    return rig


def on_host(setup: Setup, steps: tuple[int, ...] = (DEEP, VALID), **options: Any) -> Case:
    """It is on host, and only its first three pages are on device."""
    rig = grown(setup, steps, **options)
    for _ in range(PAGES - DEEP):
        rig.evict(1)
        rig.settle()
    assert rig.map(prompt(setup)) in ("BBBHHHHH", "DDDHHHHH")
    found = rig.cache.peek(rig.cache.key(prompt(setup)))
    assert (found.device_boundary, found.memory_boundary, found.full_reach) == (DEEP, memory(setup), PAGES)
    return rig


def on_device(setup: Setup) -> Case:
    """All of FULL is on device and on host; of the others device has what three pages need, host the rest."""
    rig = grown(setup)
    with rig.lease(prompt(setup, DEEP)):
        for kind in setup.kinds:
            rig.evict(16, kind=kind)
            rig.settle()
    found = rig.cache.peek(rig.cache.key(prompt(setup)))
    assert (found.device_boundary, found.memory_boundary, found.full_device) == (DEEP, VALID, PAGES)
    return rig


def memory(setup: Setup) -> int:
    """How far the prompt can be continued from memory."""
    return VALID if setup.kinds else PAGES


def next_is_valid(setup: Setup) -> bool:
    """Whether the prompt can be continued one page behind its device part too, which needs no state there."""
    return setup.kinds in ((), (SWA,))


def locks(rig: Case, setup: Setup) -> dict[Tier, list[int]]:
    """How many holds there are on each page of FULL, by tier."""
    end, depth = rig.core.radix.find(rig.cache.key(prompt(setup)))
    assert depth == PAGES
    found: dict[Tier, list[int]] = {DEVICE: [], HOST: []}
    while end is not None and end.pages:
        for tier, counts in found.items():
            counts[:0] = [end.lane(tier).locks] * end.pages
        end = end.parent
    return found


def pins(rig: Case) -> Pins:
    """How many pins each slot has."""
    pools = [(kind, tier) for kind in (FULL, *rig.kinds) for tier in (DEVICE, HOST)]
    return {
        (kind, tier): Counter({at: n for at, n in enumerate(rig.ledger(tier, kind).pins.tolist()) if n})
        for kind, tier in pools
    }


def promised(rig: Case, setup: Setup, leases: int, reach: int) -> tuple[dict[Tier, list[int]], Pins]:
    """What so many leases of the prompt must hold and pin, and nothing else."""
    from_ = reach if setup.policy is BACK or reach == memory(setup) else 0
    held = {
        DEVICE: [leases * (page < reach) for page in range(PAGES)],
        HOST: [leases * (from_ <= page < memory(setup) and reach < memory(setup)) for page in range(PAGES)],
    }
    wanted: Pins = {(kind, tier): Counter() for kind in (FULL, *rig.kinds) for tier in (DEVICE, HOST)}
    for kind in rig.kinds:
        device, host = (rig.slots(prompt(setup), tier, kind) for tier in (DEVICE, HOST))
        for page in rig.needed(kind, DEEP):
            wanted[kind, DEVICE][device[page]] += leases
        for page in rig.needed(kind, memory(setup)):
            if page in device:
                wanted[kind, DEVICE][device[page]] += leases
            else:
                wanted[kind, HOST][host[page]] += leases
    return held, wanted


# -- exactly what it needs --------------------------------------------------------------------------------


def holds_exactly(rig: Case, setup: Setup, reach: int) -> None:
    """Leases come and go, and at any time exactly what they need is held."""
    leases: list[Lease] = []
    assert (locks(rig, setup), pins(rig)) == promised(rig, setup, 0, reach)
    for count in (1, 2, 3):
        lease = rig.lease(prompt(setup))
        leases.append(lease)
        rig.settle()  # a split may have made more worth a place on host
        boundaries = (lease.device_boundary, lease.reach, lease.memory_boundary)
        assert boundaries == (DEEP, reach, memory(setup))
        assert (locks(rig, setup), pins(rig)) == promised(rig, setup, count, reach)
    for count in (2, 1, 0):
        rig.release(leases.pop(count % len(leases)))
        assert (locks(rig, setup), pins(rig)) == promised(rig, setup, count, reach)
    rig.empty_out()


@each_way
@each()
def test_a_lease_across_the_end_of_the_device_part_holds_exactly_its_pages(setup: Setup, steps: Any) -> None:
    holds_exactly(on_host(setup, steps), setup, DEEP)


@each(kinds=SETS[1:])
def test_a_lease_whose_full_part_is_all_on_device_holds_nothing_of_it_on_host(setup: Setup) -> None:
    holds_exactly(on_device(setup), setup, VALID)


@contextmanager
def nobody_looks(rig: Case, setup: Setup) -> Iterator[None]:
    """Whoever looks at the slots of pages behind the memory boundary fails."""
    end = rig.cache.peek(rig.cache.key(prompt(setup, VALID))).end
    assert end is not None
    assert end.end == VALID
    deeper = [(node, node.lanes) for node in subtree(end)]
    assert sum(node.pages for node, _ in deeper) == PAGES - VALID
    for node, _ in deeper:
        node.device = node.host = None  # type: ignore[assignment]
    yield
    for node, (device, host) in deeper:
        node.device, node.host = device, host


@each_way
@each(kinds=SETS[1:])
def test_load_back_starts_at_the_boundary_that_all_accept_and_never_looks_deeper(
    setup: Setup, steps: Any
) -> None:
    rig = on_host(setup, steps)
    lease, copies = rig.lease(prompt(setup)), len(rig.copies())
    with nobody_looks(rig, setup):
        rig.cache.load_back(lease)
    wanted = {
        kind: len(set(rig.needed(kind, VALID)) - rig.slots(prompt(setup), DEVICE, kind).keys())
        for kind in setup.kinds
    }
    assert rig.copies()[copies:] == [{FULL: VALID - DEEP, **wanted}]
    rig.evict(16, HOST)  # what is deeper may go while the load-back is under way, and only that
    assert rig.map(prompt(setup))[VALID:] == "..."
    rig.settle()
    assert (lease.device_boundary, lease.memory_boundary) == (VALID, VALID)
    rig.verify(lease, prompt(setup))
    rig.verify_windows(lease)
    assert rig.evict(16).freed == 0
    assert rig.evict(16, HOST).freed == (VALID if setup.policy is not BACK else VALID - DEEP)
    rig.release(lease)
    rig.empty_out()


@each(kinds=SETS[1:])
def test_load_back_where_full_is_on_device_brings_the_other_kinds_alone(setup: Setup) -> None:
    rig = on_device(setup)
    lease, copies = rig.lease(prompt(setup)), len(rig.copies())
    missing = {
        kind: len(set(rig.needed(kind, VALID)) - rig.slots(prompt(setup), DEVICE, kind).keys())
        for kind in setup.kinds
    }
    with nobody_looks(rig, setup):
        rig.cache.load_back(lease)
    assert rig.copies()[copies:] == [missing]
    rig.settle()
    rig.verify_windows(lease)
    assert lease.device_boundary == VALID
    rig.evict(16)
    rig.settle()
    assert not {"D", "B"} & {*rig.map(prompt(setup))[VALID:]}  # what is deeper is not leased
    assert rig.map(prompt(setup))[:VALID] in ("BBBBB", "DDDDD")
    rig.release(lease)
    rig.empty_out()


# -- refused ----------------------------------------------------------------------------------------------


def goes_on(rig: Case, setup: Setup, lease: Lease) -> None:
    """The request computes the rest itself, from its device boundary on."""
    before = lease.slots.tolist()
    assert isinstance(rig.grow(lease, prompt(setup)), Inserted)
    assert (lease.device_boundary, lease.reach, lease.memory_boundary) == (PAGES, PAGES, PAGES)
    assert lease.slots.tolist()[:DEEP] == before
    rig.verify(lease, prompt(setup))
    rig.settle()
    assert rig.where(prompt(setup)) == (PAGES, PAGES)
    assert locks(rig, setup) == {DEVICE: [1] * PAGES, HOST: [0] * PAGES}
    windows = {kind: lease.window(kind).slots.tolist() for kind in setup.kinds}
    assert {pool: counts for pool, counts in pins(rig).items() if counts} == {
        (kind, DEVICE): Counter(slots) for kind, slots in windows.items()
    }
    rig.release(lease)
    assert not any(pins(rig).values())
    rig.empty_out()


def refused(rig: Case, setup: Setup, reason: str, hoarded: Kind | None = None, left: int = 0) -> None:
    """Load-back is refused for this reason, changes nothing, and the request goes on without it. The room for
    `hoarded` but for what is `left` is taken until then."""
    lease = rig.lease(prompt(setup))
    hoard = rig.cache.allocate(rig.free(kind=hoarded) - left, kind=hoarded) if hoarded is not None else None
    pools = [(tier, kind) for kind in (FULL, *setup.kinds) for tier in (DEVICE, HOST)]
    free, slots = [rig.free(*pool) for pool in pools], lease.slots.tolist()
    before = locks(rig, setup), pins(rig)
    answer = rig.cache.load_back(lease, deadline_s=0)
    rig.look()
    assert isinstance(answer, Refused)
    assert reason in answer.reason
    assert [rig.free(*pool) for pool in pools] == free
    assert (locks(rig, setup), pins(rig)) == before
    boundaries = (lease.device_boundary, lease.reach, lease.memory_boundary)
    assert (boundaries, lease.slots.tolist()) == ((DEEP, DEEP, memory(setup)), slots)
    if hoarded is not None:
        rig.cache.free(hoard, kind=hoarded)
    goes_on(rig, setup, lease)


@each()
def test_fewer_pages_than_the_minimum_and_the_request_goes_on(setup: Setup) -> None:
    limit = LoadBackConfig(min_tokens=6 * setup.page_size)
    refused(on_host(setup, load_back=limit), setup, "fewer than the minimum")


@each()
def test_a_quota_that_reaches_no_boundary_and_the_request_goes_on(setup: Setup) -> None:
    limit = LoadBackConfig(min_tokens=2 * setup.page_size * next_is_valid(setup), max_pages=1)
    refused(on_host(setup, load_back=limit), setup, "fewer than the minimum")


@each()
def test_no_room_on_device_and_the_request_goes_on(setup: Setup) -> None:
    refused(on_host(setup), setup, "no room on device", FULL, left=1 - next_is_valid(setup))


@pytest.mark.parametrize("busy", [False, True], ids=["", "busy"])
@each(kinds=SETS[1:])
def test_no_room_for_one_kind_and_the_request_goes_on(setup: Setup, busy: bool) -> None:
    for kind in setup.kinds:
        rig = on_host(setup)
        if busy:  # a copy is under way that may or may not make room
            rig.put(setup.prompt(50), pages=setup.nothing())
            if setup.policy is BACK:
                with rig.lease(prompt(setup)):
                    rig.evict(1)
            rig.touch(setup.prompt(50))
            assert rig.running(Copy)
        refused(rig, setup, f"no room on device for {kind}", kind)


@each()
def test_a_quota_that_reaches_a_boundary_is_no_refusal(setup: Setup) -> None:
    rig = on_host(setup, load_back=LoadBackConfig(min_tokens=0, max_pages=VALID - DEEP))
    lease = rig.lease(prompt(setup))
    load = rig.load(lease)
    assert (load.first, load.boundary) == (DEEP, VALID)
    rig.settle()
    rig.verify_windows(lease)
    rig.release(lease)
    rig.empty_out()


@pytest.mark.parametrize("how", ["fails", "is cancelled", "is overtaken"])
@each()
def test_if_it_comes_to_nothing_the_request_goes_on_too(setup: Setup, how: str) -> None:
    rig = on_host(setup)
    lease = rig.lease(prompt(setup))
    load = rig.load(lease)
    if how == "fails":
        rig.failed()
        assert (locks(rig, setup), pins(rig)) == promised(rig, setup, 1, DEEP)
    elif how == "is cancelled":
        rig.cache.cancel(load)
        rig.settle()
        lease_is = (lease.device_boundary, lease.memory_boundary)
        assert lease_is == (DEEP, memory(setup))
    assert load.state == ("pending" if how == "is overtaken" else "failed")
    goes_on(rig, setup, lease)
    assert load.state == "failed"
