"""What the rules of every kind of attention state must be: pure answers, page by page, that fit together."""

from __future__ import annotations

import numpy as np

from ...components import Component
from ...config import CacheConfig, DeviceConfig, KindConfig
from ...types import ConfigError


def check_component(rules: Component, page_size: int) -> None:
    """Run every check of the rules of a kind, for pages of `page_size` token units, which they must fit."""
    try:
        kinds = (KindConfig(rules=rules, device=1 << 21),)
        CacheConfig(device=DeviceConfig(size=1), page_size=page_size, kinds=kinds)
        hash(rules)
    except (ConfigError, TypeError) as error:
        raise AssertionError(f"no cache can have this kind: {error}") from error
    assert rules.per_path is None or rules.per_path >= 1, "per_path must be None or at least 1"
    grid = rules.grid(page_size)
    assert isinstance(grid, int), "a grid is an int"
    assert grid >= 1, "a grid is at least one page"
    ends = sorted({*range(1, 65), *(most * grid + off for most in (1, 2, 3) for off in (0, 1))})
    _since_never_falls(rules, page_size, ends)
    for end in ends:
        _keeps_page_by_page(rules, page_size, end)
        _goes_in_order(rules, page_size, end)


def _since_never_falls(rules: Component, page_size: int, ends: list[int]) -> None:
    since = {end: rules.since(end, page_size) for end in ends}
    for end, first in since.items():
        assert isinstance(first, int), "since is an int"
        assert 0 <= first < end, f"since({end}) = {first} is not in [0, {end})"
    assert list(since.values()) == sorted(since.values()), "since is smaller for a larger boundary"
    again = {end: rules.since(end, page_size) for end in reversed(ends)}
    assert since == again, "since depends on what was asked before"


def _keeps_page_by_page(rules: Component, page_size: int, end: int) -> None:
    pages = np.arange(end, dtype=np.int64)
    kept = rules.kept(pages, end, page_size)
    assert isinstance(kept, np.ndarray), "kept is an array"
    assert kept.dtype == np.bool_, "kept is of bools"
    assert np.array_equal(pages, np.arange(end)), "kept has changed the pages it was asked about"
    for part in (slice(None), slice(None, None, 2), slice(end // 2, None), slice(0)):
        answer = rules.kept(pages[part].copy(), end, page_size)
        assert answer.shape == pages[part].shape, "kept has one entry per page"
        assert np.array_equal(answer, kept[part]), "whether a page is kept depends on the others asked about"
    if end % rules.grid(page_size) == 0:
        needed = kept[rules.since(end, page_size) :]
        assert needed.all(), f"pages that continuing at {end} needs are not kept in a node that ends there"


def _goes_in_order(rules: Component, page_size: int, end: int) -> None:
    for pages in (
        np.arange(end, dtype=np.int64),
        np.arange(0, end, 2, dtype=np.int64),
        np.empty(0, np.int64),
    ):
        asked = pages.copy()
        cold = rules.cold(pages, end, page_size)
        assert isinstance(cold, np.ndarray), "cold is an array"
        assert cold.dtype == np.bool_, "cold is of bools"
        assert cold.shape == pages.shape, "cold has one entry per page"
        assert np.array_equal(pages, asked), "cold has changed the pages it was asked about"
        assert cold[~rules.kept(pages, end, page_size)].all(), "a page that is not kept is not cold"
    if end % rules.grid(page_size) == 0:
        needed = np.arange(rules.since(end, page_size), end, dtype=np.int64)
        assert not rules.cold(needed, end, page_size).any(), "what continuing at a node's end needs is cold"
