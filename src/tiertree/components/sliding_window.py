"""Sliding-window attention: only the last `window` tokens before a boundary matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..types import SWA, Kind
from ..validate import a_name, an_integer
from .base import Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class SlidingWindow:
    """The rules of sliding-window attention (Gemma 3, gpt-oss). Raises ConfigError.

    A node keeps the window before its end, and one before every multiple of `checkpoint_tokens`; its other
    pages are cold."""

    window: int
    """Tokens that attention looks back, the current one included or not: pages of all of them are kept."""
    checkpoint_tokens: int | None = None
    """Keep a window before every multiple of this many tokens too, so that a hit can end there; None: only
    before the ends of nodes. A multiple of the page size."""
    name: str = SWA
    """The name of the kind; another one where a model has windows of two sizes."""

    def __post_init__(self) -> None:
        an_integer(self, "window", 1)
        if self.checkpoint_tokens is not None:
            an_integer(self, "checkpoint_tokens", 1)
        a_name(self, "name")

    @property
    def kind(self) -> Kind:
        """See `Component`."""
        return Kind(self.name)

    @property
    def per_path(self) -> int | None:
        """Any number."""
        return None

    def since(self, boundary: int, page_size: int) -> int:
        """The page of the first of the last `window` tokens."""
        return max(0, boundary * page_size - self.window) // page_size

    def kept(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """Those in the last window of the node or of a checkpoint before its end."""
        warm: NDArray[np.bool_] = pages >= self.since(end, page_size)
        if self.checkpoint_tokens is not None:
            step = self.checkpoint_tokens // page_size
            after = (pages // step + 1) * step
            warm |= (after <= end) & (pages >= np.maximum(after * page_size - self.window, 0) // page_size)
        return warm

    def cold(self, pages: Pages, end: int, page_size: int) -> NDArray[np.bool_]:
        """Those in no such window."""
        return ~self.kept(pages, end, page_size)

    def grid(self, page_size: int) -> int:
        """Every page."""
        return 1

    def fits(self, page_size: int) -> str | None:
        """Checkpoints fall on page boundaries."""
        step = self.checkpoint_tokens
        if step is not None and step % page_size:
            return f"checkpoint_tokens: {step} is not allowed; allowed: a multiple of page_size {page_size}"
        return None
