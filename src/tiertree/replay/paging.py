"""From requests to pages: which tokens spell a block, and which pages are the same page.

    block ids        7             9             9         equal id, equal block
    pages        ┌─ 0 ─┬─ 1 ─┐ ┌─ 0 ─┬─ 1 ─┐ ┌─ 0 ─┐       the last block may have fewer
    tokens        a a a b b b   c c c d d d   c c c        one number per id and page of the block
    numbers          0     1       2     3       4         one per page and everything before it

Tokens know nothing of the prefix, so that finding equal prefixes is left to the cache. Page numbers
are found here, independently of it: they say what a payload must be.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..types import ConfigError
from .trace import Request

TOKENS_MAX = 2**32


class Paging:
    """The pages of `requests`, whose blocks of `block_tokens` are cut into pages of `page_tokens`; O(blocks).

    A partial last page counts as a page; what it is padded with belongs to its block, as the id does.
    `counts` are the pages of each request, `whole` those without a partial one; `pages` counts all pages,
    `unique_pages` those that differ in themselves or in what is before them, `longest` those of the longest
    request. Raises ConfigError unless `page_tokens` divides `block_tokens`.
    """

    def __init__(self, requests: Sequence[Request], block_tokens: int, page_tokens: int) -> None:
        if page_tokens < 1 or block_tokens % page_tokens:
            raise ConfigError(
                f"--page-tokens: {page_tokens} is not allowed; allowed: a divisor of --block-tokens "
                f"{block_tokens}"
            )
        self.page_tokens = page_tokens
        self._pages_per_block = block_tokens // page_tokens
        self._within = np.arange(self._pages_per_block, dtype=np.int64)
        self.counts = [self._count(request) for request in requests]
        self.whole = [
            count - bool(request.last_tokens % page_tokens)
            for count, request in zip(self.counts, requests, strict=True)
        ]
        self.pages = sum(self.counts)
        self.longest = max(self.counts, default=0)
        spelling: dict[int, int] = {}
        self._spelled = [
            np.array([spelling.setdefault(each, len(spelling)) for each in request.blocks], np.int64)
            for request in requests
        ]
        if len(spelling) * self._pages_per_block > TOKENS_MAX:
            raise ConfigError(f"--page-tokens: {len(spelling)} blocks have too many pages of {page_tokens}")
        prefixes: dict[tuple[int, int], int] = {}
        self._prefixes = [_chain(request.blocks, prefixes) for request in requests]
        self.unique_pages = self._unique(len(prefixes))

    def tokens(self, index: int) -> NDArray[np.uint32]:
        """The tokens of request `index`, whole pages only: equal pages of equal blocks, and no others, have
        equal tokens. O(tokens)."""
        pages = self._paged(self._spelled[index], self.counts[index])
        return np.repeat(pages.astype(np.uint32), self.page_tokens)

    def numbers(self, index: int) -> NDArray[np.int64]:
        """One number for each page of request `index`: equal for equal pages after equal prefixes, and for
        no others. O(pages)."""
        return self._paged(self._prefixes[index], self.counts[index])

    def _paged(self, blocks: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        if self._pages_per_block == 1:
            return blocks
        return (blocks[:, None] * self._pages_per_block + self._within).ravel()[:count]

    def _count(self, request: Request) -> int:
        if not request.blocks:
            return 0
        return self._pages_per_block * (len(request.blocks) - 1) + -(-request.last_tokens // self.page_tokens)

    def _unique(self, prefixes: int) -> int:
        reach = np.zeros(prefixes, np.int64)
        for chain, count in zip(self._prefixes, self.counts, strict=True):
            if count:
                reach[chain[:-1]] = self._pages_per_block
                reach[chain[-1]] = max(
                    int(reach[chain[-1]]), count - self._pages_per_block * (len(chain) - 1)
                )
        return int(reach.sum())


def _chain(blocks: Sequence[int], prefixes: dict[tuple[int, int], int]) -> NDArray[np.int64]:
    """The number of the prefix that ends with each block; new ones are entered in `prefixes`."""
    before, chain = -1, []
    for block in blocks:
        before = prefixes.setdefault((before, block), len(prefixes))
        chain.append(before)
    return np.array(chain, np.int64)
