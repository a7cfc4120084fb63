"""What the bytes of a page must be: a function of the page and of everything before it.

    word w of page n     mix(n) XOR pattern[w]       mix is one-to-one on 64 bits, pattern is random,
                                                     and another one for each kind

Any two pages differ in every word, so a stale, foreign, shifted or half-copied page shows as a
mismatch, and making what is expected costs one XOR per word.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..config import Attention, KVLayout, StateLayout
from ..pools.paged import Pool
from ..types import FULL, ConfigError, Kind, Slots
from .report import KindTally, Tally

WORD_BYTES = 8
LAYERS = 4


def layout_of(page_bytes: int, page_tokens: int) -> KVLayout:
    """A layout whose pages have exactly `page_bytes` bytes: four layers of K and V where that divides
    them, so that device and host order them differently; otherwise one layer of one plane. Raises
    ConfigError below 8 bytes, which could not tell all pages apart."""
    if page_bytes < WORD_BYTES:
        raise ConfigError(f"--page-bytes: {page_bytes} is not allowed; allowed: at least {WORD_BYTES}")
    layers, attention, planes = LAYERS, Attention.MHA, 2
    if page_bytes % (layers * planes):
        layers, attention, planes = 1, Attention.MLA, 1
    return KVLayout(
        layers=layers,
        kv_heads=1,
        head_size=page_bytes // (layers * planes),
        dtype="uint8",
        attention=attention,
        page_size=page_tokens,
        tokens_per_entry=page_tokens,
    )


def state_layout_of(state_bytes: int) -> StateLayout:
    """A layout of recurrent states of exactly `state_bytes` bytes: of four layers where that divides them,
    otherwise of one."""
    layers = 1 if state_bytes % LAYERS else LAYERS
    return StateLayout(layers=layers, elements=state_bytes // layers, dtype="uint8")


class Payload:
    """Makes the bytes of pages of `kind` by their numbers (see `Paging.numbers`), and compares them.
    Seeded."""

    def __init__(self, page_bytes: int, seed: int, kind: Kind = FULL) -> None:
        self.page_bytes = page_bytes
        words = -(-page_bytes // WORD_BYTES)
        mark = b"" if kind == FULL else kind.encode()
        self._pattern = np.random.default_rng([seed, 1, *mark]).integers(0, 2**64, words, np.uint64)

    def pages(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The bytes of these pages: uint8, C-contiguous, [len(numbers), page_bytes]. O(bytes)."""
        words: NDArray[np.uint64] = _mix(numbers)[:, None] ^ self._pattern
        return np.ascontiguousarray(words.view(np.uint8)[:, : self.page_bytes])

    def mismatches(self, numbers: NDArray[np.int64], found: NDArray[np.uint8]) -> int:
        """How many of these pages (uint8, [len(numbers), page_bytes]) are not what they must be."""
        wrong = self.pages(numbers) != found
        return int(wrong.any(axis=1).sum()) if wrong.any() else 0


class PageBytes:
    """Writes and compares the bytes of pages of one kind on device; counts in `tally` and in `own`, the
    kind's share of it."""

    def __init__(self, pool: Pool, payload: Payload, tally: Tally, own: KindTally) -> None:
        self._pool = pool
        self._payload = payload
        self._tally = tally
        self._own = own
        self._read = np.empty((0, pool.page_bytes), np.uint8)

    def fill(self, numbers: NDArray[np.int64], slots: Slots) -> None:
        """The model computes these pages."""
        self._pool.write_pages(slots, self._payload.pages(numbers))

    def compare(self, numbers: NDArray[np.int64], slots: Slots) -> None:
        """A hit returned `slots` for these pages."""
        if len(self._read) < len(slots):
            self._read = np.empty((2 * len(slots), self._pool.page_bytes), np.uint8)
        found = self._read[: len(slots)]
        self._pool.read_pages(slots, found)
        wrong = self._payload.mismatches(numbers, found)
        for tally in (self._tally, self._own):
            tally.verified += len(slots)
            tally.mismatched += wrong


def _mix(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A one-to-one scramble of 64 bits: odd multiplications and xor-shifts (Stafford's mix 13)."""
    mixed = numbers.astype(np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed ^= mixed >> np.uint64(shift)
        mixed *= np.uint64(factor)
    mixed ^= mixed >> np.uint64(31)
    return mixed
