"""The invariants I1–I12 of ARCHITECTURE.md, one function each, recomputed from scratch and compared.

`audit(core)` runs them all, O(everything), and raises InvariantViolated with every sentence that is
not true. Nothing here is used by the tree itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from ..types import FULL, InvariantViolated, Slots, Tier
from . import check_partial
from .core import Core
from .ledger import NODE_FILLING, NODE_READY, REQUEST_FILLING, Ledger, Owner, State
from .node import ABSENT, NO_CHILDREN, Hold, Lane, Node, subtree
from .operation import Purpose
from .radix import DEVICE, HOST, LANES
from .victims import Victims

Findings = Iterator[str]


def audit(core: Core) -> None:
    """Raise InvariantViolated unless every invariant holds."""
    found = [
        f"{name}: {finding}" for name, rules in INVARIANTS.items() for rule in rules for finding in rule(core)
    ]
    if found:
        raise InvariantViolated("\n".join(found))


def nodes_of(core: Core) -> list[Node]:
    """Every node of the tree, parents before children."""
    return [node for root in core.radix.roots.values() for node in subtree(root)]


def state_of(core: Core, tier: Tier, node: Node) -> list[int]:
    """Per page of `node` the state of its slot on `tier`, −1 where it has none."""
    slots = node.lane(tier).slots
    if slots is None:
        return [-1] * node.pages
    return [-1 if slot < 0 else int(core.radix.ledgers[tier].book[slot]) >> 2 for slot in slots.tolist()]


def structure(core: Core) -> Findings:
    """I1: siblings differ in their first page; no node but a root is empty; parent and child agree."""
    size = core.radix.keys.page_bytes
    for name, root in core.radix.roots.items():
        if not root.children:
            yield f"root of {name!r} has no pages"
        for node in [root, *subtree(root)]:
            for first, child in node.children.items():
                if child.parent is not node or child.edge[:size] != first or child.start != node.end:
                    yield f"{node} and its child {child} do not agree"
                if not child.pages or len(child.edge) != child.pages * size or child.detached:
                    yield f"{child} is empty, torn or detached"
                for lane in (*child.lanes, *child.partial):
                    if lane.slots is not None and len(lane.slots) != child.pages:
                        yield f"{child} has slots for {len(lane.slots)} pages"
    if NO_CHILDREN:
        yield "the children of all leaves were written to"
    if core.radix.nodes != len(nodes_of(core)):
        yield f"{core.radix.nodes} nodes are counted, {len(nodes_of(core))} are there"


def presence(core: Core) -> Findings:
    """I2: every page has FULL data READY or FILLING on device or host."""
    for node in nodes_of(core):
        states = zip(state_of(core, DEVICE, node), state_of(core, HOST, node), strict=True)
        if any(State.READY not in both and State.FILLING not in both for both in states):
            yield f"{node} has a page that is nowhere"


def _prefix_closed(core: Core, tier: Tier) -> Findings:
    for node in nodes_of(core):
        assert node.parent is not None
        states = state_of(core, tier, node)
        parents = state_of(core, tier, node.parent)[-1:] or [int(State.READY)]
        for before, page in zip(parents + states, states, strict=False):
            if page >= 0 and before < 0:
                yield f"{node} has a page on {tier.name} behind one that is not there"
            if page == State.READY and before != State.READY:
                yield f"{node} has a page READY on {tier.name} behind one that is not"


def device_closed(core: Core) -> Findings:
    """I3: FULL on device is prefix-closed, READY pages among themselves too."""
    yield from _prefix_closed(core, DEVICE)


def host_closed(core: Core) -> Findings:
    """I4: under the write-through policies FULL on host is prefix-closed too."""
    if core.radix.host_prefix_closed:
        yield from _prefix_closed(core, HOST)


def conservation(core: Core) -> Findings:
    """I5: free + nodes' + requests' + operations' + LOST = capacity; no slot has two owners."""
    nodes = [*nodes_of(core), *core.radix.detached]
    for tier in LANES:
        lanes = [node.lane(tier) for node in nodes]
        yield from _conserved(tier.name, core.radix.ledgers[tier], lanes)
        for kind in core.radix.partials:
            lanes = [kind.lane(node, tier) for node in nodes]
            yield from _conserved(f"{kind.kind} on {tier.name}", kind.ledgers[tier], lanes)


