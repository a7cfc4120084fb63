"""The kinds that tests combine. One of them is made up here: the package knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain, combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from tiertree import MAMBA, SWA, Component, Mamba, SlidingWindow, register_kind
from tiertree.types import Kind

CHUNK = Kind("chunk")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunked:
    """Attention inside chunks of `pages` pages: whoever goes on needs the chunk of the page before."""

    pages: int
    kind: Kind = CHUNK
    per_path: int | None = None

    def since(self, boundary: int, page_size: int) -> int:
        return (boundary - 1) // self.pages * self.pages

    def kept(self, pages: NDArray[np.int64], end: int, page_size: int) -> NDArray[np.bool_]:
        return pages >= self.since(end, page_size)

    def cold(self, pages: NDArray[np.int64], end: int, page_size: int) -> NDArray[np.bool_]:
        return ~self.kept(pages, end, page_size)

    def grid(self, page_size: int) -> int:
        return 1

    def fits(self, page_size: int) -> str | None:
        return None if self.pages > 0 else f"pages: {self.pages} is not allowed; allowed: at least 1"


register_kind("chunk", Chunked)


def rules(window: int = 2, checkpoint: int | None = None, grid: int | None = None) -> dict[Kind, Component]:
    """The three partial kinds, each of which needs something else at a boundary."""
    return {
        SWA: SlidingWindow(window=window, checkpoint_tokens=checkpoint),
        MAMBA: Mamba(grid_tokens=grid),
        CHUNK: Chunked(pages=3),
    }


def every_set(of: Iterable[Kind] = (SWA, MAMBA, CHUNK)) -> list[tuple[Kind, ...]]:
    """Every set of partial kinds, the empty one first."""
    kinds = tuple(of)
    return list(chain.from_iterable(combinations(kinds, size) for size in range(len(kinds) + 1)))


def name(kinds: Iterable[Kind]) -> str:
    """What a test with these partial kinds is called."""
    return "+".join(("full", *kinds))


each_set = pytest.mark.parametrize("kinds", every_set()[1:], ids=name)
"""Once for every set of kinds that has more than FULL."""
