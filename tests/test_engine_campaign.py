"""The reference engine in random worlds: see `engine_world`."""

from __future__ import annotations

import os
import random
import time
from collections import Counter

import pytest
from engine_world import RARE, live, seconds

SEEDS = range(40)
WORLDS_MIN = 300
"""So many worlds meet every rare path."""


@pytest.mark.parametrize("first", SEEDS[::8])
def test_random_worlds(first: int) -> None:
    for seed in range(first, first + 8):
        live(seed)


@pytest.mark.soak
def test_soak_random_worlds(capsys: pytest.CaptureFixture[str]) -> None:
    """For a part of SOAK_SECONDS. Where there are 600 of them, every rare path has been met afterwards."""
    end, least = time.monotonic() + seconds(0.15), WORLDS_MIN * (seconds(1) >= 600)
    first = seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    seen: Counter[str] = Counter()
    steps = 0
    while time.monotonic() < end or seed < first + least:
        world = live(seed)
        seen.update(world.seen)
        steps += world.steps
        seed += 1
    with capsys.disabled():
        print(f"\nSOAK_SEED={first}: {seed - first} worlds, {steps} steps, {dict(sorted(seen.items()))}")
    assert not least or not [path for path in RARE if not seen[path]]
