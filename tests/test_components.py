"""The rules of the kinds: compared with their definition token by token, and the conformance of any kind."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

from tiertree.components import Component, Mamba, Pages, SlidingWindow, register_kind
from tiertree.components.registry import read_rules
from tiertree.testing.conformance import check_component
from tiertree.types import MAMBA, SWA, ConfigError, Kind

PAGE_SIZES = range(1, 5)
END_MAX = 14


def windows() -> Iterator[tuple[SlidingWindow, int]]:
    """Small windows, with checkpoints and without, for each page size."""
    for page_size, window in itertools.product(PAGE_SIZES, range(1, 14)):
        for step in (None, 1, 2, 3, 5):
            checkpoint = None if step is None else step * page_size
            yield SlidingWindow(window=window, checkpoint_tokens=checkpoint), page_size


def window_pages(rules: SlidingWindow, boundary: int, page_size: int) -> set[int]:
    """The pages of the last `window` tokens before `boundary`, token by token."""
    stop = boundary * page_size
    return {token // page_size for token in range(stop) if token >= stop - rules.window}


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_window_is_the_pages_of_its_last_tokens(page_size: int) -> None:
    for window, boundary in itertools.product(range(1, 14), range(1, END_MAX)):
        rules = SlidingWindow(window=window)
        needed = set(range(rules.since(boundary, page_size), boundary))
        assert needed == window_pages(rules, boundary, page_size)


def test_a_window_is_kept_before_the_end_of_a_node_and_before_each_checkpoint() -> None:
    for rules, page_size in windows():
        for end in range(1, END_MAX):
            boundaries = {end}
            if rules.checkpoint_tokens is not None:
                tokens = range(rules.checkpoint_tokens, end * page_size + 1, rules.checkpoint_tokens)
                boundaries |= {token // page_size for token in tokens}
            warm = set().union(*(window_pages(rules, each, page_size) for each in boundaries))
            kept = rules.kept(np.arange(end), end, page_size)
            assert set(np.flatnonzero(kept).tolist()) == warm, (rules, page_size, end)


def test_a_checkpoint_is_kept_whole_however_nodes_cut_its_window() -> None:
    for rules, page_size in windows():
        if rules.checkpoint_tokens is None:
            continue
        step = rules.checkpoint_tokens // page_size
        for cut, end in itertools.combinations(range(1, END_MAX), 2):
            kept = np.concatenate(
                (
                    rules.kept(np.arange(cut), cut, page_size),
                    rules.kept(np.arange(cut, end), end, page_size),
                )
            )
            for checkpoint in range(step, end + 1, step):
                assert kept[rules.since(checkpoint, page_size) : checkpoint].all(), (rules, page_size, cut)


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_a_state_is_needed_at_exactly_the_boundary_and_all_are_kept(page_size: int) -> None:
    rules = Mamba(states_per_path=3)
    for boundary in range(1, END_MAX):
        assert rules.since(boundary, page_size) == boundary - 1
        assert rules.kept(np.arange(0, boundary, 2), boundary, page_size).all()
    assert rules.per_path == 3
    assert rules.grid(page_size) == 1
    for pages in range(1, 5):
        assert Mamba(grid_tokens=pages * page_size).grid(page_size) == pages


def test_what_does_not_fall_on_page_boundaries_does_not_fit() -> None:
    for page_size, tokens in itertools.product(PAGE_SIZES, range(1, 13)):
        fits = tokens % page_size == 0
        for rules in (SlidingWindow(window=1, checkpoint_tokens=tokens), Mamba(grid_tokens=tokens)):
            wrong = rules.fits(page_size)
            assert (wrong is None) == fits
            assert fits or f"_tokens: {tokens} is not allowed; allowed: a multiple of" in str(wrong)
        assert SlidingWindow(window=tokens).fits(page_size) is None
        assert Mamba().fits(page_size) is None


@pytest.mark.parametrize(
    ("rules", "fields", "start"),
    [
        (SlidingWindow, {"window": 0}, "window: 0 is not allowed"),
        (SlidingWindow, {"window": 1, "checkpoint_tokens": 0}, "checkpoint_tokens: 0"),
        (SlidingWindow, {"window": 1, "name": "A b"}, "name: 'A b'"),
        (Mamba, {"grid_tokens": 0}, "grid_tokens: 0"),
        (Mamba, {"states_per_path": 1.0}, "states_per_path: 1.0"),
        (Mamba, {"name": ""}, "name: ''"),
    ],
)
def test_rules_that_cannot_be_are_refused(rules: Any, fields: dict[str, Any], start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        rules(**fields)
    assert str(caught.value).startswith(start)


def test_one_model_may_have_two_windows() -> None:
    assert SlidingWindow(window=8).kind == SWA
    assert SlidingWindow(window=8, name="wide").kind == "wide"
    assert (Mamba().kind, Mamba(name="conv").kind) == (MAMBA, "conv")


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
def test_the_kinds_that_come_along_conform(page_size: int) -> None:
    for window in (1, 2, 7, 4096):
        check_component(SlidingWindow(window=window), page_size)
        check_component(SlidingWindow(window=window, checkpoint_tokens=5 * page_size), page_size)
    check_component(Mamba(), page_size)
    check_component(Mamba(grid_tokens=100 * page_size, states_per_path=2), page_size)


# A kind from outside, and ways to get one wrong.


@dataclass(frozen=True)
class Sinks:
    """The last `back` pages, at every `every`-th page."""

    back: int = 2
    every: int = 3
    kind: ClassVar[Kind] = Kind("sinks")
    per_path: ClassVar[int | None] = None

    def since(self, boundary: int, page_size: int) -> int:
        return max(0, boundary - self.back)

    def kept(self, pages: Pages, end: int, page_size: int) -> np.ndarray:
        last = end - end % self.every
        return (pages >= last - self.back) & (pages < last)

    def cold(self, pages: Pages, end: int, page_size: int) -> np.ndarray:
        return ~self.kept(pages, end, page_size)

    def grid(self, page_size: int) -> int:
        return self.every

    def fits(self, page_size: int) -> str | None:
        return None if page_size < 64 else f"every: {self.every} is too much; allowed: small pages"


def test_a_kind_from_outside_conforms() -> None:
    rules: Component = Sinks()
    for page_size in (1, 2, 3, 16):
        check_component(rules, page_size)


def broken(**methods: Any) -> Component:
    """A kind with some of its rules replaced."""
    rules: Component = type("Broken", (Sinks,), methods)()
    return rules


class Forgetful(Sinks):
    """Whose answers depend on what it was asked before."""

    def since(self, boundary: int, page_size: int) -> int:
        seen = vars(self).setdefault("seen", [])
        seen.append(boundary)
        return boundary - 1 if len(seen) < 100 else 0


def needs_no_more(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    return np.zeros(len(pages), bool)


def first_asked(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    return Sinks.kept(self, pages, end, page_size) | (np.arange(len(pages)) == 0)


def moves_pages(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    pages += 1
    return np.ones(len(pages), bool)


def everything_is_cold(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    return np.ones(len(pages), bool)


def nothing_is_cold(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    return np.zeros(len(pages), bool)


def cold_but_for_one(self: Sinks, pages: Pages, end: int, page_size: int) -> np.ndarray:
    return ~self.kept(pages, end, page_size)[:-1]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (broken(cold=everything_is_cold), "what continuing at a node's end needs is cold"),
        (broken(cold=nothing_is_cold), "not kept is not cold"),
        (broken(cold=cold_but_for_one), "one entry per page"),
        (broken(cold=lambda self, pages, end, page_size: [False] * len(pages)), "cold is an array"),
        (broken(kind="full"), "'full'"),
        (broken(kind="A b"), "rules.kind: 'A b'"),
        (broken(fits=lambda self, page_size: "every: no"), "rules.every: no"),
        (broken(__hash__=None), "unhashable"),
        (broken(per_path=0), "per_path"),
        (broken(grid=lambda self, page_size: 0), "at least one page"),
        (broken(grid=lambda self, page_size: 1.0), "a grid is an int"),
        (broken(since=lambda self, boundary, page_size: boundary), r"since\(1\) = 1 is not in"),
        (broken(since=lambda self, boundary, page_size: -1), "is not in"),
        (broken(since=lambda self, boundary, page_size: boundary / 2), "since is an int"),
        (broken(since=lambda self, boundary, page_size: max(0, 9 - boundary) % boundary), "smaller"),
        (Forgetful(), "since depends"),
        (broken(kept=lambda self, pages, end, page_size: [True] * len(pages)), "an array"),
        (broken(kept=lambda self, pages, end, page_size: pages), "bools"),
        (broken(kept=lambda self, pages, end, page_size: np.ones(end, bool)), "one entry per page"),
        (broken(kept=needs_no_more), "are not kept"),
        (broken(kept=first_asked), "the others asked about"),
        (broken(kept=moves_pages), "changed the pages"),
        (object(), "a Component"),
        (Sinks, "a Component"),
    ],
)
def test_a_kind_that_breaks_its_promises_does_not_conform(rules: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_component(rules, 4)


# The registry.


def test_rules_are_read_by_their_name() -> None:
    assert read_rules({"kind": "swa", "window": 7}, "rules") == SlidingWindow(window=7)
    assert read_rules({"kind": "mamba"}, "rules") == Mamba()
    assert read_rules(Mamba(), "rules") == Mamba()


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"window": 7}, "rules.kind: is missing; allowed: "),
        ({"kind": "swe"}, r"rules.kind: 'swe' is not known \(did you mean 'swa'\?\); allowed: .*mamba"),
        ({"kind": 3}, "rules.kind: 3 is not known"),
        ({"kind": "swa", "windows": 7}, r"rules.windows: is not a known key \(did you mean 'window'\?\)"),
        ({"kind": "swa"}, "rules.window: is missing"),
        ({"kind": "swa", "window": -7}, "rules.window: -7 is not allowed"),
    ],
)
def test_rules_that_cannot_be_read_say_where(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_rules(table, "rules")


def test_a_kind_may_be_registered_once() -> None:
    def sinks(back: int, every: int = 3) -> Sinks:
        return Sinks(back=back, every=every)

    register_kind("test-sinks", sinks)
    register_kind("test-sinks", sinks)
    assert read_rules({"kind": "test-sinks", "back": 4}, "rules") == Sinks(back=4)
    with pytest.raises(ConfigError, match=r"rules\.front: is not a known key.*allowed: back, every"):
        read_rules({"kind": "test-sinks", "front": 4}, "rules")
    with pytest.raises(ConfigError, match="'test-sinks' is registered already"):
        register_kind("test-sinks", Sinks)
