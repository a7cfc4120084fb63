"""The invariants of partial kinds, beside those of FULL in `check.py`."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .core import Core
from .ledger import NODE_FILLING, NODE_READY, REQUEST_FILLING, State
from .node import NO_PARTIALS, UNKNOWN, Node, subtree
from .partial import Partial, boundary
from .radix import DEVICE, HOST, LANES

Findings = Iterator[str]


def _each(core: Core) -> Iterator[tuple[Partial, Node]]:
    for kind in core.radix.partials:
        for root in core.radix.roots.values():
            yield from ((kind, node) for node in subtree(root))


def presence(core: Core) -> Findings:
    """I2: a partial kind is on device only where FULL is, and READY only where FULL is (on host FULL is in
    memory anyway)."""
    for kind, node in _each(core):
        slots = kind.lane(node, DEVICE).slots
        if slots is None:
            continue
        if (slots[node.device.count :] >= 0).any():
            yield f"{node} has {kind.kind} on device where FULL is not"
        beyond = slots[node.device.ready_prefix(core.radix.ledgers[DEVICE]) :]
        if (kind.ledgers[DEVICE].book[beyond[beyond >= 0]] == NODE_READY).any():
            yield f"{node} has {kind.kind} READY on device where FULL is not"
    if NO_PARTIALS or NO_PARTIALS.dead != UNKNOWN or NO_PARTIALS.unsaved:
        yield "the stand-in for nodes without partial kinds was written to"


def candidates(core: Core) -> Findings:
    """I7: whatever is unleased and unpinned can be found by eviction, at any position."""
    for kind, node in _each(core):
        for tier in LANES:
            if len(kind.evictable(node, tier)) and not kind.lane(node, tier).ticket:
                yield f"{kind.kind} of {node} may go from {tier.name} and is not queued"


def boundaries(core: Core) -> Findings:
    """I8: what leases rely on is READY and pinned, at the boundaries that they were promised."""
    for lease in core.leases.values():
        for kind in core.radix.partials:
            if kind.kind in lease.returned:
                continue
            window = lease.windows[kind.kind].slots
            held = window[window >= 0]
            book, pins = kind.ledgers[DEVICE].book, kind.ledgers[DEVICE].pins
            if (book[held] >> 2 != State.READY).any() or not (pins[held] > 0).all():
                yield f"{lease} relies on {kind.kind} that is not READY, or not pinned"
            beyond = [each for each in lease.beyond if each.kind is kind]
            if lease.memory_boundary > lease.device_boundary:
                wanted = kind.needed(lease.memory_boundary)
                have = np.sort(np.concatenate([np.empty(0, np.int64), *(each.pages for each in beyond)]))
                if not np.array_equal(wanted, have):
                    yield f"{lease} lacks {kind.kind} for its memory boundary"
            for each in beyond:
                if (kind.ledgers[each.tier].book[each.slots] >> 2 != State.READY).any():
                    yield f"{lease} was promised {kind.kind} on {each.tier.name} that is not READY"


def counters(core: Core) -> Findings:
    """I11: the counters equal the sums, per kind and tier; what is remembered of a node is true."""
    for kind in core.radix.partials:
        for tier in LANES:
            resident = 0
            for root in core.radix.roots.values():
                for node in subtree(root):
                    yield from _lane(kind, node, tier)
                    resident += kind.lane(node, tier).count
            if resident != kind.resident[tier]:
                yield f"{kind.kind} on {tier.name}: {kind.resident[tier]} counted, {resident} resident"
    for root in core.radix.roots.values() if core.radix.partials else ():
        for node in subtree(root):
            alive = boundary(core.radix.partials, node, node.end, False, node.start)
            if node.partial.dead not in (UNKNOWN, node.end - alive):
                yield f"{node} counts {node.partial.dead} dead pages, {node.end - alive} are"


def _lane(kind: Partial, node: Node, tier: int) -> Findings:
    lane, book = kind.lane(node, tier), kind.ledgers[tier].book
    held = lane.slots[lane.slots >= 0] if lane.slots is not None else np.empty(0, np.int64)
    filling = int(np.count_nonzero(book[held] == NODE_FILLING))
    if lane.count != len(held) or lane.filling != filling or (lane.slots is not None and not len(held)):
        yield f"{node} counts {lane.count}, {lane.filling} FILLING of {kind.kind}: there are {len(held)}"
    if lane.locks or lane.below:
        yield f"{node} has locks, or subtrees counted, for {kind.kind}"
    bare = tier == DEVICE and _host_lacks(kind, node)
    if bare and not node.partial.unsaved:
        yield f"{node} has {kind.kind} that host should have and lacks, and does not say so"


def _host_lacks(kind: Partial, node: Node) -> bool:
    """Whether `node` has pages READY on device that are worth keeping and have no slot on host."""
    device, host = kind.lane(node, DEVICE).slots, kind.lane(node, HOST).slots
    if device is None:
        return False
    ready = (device >= 0) & (kind.ledgers[DEVICE].book[device] == NODE_READY)
    bare = np.flatnonzero(ready if host is None else ready & (host < 0))
    return bool(kind.kept(node, bare).any())


def quiescence(core: Core) -> Findings:
    """I12: with nothing in flight and nothing held, every slot is free or a READY page of a node."""
    for kind in core.radix.partials:
        for tier in LANES:
            ledger = kind.ledgers[tier]
            if ledger.free + kind.resident[tier] != ledger.capacity or (ledger.pins > 0).any():
                yield f"{kind.kind} on {tier.name}: not everything could be evicted"
            if (ledger.book == NODE_FILLING).any() or (ledger.book == REQUEST_FILLING).any():
                yield f"{kind.kind} on {tier.name}: a slot is FILLING though nothing is in flight"
