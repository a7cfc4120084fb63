"""Load-back: host → device for the pages between a lease's device and memory boundary.

    page      device_boundary ── missing ───── boundary ── memory_boundary
              there, or loading │ one Copy,     │ beyond the quota or the room
              already: joined   │ all or nothing│
    others    ·······················██████████                what continuing at `boundary` lacks

The sources are held by the lease before anything is evicted to make room. When every operation it
waits for is done the lease trades its host locks for device locks; when one fails it keeps what it
had, and the request goes on from `device_boundary`.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from ..types import Kind, Refused, Slots
from .counters import Counters
from .lease import Lease
from .ledger import NODE_FILLING
from .node import NOWHERE, Hold, Node, fragments, slots_of
from .operation import Cargo, Operation, Operations, Purpose
from .partial import Partial, boundary
from .radix import DEVICE, EMPTY, HOST, Radix
from .window import Pinned


class Progress(StrEnum):
    """How far a load-back has come."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class LoadBack:
    """One request's load-back of pages `first .. boundary`. `operations` are the numbers it waits for."""

    __slots__ = ("boundary", "first", "hold", "lease", "operations", "pins", "state", "waiting")

    def __init__(self, lease: Lease, first: int, boundary: int, hold: Hold, pins: list[Pinned]) -> None:
        self.lease = lease
        self.first = first
        self.boundary = boundary
        self.hold = hold
        self.pins = pins
        self.state = Progress.PENDING
        self.operations: tuple[int, ...] = ()
        self.waiting: set[int] = set()

    @property
    def pages(self) -> int:
        """How many pages it brings."""
        return self.boundary - self.first

    @property
    def slots(self) -> Slots:
        """Device slots of pages `first .. boundary`, so that a layer can be read as soon as it is there
        (`PrefixCache.layers_ready`); none once it has FAILED. An insert of the same pages by somebody else
        changes them, so ask again before each forward pass. O(pages)."""
        if self.state is Progress.FAILED:
            return EMPTY
        return slots_of(self.hold.end, DEVICE, self.first, self.pages)

    def window(self, kind: Kind) -> Slots:
        """The same for a partial kind: device slots of what continuing at `boundary` needs of it; −1 where
        somebody else's insert has brought a page that was evicted since: it will fail then."""
        pins = [each for each in self.pins if each.kind.kind == kind]
        if self.state is Progress.FAILED or not pins:
            return EMPTY
        slots = pins[0].kind.on(self.hold.end, DEVICE, pins[0].pages, filling=True)
        slots.flags.writeable = False
        return slots

    def __repr__(self) -> str:
        return f"LoadBack({self.state}, pages {self.first} to {self.boundary})"


class Plan:
    """What a load-back would do: bring FULL from page `missing` on up to `boundary`, and `cargo`."""

    __slots__ = ("boundary", "cargo", "end", "missing")

    def __init__(self, end: Node, boundary: int, missing: int, cargo: Cargo) -> None:
        self.end = end
        self.boundary = boundary
        self.missing = missing
        self.cargo = cargo


