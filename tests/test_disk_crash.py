"""The disk tier dies at every operation, in every way a machine may come back, and is opened again.

    workload   ──op──op──op──op──op──▶     after each operation: what if it all ended here?
                      │
                      ├─ killed           everything the kernel had
                      ├─ lost             what was synced
                      └─ mixed, seed n    what was synced, and some of the rest
                             │
                             ▼
                     open ──op──op──▶     and for a share of them: what if opening ended here, too?

`World` knows from the answers alone what must be served, and what must not be. Run as a program it prints
how many crashes that were.
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest

from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.lock import FIXED_BYTES
from tiertree.testing.conformance import page_content, page_key
from tiertree.testing.fakedisk import After, Crashed, FakeDisk, FakeFiles, Op

PATH = "/data/cache/d"
SEGMENT_BYTES = 4096
CAPACITY = 24 << 10
SMALL = 10 << 10
PAGES = 64
Script = Sequence[tuple[str, tuple[int, ...]]]

SCRIPT: Script = [
    ("open", (CAPACITY,)),
    ("put", (0, 1, 2)),
    ("put", tuple(range(3, 12))),  # several segments in one call
    ("fail", (4,)),  # quarantined, with a tombstone
    ("put", (12, 4)),
    ("get", (0, 1, 5)),  # to be written again when their segment goes
    ("close", ()),
    ("open", (CAPACITY,)),
    ("put", (13, 0)),  # behind what is there
    ("fail", (13,)),
    ("close", ()),
    ("open", (CAPACITY,)),
    ("get", (0, 1, 2, 5, 6)),
    *(("put", tuple(range(n, n + 5))) for n in range(16, 41, 5)),  # evicts
    ("put", (63,)),  # longer than a segment
    ("get", (30, 31, 40)),
    ("put", (41, 42, 43)),
    ("close", ()),
    ("open", (SMALL,)),
    ("put", (44, 45)),
    ("clear", ()),
    ("put", (2, 46, 47)),
    ("get", (2,)),
    ("close", ()),
    ("open", (CAPACITY,)),
    ("clear", ()),
    ("close", ()),
    ("open", (SMALL,)),
    *(("put", tuple(range(n, n + 4))) for n in range(48, 60, 4)),
]


def length_of(number: int) -> int:
    """Pages differ in length; the last is longer than a segment."""
    return 5000 if number == PAGES - 1 else 130 + number * 97 % 900


def draw_script(rng: random.Random) -> Script:
    """Some forty steps, drawn."""
    script: list[tuple[str, tuple[int, ...]]] = [("open", (CAPACITY,))]
    for _ in range(40):
        step = rng.choice(("put", "put", "put", "put", "get", "get", "fail", "clear", "close"))
        if step == "clear" and rng.random() < 0.6:
            continue
        some = tuple(rng.sample(range(PAGES), rng.randrange(1, 9)))
        if step in ("put", "get"):
            script.append((step, some))
        elif step == "fail":
            script.append((step, some[:1]))
        else:
            script.append((step, ()))
        if step == "close":
            script.append(("open", (rng.choice((CAPACITY, CAPACITY, SMALL)),)))
    return script


@dataclass
class World:
    """A disk, the tier on it, and what its answers so far have promised.

    `sure` is there after the death of the process, and with durability "batch" after a power loss as well,
    but for `risked`: the pages of segments that the step under way removes. Nothing that is not in
    `may_killed` is there after the death of the process, nothing that is not in `may_power` after a power
    loss: evicted pages may come back then, cleared ones never, quarantined ones only with "none".
    """

    durability: str
    disk: FakeDisk = field(default_factory=FakeDisk)
    capacity: int = 0
    storage: DiskStorage | None = None
    sure: set[int] = field(default_factory=set)
    may_killed: set[int] = field(default_factory=set)
    may_power: set[int] = field(default_factory=set)
    risks: list[set[int]] = field(default_factory=list)
    """By step, from a run without crashes."""
    risked: set[int] = field(default_factory=set)
    placed: dict[int, str] = field(default_factory=dict)
    """The segment of each page, before the step under way."""

    @property
    def opened(self) -> DiskStorage:
        assert self.storage is not None
        return self.storage

    def run(self, script: Script) -> None:
        """Do it all. The next run with the `risks` of this one knows what each step removes."""
        for i, (step, numbers) in enumerate(script):
            self.risked = self.risks[i] if i < len(self.risks) else set()
            if self.storage is not None:
                self.placed = self.places()
            getattr(self, step)(*numbers)
            if i == len(self.risks):
                self.risks.append(self.removed())
            self.risked = set()

    def places(self) -> dict[int, str]:
        """The segment of each page that is there."""
        found = {n: self.opened.locate(page_key(n)) for n in range(PAGES)}
        return {n: os.path.basename(place[0]) for n, place in found.items() if place is not None}

    def removed(self) -> set[int]:
        """Pages whose segment is not there any more."""
        names = self.disk.listing(PATH)
        return {n for n, name in self.placed.items() if name not in names}

    def open(self, capacity: int) -> None:
        shrinks, self.capacity = capacity < self.capacity, capacity
        self.storage = open_storage(self.disk, capacity, self.durability)
        gone = self.removed()
        assert shrinks or not gone, "opening has removed pages that fit"
        self.sure -= gone
        self.may_killed -= gone

    def close(self) -> None:
        storage, self.storage = self.opened, None
        storage.close()

    def put(self, *numbers: int) -> None:
        self.may_killed |= set(numbers)
        self.may_power |= set(numbers)
        keys = [page_key(n) for n in numbers]
        result = self.opened.put(keys, [page_content(n, length_of(n)) for n in numbers])
        evicted = {n for n in range(PAGES) if page_key(n) in result.evicted}
        kept, stored = (
            {n for n, o in zip(numbers, result.outcomes, strict=True) if o in those}
            for those in ((Wrote.STORED, Wrote.PRESENT), (Wrote.STORED,))
        )
        assert not evicted & stored
        self.sure = (self.sure | kept) - evicted  # what was PRESENT may have had to go for the others
        self.may_killed = set(self.sure)

    def get(self, *numbers: int) -> None:
        for number, (got, data) in zip(numbers, read(self.opened, numbers), strict=True):
            assert (got is Got.HIT) == (number in self.sure)
            assert got is not Got.HIT or data == page_content(number, length_of(number))

    def fail(self, number: int) -> None:
        """One page cannot be read, this once. It must not be served again, though its bytes are sound."""
        if number not in self.sure:
            return
        self.sure.discard(number)
        self.disk.fail(Op.READ)
        assert read(self.opened, [number])[0][0] is Got.CORRUPT
        self.may_killed.discard(number)
        self.sure -= self.removed() - set(
            self.places()
        )  # a tombstone may need room; the next put says what has gone
        if self.durability == "batch":
            self.may_power.discard(number)

    def clear(self) -> None:
        self.sure.clear()
        self.opened.clear()
        self.may_killed.clear()
        self.may_power.clear()
        assert not [name for name in self.disk.listing(PATH) if name.startswith("seg-")]


def open_storage(disk: FakeDisk, capacity: int, durability: str) -> DiskStorage:
    return DiskStorage(PATH, capacity, SEGMENT_BYTES, durability, FakeFiles(disk))


def read(storage: DiskStorage, numbers: Sequence[int]) -> list[tuple[Got, bytes]]:
    into = [memoryview(bytearray(length_of(n))) for n in numbers]
    results = storage.get([page_key(n) for n in numbers], into)
    return [(got, bytes(data)) for got, data in zip(results, into, strict=True)]


def served(storage: DiskStorage) -> dict[int, Got]:
    """What becomes of each page that the index has. None is ever wrong."""
    results = {}
    numbers = [n for n, there in enumerate(storage.holds([page_key(n) for n in range(PAGES)])) if there]
    for number, (got, data) in zip(numbers, read(storage, numbers), strict=True):
        assert got is not Got.HIT or data == page_content(number, length_of(number)), f"page {number}: wrong"
        results[number] = got
    return results


def used(disk: FakeDisk) -> int:
    """Bytes of all files in the directory, which may not be there yet."""
    try:
        return sum(disk.listing(PATH).values())
    except FileNotFoundError:
        return 0


class Promise(NamedTuple):
    """What opening after one crash has to keep."""

    must: set[int]
    may: set[int]
    killed: bool
    """Only the process died, so nothing can have been damaged."""
    capacity: int
    durability: str


@dataclass
class Crashes:
    """Looks at what every kind of crash would leave of a world at this moment."""

    world: World
    seeds: int
    """How many random power losses at each moment."""
    share: int
    """After one crash of so many, opening is crashed at each operation, and what it leaves used on."""
    count: Counter[str] = field(default_factory=Counter)
    done: int = 0

    def everywhere(self) -> None:
        """Here, for every kind of crash. To be called after each operation."""
        world = self.world
        if world.storage is not None:
            assert used(world.disk) <= world.capacity, "more bytes than the capacity"
        self.count["crash points"] += 1
        first = world.disk.operations * self.seeds
        modes = [(After.KILLED, 0), (After.LOST, 0), *((After.MIXED, first + i) for i in range(self.seeds))]
        for after, seed in modes:
            try:
                self.crash(after, seed)
            except BaseException as error:
                error.add_note(f"{world.durability}, operation {world.disk.operations}, {after}, seed {seed}")
                raise

    def crash(self, after: After, seed: int) -> None:
        """One kind of crash, here: open what is left, and compare."""
        world = self.world
        killed = after is After.KILLED
        firm = killed or world.durability == "batch"
        promise = Promise(
            world.sure - world.risked if firm else set(),
            world.may_killed | world.risked if killed else world.may_power,
            killed,
            world.capacity or CAPACITY,
            world.durability,
        )
        self.count[after.value] += 1
        disk = world.disk.after_crash(after, seed)
        self.done += 1
        closely = self.done % self.share == 0
        nested: list[tuple[After, FakeDisk]] = []

        def opening() -> None:
            again = list(After)[len(nested) % 3]
            nested.append((again, disk.after_crash(again, seed + len(nested))))

        examine(disk, promise, opening if closely else None)
        for again, left in nested:
            self.count["while opening"] += 1
            still = killed and again is After.KILLED
            must = promise.must if still or world.durability == "batch" else set()
            may = promise.may if still else world.may_power
            examine(left, promise._replace(must=must, may=may, killed=still))


def examine(disk: FakeDisk, promise: Promise, opening: Callable[[], None] | None = None) -> None:
    """Open what a crash has left and hold it to its promise. `opening` is called at each operation of that,
    and then the directory is used on, and loses power once more."""
    limit = max(promise.capacity, used(disk) + FIXED_BYTES)

    def watch() -> None:
        assert used(disk) <= limit, "more bytes than the capacity"
        if opening is not None:
            opening()

    disk.watch = watch
    storage = open_storage(disk, promise.capacity, promise.durability)
    disk.watch = lambda: None
    check(disk, storage, promise)
    if opening is None:
        return
    results = served(storage)  # without what was damaged; a tombstone may have needed room
    assert set(results.values()) <= {Got.HIT}
    lost = disk.after_crash(After.LOST)
    if promise.durability == "batch":
        again = open_storage(lost, promise.capacity, promise.durability)
        there = {n for n, got in served(again).items() if got is Got.HIT}
        assert set(results) <= there, f"found and not durable: {sorted(set(results) - there)}"
    numbers = (60, 61, 62)
    result = storage.put([page_key(n) for n in numbers], [page_content(n, length_of(n)) for n in numbers])
    assert Wrote.REFUSED not in result.outcomes
    results = served(storage)
    assert set(results.values()) == {Got.HIT}
    missing = {n for n in numbers if n not in results and page_key(n) not in result.evicted}
    assert not missing, f"put after a crash, and not there: {sorted(missing)}"
    storage.close()
    storage = open_storage(disk, promise.capacity, promise.durability)
    assert served(storage) == results
    storage.close()


def check(disk: FakeDisk, storage: DiskStorage, promise: Promise) -> None:
    """Is what an opened directory serves what was promised?"""
    names = disk.listing(PATH)
    assert storage.stats().bytes == sum(names.values()) <= promise.capacity
    strange = [name for name in names if name not in ("FORMAT", "LOCK") and not name.startswith("seg-")]
    assert not strange, f"left behind: {strange}"
    results = served(storage)
    hits = {n for n, got in results.items() if got is Got.HIT}
    assert promise.must <= hits, f"lost: {sorted(promise.must - hits)}"
    assert hits <= promise.may, f"resurrected: {sorted(hits - promise.may)}"
    assert not promise.killed or hits == set(results), "damaged by the death of a process"


def crash_everywhere(script: Script, durability: str, seeds: int, share: int) -> Counter[str]:
    """Run `script` and crash at each of its operations; returns how often, by kind."""
    sound = World(durability)
    sound.run(script)
    crashes = Crashes(World(durability, risks=sound.risks), seeds, share)
    crashes.world.disk.watch = crashes.everywhere
    crashes.world.run(script)
    assert crashes.world.disk.operations == sound.disk.operations == crashes.count["crash points"]
    return crashes.count


def tear_everywhere(script: Script, durability: str, every: int, rng: random.Random) -> int:
    """Die within each `every`-th operation, which, if it is a write, leaves some of its bytes."""
    sound = World(durability)
    sound.run(script)
    points = range(rng.randrange(every), sound.disk.operations, every)
    for at in points:
        world = World(durability, risks=sound.risks)
        torn = rng.choice((1, 63, 64, 127, 128, 129, rng.randrange(1, 4096)))
        world.disk.crash(at=at, torn_bytes=torn)
        with pytest.raises(Crashed):
            world.run(script)
        for after in After:
            try:
                Crashes(world, 0, 1).crash(after, at)
            except BaseException as error:
                error.add_note(f"{durability}, torn after {torn} bytes at {at}, {after}")
                raise
    return len(points)


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_death_at_every_operation(durability: str) -> None:
    count = crash_everywhere(SCRIPT, durability, seeds=3, share=11)
    assert count["crash points"] > 100
    assert count["while opening"] > 100


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_death_within_a_write(durability: str) -> None:
    assert tear_everywhere(SCRIPT, durability, every=5, rng=random.Random(1)) > 20


# In 107 and 113 a tombstone could go before the page it hides; 2 and 23 are as good as any.
@pytest.mark.parametrize("seed", [2, 23, 107, 113])
def test_death_at_every_operation_of_drawn_steps(seed: int) -> None:
    for durability in ("none", "batch"):
        crash_everywhere(draw_script(random.Random(seed)), durability, seeds=2, share=29)


def test_a_tombstone_does_not_go_before_what_it_hides() -> None:
    """One put removes both, with no new file in between, and a power loss brings back what it likes."""
    script = [("open", (9000,)), ("put", tuple(range(12))), ("fail", (0,)), ("put", (63,))]
    world = World("batch")
    world.run(script[:3])
    places = world.places()
    assert places[1] != places[11], "the tombstone must be in another segment than what it hides"
    world.run(script[3:])
    assert not set(places.values()) & set(world.disk.listing(PATH)), "both must have gone"
    crash_everywhere(script, "batch", seeds=30, share=1000)


@pytest.mark.parametrize("between", [After.KILLED, After.LOST])
def test_cleared_pages_stay_away_when_old_blocks_show_through(between: After) -> None:
    """After a clear the same pages' blocks, at the same places of new files, are not taken for them. Neither
    after a session that was forgotten in a power loss, nor if the clear's own machine lost power."""
    world = World("none")
    world.run([("open", (CAPACITY,)), ("put", (0, 1, 2))])
    world.disk = world.disk.after_crash(After.LOST)
    world.storage, world.sure, world.placed = None, set(), {}
    world.run([("open", (CAPACITY,)), ("put", (3, 4)), ("clear", ())])
    world.disk = world.disk.after_crash(between)
    world.storage, world.placed = None, {}
    world.run([("open", (CAPACITY,)), ("put", (5,)), ("put", (6, 7))])
    crashes = Crashes(world, seeds=0, share=10000)
    for seed in range(600):
        try:
            crashes.crash(After.MIXED, seed)
        except AssertionError as error:
            error.add_note(f"seed {seed}")
            raise


