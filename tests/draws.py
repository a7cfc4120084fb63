"""What worlds and prompts are drawn from: all of it small, so that what is rare elsewhere is common here."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kinds import CHUNK, Chunked

from tiertree import (
    MAMBA,
    SWA,
    BreakerConfig,
    Component,
    KindConfig,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    SlidingWindow,
    StopRule,
    WritePolicy,
)
from tiertree.types import Kind

NAMESPACES = ("", "tenant")
FORKS = (9, 0, 1, 2, 3)
"""Prompts of one family are alike but for one token: where it is, decides where they part."""

HABITS = ("what it needs", "all", "nothing", "the last page", "two ends", "every other page")
"""Which pages of a partial kind a request may have when it inserts."""

Habits = Sequence[str]
"""One of HABITS for each partial kind in turn."""


def prompt(fork: int, pages: int, page_size: int, odd: int = 0) -> list[int]:
    """A prompt of `pages` pages and `odd` more tokens, that parts from its family in page `fork`."""
    length = pages * page_size + odd
    return [int(at // page_size == fork) for at in range(length)]


def draw_kinds(rng: random.Random, page_size: int, has_host: bool) -> tuple[KindConfig, ...]:
    """A set of partial kinds with tiny pools, each set as likely as any other."""
    checkpoint, grid = rng.choice([None, 1, 2, 3]), rng.choice([None, None, 1, 2])
    rules: dict[Kind, Component] = {
        SWA: SlidingWindow(
            window=rng.randint(1, 3 * page_size),
            checkpoint_tokens=checkpoint and checkpoint * page_size,
        ),
        MAMBA: Mamba(grid_tokens=grid and grid * page_size, states_per_path=rng.choice([None, 1, 2])),
        CHUNK: Chunked(pages=rng.randint(1, 3)),
    }
    chosen = [kind for kind in rules if rng.random() < 0.5]
    return tuple(
        KindConfig(
            rules=rules[kind],
            device=rng.choice([2, 4, 6, 8, 8, 12]),
            host=rng.choice([1, 2, 6, 8, 12, 16]) if has_host else None,
        )
        for kind in chosen
    )


def draw_options(rng: random.Random) -> dict[str, object]:
    """A tiny cache: sizes, kinds, policies and limits at which the rare paths are common."""
    host = rng.choice([0, 1, 4, 8, 12, 16])
    page_size = rng.randint(1, 3)
    return {
        "diligent": rng.random() < 0.7,
        "device": rng.choice([1, 4, 6, 8, 8, 10]),
        "host": host,
        "storage": rng.choice([0, 3, 12, 1000, 1000]) if host else 0,
        "page_size": page_size,
        "kinds": draw_kinds(rng, page_size, host > 0),
        "write_policy": rng.choice(list(WritePolicy)),
        "selective_hits": rng.randint(1, 3),
        "op_deadline_seconds": rng.choice([1.0, 30.0, 30.0]),
        "max_operations": rng.choice([2, 4096, 4096]),
        "breaker": BreakerConfig(failures=rng.choice([1, 1, 2, 3, 1000]), base_seconds=0.1, max_seconds=1.0),
        "load_back": LoadBackConfig(min_tokens=rng.choice([0, 2]), max_pages=rng.choice([None, 1, 3])),
        "prefetch": PrefetchConfig(
            min_tokens=rng.choice([0, 2]),
            stop_rule=rng.choice(list(StopRule)),
            base_seconds=0.5,
            max_pages_in_flight=rng.choice([4, 1000]),
        ),
    }
