"""Real processes, killed with signal 9 again and again over the same directory.

`disk_victim.py` is killed while it writes, reads, evicts and clears from three threads, or while it opens
what the one before has left. `Ledger` knows from its output what must be there, and what must not.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import disk_victim as victim
import pytest

import tiertree
from tiertree.storage.base import Got
from tiertree.storage.disk import DiskStorage

RISK_BYTES = 4 * (victim.SEGMENT_BYTES + victim.PAGE_BYTES_MAX)
"""What one put may evict before it can say so: its own bytes, a half of each segment being kept."""

KILLS = 200

TIGHT, ROOMY = 768 << 10, 1 << 30
"""The capacities of a directory, by turns: with the one pages are evicted all the time, with the other
never, so there every page that was acknowledged must be found."""

TURN = 4
"""Kills with one capacity before it is the other's turn."""


@dataclass
class Ledger:
    """What the processes have said. `sure` in the order of its acknowledgement."""

    sure: dict[int, None] = field(default_factory=dict)
    maybe: set[int] = field(default_factory=set)
    """There, or not: under way when its process died, or when all was cleared."""
    damaged: set[int] = field(default_factory=set)
    under_way: set[int] = field(default_factory=set)
    """Being put."""
    crossed: set[int] = field(default_factory=set)
    """Being put while all was cleared: there, or not."""
    cleared: set[int] | None = None
    """Put before the clear that is under way."""
    risk_bytes: int = 0
    """What may have gone unsaid since the directory was last looked at."""

    def hear(self, lines: Sequence[str]) -> None:
        """All that one process has said, in order. What it had begun when it died may be done or not."""
        for line in lines:
            word, *rest = line.split()
            numbers = [int(word) for word in rest] if word in "psf" else []
            if word == "p":
                self.under_way |= set(pages_of(numbers[0]))
                self.maybe |= set(pages_of(numbers[0]))
            elif word == "s":
                self._stored(numbers[0], numbers[1:])
            elif word == "f":
                self.damaged.add(numbers[0])
                self.sure.pop(numbers[0], None)
                self.risk_bytes += RISK_BYTES  # its tombstone may need room
            elif word == "c":
                self.maybe |= set(self.sure)
                self.sure.clear()
                self.cleared = self.maybe - self.under_way
                self.crossed |= self.under_way
            elif word == "C":
                assert self.cleared is not None
                self.maybe -= self.cleared
                self.crossed |= self.under_way
                self.cleared = None
            else:
                assert word in ("open", "opened"), line
        self.risk_bytes += RISK_BYTES * (len(self.under_way) // victim.GROUP)
        self.under_way.clear()
        self.crossed.clear()
        self.cleared = None

    def _stored(self, group: int, evicted: Sequence[int]) -> None:
        for number in evicted:
            self.sure.pop(number, None)
            self.maybe.discard(number)
        for number in pages_of(group):
            self.under_way.discard(number)
            if number not in self.crossed and self.cleared is None:
                self.maybe.discard(number)
                self.sure[number] = None

    def compare(self, storage: DiskStorage, risk_bytes: int) -> None:
        """Hold a directory to what was said, and take what it has for what there is from now on. So many
        bytes of its oldest pages may have gone without a word."""
        keys = storage.keys()
        found = {victim.number_of(key): key for key in keys}
        assert set(found) <= set(self.sure) | self.maybe | self.damaged, "a page was resurrected"
        hits = []
        for number, key in found.items():
            content = victim.content_of(number)
            into = memoryview(bytearray(len(content)))
            (got,) = storage.get([key], [into])
            assert got is not Got.HIT or into == content, f"page {number}: wrong bytes"
            assert got is Got.HIT or number in self.damaged, f"page {number} is {got}, and nobody damaged it"
            if got is Got.HIT:
                hits.append(number)
        lost = [number for number in self.sure if number not in found]
        lost_bytes = sum(len(victim.content_of(number)) for number in lost)
        assert lost_bytes <= risk_bytes, f"{lost_bytes} bytes of acknowledged pages are gone: {lost}"
        newest = list(self.sure)[-len(self.sure) // 3 :] if risk_bytes < ROOMY else []
        order = {number: i for i, number in enumerate(self.sure)}
        where = f"of {len(self.sure)} pages these, counted from the oldest: {sorted(order[n] for n in lost)}"
        assert not set(newest) & set(lost), f"pages went that were not the oldest: {where}"
        self.sure = dict.fromkeys(sorted(hits, key=lambda number: order.get(number, -1)))
        self.maybe.clear()
        self.damaged.clear()
        self.risk_bytes = 0


def pages_of(group: int) -> range:
    return range(group * victim.GROUP, (group + 1) * victim.GROUP)


def used(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir()) if path.exists() else 0


def kill_one(path: Path, capacity: int, first: int, rng: random.Random) -> list[str]:
    """Start a victim, kill it somewhere, now and then while it opens, and return what it has said."""
    sources = str(Path(tiertree.__file__).parent)
    durability, seed = rng.choice(("none", "batch")), str(rng.randrange(1 << 32))
    command = [
        sys.executable,
        victim.__file__,
        sources,
        str(path),
        str(capacity),
        durability,
        str(first),
        seed,
    ]
    lines: list[str] = []
    until = 1 if rng.random() < 0.25 else rng.randrange(2, 150)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            while len(lines) < until:
                lines.append(process.stdout.readline())
                assert lines[-1], f"the victim died by itself: {lines[-2:]}"
            time.sleep(rng.random() * 0.004)
        finally:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read()
        lines += rest[: rest.rfind("\n") + 1].splitlines()
    return lines


def look(path: Path, capacity: int, ledger: Ledger, rng: random.Random, risk_bytes: int) -> None:
    """Open the directory, compare, and close it."""
    storage = DiskStorage(path, capacity, victim.SEGMENT_BYTES, rng.choice(("none", "batch")))
    assert storage.stats().bytes == used(path)
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
    ledger.compare(storage, risk_bytes)
    storage.close()


def kill_many(path: Path, kills: int, seed: int) -> str:
    """Kill so many processes that use the directory `path`; returns figures."""
    rng = random.Random(seed)
    ledger = Ledger()
    count: Counter[str] = Counter()
    for number in range(kills):
        capacity = (TIGHT, ROOMY)[number // TURN % 2]
        if number % TURN == 0 and number:
            look(path, capacity, ledger, rng, ROOMY)  # what does not fit any more has gone
        lines = kill_one(path, capacity, number << 20, rng)
        count["at work" if any(line.startswith("opened") for line in lines) else "while opening"] += 1
        count["puts"] += sum(line.startswith("s") for line in lines)
        count["evicted"] += sum(len(line.split()) - 2 for line in lines if line.startswith("s"))
        count["cleared"] += sum(line.startswith("C") for line in lines)
        assert used(path) <= capacity
        ledger.hear(lines)
        if rng.random() < 0.7 or number % TURN == TURN - 1 or number == kills - 1:
            look(path, capacity, ledger, rng, ledger.risk_bytes if capacity == TIGHT else 0)
            count["pages verified"] += len(ledger.sure)
    return f"{kills} kills, seed {seed}: " + ", ".join(f"{n} {kind}" for kind, n in sorted(count.items()))


def test_a_few_kills(tmp_path: Path) -> None:
    kill_many(tmp_path / "d", 8, seed=3)


@pytest.mark.soak
def test_soak_kills(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of `KILLS` where there are 300 seconds for the soak; a part of them where there are fewer."""
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    kills = max(8, min(KILLS, int(KILLS * seconds / 300)))
    with capsys.disabled():
        print(f"\nSOAK_SEED={seed}", flush=True)
        print(kill_many(tmp_path / "d", kills, seed), flush=True)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        print(kill_many(Path(directory) / "d", int(sys.argv[1]), int(sys.argv[2])))
