"""Load-back: host → device for the pages between a lease's device and memory boundary.

    page      device_boundary ── x ─────────── boundary ── memory_boundary
              loading already,  │ one Copy,     │ beyond the quota or the room
              joined            │ all or nothing│

The sources are held by the lease before anything is evicted to make room. When every operation it
waits for is done the lease trades its host locks for device locks; when one fails it keeps what it
had, and the request goes on from `device_boundary`.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

from ..types import Refused, Slots
from .counters import Counters
from .lease import Lease
from .node import Hold, Node, fragments, slots_of
from .operation import Operation, Operations, Purpose
from .radix import DEVICE, EMPTY, HOST, Radix


class Progress(StrEnum):
    """How far a load-back has come."""

    PENDING = "pending"
    DONE = "done"
    FAILED = "failed"


class LoadBack:
    """One request's load-back of pages `first .. boundary`. `operations` are the numbers it waits for."""

    __slots__ = ("boundary", "first", "hold", "lease", "operations", "state", "waiting")

    def __init__(self, lease: Lease, first: int, boundary: int, hold: Hold) -> None:
        self.lease = lease
        self.first = first
        self.boundary = boundary
        self.hold = hold
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
        (`PrefixCache.layers_ready`); none once it has FAILED. O(pages)."""
        if self.state is Progress.FAILED:
            return EMPTY
        return slots_of(self.hold.end, DEVICE, self.first, self.pages)

    def __repr__(self) -> str:
        return f"LoadBack({self.state}, pages {self.first} to {self.boundary})"


class Loads:
    """Plans, starts and settles load-backs."""

    __slots__ = ("_counters", "_operations", "_radix", "_waiting", "pages_max", "pages_min")

    def __init__(
        self, radix: Radix, operations: Operations, counters: Counters, pages_min: int, pages_max: int | None
    ) -> None:
        self._radix = radix
        self._operations = operations
        self._counters = counters
        self.pages_min = pages_min
        self.pages_max = pages_max
        self._waiting: list[LoadBack] = []

    def plan(self, lease: Lease) -> int | Refused:
        """How many device slots a load-back for `lease` would take now."""
        if lease.loading is not None:
            return Refused("a load-back of this lease is under way")
        if lease.host_hold is None:
            return Refused("nothing to load: host holds no page beyond the device boundary")
        if next(fragments(lease.host_hold.end, lease.memory_boundary - 1, 1))[0].detached:
            return Refused("the leased prefix was cleared")
        boundary = self._boundary(lease)
        if boundary - lease.device_boundary < self.pages_min:
            return Refused(
                f"{boundary - lease.device_boundary} pages are fewer than the minimum of {self.pages_min}"
            )
        return boundary - self._missing_from(lease, boundary)

    def _boundary(self, lease: Lease) -> int:
        if self.pages_max is None:
            return lease.memory_boundary
        return min(lease.memory_boundary, lease.device_boundary + self.pages_max)

    def _missing_from(self, lease: Lease, boundary: int) -> int:
        """The first page without a device slot; device is prefix-closed, so all after it have none."""
        assert lease.host_hold is not None
        for node, low, _ in fragments(
            lease.host_hold.end, lease.device_boundary, boundary - lease.device_boundary
        ):
            count = node.device.count
            if count > low:
                return min(node.start + count, boundary)
        return lease.device_boundary

    def start(self, lease: Lease, now: float) -> LoadBack | Refused:
        """Load the deepest boundary that fits the quota and the free device slots. O(pages)."""
        planned = self.plan(lease)
        if isinstance(planned, Refused):
            return planned
        if self._operations.full:
            return Refused("too many operations in flight")
        radix, host = self._radix, lease.host_hold
        assert host is not None
        boundary = self._boundary(lease)
        missing = self._missing_from(lease, boundary)
        boundary = min(boundary, missing + radix.ledgers[DEVICE].free)
        if boundary - lease.device_boundary < max(self.pages_min, 1):
            return Refused("no room on device")
        end = self.node_at(host.end, boundary)
        joined = self._running(end, lease.device_boundary, boundary)
        load = LoadBack(lease, lease.device_boundary, boundary, radix.hold(end, DEVICE))
        load.waiting = joined
        if missing < boundary:
            load.waiting.add(self._copy_in(end, missing, boundary - missing, now))
        load.operations = tuple(sorted(load.waiting))
        lease.loading = load
        self._waiting.append(load)
        if not load.waiting:
            self._settle(load)
        return load

    def _running(self, end: Node, first: int, stop: int) -> set[int]:
        """Load operations that are filling device slots of these pages."""
        filling: set[int] = set()
        for node, low, high in fragments(end, first, stop - first):
            lane = node.device
            if lane.filling and lane.slots is not None:
                filling.update(lane.slots[low:high].tolist())
        if not filling:
            return set()
        loads = (each for each in self._operations.in_flight.values() if each.purpose is Purpose.LOAD_BACK)
        return {each.number for each in loads if not each.late and filling.intersection(each.target.tolist())}

    def _copy_in(self, end: Node, first: int, count: int, now: float) -> int:
        radix = self._radix
        floor = 0 if radix.host_prefix_closed else first
        holds = [radix.hold(end, DEVICE), radix.hold(end, HOST, floor)]
        pages, tiers = (end, first, count), (HOST, DEVICE)
        return self._operations.copy(Purpose.LOAD_BACK, pages, tiers, holds, now).number

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
        if old_device is not None:
            radix.unhold(old_device)
        if load.boundary == lease.memory_boundary and old_host is not None:
            lease.host_hold = None
            radix.unhold(old_host)

    def _ready(self, load: LoadBack) -> bool:
        ledger = self._radix.ledgers[DEVICE]
        for node, low, high in fragments(load.hold.end, load.first, load.pages):
            lane = node.device
            if node.detached or lane.slots is None or not np.all(lane.ready_mask(ledger)[low:high]):
                return False
        return True

    def abandon(self, load: LoadBack) -> None:
        """The request goes on without it; operations under way go on for whoever else wants them."""
        if load.state is not Progress.PENDING:
            return
        self._waiting.remove(load)
        load.state = Progress.FAILED
        load.lease.loading = None
        self._radix.unhold(load.hold)