class Loads:
    """Plans, starts and settles load-backs."""

    __slots__ = ("_counters", "_operations", "_radix", "_waiting", "pages_max", "pages_min")

    def __init__(
        self, radix: Radix, operations: Operations, counters: Counters, pages_min: int, pages_max: int | None
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._counters = counters
        self.pages_min = max(pages_min, 1)
        self.pages_max = pages_max
        self._waiting: list[LoadBack] = []

    def plan(self, lease: Lease, room: int | None = None) -> Plan | Refused:
        """The deepest load-back for `lease` that the quota allows, and `room` free device slots of FULL
        (None: any number). O(pages)."""
        if lease.loading is not None:
            return Refused("a load-back of this lease is under way")
        if lease.memory_boundary == lease.device_boundary:
            return Refused("nothing to load: host holds no page beyond the device boundary")
        if lease.returned:
            return Refused("a window of this lease was released early")
        first, end = lease.device_boundary, lease.end
        assert end is not None
        if next(fragments(end, lease.memory_boundary - 1, 1))[0].detached:
            return Refused("the leased prefix was cleared")
        deepest = lease.memory_boundary
        if self.pages_max is not None and deepest > first + self.pages_max:
            deepest = self._continuable(end, first + self.pages_max, first)
        missing = self._missing_from(end, first, deepest)
        if room is not None and deepest > missing + room:
            deepest = self._continuable(end, missing + room, first)
            if deepest - first < self.pages_min:
                return Refused("no room on device")
        if deepest - first < self.pages_min:
            return Refused(f"{deepest - first} pages are fewer than the minimum of {self.pages_min}")
        cargo = [(kind, self._lacking(kind, end, deepest)) for kind in self._radix.partials]
        return Plan(end, deepest, min(missing, deepest), [each for each in cargo if len(each[1])])

    def _continuable(self, end: Node, limit: int, first: int) -> int:
        return boundary(self._radix.partials, end, max(limit, first), False, first)

    @staticmethod
    def _lacking(kind: Partial, end: Node, stop: int) -> Slots:
        """Pages (depths) that continuing at `stop` needs of `kind` and that have no slot on device."""
        pages = kind.needed(stop)
        lacking: Slots = pages[kind.on(end, DEVICE, pages, filling=True) == NOWHERE]
        return lacking

    @staticmethod
    def _missing_from(end: Node, first: int, stop: int) -> int:
        """The first page of FULL without a device slot; device is prefix-closed, so all after it have
        none."""
        for node, low, _ in fragments(end, first, stop - first):
            count = node.device.count
            if count > low:
                return min(node.start + count, stop)
        return first

    def start(self, lease: Lease, now: float) -> LoadBack | Refused:
        """Load the deepest boundary that fits the quota and the free device slots. O(pages)."""
        if self._operations.full:
            return Refused("too many operations in flight")
        plan = self.plan(lease, self._radix.ledgers[DEVICE].free)
        if isinstance(plan, Refused):
            return plan
        for kind, pages in plan.cargo:
            if kind.ledgers[DEVICE].free < len(pages):
                return Refused(f"no room on device for {kind.kind}")
        held = self.node_at(plan.end, max(plan.boundary, lease.reach))
        end = self.node_at(held, plan.boundary)
        hold = self._radix.hold(held, DEVICE)
        joined = self._running(end, lease.device_boundary, plan.boundary)
        if plan.missing < plan.boundary or plan.cargo:
            joined.add(self._copy_in(end, plan, now))
        pins = [self._pin(kind, end, plan.boundary) for kind in self._radix.partials]
        load = LoadBack(lease, lease.device_boundary, plan.boundary, hold, pins)
        load.waiting = joined
        load.operations = tuple(sorted(load.waiting))
        lease.loading = load
        self._waiting.append(load)
        if not load.waiting:
            self._settle(load)
        return load

    @staticmethod
    def _pin(kind: Partial, end: Node, stop: int) -> Pinned:
        pages = kind.needed(stop)
        return Pinned(kind, DEVICE, pages, kind.on(end, DEVICE, pages, filling=True))

    def _running(self, end: Node, first: int, stop: int) -> set[int]:
        """Load operations that are filling device slots which continuing at `stop` needs."""
        filling: set[int] = set()
        for node, low, high in fragments(end, first, stop - first):
            lane = node.device
            if lane.filling and lane.slots is not None:
                filling.update(lane.slots[low:high].tolist())
        others: dict[int, set[int]] = {}
        for kind in self._radix.partials:
            slots = kind.on(end, DEVICE, kind.needed(stop), filling=True)
            slots = slots[slots != NOWHERE]
            others[kind.index] = set(slots[kind.ledgers[DEVICE].book[slots] == NODE_FILLING].tolist())
        if not filling and not any(others.values()):
            return set()
        loads = (each for each in self._operations.in_flight.values() if each.purpose is Purpose.LOAD_BACK)
        return {
            each.number
            for each in loads
            if not each.late
            and (
                filling.intersection(each.target.tolist())
                or any(others[part.kind.index].intersection(part.target.tolist()) for part in each.parts)
            )
        }

    def _copy_in(self, end: Node, plan: Plan, now: float) -> int:
        radix, first = self._radix, plan.missing
        floor = 0 if radix.host_prefix_closed else first
        holds = [radix.hold(end, DEVICE), radix.hold(end, HOST, floor)]
        pages, tiers = (end, first, plan.boundary - first), (HOST, DEVICE)
        return self._operations.copy(Purpose.LOAD_BACK, pages, tiers, holds, now, plan.cargo).number

    def node_at(self, end: Node, depth: int) -> Node:
        """The node on the path to `end` that ends at `depth` pages; splits one if need be."""
        node = end
        while node.end - node.pages >= depth:
            assert node.parent is not None
            node = node.parent
        return self._radix.split(node, depth - node.start) if node.end > depth else node

    # -- settling -----------------------------------------------------------------------------------

    def settled(self, operation: Operation, ok: bool) -> None:
        """A load operation has ended, well or not: settle whoever waited for it."""
        if ok:
            self._counters.loaded_back += operation.count
            for part in operation.parts:
                part.kind.counters.loaded_back += len(part.pages)
        for load in [each for each in self._waiting if operation.number in each.waiting]:
            load.waiting.discard(operation.number)
            if not load.waiting or not ok:
                self._settle(load)

    def _settle(self, load: LoadBack) -> None:
        """All it waited for has ended, or something has failed: whether it is done shows in the pages."""
        if not self._ready(load):
            self.abandon(load)
            return
        self._waiting.remove(load)
        radix, lease = self._radix, load.lease
        load.state = Progress.DONE
        lease.loading = None
        old_device, old_host = lease.device_hold, lease.host_hold
        lease.device_hold = load.hold
        lease.device_boundary = load.boundary
        lease.reach = max(lease.reach, load.boundary)
        lease.pin_windows(radix.partials)
        for pinned in load.pins:
            pinned.unpin(load.hold.end)
        if load.boundary == lease.memory_boundary:
            lease.unpin_beyond(old_host.end if old_host is not None else load.hold.end)
            lease.host_hold = None
            if old_host is not None:
                radix.unhold(old_host)
        if old_device is not None:
            radix.unhold(old_device)

    def _ready(self, load: LoadBack) -> bool:
        ledger, end = self._radix.ledgers[DEVICE], load.hold.end
        for node, low, high in fragments(end, load.first, load.pages):
            lane = node.device
            if node.detached or lane.slots is None or not np.all(lane.ready_mask(ledger)[low:high]):
                return False
        return all(
            (kind.on(end, DEVICE, kind.needed(load.boundary)) != NOWHERE).all()
            for kind in self._radix.partials
        )

    def abandon(self, load: LoadBack) -> None:
        """The request goes on without it; operations under way go on for whoever else wants them."""
        if load.state is not Progress.PENDING:
            return
        self._waiting.remove(load)
        load.state = Progress.FAILED
        load.lease.loading = None
        for pinned in load.pins:
            pinned.unpin(load.hold.end)
        self._radix.unhold(load.hold)
