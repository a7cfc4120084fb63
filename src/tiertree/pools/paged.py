"""One pool: a single tensor that holds `pages` pages of one layout in one memory order.

    view        axes                                      for
    .logical    [page, layer, plane, entry, head, dim]    models and tests; same values in every order
    .layer(l)   [page, plane, entry, head, dim]           the attention of one layer
    .words      [page, layer, plane, entry, word]         copies between any two orders
    .rows       [page, word], page_first* only            copies of whole pages
    .word_array, .row_array: both as numpy sees them, on CPU only
    .page_buffer(slot)  bytes, page_first* on CPU only    storage, without a copy

A pool keeps bytes and knows no meaning: which slot is whose is the ledger's business. Fresh memory is
not cleared. All views alias the one tensor.
"""

from __future__ import annotations

import mmap
import weakref
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from ..config import Layout, MemoryOrder
from ..types import InvalidSlots, Slots
from .layout import memory_shape, to_logical, to_words

_HUGE_PAGES: Final[int | None] = getattr(mmap, "MADV_HUGEPAGE", None)  # Linux only
POISON: Final = 0xFF
"""Every byte of a poisoned page (see `tiertree.poison`)."""
_POISON_BYTES: Final = 4 << 20  # looked at in one go

_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every device, not only the current one


