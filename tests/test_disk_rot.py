"""Whatever happens to the bytes of its files: exact pages or misses, a named error at worst, nothing else.

Every bit of a small directory is flipped, one at a time; then files are mangled in every other way there is:
cut, extended, swapped, copied, renamed to one another, with sectors zeroed and moved.
"""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.testing.conformance import page_content, page_key
from tiertree.testing.fakedisk import After, FakeDisk, FakeFiles, Op
from tiertree.types import StorageError

PATH = "/d"
CAPACITY = 8192
LENGTHS = {0: 8, 1: 5, 2: 8, 3: 9, 4: 1}
"""Pages of `small_directory`, as long as they need be: nearly every bit is one of a header."""

QUARANTINED = 3


def open_storage(disk: FakeDisk, durability: str = "none") -> DiskStorage:
    return DiskStorage(PATH, CAPACITY, 4096, durability, FakeFiles(disk))


def put(storage: DiskStorage, *numbers: int) -> tuple[Wrote, ...]:
    pages = [page_content(n, LENGTHS.get(n, 700)) for n in numbers]
    return storage.put([page_key(n) for n in numbers], pages).outcomes


def small_directory(sealed: bool) -> FakeDisk:
    """Two segments. In the second, a page that has rotted and its tombstone, and a page behind it."""
    disk = FakeDisk()
    storage = open_storage(disk, "batch")
    put(storage, 0, 1)
    disk.fail(Op.SYNC)
    assert put(storage, 9) == (Wrote.REFUSED,)  # the first segment is not written any more
    put(storage, 2, QUARANTINED)
    place = storage.locate(page_key(QUARANTINED))
    assert place is not None
    flip(disk, place[0], 8 * place[1])
    assert results_of(storage)[QUARANTINED] is Got.CORRUPT
    put(storage, 4)
    if sealed:
        storage.close()
        open_storage(disk).close()
    return disk.after_crash(After.KILLED)