def _conserved(name: str, ledger: Ledger, lanes: list[Lane]) -> Findings:
    owned = [lane.slots[lane.slots >= 0] for lane in lanes if lane.slots is not None]
    slots = np.concatenate(owned) if owned else np.empty(0, np.int64)
    if len(np.unique(slots)) != len(slots):
        yield f"a slot of {name} is in two places of the tree"
    in_books = set(np.flatnonzero((ledger.book & 3) == Owner.NODE).tolist())
    if in_books != set(slots.tolist()):
        yield f"{name}: nodes have {len(slots)} slots, the ledger says {len(in_books)}"
    stack = ledger.free_slots()
    if len(set(stack)) != len(stack) or any(ledger.book[slot] for slot in stack):
        yield f"{name}: the free list names a slot twice, or one that is not free"
    if ((ledger.tags != 0) != ((ledger.book & 3) == Owner.REQUEST)).any():
        yield f"{name}: a slot has a tag and no request, or the other way round"
    if ledger.count(State.FREE) != ledger.free or len(stack) != ledger.free:
        yield f"{name}: {ledger.free} slots are counted free, {ledger.count(State.FREE)} are"


def all_pins(core: Core) -> Iterator[tuple[Ledger, Slots]]:
    """Every array of slots that something has pinned, with its books: operations in flight, prefetches
    that wait to land, and of partial kinds leases and load-backs."""
    for operation in core.operations.in_flight.values():
        yield from core.operations.named(operation)
    for prefetch in core.landing.waiting:
        yield core.radix.ledgers[HOST], prefetch.parcel
        yield from ((part.kind.ledgers[HOST], part.target) for part in prefetch.parts)
    for lease in core.leases.values():
        pins = [*lease.pins.values(), *lease.beyond, *(lease.loading.pins if lease.loading else ())]
        yield from ((pinned.kind.ledgers[pinned.tier], pinned.slots) for pinned in pins)


def pins_and_locks(core: Core) -> Findings:
    """I6: what is leased or pinned is not free, and pins and locks are exactly those of operations,
    leases and load-backs."""
    ledgers = [(FULL, tier, core.radix.ledgers[tier]) for tier in LANES]
    ledgers += [(kind.kind, tier, kind.ledgers[tier]) for kind in core.radix.partials for tier in LANES]
    for name, tier, ledger in ledgers:
        pins = np.zeros(ledger.capacity, np.int64)
        for books, slots in all_pins(core):
            if books is ledger:
                np.add.at(pins, slots, 1)
        if not np.array_equal(pins, ledger.pins):
            yield f"{name} on {tier.name}: the pins are not those of what is in flight and leased"
        pinned = np.count_nonzero(ledger.pins[(ledger.book & 3) == Owner.NODE])
        if ledger.pinned != pinned:
            yield f"{name} on {tier.name}: {ledger.pinned} pinned slots of nodes are counted, {pinned} are"
        if (ledger.book[ledger.pins > 0] == 0).any():
            yield f"{name} on {tier.name}: a pinned slot is free"
    locks: Counter[tuple[Node, int]] = Counter()
    for hold in all_holds(core):
        node: Node | None = hold.end
        while node is not None and node.end > hold.floor:
            locks[node, hold.lane] += 1
            node = node.parent
    for node in [*nodes_of(core), *core.radix.detached]:
        for tier in LANES:
            have, held = node.lane(tier).locks, locks[node, tier]
            if have != held:
                yield f"{node} has {have} locks on {tier.name}, {held} are held"


def all_holds(core: Core) -> Iterator[Hold]:
    """Every hold there is: of leases, of their load-backs, of operations."""
    for lease in core.leases.values():
        yield from (hold for hold in (lease.device_hold, lease.host_hold) if hold is not None)
        if lease.loading is not None:
            yield lease.loading.hold
    for operation in core.operations.in_flight.values():
        yield from operation.holds


def candidates(core: Core) -> Findings:
    """I7: exactly the nodes whose tail may go can be found by eviction."""
    for tier in LANES:
        yield from _ordered(core.radix.victims[tier])
        queued = set(core.radix.victims[tier].items())
        if len(queued) != core.radix.victims[tier].live:
            yield f"{tier.name}: {len(queued)} candidates are queued, another number is counted"
        for node in nodes_of(core):
            lane = node.lane(tier)
            if lane.count and not lane.locks and not lane.below and node not in queued:
                yield f"{node} may go from {tier.name} and is not queued"
    if core.radix.host_prefix_closed:
        return
    for node in nodes_of(core):
        both = zip(state_of(core, DEVICE, node), state_of(core, HOST, node), strict=True)
        duplicate = any(pair == (State.READY, State.READY) for pair in both)
        if duplicate and not node.host.locks and node not in core.radix.duplicates:
            yield f"{node} has duplicates that eviction would not find"


def _ordered(victims: Victims) -> Findings:
    """Whoever is to go first comes up first: no entry has a higher score than its node."""
    for node, queued, now in victims.scores():
        if queued > now:
            yield f"{node} is queued for eviction with {queued} and would be with {now}"


