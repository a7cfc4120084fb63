"""What partial kinds send along when pages go to host: what makes a boundary usable, and no more.

FULL      ████████████████████████   every page of the copy
window    ······██········██████     kept pages (last window, checkpoints) that host lacks
state     ···█···█···█···█···█··█    every saved state that host lacks
"""

from __future__ import annotations

import numpy as np

from ..types import Slots
from .ledger import NODE_READY
from .node import NOWHERE, Node
from .operation import Cargo
from .partial import DEVICE, HOST, Partial
from .radix import Radix
from .thin import Thinner
from .window import spared


class Carrier:
    """Collects what goes along, and finds room for it."""

    __slots__ = ("_radix", "_thinner")

    def __init__(self, radix: Radix, thinner: Thinner) -> None:
        self._radix = radix
        self._thinner = thinner

    def cargo(self, end: Node, first: int, stop: int) -> Cargo:
        """Of the pages `first .. stop` of the path to `end`, those of partial kinds that are READY on
        device, worth keeping and not on host, as far as host has room: the last ones first. O(pages)."""
        nodes = []
        node: Node | None = end
        while node is not None and node.end > first and node.pages:
            if node.partial.unsaved:
                nodes.append(node)
            node = node.parent
        if not nodes:
            return ()
        for node in nodes:
            node.partial.unsaved = False
        found: list[tuple[Partial, Slots]] = []
        complete = True
        for kind in self._radix.partials:
            parts = [self._bare(kind, node) for node in reversed(nodes)]
            bare = np.concatenate(parts)
            wanted = bare[(bare >= first) & (bare < stop)]
            taken = self._fitting(kind, end, wanted, stop)
            complete = complete and len(taken) == len(bare)
            if len(taken):
                found.append((kind, taken))
        for node in nodes if not complete else ():
            node.partial.unsaved = True
        return found

    def leaves_behind(self, node: Node, low: int) -> bool:
        """Whether partial kinds would lose something worth keeping if the pages of `node` from `low` on left
        device now: a split under a running copy has made it so. O(1) unless something was split, then
        O(pages)."""
        return node.partial.unsaved and any(
            bool((self._bare(kind, node) >= node.start + low).any()) for kind in self._radix.partials
        )

    @staticmethod
    def _bare(kind: Partial, node: Node) -> Slots:
        """Depths of the pages of `node` that are READY on device, worth keeping and not on host."""
        device, host = kind.lane(node, DEVICE), kind.lane(node, HOST)
        if device.slots is None:
            return np.empty(0, np.int64)
        bare = device.slots >= 0
        if host.slots is not None:
            bare &= host.slots == NOWHERE
        if device.filling:
            bare &= kind.ledgers[DEVICE].book[device.slots] == NODE_READY
        inside = np.flatnonzero(bare)
        return inside[kind.kept(node, inside)] + node.start

    def _fitting(self, kind: Partial, end: Node, wanted: Slots, stop: int) -> Slots:
        """As many of the last of `wanted` as host has or can make room for without giving up what continuing
        at `stop` needs of it; what is worth something only together goes together."""
        taken = wanted
        if kind.ledgers[HOST].free < len(wanted):
            with spared(kind, end, kind.needed(stop)):
                taken = _together(kind, wanted, kind.room(HOST))
                self._thinner.room_on_host(kind, len(taken))
        kind.counters.backups_dropped += len(wanted) - len(taken)
        return taken


def _together(kind: Partial, wanted: Slots, room: int) -> Slots:
    """The most of the last of `wanted` that fit into `room` and do not begin between pages of which the
    second needs the first."""
    pages = wanted.tolist()
    for at in range(max(0, len(pages) - room), len(pages)):
        if not at or pages[at - 1] < max(pages[at] - 1, kind.since(pages[at] + 1)):
            return wanted[at:]
    return wanted[:0]
