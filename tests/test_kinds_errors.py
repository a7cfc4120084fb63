"""Bad input about kinds raises a named error and changes nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from kinds import Chunked, each_set
from rig import Rig, books
from test_kinds import PROMPT, Kinds, rig_of

from tiertree import (
    FULL,
    CacheConfig,
    ConfigError,
    DeviceConfig,
    ForeignObject,
    HostConfig,
    InvalidSlots,
    KindConfig,
    KVLayout,
    LeaseReleased,
    Mamba,
    Refused,
    SidecarConfig,
    SlidingWindow,
    Tier,
)
from tiertree.types import Kind, Slots

NOBODY = Kind("nobody")
MORE = [*PROMPT, 8, 9]


def slots(*given: int) -> Slots:
    return np.array(given, np.int64)


def wrong_entries(rig: Rig, kind: Kind, mine: Slots) -> dict[str, Any]:
    """What may be wrong with the slots of one kind for two pages, of which `mine` are two good ones."""
    first, second = mine.tolist()
    theirs = rig.cache.allocate(1, kind=kind).tolist()[0]
    in_tree = rig.map(PROMPT, kind).index("D")
    node_slot = rig.core.radix.walk(rig.cache.key(PROMPT))[0][0]
    taken = int(rig.lane(node_slot, Tier.DEVICE, kind).slots[in_tree])
    return {
        "one entry too few": slots(first),
        "one entry too many": slots(first, second, -1),
        "somebody else's": slots(first, theirs),
        "the tree's": slots(taken, second),
        "named twice": slots(first, first),
        "negative": slots(first, -2),
        "too large": slots(first, 10_000),
        "not 64 bits wide": np.array([first, second], np.int32),
        "not whole": np.array([first, second], np.float64),
        "two-dimensional": np.array([[first, second]], np.int64),
        "a list": [first, second],
        "nothing at all": None,
    }


@each_set
def test_slots_of_a_kind_that_are_not_right_are_refused(kinds: Kinds) -> None:
    for kind in kinds:
        rig = rig_of(kinds, device=16)
        rig.put(PROMPT)
        lease = rig.lease(PROMPT)
        key = rig.cache.key(MORE)
        full, mine = rig.cache.allocate(2, lease), rig.cache.allocate(2, lease, kind=kind)
        for what, wrong in wrong_entries(rig, kind, mine).items():
            before = books(rig)
            with pytest.raises(InvalidSlots, match=re.escape(kind)):
                rig.cache.insert(key, full, lease, partial={kind: wrong})
            assert books(rig) == before, what
        rig.cache.check()
        rig.write(full, MORE, "", 8)
        rig.write(mine, MORE, "", 8, kind)
        rig.cache.insert(key, full, lease, partial={kind: mine})  # and the right ones are taken after all
        rig.verify(lease, MORE)
        rig.cache.check()


@each_set
def test_slots_of_one_kind_are_not_slots_of_another(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    kind = kinds[0]
    full, mine = rig.cache.allocate(2), rig.cache.allocate(4, kind=kind)
    before = books(rig)
    with pytest.raises(InvalidSlots):
        rig.cache.free(mine[2:])
    with pytest.raises(InvalidSlots):
        rig.cache.insert(rig.cache.key([1, 2]), mine[2:], partial={kind: mine[:2]})
    assert books(rig) == before
    rig.cache.free(full)
    rig.cache.free(mine, kind=kind)
    with pytest.raises(InvalidSlots):
        rig.cache.free(mine, kind=kind)
    rig.cache.check()


@each_set
def test_a_kind_that_is_left_out_brings_nothing(kinds: Kinds) -> None:
    rig = rig_of(kinds)
    key = rig.cache.key(PROMPT)
    full = rig.cache.allocate(8)
    rig.write(full, PROMPT, "", 0)
    rig.cache.insert(key, full)
    assert (rig.map(PROMPT), rig.where(PROMPT)) == ("DDDDDDDD", (0, 0))
    assert all(rig.map(PROMPT, kind) == "........" for kind in kinds)


CALLS: dict[str, Callable[[Rig, Any, Kind], object]] = {
    "allocate": lambda rig, lease, kind: rig.cache.allocate(1, lease, kind=kind),
    "free": lambda rig, lease, kind: rig.cache.free(slots(), lease, kind=kind),
    "evict": lambda rig, lease, kind: rig.cache.evict(1, kind=kind),
    "window": lambda rig, lease, kind: lease.window(kind),
    "release_window": lambda rig, lease, kind: rig.cache.release_window(lease, kind),
    "copy_on_write": lambda rig, lease, kind: rig.cache.copy_on_write(lease, kind),
    "insert": lambda rig, lease, kind: rig.cache.insert(
        rig.cache.key(PROMPT), slots(), lease, partial={kind: slots()}
    ),
}


@each_set
@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_kind_is_refused(kinds: Kinds, call: str) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    before = books(rig)
    with pytest.raises(ForeignObject, match="nobody"):
        CALLS[call](rig, lease, NOBODY)
    assert books(rig) == before


@each_set
@pytest.mark.parametrize("call", ["window", "release_window", "copy_on_write", "insert"])
def test_full_has_no_window(kinds: Kinds, call: str) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    before = books(rig)
    with pytest.raises(ForeignObject, match=FULL):
        CALLS[call](rig, lease, FULL)
    assert books(rig) == before


@each_set
@pytest.mark.parametrize("call", ["window", "release_window", "copy_on_write", "allocate"])
def test_a_released_lease_is_good_for_nothing(kinds: Kinds, call: str) -> None:
    rig = rig_of(kinds)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    lease.release()
    before = books(rig)
    for kind in kinds:
        with pytest.raises(LeaseReleased):
            CALLS[call](rig, lease, kind)
    assert books(rig) == before


@each_set
@pytest.mark.parametrize("call", ["release_window", "copy_on_write"])
def test_another_caches_lease_is_refused(kinds: Kinds, call: str) -> None:
    rig, other = rig_of(kinds), rig_of(kinds)
    other.put(PROMPT)
    lease = other.lease(PROMPT)
    before = books(rig), books(other)
    with pytest.raises(ForeignObject):
        CALLS[call](rig, lease, kinds[0])
    assert (books(rig), books(other)) == before


@each_set
def test_an_insert_that_is_refused_leaves_the_slots_of_every_kind_with_the_request(kinds: Kinds) -> None:
    rig = rig_of(kinds, device=16)
    rig.put(PROMPT)
    lease = rig.lease(PROMPT)
    full = rig.cache.allocate(2, lease)
    partial = {kind: rig.cache.allocate(2, lease, kind=kind) for kind in kinds}
    rig.cache.clear()
    before = books(rig)
    assert isinstance(rig.cache.insert(rig.cache.key(MORE), full, lease, partial=partial), Refused)
    assert books(rig) == before
    for kind in kinds:
        rig.cache.free(partial[kind], lease, kind=kind)
    rig.cache.check()
    lease.release()
    assert all(rig.free(kind=kind) == 16 for kind in (FULL, *kinds))
    rig.cache.check()


@each_set
def test_clear_takes_every_kind_and_leaves_what_is_leased_readable(kinds: Kinds) -> None:
    rig = rig_of(kinds, host=8)
    rig.put(PROMPT)
    rig.settle()
    lease = rig.lease(PROMPT)
    rig.cache.clear()
    assert rig.where(PROMPT) == (0, 0)
    rig.verify(lease, PROMPT)
    rig.verify_windows(lease)
    rig.cache.check()
    for kind in kinds:
        assert rig.free(kind=kind) == 8 - len(rig.needed(kind, 8))
    lease.release()
    for kind in (FULL, *kinds):
        assert (rig.free(kind=kind), rig.free(Tier.HOST, kind)) == (8, 8)
        assert not rig.mirror(Tier.DEVICE, kind)
        assert not rig.mirror(Tier.HOST, kind)
    rig.cache.check()


# -- configuration ----------------------------------------------------------------------------------------

ONE = KindConfig(rules=Mamba(), device=4)
WRONG: dict[str, dict[str, object]] = {
    "kinds[1].rules.kind": {"kinds": (ONE, ONE)},
    "kinds[0].rules.kind": {"kinds": (KindConfig(rules=Mamba(name=FULL), device=4),)},
    "kinds[0].rules.grid_tokens": {"kinds": (KindConfig(rules=Mamba(grid_tokens=3), device=4),)},
    "kinds[0].rules.checkpoint_tokens": {
        "kinds": (KindConfig(rules=SlidingWindow(window=2, checkpoint_tokens=3), device=4),)
    },
    "kinds[0].host": {"kinds": (ONE,), "host": HostConfig(size=8)},
    "kinds[0]": {"kinds": ("mamba",)},
    "kinds": {"kinds": [ONE]},
}


@pytest.mark.parametrize("field", WRONG)
def test_kinds_that_cannot_work_are_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(device=DeviceConfig(size=8), page_size=2, **WRONG[field])
    assert str(caught.value).startswith(f"{field}:")
    assert "allowed:" in str(caught.value) or "required:" in str(caught.value)


def test_rules_are_rules() -> None:
    for wrong in (None, "mamba", Mamba, object()):
        with pytest.raises(ConfigError, match=r"^rules: .*allowed: "):
            KindConfig(rules=wrong, device=4)
    with pytest.raises(ConfigError, match=r"^rules\.kind: .*allowed: "):
        KindConfig(rules=Chunked(pages=2, kind=Kind("No Name")), device=4)


def test_a_sidecar_rides_on_a_kind_that_is_there() -> None:
    layout = KVLayout(layers=1, kv_heads=1, head_size=4, dtype="float32", page_size=2)
    with pytest.raises(ConfigError, match=r"^sidecars\[0\]\.kind: "):
        CacheConfig(
            device=DeviceConfig(size=8),
            page_size=2,
            layout=layout,
            sidecars=(SidecarConfig(name="draft", layout=layout, kind=NOBODY),),
        )