def boundaries(core: Core) -> Findings:
    """I8: what a lease was promised is READY: on device before its device boundary, on device or host
    before its memory boundary."""
    for lease in core.leases.values():
        for hold, stop, tier in (
            (lease.device_hold, lease.reach, DEVICE),
            (lease.host_hold, lease.memory_boundary, HOST),
        ):
            node = hold.end if hold is not None else None
            while node is not None and node.pages:
                first = lease.reach if tier == HOST else 0
                pages = range(max(first - node.start, 0), min(stop - node.start, node.pages))
                slots = node.lane(tier).slots
                book = core.radix.ledgers[tier].book
                if any(slots is None or slots[page] < 0 or book[slots[page]] != NODE_READY for page in pages):
                    yield f"{lease} was promised pages of {node} on {tier.name} that are not READY"
                node = node.parent


def order(core: Core) -> Findings:
    """I9: page hashes, by which events name pages, are chained right wherever they are known."""
    hashes = core.radix.hashes
    for node in nodes_of(core):
        if node.hashes:
            known = node.edge[: len(node.hashes) // 32 * core.radix.keys.page_bytes]
            if hashes.chain(hashes.before(node), known) != node.hashes:
                yield f"{node} carries wrong page hashes"


def demotion(core: Core) -> Findings:
    """I10: while a page is being demoted its device slot still holds the bytes."""
    book = core.radix.ledgers[DEVICE].book
    for operation in core.operations.in_flight.values():
        if operation.purpose is not Purpose.DEMOTE:
            continue
        for part in operation.parts:
            if (part.kind.ledgers[DEVICE].book[part.source] >> 2 != State.READY).any():
                yield f"operation {operation.number} demotes {part.kind.kind} that is not READY on device"
        if (book[operation.source] >> 2 != State.READY).any():
            yield f"operation {operation.number} demotes a page that is not READY on device"


def counters(core: Core) -> Findings:
    """I11: the counters equal the sums, per tier; what may be evicted is reclaimable."""
    for tier in LANES:
        lanes = [node.lane(tier) for node in nodes_of(core)]
        for node in nodes_of(core):
            lane, states = node.lane(tier), state_of(core, tier, node)
            if lane.count != sum(state >= 0 for state in states):
                yield f"{node} counts {lane.count} pages on {tier.name}"
            if lane.filling != states.count(State.FILLING):
                yield f"{node} counts {lane.filling} FILLING pages on {tier.name}"
            if lane.below != sum(child.lane(tier).occupied for child in node.children.values()):
                yield f"{node} counts {lane.below} subtrees with pages on {tier.name}"
        resident = sum(lane.count for lane in lanes)
        protected = sum(lane.count for lane in lanes if lane.locks)
        counted = (core.radix.resident[tier], core.radix.protected[tier])
        if (resident, protected) != counted:
            yield f"{tier.name}: resident, protected are {(resident, protected)}, counted {counted}"
    if ABSENT.count or ABSENT.below or ABSENT.locks or ABSENT.slots is not None:
        yield "the stand-in for an absent tier was written to"


def quiescence(core: Core) -> Findings:
    """I12: with nothing in flight and nothing held, every slot is free or a READY page of a node that
    may go."""
    if not quiet(core):
        return
    for tier in LANES:
        ledger = core.radix.ledgers[tier]
        if ledger.free + core.radix.resident[tier] != ledger.capacity or core.radix.protected[tier]:
            yield f"{tier.name}: not everything could be evicted though nothing is in flight or leased"
        if (ledger.book == NODE_FILLING).any() or (ledger.book == REQUEST_FILLING).any():
            yield f"{tier.name}: a slot is FILLING though nothing is in flight"
    if core.radix.detached:
        yield f"{len(core.radix.detached)} detached nodes are left though nobody holds them"


def quiet(core: Core) -> bool:
    """Whether nothing is in flight, leased, waiting to land, or in the hands of a request."""
    ledgers = [*core.radix.ledgers, *(ledger for kind in core.radix.partials for ledger in kind.ledgers)]
    requests = any(ledger.count(owner=Owner.REQUEST) for ledger in ledgers)
    return not (core.leases or core.operations.in_flight or requests or core.landing.waiting)


def partial_quiescence(core: Core) -> Findings:
    """I12 for partial kinds."""
    if quiet(core):
        yield from check_partial.quiescence(core)


INVARIANTS: dict[str, tuple[Callable[[Core], Findings], ...]] = {
    "I1": (structure,),
    "I2": (presence, check_partial.presence),
    "I3": (device_closed,),
    "I4": (host_closed,),
    "I5": (conservation,),
    "I6": (pins_and_locks,),
    "I7": (candidates, check_partial.candidates),
    "I8": (boundaries, check_partial.boundaries),
    "I9": (order,),
    "I10": (demotion,),
    "I11": (counters, check_partial.counters),
    "I12": (quiescence, partial_quiescence),
}
