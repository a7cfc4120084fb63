"""FULL attention: a boundary is valid when every page before it is there (I8)."""

from __future__ import annotations

from ..tree.ledger import Ledger
from ..tree.node import Node
from ..types import FULL


class FullComponent:
    """The rules of full attention. Its lanes are the spine of the tree."""

    kind = FULL

    __slots__ = ("_device", "_host")

    def __init__(self, ledgers: tuple[Ledger, Ledger]) -> None:
        self._device, self._host = ledgers

    def reach(self, path: list[Node], inside: int) -> tuple[int, int]:
        """How far `path` can be continued from on device, and in memory at large, in pages; only the
        first `inside` pages of its last node count. READY pages only. O(nodes), plus O(pages) of a
        node that is not whole on one tier."""
        device = memory = 0
        on_device = True
        last = path[-1] if path else None
        for node in path:
            pages = inside if node is last else node.pages
            lane = node.device
            if on_device:
                ready = (
                    pages
                    if lane.count == node.pages and not lane.filling
                    else lane.ready_prefix(self._device)
                )
                if ready >= pages:
                    device = memory = memory + pages
                    continue
                device += ready
                on_device = False
            ready = self._in_memory(node, pages)
            memory += ready
            if ready < pages:
                break
        return device, memory

    def _in_memory(self, node: Node, pages: int) -> int:
        """How many of the first `pages` pages are READY on either tier, up to the first that is not."""
        host = node.host
        if host.slots is None:
            return min(pages, node.device.ready_prefix(self._device))
        if host.count == node.pages and not host.filling:
            return pages
        mask = host.ready_mask(self._host)
        mask[: node.device.ready_prefix(self._device)] = True
        return pages if mask[:pages].all() else int(mask[:pages].argmin())
