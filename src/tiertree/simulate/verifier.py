"""Whether what a lease lets a request read is what it must be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..pools.group import PoolGroup
from ..tree.load import LoadBack
from ..types import FULL, Kind, Slots
from .content import Contents
from .request import Request


class Found(Exception):
    """A violation: `kind` is the sort of it, the same for the same fault in other runs."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


class Verifier:
    """Compares for one engine, whose cache has `kinds` beside FULL. Every method raises Found."""

    def __init__(self, contents: Contents, kinds: Sequence[Kind]) -> None:
        self._contents = contents
        self._kinds = kinds
        self._device: PoolGroup

    def adopt(self, device: PoolGroup) -> None:
        """Go on with a cache whose device pools these are."""
        self._device = device

    def leave(self) -> None:
        """Let go of them."""
        del self._device

    def lease(self, request: Request) -> None:
        """Everything that the lease of `request` lets it read. O(pages)."""
        lease = request.lease
        assert lease is not None
        self.pages(request, FULL, lease.slots, range(lease.device_boundary), "a hit")
        for kind in self._kinds:
            if kind in lease.returned or not lease.device_boundary:
                continue
            window = lease.window(kind)
            there = np.flatnonzero(window.slots >= 0)
            pages = [window.first + at for at in there.tolist()]
            self.pages(request, kind, window.slots[there], pages, "a window")

    def pages(self, request: Request, kind: Kind, slots: Slots, pages: Sequence[int], what: str) -> None:
        """Device slots of `kind` hold these pages of the request's tokens."""
        if len(slots) != len(pages):
            raise Found("short hit", f"{what} of {kind}: {len(slots)} slots for pages {list(pages)}")
        digests = self._digests(request, max(pages, default=-1) + 1)
        wrong = self._contents.wrong(self._device, kind, slots, [digests[page] for page in pages])
        if wrong:
            found = [pages[at] for at in wrong]
            raise Found("wrong page", f"{what} of request {request.number}: {kind} pages {found}")

    def layers(self, request: Request, load: LoadBack, layers: int) -> None:
        """The leading layers of a load-back under way are there."""
        digests = self._digests(request, load.boundary)[load.first :]
        wrong = self._contents.wrong_layers(self._device, load.slots, digests, layers)
        if wrong:
            raise Found("wrong layer", f"of {load}, {layers} layers are said to be ready: pages {wrong}")

    def _digests(self, request: Request, stop: int) -> list[bytes]:
        ask = request.ask
        return self._contents.chain(ask.tokens, ask.namespace, request.revision, stop)