class Pool:
    """`pages` slots of one page each, on any torch device.

    `pinned` asks for page-locked memory where CUDA is present (elsewhere it changes nothing; `.pinned`
    says what came of it). Raises what torch raises when the device does not exist or has no room."""

    def __init__(
        self,
        layout: Layout,
        order: MemoryOrder,
        pages: int,
        device: str | torch.device = "cpu",
        pinned: bool = False,
    ) -> None:
        self.layout: Final = layout
        self.order: Final = MemoryOrder(order)
        self.pages: Final = pages
        on_cpu = torch.device(device).type == "cpu"
        self.pinned: Final = pinned and on_cpu and torch.cuda.is_available()
        shape = memory_shape(layout, self.order, pages)
        dtype: torch.dtype = getattr(torch, layout.dtype)
        self.tensor: Final = (
            _main_memory(pages * layout.page_bytes, self.pinned).view(dtype).view(shape)
            if on_cpu
            else torch.empty(shape, dtype=dtype, device=device)
        )
        """The memory itself, in memory order (see `layout`)."""
        self.logical: Final = to_logical(self.tensor, self.order)
        memory_words = to_words(self.tensor)
        self.words: Final = to_logical(memory_words, self.order)
        self.rows: Final = None if self.order is MemoryOrder.LAYER_FIRST else memory_words.flatten(1)
        self.word_array: Final = self.words.numpy() if on_cpu else None
        self.row_array: Final = self.rows.numpy() if on_cpu and self.rows is not None else None

    @property
    def device(self) -> torch.device:
        """Where the tensor is."""
        return self.tensor.device

    @property
    def on_cpu(self) -> bool:
        """Whether numpy can reach the memory."""
        return self.tensor.device.type == "cpu"

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.layout.page_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole pool."""
        return self.pages * self.page_bytes

    def layer(self, index: int) -> torch.Tensor:
        """View [page, plane, entry, head, dim] of one layer; contiguous per plane for layer_first."""
        return self.logical[:, index]

    def page_buffer(self, slot: int) -> memoryview | None:
        """The bytes of one page, writable and without a copy (format 'B'); None where a page is not
        contiguous (layer_first) or not in main memory."""
        if self.rows is None or not self.on_cpu:
            return None
        self.check(np.array([slot], np.int64))
        page: NDArray[np.uint8] = self.rows[slot].view(torch.uint8).numpy()
        return page.data

    def read_pages(self, slots: Slots, out: NDArray[np.uint8]) -> None:
        """Copy pages into `out` (uint8, C-contiguous, [len(slots), page_bytes]), each in the order that
        pages have outside their pool: page_first as it is, the other two as page_first_direct."""
        view, outside = self._outside(slots, out)
        if self.on_cpu:
            outside[...] = view.numpy()[slots]
        else:
            index = torch.from_numpy(slots).to(self.device)
            torch.from_numpy(outside).copy_(view.index_select(0, index))

    def write_pages(self, slots: Slots, data: NDArray[np.uint8]) -> None:
        """The inverse of `read_pages`; `slots` must not repeat."""
        view, outside = self._outside(slots, data)
        if self.on_cpu:
            view.numpy()[slots] = outside
        else:
            index = torch.from_numpy(slots).to(self.device)
            view.index_copy_(0, index, torch.tensor(outside, device=self.device))

    def clone(self, source: Slots, target: Slots) -> None:
        """Copy pages inside the pool, `source[i]` to `target[i]`; `target` must not repeat. On a device it
        is queued on the caller's stream, behind the caller's own work, and not waited for."""
        self.check(source)
        self.check(target)
        if source.size != target.size:
            raise InvalidSlots(f"{source.size} source slots, {target.size} target slots")
        view = self._pages()
        if self.on_cpu:
            array = view.numpy()
            array[target] = array[source]
        else:
            index = torch.from_numpy(np.stack((source, target)))
            if self.device.type == "cuda":  # a copy from memory that is not pinned would wait for the stream
                index = index.pin_memory()
            here, there = index.to(self.device, non_blocking=True)
            view.index_copy_(0, there, view.index_select(0, here))

    def poison(self, slots: Slots) -> None:
        """Make every byte of these pages POISON. On a device it is queued on the caller's stream."""
        self.check(slots)
        view = self._pages()
        index = torch.from_numpy(slots).to(self.device)
        view.index_fill_(0, index, _poison_word(view))

    def stain(self, slots: Slots) -> tuple[int, int, int] | None:
        """The first of `slots` whose page has a byte that is not POISON: (slot, offset of that byte in the
        page as `read_pages` gives it, the byte); None if there is none. Waits for the caller's stream."""
        self.check(slots)
        view = self._pages()
        at_once = max(1, _POISON_BYTES // self.page_bytes)
        for start in range(0, len(slots), at_once):
            part = slots[start : start + at_once]
            pages = view.index_select(0, torch.from_numpy(part).to(self.device))
            clean = (pages == _poison_word(view)).flatten(1).all(1).cpu().numpy()
            if not clean.all():
                slot = part[~clean][:1]
                page = np.empty((1, self.page_bytes), np.uint8)
                self.read_pages(slot, page)
                offset = int(np.flatnonzero(page[0] != POISON)[0])
                return int(slot[0]), offset, int(page[0, offset])
        return None

    def check(self, slots: Slots) -> None:
        """Raise `InvalidSlots` unless `slots` is a 1-D int64 array of indices into this pool. O(n)."""
        if slots.ndim != 1 or slots.dtype != np.int64:
            raise InvalidSlots(f"slots must be a 1-D int64 array, got {slots.ndim}-D {slots.dtype}")
        if slots.size and (slots.min() < 0 or slots.max() >= self.pages):
            raise InvalidSlots(f"slots {slots.min()}..{slots.max()} are outside a pool of {self.pages} pages")

    def _pages(self) -> torch.Tensor:
        """All pages as words, [page, …], each in the order that pages have outside their pool."""
        return self.words if self.rows is None else self.rows

    def _outside(self, slots: Slots, data: NDArray[np.uint8]) -> tuple[torch.Tensor, NDArray[np.generic]]:
        """This pool's words in page order, and `data` as an array of the same shape and word."""
        self.check(slots)
        expected = (len(slots), self.page_bytes)
        if data.shape != expected or data.dtype != np.uint8 or not data.flags.c_contiguous:
            raise ValueError(
                f"pages must be a C-contiguous uint8 array of shape {expected}, got {data.dtype} {data.shape}"
            )
        view = self._pages()
        word = np.dtype(f"i{view.element_size()}") if view.element_size() > 1 else np.dtype(np.uint8)
        return view, data.view(word).reshape(len(slots), *view.shape[1:])


def _poison_word(view: torch.Tensor) -> int:
    """A word of `view` whose bytes are all POISON."""
    return -1 if view.dtype.is_signed else POISON


def _main_memory(nbytes: int, pinned: bool) -> torch.Tensor:
    """`nbytes` of main memory (uint8), given back when the last view of it is gone.

    An anonymous map of its own, because it may have huge pages (scattered copies miss the TLB less), and
    because a pinned one is page-locked at its exact size: torch's pinned allocator rounds up to a power of
    two, which for a pool of 40 GiB is 24 GiB more."""
    area = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if _HUGE_PAGES is not None:
        area.madvise(_HUGE_PAGES)
    memory = np.frombuffer(area, np.uint8)
    if pinned:
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        status = runtime.cudaHostRegister(memory.ctypes.data, nbytes, _PORTABLE)
        if int(status) != 0:
            raise RuntimeError(f"pinning {nbytes} bytes of host memory failed with CUDA error {int(status)}")
        weakref.finalize(memory, runtime.cudaHostUnregister, memory.ctypes.data).atexit = False
    return torch.from_numpy(memory)
