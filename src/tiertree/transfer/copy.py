"""How pages are copied: in which steps, and with which operation.

Steps. A transfer is cut into (move, layers [first, last)) and the steps run in order of `first`, so when
the next one's `first` is f, layers [0, f) have arrived in every move. How many layers one step takes is
decided by what lies together in the *target*:

    target             layers per step                          why
    layer_first        1                                        a layer is a place of its own
    page_first_direct  fewest that make STEP_BYTES of a page    a slice of a page; shorter ones copy slower
    page_first         all                                      layers interleave in every entry

Operations, on the words of the pages [page, …] of one step (`source[s] → target[t]`, all pairs at once):

    both on CPU, long pieces    one assignment (a memcpy without the GIL) per run of consecutive slots
    both on CPU, short pieces   numpy gather and scatter, through a buffer that stays in the L2 cache
    any other device            torch index_select, then index_copy_

Whole pages between pools of one page_first* order are taken as rows, so that a run is one memcpy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import MemoryOrder
from ..pools.paged import Pool
from ..types import Slots
from .op import PoolMove

STEP_BYTES: Final = 256 << 10
"""Bytes of one page that a step takes at least, where layers are slices of a page. Measured on CPU:
beside one long copy, pieces of 256 KiB cost no more per byte, of 64 KiB a tenth, of 32 KiB a third more."""
CHUNK_BYTES: Final = 16 << 20
"""Bytes between two looks at whether a transfer was cancelled: one or two milliseconds on CPU."""
_SHORT_BYTES: Final = 8 << 10
_BUFFER_BYTES: Final = 512 << 10


@dataclass(frozen=True, slots=True)
class Step:
    """Layers [first, last) of one move. Once it has run, and all steps before it, the leading `arrived`
    layers of the transfer are there."""

    move: PoolMove
    first: int
    last: int
    arrived: int

    @property
    def is_rows(self) -> bool:
        """Whether it copies whole pages between pools of one order (rows, unless that is layer_first)."""
        whole = self.last - self.first == self.move.source.layout.layers
        return whole and self.move.source.order is self.move.target.order


def plan(moves: Sequence[PoolMove], step_bytes: int = STEP_BYTES) -> list[Step]:
    """The steps of a transfer, in order of their first layer."""
    cuts = [
        (move, first, min(first + stride, layers))
        for move in moves
        for layers, stride in [(move.source.layout.layers, layers_per_step(move.target, step_bytes))]
        for first in range(0, layers, stride)
    ]
    cuts.sort(key=lambda cut: cut[1])
    arrived = [first for _, first, _ in cuts[1:]] + [max((last for _, _, last in cuts), default=0)]
    return [Step(*cut, done) for cut, done in zip(cuts, arrived, strict=False)]


def layers_per_step(target: Pool, step_bytes: int = STEP_BYTES) -> int:
    """How many layers of a page are copied together into `target`: see the table above."""
    layers = target.layout.layers
    if target.order is MemoryOrder.LAYER_FIRST:
        return 1
    if target.order is MemoryOrder.PAGE_FIRST:
        return layers
    layer_bytes = target.page_bytes // layers
    return min(layers, -(-step_bytes // layer_bytes))


def chunks(step: Step, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """Ranges of the step's pages, each of at most `chunk_bytes` but at least one page."""
    page_bytes = step.move.source.page_bytes * (step.last - step.first) // step.move.source.layout.layers
    pages = max(1, chunk_bytes // page_bytes)
    for start in range(0, step.move.source_slots.size, pages):
        yield slice(start, start + pages)


def step_words(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Source and target of a step as views [page, …, word] of equal trailing shape."""
    source, target = step.move.source, step.move.target
    if step.is_rows and source.rows is not None and target.rows is not None:
        return source.rows, target.rows
    layers = slice(step.first, step.last)
    return source.words[:, layers], target.words[:, layers]


class Mover:
    """Copies parts of one move, between any two devices; what all parts share is made ready once. Pages go
    in order of their source slot, which finds the longest runs and is kinder to memory. O(n log n)."""

    def __init__(self, move: PoolMove) -> None:
        order = np.argsort(move.source_slots)
        self._s, self._t = move.source_slots[order], move.target_slots[order]
        self._pairs = list(zip(self._s.tolist(), self._t.tolist(), strict=True))
        self._scattered = run_starts(self._s, self._t).size == self._s.size

    def copy(self, step: Step, pages: slice) -> None:
        """Copy some pages, by rank, of a step of this move, now."""
        arrays = _step_arrays(step)
        if arrays is None:
            source, target = step_words(step)
            s, t = (torch.from_numpy(slots[pages]) for slots in (self._s, self._t))
            copy_tensors(source, target, s.to(source.device), t.to(target.device))
        elif self._scattered and arrays[0][:1].nbytes >= _SHORT_BYTES:
            source_array, target_array = arrays
            for i, j in self._pairs[pages]:
                target_array[j] = source_array[i]
        else:
            copy_arrays(*arrays, self._s[pages], self._t[pages])


def _step_arrays(step: Step) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """`step_words` as numpy sees them; None unless both pools are on CPU."""
    source, target = step.move.source, step.move.target
    if source.word_array is None or target.word_array is None:
        return None
    if step.is_rows and source.row_array is not None and target.row_array is not None:
        return source.row_array, target.row_array
    return source.word_array[:, step.first : step.last], target.word_array[:, step.first : step.last]


def copy_tensors(source: torch.Tensor, target: torch.Tensor, s: torch.Tensor, t: torch.Tensor) -> None:
    """`target[t] = source[s]` along the first axis, indices on the device of their tensor."""
    target.index_copy_(0, t, source.index_select(0, s).to(target.device))


def run_starts(s: Slots, t: Slots) -> Slots:
    """Where, in both arrays at once, a run of consecutive slots begins. O(n)."""
    return np.flatnonzero(np.concatenate(([True], (np.diff(s) != 1) | (np.diff(t) != 1))))


def copy_arrays(source: NDArray[Any], target: NDArray[Any], s: Slots, t: Slots) -> None:
    """`target[t] = source[s]` along the first axis; one memcpy per run where that is the faster way."""
    starts = run_starts(s, t)
    piece_bytes = source[:1].nbytes
    if s.size * piece_bytes < starts.size * _SHORT_BYTES:
        _gather_scatter(source, target, s, t, max(1, _BUFFER_BYTES // piece_bytes))
        return
    lengths = np.diff(starts, append=s.size)
    for i, j, n in zip(s[starts].tolist(), t[starts].tolist(), lengths.tolist(), strict=True):
        target[j : j + n] = source[i : i + n]


def _gather_scatter(source: NDArray[Any], target: NDArray[Any], s: Slots, t: Slots, pages: int) -> None:
    """`target[t] = source[s]`, `pages` pages at a time."""
    for start in range(0, s.size, pages):
        target[t[start : start + pages]] = source[s[start : start + pages]]
