"""Keys: token ids packed into page-aligned bytes, made once per prompt and then only compared.

    tokens   5 9 7 1 | 4 4 8 2 | 3            page_size 4
    key      05 09 07 01  04 04 08 02         two pages; the ninth token is not part of the key

Every length in the tree counts pages. A unit is 4 bytes (a token id below 2**32) or 8 (a bigram of
two token ids, or ids that need the room); the width is fixed per cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..types import ForeignObject, InvalidNamespace, InvalidTokens

Tokens = Sequence[int] | NDArray[np.integer]

NAMESPACE_BYTES_MAX = 1024
TOKENS_MAX = 1 << 30
"""No prompt has as many: a sequence that says it has is refused before it is looked at."""


class Key:
    """The page-aligned prefix of one prompt in one namespace. Immutable.

    `units` holds `pages * page_bytes` bytes; tokens after the last whole page are not part of it.
    """

    __slots__ = ("maker", "namespace", "pages", "units")

    def __init__(self, maker: KeyMaker, units: bytes, namespace: str) -> None:
        self.maker = maker
        self.units = units
        self.namespace = namespace
        self.pages = len(units) // maker.page_bytes

    def head(self, pages: int) -> Key:
        """The first `pages` pages of this key. O(pages)."""
        return Key(self.maker, self.units[: pages * self.maker.page_bytes], self.namespace)

    def __repr__(self) -> str:
        return f"Key({self.pages} pages, namespace={self.namespace!r})"


class KeyMaker:
    """Turns tokens into keys of one cache: `page_size` units of `unit_bits` (32 or 64) each.

    With `bigram`, unit *i* is made of tokens *i* and *i+1* (EAGLE draft heads see both), so *n* tokens
    give *n - 1* units.
    """

    __slots__ = ("bigram", "dtype", "page_bytes", "page_size", "token_max", "unit_bytes")

    def __init__(self, page_size: int, unit_bits: int = 32, bigram: bool = False) -> None:
        self.page_size = page_size
        self.unit_bytes = unit_bits // 8
        self.page_bytes = page_size * self.unit_bytes
        self.bigram = bigram
        self.dtype = np.dtype("<u4") if unit_bits == 32 else np.dtype("<u8")
        self.token_max = 2**31 - 1 if bigram else 2 ** (unit_bits - (unit_bits == 64)) - 1

    def make(self, tokens: Tokens, namespace: str = "") -> Key:
        """The key of `tokens` (any integer sequence or array). O(tokens).

        Raises InvalidTokens (not integers, negative, above `token_max`) or InvalidNamespace.
        """
        check_namespace(namespace)
        units = self._units(self._checked(tokens))
        whole = len(units) - len(units) % self.page_size
        return Key(self, units[:whole].tobytes(), namespace)

    def extend(self, key: Key, tokens: Tokens) -> Key:
        """`key` with more whole pages of `tokens` behind it; not for bigram caches, whose last unit
        depends on the next token. O(pages of the result), one copy."""
        if not isinstance(key, Key) or key.maker is not self:
            raise ForeignObject("this key was made by another cache")
        if self.bigram:
            raise InvalidTokens("a bigram key cannot be extended: make it anew from all tokens")
        more = self.make(tokens, key.namespace)
        return Key(self, key.units + more.units, key.namespace)

    def _checked(self, tokens: Tokens) -> NDArray[np.integer]:
        try:
            if len(tokens) > TOKENS_MAX:
                raise InvalidTokens(f"{len(tokens)} tokens are more than {TOKENS_MAX}")
            array = np.asarray(tokens)
        except (TypeError, ValueError, OverflowError, RuntimeError, MemoryError) as error:
            raise InvalidTokens(f"tokens are not a flat sequence of integers: {error}") from None
        if array.ndim != 1:
            raise InvalidTokens(f"tokens must have one dimension, got {array.ndim}")
        if array.size == 0:
            return np.empty(0, np.int64)
        if array.dtype.kind not in "iu":
            raise InvalidTokens(f"tokens must be integers, got {array.dtype}")
        if array.dtype == np.int64 and array.view(np.uint64).max() <= self.token_max:
            return array
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > self.token_max:
            wrong = low if low < 0 else high
            where = int(np.flatnonzero(array == wrong)[0])
            raise InvalidTokens(f"token {wrong} at position {where} is not in 0..{self.token_max}")
        return array

    def _units(self, tokens: NDArray[np.integer]) -> NDArray[np.integer]:
        if not self.bigram:
            return tokens.astype(self.dtype)
        wide = tokens.astype(np.uint64)
        bigrams: NDArray[np.integer] = (wide[:-1] << np.uint64(32)) | wide[1:]
        return bigrams


def check_namespace(namespace: str) -> None:
    """Raise InvalidNamespace unless `namespace` is a text that is not too long."""
    if not isinstance(namespace, str):
        raise InvalidNamespace(f"namespace must be a str, got {type(namespace).__name__}")
    if len(namespace.encode("utf-8", "surrogatepass")) > NAMESPACE_BYTES_MAX:
        raise InvalidNamespace(f"namespace is longer than {NAMESPACE_BYTES_MAX} bytes")


def first_difference(edge: bytes, units: bytes, at: int, page_bytes: int) -> int:
    """How many leading pages of `edge` equal `units[at:]`. One vector comparison, O(bytes compared)."""
    size = min(len(edge), len(units) - at)
    size -= size % page_bytes
    if units.startswith(edge[:size], at):
        return size // page_bytes
    ours = np.frombuffer(edge, np.uint32, size // 4)
    theirs = np.frombuffer(units, np.uint32, size // 4, at)
    return int((ours != theirs).argmax()) * 4 // page_bytes
