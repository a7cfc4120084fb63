"""A disk without room loses nothing that was stored, and takes pages again when there is room.

In memory, with a quota that is hit at every byte of a record, a footer and a header; and once on a real
file system of a few hundred kilobytes, where the system lets us have one.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.testing.conformance import page_content, page_key, read, write
from tiertree.testing.fakedisk import After, FakeDisk, FakeFiles, Op
from tiertree.types import StorageError

CAPACITY = 1 << 20
LENGTH = 300


def open_storage(disk: FakeDisk, durability: str, capacity: int = CAPACITY) -> DiskStorage:
    return DiskStorage("/d", capacity, 4096, durability, FakeFiles(disk))


def put(storage: DiskStorage, kept: set[int], *numbers: int) -> tuple[Wrote, ...]:
    """Put pages, and note those that were taken and those that had to go."""
    keys = [page_key(n) for n in numbers]
    result = storage.put(keys, [page_content(n, LENGTH) for n in numbers])
    kept |= {n for n, outcome in zip(numbers, result.outcomes, strict=True) if outcome is not Wrote.REFUSED}
    kept -= {n for n in kept if page_key(n) in result.evicted}
    return result.outcomes


def assert_kept(storage: DiskStorage, kept: set[int], exactly: bool = True) -> None:
    """`exactly`: and nothing else is there, no page that was refused."""
    for number in kept:
        assert read(storage, number, LENGTH) == (Got.HIT, bytes(page_content(number, LENGTH))), number
    assert not exactly or storage.stats().pages == len(kept), "a page that was refused is there"


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_no_room_at_any_byte(durability: str) -> None:
    sound = FakeDisk()
    storage = open_storage(sound, durability)
    kept: set[int] = set()
    put(storage, kept, 0, 1)
    room = 4 * (128 + LENGTH) - 2 * 64 - 64  # less the footer, which is cut off first
    storage.close()
    for quota in range(sound.used_bytes, sound.used_bytes + room, 7):
        disk = sound.after_crash(After.KILLED)
        disk.quota_bytes = quota
        check_full(disk, durability, set(kept))


def check_full(disk: FakeDisk, durability: str, kept: set[int]) -> None:
    """Put until there is no room, in every way; then make room."""
    storage = open_storage(disk, durability)
    assert_kept(storage, kept)
    outcomes = put(storage, kept, 2, 3, 4, 5)
    assert outcomes[-1] is Wrote.REFUSED
    assert_kept(storage, kept)
    assert storage.stats().bytes == sum(disk.listing("/d").values())
    for number in (6, 7):
        put(storage, kept, number)
    for after in (After.KILLED, After.LOST) if durability == "batch" else (After.KILLED,):
        again = open_storage(disk.after_crash(after), durability)
        assert_kept(again, kept)
    storage.close()
    storage = open_storage(disk, durability)
    assert_kept(storage, kept)
    disk.quota_bytes = None
    assert put(storage, kept, 8) == (Wrote.STORED,)
    assert_kept(storage, kept)
    storage.close()
    storage = open_storage(disk, durability)
    assert_kept(storage, kept)
    storage.clear()
    assert storage.stats().pages == 0


@pytest.mark.parametrize("seed", range(40))
def test_room_that_comes_and_goes(seed: int) -> None:
    """Quota, capacity, failing operations, short writes: what was stored and not evicted is there."""
    rng = random.Random(seed)
    disk = FakeDisk()
    durability, capacity = rng.choice(("none", "batch")), rng.choice((8 << 10, 16 << 10, CAPACITY))
    storage = open_storage(disk, durability, capacity)
    kept: set[int] = set()
    for _ in range(60):
        step = rng.random()
        if step < 0.6:
            put(storage, kept, *(rng.randrange(60) for _ in range(rng.randrange(1, 6))))
        elif step < 0.7:
            disk.quota_bytes = disk.used_bytes + rng.randrange(2000)
        elif step < 0.8:
            disk.heal()
            disk.quota_bytes = None
        elif step < 0.85:
            disk.io_bytes_max = rng.choice((1, 100, 511))
        elif step < 0.92:
            disk.fail(
                rng.choice((Op.WRITE, Op.TRUNCATE, Op.CREATE, Op.SYNC, Op.UNLINK)), skip=rng.randrange(3)
            )
        elif rng.random() < 0.5:
            disk.heal()
            storage.close()
            storage = open_storage(disk, durability, capacity)
        assert sum(disk.listing("/d").values()) <= capacity, f"seed {seed}"
    disk.heal()
    assert_kept(storage, kept, exactly=False)  # what could not be cut off may be found again
    disk.quota_bytes = None
    fresh = list(range(100, 110))
    put(storage, kept, *fresh)
    assert kept & set(fresh), "it does not recover"
    storage.close()
    storage = open_storage(disk, durability, capacity)
    assert_kept(storage, kept, exactly=False)


def test_no_room_to_open() -> None:
    """Nothing is half made: the next open that finds room is the first."""
    for quota in range(60):
        disk = FakeDisk(quota_bytes=quota)
        try:
            open_storage(disk, "batch").close()
        except StorageError as error:
            message = str(error)
            assert quota < 48
        else:
            assert quota >= 48
            continue
        assert "/d: cannot be opened" in message
        disk.quota_bytes = None
        storage = open_storage(disk, "batch")
        assert write(storage, 1) == (Wrote.STORED,)


@pytest.fixture
def small_mount(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    path = tmp_path / "small"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tiertree-test", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_a_real_file_system_without_room(small_mount: Path, durability: str) -> None:
    path, other = small_mount / "d", small_mount / "other"
    files = Files()
    storage = DiskStorage(path, CAPACITY, 16 << 10, durability, files)
    stored = []
    for number in range(100):
        stored += [number] if write(storage, number) == (Wrote.STORED,) else []
    assert 40 < len(stored) < 64, "256 KiB hold about sixty pages of 4 KiB"
    assert storage.stats().pages == len(stored)
    assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
    storage.close()
    storage = DiskStorage(path, CAPACITY, 16 << 10, durability, files)
    for number in stored:
        assert read(storage, number) == (Got.HIT, bytes(page_content(number)))
    storage.clear()
    with open(other, "wb") as file:
        file.write(bytes(200 << 10))
    outcomes = [write(storage, number)[0] for number in range(40)]
    assert 0 < outcomes.count(Wrote.STORED) < 20
    os.unlink(other)
    outcomes += [write(storage, number)[0] for number in range(200, 220)]
    assert set(outcomes[40:]) == {Wrote.STORED}
    numbers = [*range(40), *range(200, 220)]
    kept = [n for n, outcome in zip(numbers, outcomes, strict=True) if outcome is Wrote.STORED]
    for number in kept:
        assert read(storage, number) == (Got.HIT, bytes(page_content(number)))
    storage.close()