def flip(disk: FakeDisk, path: str, bit: int) -> None:
    content = bytearray(disk.content(path))
    content[bit // 8] ^= 1 << bit % 8
    disk.replace(path, bytes(content))


def results_of(storage: DiskStorage) -> dict[int, Got]:
    """What becomes of each page; none may be wrong."""
    into = {n: memoryview(bytearray(length)) for n, length in LENGTHS.items()}
    results = storage.get([page_key(n) for n in into], list(into.values()))
    for (number, data), got in zip(into.items(), results, strict=True):
        assert got is not Got.HIT or data == page_content(number, len(data)), f"page {number}: wrong bytes"
    return dict(zip(into, results, strict=True))


def served(disk: FakeDisk) -> dict[int, Got] | None:
    """What a directory gives for each page; None if it is refused."""
    try:
        storage = open_storage(disk)
    except StorageError as error:
        message = str(error)
    else:
        return results_when_open(disk, storage)
    assert PATH in message
    return None


def results_when_open(disk: FakeDisk, storage: DiskStorage) -> dict[int, Got]:
    results = results_of(storage)
    assert results[QUARANTINED] is not Got.HIT, "a quarantined page came back whole"
    assert storage.stats().bytes == sum(disk.listing(PATH).values()) <= CAPACITY
    storage.close()
    return results


@pytest.mark.parametrize("sealed", [False, True])
def test_no_flipped_bit_is_ever_served(sealed: bool) -> None:
    sound = small_directory(sealed)
    names = sound.listing(PATH)
    assert len(names) == 4
    good = served(sound.after_crash(After.KILLED))
    assert good == {n: Got.MISS if n == QUARANTINED else Got.HIT for n in LENGTHS}
    pages = places(sound)
    count: Counter[str] = Counter()
    for name, size in names.items():
        for bit in range(8 * size):
            disk = sound.after_crash(After.KILLED)
            flip(disk, f"{PATH}/{name}", bit)
            here = {n: start for n, (file, start, end) in pages.items() if file == name and bit // 8 < end}
            hit = {n for n, start in here.items() if start <= bit // 8}
            # A footer keeps damage to itself and its page; without one a walk ends at what is damaged.
            may = set(pages) if bit < 8 * 64 else hit if sealed else set(here)
            try:
                count[flipped(disk, may if name.startswith("seg-") else set())] += 1
            except BaseException as error:
                error.add_note(f"{name}, bit {bit}, sealed: {sealed}")
                raise
    assert count["refused"] == 8 * names["FORMAT"], "each flip in FORMAT is refused, no other is"
    assert count["lost"] > 4000, "flips in payloads and headers must be noticed"
    assert sum(count.values()) == 8 * sum(names.values())


def places(sound: FakeDisk) -> dict[int, tuple[str, int, int]]:
    """File, and first byte and end of the record, of each page that is served."""
    storage = open_storage(sound.after_crash(After.KILLED))
    found = {n: storage.locate(page_key(n)) for n in LENGTHS}
    return {
        n: (os.path.basename(place[0]), place[1] - 128, place[1] + place[2])
        for n, place in found.items()
        if place is not None
    }


def flipped(disk: FakeDisk, may: set[int]) -> str:
    """Nothing but the pages in `may` may be lost, and those for good."""
    results = served(disk)
    if results is None:
        return "refused"
    bad = {n for n, got in results.items() if got is not Got.HIT} - {QUARANTINED}
    assert bad <= may, f"lost without need: {bad - may}"
    if bad:
        again = served(disk)
        assert again is not None
        assert all(again[n] is Got.MISS for n in bad), f"resurrected: {bad}"
    return "lost" if bad else "nothing"


Mangle = Callable[[FakeDisk, random.Random], None]


def any_file(disk: FakeDisk, rng: random.Random) -> str:
    """Mostly a segment."""
    names = list(disk.listing(PATH))
    segments = [name for name in names if name.startswith("seg-")]
    return f"{PATH}/{rng.choice(segments if segments and rng.random() < 0.8 else names)}"


def any_name(disk: FakeDisk, rng: random.Random) -> str:
    """A name that is there, or could be."""
    number = rng.choice((0, 1, 2, 3, 9, (1 << 32) - 1, (1 << 63) + 1, (1 << 64) - 1))
    others = ("FORMAT", "LOCK", "FORMAT.tmp", "x.tmp", f"seg-{number:016x}.tts", f"seg-{number:016x}.tts.tmp")
    return f"{PATH}/{rng.choice(others)}" if rng.random() < 0.7 else any_file(disk, rng)


def flip_some(disk: FakeDisk, rng: random.Random) -> None:
    path = any_file(disk, rng)
    for _ in range(rng.randrange(2, 12) if disk.content(path) else 0):
        flip(disk, path, rng.randrange(8 * len(disk.content(path))))


def cut(disk: FakeDisk, rng: random.Random) -> None:
    path = any_file(disk, rng)
    content = disk.content(path)
    disk.replace(path, content[: rng.randrange(len(content) + 1)])


def extend(disk: FakeDisk, rng: random.Random) -> None:
    path = any_file(disk, rng)
    length = rng.choice((1, 64, 128, 512, 3000))
    content = disk.content(path)
    tail = rng.choice((bytes(length), rng.randbytes(length), content[-length:], content[:length]))
    disk.replace(path, content + tail)


def swap(disk: FakeDisk, rng: random.Random) -> None:
    one, other = any_file(disk, rng), any_file(disk, rng)
    content = disk.content(one)
    disk.replace(one, disk.content(other))
    disk.replace(other, content)


def copy(disk: FakeDisk, rng: random.Random) -> None:
    disk.replace(any_name(disk, rng), disk.content(any_file(disk, rng)))


def rename(disk: FakeDisk, rng: random.Random) -> None:
    path = any_file(disk, rng)
    content = disk.content(path)
    disk.remove(path)
    disk.replace(any_name(disk, rng), content)


def remove(disk: FakeDisk, rng: random.Random) -> None:
    disk.remove(any_file(disk, rng))


def zero(disk: FakeDisk, rng: random.Random) -> None:
    overwrite(disk, rng, bytes(rng.choice((512, 4096))))


def move(disk: FakeDisk, rng: random.Random) -> None:
    content = disk.content(any_file(disk, rng))
    start = rng.randrange(0, len(content) + 1, rng.choice((1, 8, 64, 512)))
    overwrite(disk, rng, content[start : start + rng.choice((64, 136, 512))])


def overwrite(disk: FakeDisk, rng: random.Random, data: bytes) -> None:
    path = any_file(disk, rng)
    content = disk.content(path)
    start = rng.randrange(0, len(content) + 1, rng.choice((8, 64, 512)))
    disk.replace(path, (content[:start] + data + content[start + len(data) :])[: len(content)])


MANGLES: Sequence[Mangle] = (flip_some, cut, extend, swap, copy, rename, remove, zero, move)


def mangled(seed: int, sound: FakeDisk) -> str:
    """Mangle a directory and use it; returns how it went. Raises whatever should not have been."""
    rng = random.Random(seed)
    disk = sound.after_crash(After.KILLED)
    for mangle in rng.choices(MANGLES, k=rng.randrange(1, 4)):
        if disk.listing(PATH):
            mangle(disk, rng)
    try:
        storage = open_storage(disk, rng.choice(("none", "batch")))
    except StorageError as error:
        message = str(error)
    else:
        return used_on(disk, storage, rng)
    assert PATH in message
    return "refused"


def used_on(disk: FakeDisk, storage: DiskStorage, rng: random.Random) -> str:
    """Whatever it holds: it can be written, read, cleared, closed and opened again, within its bound."""

    def watch() -> None:
        assert sum(disk.listing(PATH).values()) <= CAPACITY
        assert storage.stats().bytes <= CAPACITY

    watch()
    disk.watch = watch
    before = results_of(storage)
    outcomes = [put(storage, n, n + 1)[0] for n in range(100, 112, 2)]
    assert Wrote.REFUSED not in outcomes
    bad = {n for n, got in before.items() if got is not Got.HIT}
    after = results_of(storage)
    assert all(after[n] is Got.MISS for n in bad), "resurrected"
    if rng.random() < 0.3:
        storage.clear()
    storage.close()
    storage = open_storage(disk)
    results_of(storage)
    storage.close()
    return "damaged" if len(bad) > 1 else "whole"


def mangle_many(seeds: Sequence[int]) -> Counter[str]:
    directories = [small_directory(sealed) for sealed in (False, True)]
    count: Counter[str] = Counter()
    for seed in seeds:
        try:
            count[mangled(seed, directories[seed % 2])] += 1
        except BaseException as error:
            error.add_note(f"repeat with mangle_many([{seed}])")
            raise
    return count


@pytest.mark.parametrize("closed", [True, False])
def test_a_rotten_header_costs_its_own_page_alone(closed: bool) -> None:
    """Whatever dies after it was found: neither the pages behind it go, nor those put since."""
    disk = FakeDisk()
    storage = DiskStorage(PATH, 1 << 16, 1 << 14, "batch", FakeFiles(disk))
    put(storage, 10, 11, 12)
    place = storage.locate(page_key(11))
    assert place is not None
    if closed:
        storage.close()
    flip(disk, place[0], 8 * (place[1] - 100))
    if closed:
        storage = DiskStorage(PATH, 1 << 16, 1 << 14, "batch", FakeFiles(disk))
    assert storage.get([page_key(11)], [memoryview(bytearray(700))]) == [Got.CORRUPT]
    assert put(storage, 13, 14) == (Wrote.STORED, Wrote.STORED)
    for after in (After.KILLED, After.LOST):
        again = DiskStorage(PATH, 1 << 16, 1 << 14, "batch", FakeFiles(disk.after_crash(after)))
        assert again.holds([page_key(n) for n in (10, 11, 12, 13, 14)]) == [True, False, True, True, True]


def test_no_mangled_file_is_ever_served() -> None:
    count = mangle_many(range(1500))
    assert min(count["refused"], count["damaged"], count["whole"]) > 50


@pytest.mark.soak
def test_soak_mangled_files(capsys: pytest.CaptureFixture[str]) -> None:
    first = seed = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    end = time.monotonic() + 0.03 * float(os.environ.get("SOAK_SECONDS", "600"))
    total: Counter[str] = Counter()
    while seed == first or time.monotonic() < end:
        total += mangle_many(range(seed, seed + 100))
        seed += 100
    with capsys.disabled():
        print(f"\nSOAK_SEED={first}\nmangled directories: {dict(total)}", flush=True)
