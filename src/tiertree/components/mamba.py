"""Recurrent states (Mamba, SSM, linear attention): one state at exactly the boundary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import MAMBA, Kind
from ..validate import a_name, an_integer
from .base import Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Mamba:
    """The rules of recurrent state (Qwen3-Next, Falcon-H1, Jamba). Raises ConfigError.

    The state after page `p` has its place at page `p`. Whatever the engine has saved is worth keeping:
    `grid_tokens` and `states_per_path` say how much that may be."""

    grid_tokens: int | None = None
    """Keep states only at multiples of this many tokens, a multiple of the page size; None: at any page."""
    states_per_path: int | None = None
    """Keep at most so many states of one path on device; the first ones go first, with their copies on host
    (states that are on host alone do not count). A state that somebody leases stays, even if it is one too
    many. None: any number."""
    name: str = MAMBA
    """The name of the kind."""

    def __post_init__(self) -> None:
        if self.grid_tokens is not None:
            an_integer(self, "grid_tokens", 1)
        if self.states_per_path is not None:
            an_integer(self, "states_per_path", 1)
        a_name(self, "name")

    @property
    def kind(self) -> Kind:
        """See `Component`."""
        return Kind(self.name)

    @property
    def per_path(self) -> int | None:
        """`states_per_path`."""
        return self.states_per_path

    def since(self, boundary: int, page_size: int) -> int:
        """The page that ends at the boundary."""
        return boundary - 1

    def kept(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """All of them."""
        return np.ones(len(pages), bool)

    def cold(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """All but the last: that is where the next request goes on."""
        cold = np.ones(len(pages), bool)
        cold[-1:] = False
        return cold

    def grid(self, page_size: int) -> int:
        """`grid_tokens` in pages."""
        return 1 if self.grid_tokens is None else self.grid_tokens // page_size

    def fits(self, page_size: int) -> str | None:
        """The grid falls on page boundaries."""
        grid = self.grid_tokens
        if grid is not None and grid % page_size:
            return f"grid_tokens: {grid} is not allowed; allowed: a multiple of page_size {page_size}"
        return None
