"""Where one value of a page lies in a pool's memory.

Every pool holds the same six axes; its order only says how they nest, outermost first:

    layer_first        [layer, plane, page, entry, head, dim]     one layer of all pages is contiguous
    page_first         [page, entry, layer, plane, head, dim]     one page is contiguous, token by token
    page_first_direct  [page, layer, plane, entry, head, dim]     one page is contiguous, layer by layer
    logical            [page, layer, plane, entry, head, dim]     what callers index, whatever the order

A recurrent state is a page of one entry and one plane, its elements one head. Head and dim are
innermost everywhere, so one entry of one plane (an *item*) is contiguous in every order. Copies move
items as machine *words*, never as numbers: bytes stay what they are, NaN included.
"""

from __future__ import annotations

from typing import Final

import torch

from ..config import Layout, MemoryOrder

_LOGICAL: Final = ("page", "layer", "plane", "entry")
_NESTING: Final[dict[MemoryOrder, tuple[str, ...]]] = {
    MemoryOrder.LAYER_FIRST: ("layer", "plane", "page", "entry"),
    MemoryOrder.PAGE_FIRST: ("page", "entry", "layer", "plane"),
    MemoryOrder.PAGE_FIRST_DIRECT: _LOGICAL,
}
_WORDS: Final = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


def memory_shape(layout: Layout, order: MemoryOrder, pages: int) -> tuple[int, ...]:
    """Shape, C-contiguous, of a pool of `pages` pages: the four axes of `order`, then head and dim."""
    sizes = {"page": pages, "layer": layout.layers, "plane": layout.planes, "entry": layout.entries}
    return (*(sizes[axis] for axis in _NESTING[order]), layout.kv_heads, layout.head_size)


def to_logical(memory: torch.Tensor, order: MemoryOrder) -> torch.Tensor:
    """View of `memory`, whose first four axes nest as `order` says, as [page, layer, plane, entry, …]."""
    axes = [_NESTING[order].index(axis) for axis in _LOGICAL]
    return memory.permute(*axes, *range(4, memory.dim()))


def to_words(memory: torch.Tensor) -> torch.Tensor:
    """View of `memory` with head and dim as one axis of the widest words (8, 4, 2 or 1 bytes) that fit."""
    item_bytes = memory.shape[-2] * memory.shape[-1] * memory.element_size()
    dtype = next(dtype for size, dtype in _WORDS.items() if item_bytes % size == 0)
    return memory.view(torch.uint8).flatten(-2).view(dtype)
