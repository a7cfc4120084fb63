"""How far a path can be continued from (I8).

    FULL      ██████████████████████   every page before the boundary
    others    ·······██████····█████   what their component asks for
    valid at           │         │     and at no boundary between

`device` counts READY pages on device, `memory` those on device or host. FULL goes from the root down;
then each partial kind in turn lowers the boundary until all agree (`partial.boundary`).
"""

from __future__ import annotations

from .ledger import Ledger
from .node import Node
from .partial import boundary
from .radix import DEVICE, HOST, Radix

Reach = tuple[int, int, int, int]
"""How far a key can be continued from, in pages: (on device, in memory, FULL alone on device, FULL alone in
memory). Ascending but for the second and third, of which either may be the larger."""

NOWHERE_AT_ALL: Reach = (0, 0, 0, 0)


def reach(radix: Radix, path: list[Node], inside: int) -> Reach:
    """The reach of `path` (root to end, not empty), of whose last node only the first `inside` pages
    count. O(nodes), plus O(pages) of nodes that are not whole."""
    ledgers, end = radix.ledgers, path[-1]
    device = memory = 0
    on_device = True
    for node in path:
        pages = inside if node is end else node.pages
        lane = node.device
        if on_device:
            whole = lane.count == node.pages and not lane.filling
            ready = pages if whole else lane.ready_prefix(ledgers[DEVICE])
            if ready >= pages:
                device = memory = memory + pages
                continue
            device += ready
            on_device = False
        ready = _in_memory(ledgers, node, pages)
        memory += ready
        if ready < pages:
            break
    if not radix.partials:
        return device, memory, device, memory
    every = everywhere = boundary(radix.partials, end, device, True)
    if every < memory:
        everywhere = boundary(radix.partials, end, memory, False, every)
    return every, everywhere, device, memory


def _in_memory(ledgers: tuple[Ledger, Ledger], node: Node, pages: int) -> int:
    """How many of the first `pages` pages are READY on either tier, up to the first that is not."""
    host = node.host
    if host.slots is None:
        return min(pages, node.device.ready_prefix(ledgers[DEVICE]))
    if host.count == node.pages and not host.filling:
        return pages
    mask = host.ready_mask(ledgers[HOST])
    mask[: node.device.ready_prefix(ledgers[DEVICE])] = True
    return pages if mask[:pages].all() else int(mask[:pages].argmin())