def test_a_world_that_promises_too_much_is_found_out() -> None:
    """The oracle itself: a page that was not put, and one that was cleared, must be missed or noticed."""
    world = World("none")
    world.run(SCRIPT[:3])
    crashes = Crashes(world, seeds=0, share=100)
    crashes.crash(After.KILLED, 0)
    world.sure.add(50)
    with pytest.raises(AssertionError, match="lost: "):
        crashes.crash(After.KILLED, 0)
    world.sure.discard(50)
    world.may_killed.discard(1)
    world.sure.discard(1)
    with pytest.raises(AssertionError, match="resurrected: "):
        crashes.crash(After.KILLED, 0)


def campaign(first: int, seconds: float, durabilities: Sequence[str] = ("none", "batch")) -> str:
    """Crash drawn scripts everywhere, from seed `first` on, for so long; returns figures."""
    end, seed = time.monotonic() + seconds, first
    total: Counter[str] = Counter()
    while seed == first or time.monotonic() < end:
        rng = random.Random(seed)
        script = draw_script(rng)
        for durability in durabilities:
            try:
                total += crash_everywhere(script, durability, seeds=4, share=11)
                total["torn"] += tear_everywhere(script, durability, 7, rng)
            except BaseException as error:
                error.add_note(f"repeat with python tests/test_disk_crash.py {seed}")
                raise
        seed += 1
    figures = ", ".join(f"{count} {kind}" for kind, count in sorted(total.items()))
    return f"crashes of {seed - first} scripts from seed {first} on: {figures}"


@pytest.mark.soak
def test_soak_crashes(capsys: pytest.CaptureFixture[str]) -> None:
    seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    with capsys.disabled():
        print(f"\nSOAK_SEED={seed}\n{campaign(seed, seconds * 0.15)}", flush=True)


if __name__ == "__main__":
    for durability in ("none", "batch"):
        print(f"the script, {durability}:", dict(crash_everywhere(SCRIPT, durability, seeds=8, share=5)))
    print(campaign(int(sys.argv[1]) if len(sys.argv) > 1 else 0, 0 if len(sys.argv) > 1 else 60))
