"""The seam for kinds of attention state that need only a part of a prefix.

FULL needs every page before a boundary and is the spine of the tree. Every other kind (a *partial*
kind) is described by a few questions, and the tree does the rest:

    pages          0 ···················· since(b) ········· b
    FULL           ████████████████████████████████████████  all of them
    partial kind   ····················· ██████████████████  only these; what is before them may be gone

A kind is a frozen object that answers in pages and knows nothing of nodes, slots or tiers, so one that
is made elsewhere works as well as those that come with tiertree (see `KindConfig`); whether it keeps
what is promised here, `tiertree.testing.conformance.check_component` finds out.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from ..types import Kind

Pages = NDArray[np.int64]
"""Page indices counted from the start of the prompt, ascending."""


@runtime_checkable
class Component(Protocol):
    """The rules of one partial kind. Pure, and hashable."""

    @property
    def kind(self) -> Kind:
        """Its name: part of storage keys and events, unique in a cache."""
        ...

    @property
    def per_path(self) -> int | None:
        """How many of its pages one path may have on device; None: any number."""
        ...

    def since(self, boundary: int, page_size: int) -> int:
        """The first page that a request continuing at `boundary` (≥ 1) reads: it needs all pages
        `since .. boundary` of this kind, and no others. 0 ≤ since < boundary; never smaller for a larger
        boundary."""
        ...

    def kept(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """Which of `pages`, of a node that ends before page `end`, are worth a place on host and storage.
        Each page is judged by itself, and those from since(end) on are kept, unless `end` is off the
        grid."""
        ...

    def cold(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """Which of `pages`, all that such a node could let go, go before those of any other node; the last
        ones needed for a hit at its end age with it. At least those that are not kept."""
        ...

    def grid(self, page_size: int) -> int:
        """Boundaries at which a state of this kind may be kept are multiples of so many pages."""
        ...

    def fits(self, page_size: int) -> str | None:
        """What is wrong with these rules for pages of `page_size` token units; None if nothing is. The
        text goes into a ConfigError: `field: … allowed: …`."""
        ...
