"""The disk in memory: like the real one while it is well, and what is left of it when it is not."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from tiertree.storage.files import Files
from tiertree.testing.fakedisk import After, Crashed, FakeDisk, FakeFiles, Op

MAKE = os.O_RDWR | os.O_CREAT


def made(disk: FakeDisk, *, synced: bool = False) -> tuple[FakeFiles, int]:
    """A file /d/a; with its name, and nothing else, stable if asked for."""
    files = FakeFiles(disk)
    files.mkdir("/d")
    fd = files.open("/d/a", MAKE)
    if synced:
        files.fsync_directory("/")
        files.fsync_directory("/d")
    return files, fd


def outcome(files: Files, base: str, descriptors: list[int], step: tuple[object, ...]) -> object:
    """What one step gives, in terms that real and fake files share."""
    name, *rest = step
    try:
        if name == "open":
            descriptors.append(files.open(f"{base}/{rest[0]}", int(str(rest[1]))))
            return None
        if name == "read":
            into = [bytearray(5), bytearray(7)]
            done = files.preadv(descriptors[int(str(rest[0])) % len(descriptors)], into, int(str(rest[1])))
            return done, bytes(into[0] + into[1])
        if name == "write":
            data = bytes([len(descriptors)]) * int(str(rest[2]))
            fd = descriptors[int(str(rest[0])) % len(descriptors)]
            return files.pwritev(fd, [data, b"xy"], int(str(rest[1])))
        if name in ("truncate", "size", "close", "lock", "fdatasync"):
            fd = descriptors[int(str(rest[0])) % len(descriptors)]
            if name == "close":
                descriptors.remove(fd)
            return getattr(files, str(name))(fd, *rest[1:])
        if name == "rename":
            return files.rename(f"{base}/{rest[0]}", f"{base}/{rest[1]}")
        if name == "listdir":
            return sorted(files.listdir(base))
        return getattr(files, str(name))(f"{base}/{rest[0]}")
    except OSError as error:
        return error.errno


def draw_step(rng: random.Random, opened: int) -> tuple[object, ...]:
    names = "abc"
    kinds = ["open", "unlink", "rename", "listdir", "fsync_directory"]
    kind = rng.choice([*kinds, *(["read", "write", "truncate", "size", "close", "lock", "fdatasync"] * 2)])
    if kind == "open" or (kind not in kinds and not opened):
        flags = rng.choice((os.O_RDONLY, os.O_RDWR, MAKE, MAKE | os.O_EXCL, MAKE | os.O_TRUNC))
        return "open", rng.choice(names), flags
    if kind == "listdir":
        return (kind,)
    if kind == "fsync_directory":
        return kind, "."
    if kind == "rename":
        return kind, rng.choice(names), rng.choice(names)
    if kind == "unlink":
        return kind, rng.choice(names)
    fd = rng.randrange(opened)
    if kind == "write":
        return kind, fd, rng.randrange(40), rng.randrange(20)
    return (kind, fd, rng.randrange(40)) if kind in ("read", "truncate") else (kind, fd)


@pytest.mark.parametrize("seed", range(20))
def test_it_behaves_like_the_real_one(tmp_path: Path, seed: int) -> None:
    """The same calls on both give the same answers and leave the same files."""
    rng = random.Random(seed)
    disk = FakeDisk()
    real, fake = Files(), FakeFiles(disk)
    mine: list[int] = []
    theirs: list[int] = []
    fake.mkdir("/d")
    for i in range(150):
        step = draw_step(rng, len(mine))
        if step == ("fsync_directory", "."):
            fake.fsync_directory("/d")
            continue
        expected = outcome(real, str(tmp_path), theirs, step)
        assert outcome(fake, "/d", mine, step) == expected, f"seed {seed}, step {i}: {step}"
        found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert {name: disk.content(f"/d/{name}") for name in disk.listing("/d")} == found
    for fd in theirs:
        os.close(fd)
    for fd in mine:
        fake.close(fd)
    assert disk.used_bytes == sum(disk.listing("/d").values())


def test_what_is_lost_without_syncs() -> None:
    disk = FakeDisk()
    files, fd = made(disk)
    files.pwritev(fd, [b"one"], 0)
    assert disk.after_crash(After.KILLED).content("/d/a") == b"one"
    assert disk.after_crash(After.LOST).listing("/") == {}
    files.fsync_directory("/")
    assert disk.after_crash(After.LOST).listing("/d") == {}
    files.fsync_directory("/d")
    assert disk.after_crash(After.LOST).content("/d/a") == b"", "a name does not bring its content along"
    files.fdatasync(fd)
    files.pwritev(fd, [b"two"], 0)
    assert disk.after_crash(After.LOST).content("/d/a") == b"one"
    killed = disk.after_crash(After.KILLED)
    assert killed.after_crash(After.LOST).content("/d/a") == b"one", "a kill has synced something"
    files.rename("/d/a", "/d/b")
    assert disk.after_crash(After.LOST).listing("/d") == {"a": 3}
    files.unlink("/d/b")
    assert disk.after_crash(After.LOST).content("/d/a") == b"one"
    files.fsync_directory("/d")
    assert disk.after_crash(After.LOST).listing("/d") == {}


def test_what_may_be_left_of_writes() -> None:
    """Sectors, in any combination; the size after any of them; zeros, noise or old blocks in between."""
    disk = FakeDisk()
    files, fd = made(disk, synced=True)
    old = files.open("/d/old", MAKE)
    files.pwritev(old, [b"O" * 1600], 0)
    files.unlink("/d/old")
    files.pwritev(fd, [b"s" * 10], 0)
    files.fdatasync(fd)
    files.pwritev(fd, [b"A" * 1014], 10)
    files.pwritev(fd, [b"B" * 512], 1024)
    seen = [disk.after_crash(After.MIXED, seed).content("/d/a") for seed in range(400)]
    assert all(content[:10] == b"s" * 10 for content in seen), "what was synced has changed"
    assert {len(content) for content in seen} == {10, 512, 1024, 1536}
    full = {content for content in seen if len(content) == 1536}
    assert any(c[10:512] == b"A" * 502 and c[512:1024] != b"A" * 512 for c in full), "a torn write"
    assert any(c[1024:] == b"B" * 512 and b"A" not in c for c in full), "the second without the first"
    assert any(c[512:1024] == bytes(512) for c in full)
    assert any(c[512:1024] == b"O" * 512 for c in full)
    assert any(not set(c[512:1024]) <= set(b"\0AO") for c in full)
    shares = {c[512 * i : 512 * i + 512].count(b"A") for c in seen for i in range(2)}
    assert all(share < 20 or share >= 502 for share in shares), "a sector was torn"  # noise has some, too


def test_what_may_be_left_of_names() -> None:
    disk = FakeDisk()
    files, fd = made(disk, synced=True)
    files.pwritev(fd, [b"a"], 0)
    files.fdatasync(fd)
    files.open("/d/b", MAKE)
    files.rename("/d/a", "/d/c")
    seen = {tuple(disk.after_crash(After.MIXED, seed).listing("/d")) for seed in range(200)}
    assert seen == {("a",), ("a", "b"), ("c",), ("b", "c")}


def test_a_failed_sync_is_not_made_good_by_the_next() -> None:
    disk = FakeDisk()
    files, fd = made(disk, synced=True)
    files.pwritev(fd, [b"one"], 0)
    disk.fail(Op.SYNC)
    with pytest.raises(OSError, match="Input/output"):
        files.fdatasync(fd)
    files.pwritev(fd, [b"two"], 3)
    files.fdatasync(fd)
    assert disk.content("/d/a") == b"onetwo"
    assert disk.after_crash(After.LOST).content("/d/a") == b"\0\0\0two"


def test_the_same_seed_gives_the_same_disk() -> None:
    contents = []
    for _ in range(2):
        disk = FakeDisk()
        files, fd = made(disk, synced=True)
        files.pwritev(fd, [random.Random(1).randbytes(5000)], 100)
        files.truncate(fd, 4000)
        contents.append([disk.after_crash(After.MIXED, seed).content("/d/a") for seed in range(20)])
    assert contents[0] == contents[1]
    assert len(set(contents[0])) > 5


def test_a_crash_stops_everything() -> None:
    disk = FakeDisk()
    files, fd = made(disk)
    assert files.lock(fd)
    assert not files.lock(files.open("/d/a", os.O_RDONLY))
    disk.crash(at=disk.operations + 1, torn_bytes=2)
    files.truncate(fd, 1)
    with pytest.raises(Crashed, match="operation 3: write /d/a"):
        files.pwritev(fd, [b"xyz"], 1)
    with pytest.raises(Crashed):
        files.size(fd)
    with pytest.raises(Crashed):
        files.listdir("/d")
    files.close(fd)
    again = disk.after_crash(After.KILLED)
    assert again.content("/d/a") == b"\0xy"
    fresh = FakeFiles(again)
    assert fresh.lock(fresh.open("/d/a", os.O_RDONLY)), "a lock has outlived its holder"
    with pytest.raises(OSError, match="Bad file descriptor"):
        fresh.size(fd)
    disk = FakeDisk()
    disk.crash()
    with pytest.raises(Crashed):
        made(disk)


def test_a_quota_and_short_operations() -> None:
    disk = FakeDisk(quota_bytes=10)
    files, fd = made(disk)
    assert files.pwritev(fd, [b"1234", b"5678"], 0) == 8
    assert files.pwritev(fd, [b"abcd"], 8) == 2
    with pytest.raises(OSError, match="No space"):
        files.pwritev(fd, [b"abcd"], 10)
    assert files.pwritev(fd, [b"ABCD"], 0) == 4, "what is there already needs no room"
    with pytest.raises(OSError, match="No space"):
        files.truncate(fd, 11)
    assert disk.content("/d/a") == b"ABCD5678ab"
    files.unlink("/d/a")
    assert disk.used_bytes == 10, "a file that is still open keeps its blocks"
    files.close(fd)
    assert disk.used_bytes == 0
    fd = files.open("/d/b", MAKE)
    disk.io_bytes_max = 3
    assert files.pwritev(fd, [b"12", b"34"], 0) == 3
    assert files.preadv(fd, [bytearray(2), bytearray(2)], 0) == 3
    with pytest.raises(OSError, match="Bad file descriptor"):
        files.pwritev(files.open("/d/b", os.O_RDONLY), [b""], 0)


def test_failures_when_asked_for() -> None:
    disk = FakeDisk()
    files, fd = made(disk)
    disk.fail(Op.WRITE, errno.ENOSPC, skip=1, times=2)
    assert [outcome(files, "/d", [fd], ("write", 0, 0, 1)) for _ in range(4)] == [3, 28, 28, 3]
    disk.fail(Op.READ, times=5)
    disk.heal()
    assert files.size(fd) == 3
    operations = disk.operations
    disk.replace("/d/a", b"rotten")
    disk.replace("/d/new", b"")
    disk.remove("/d/new")
    assert disk.operations == operations
    assert disk.after_crash(After.LOST).listing("/") == {}
    assert disk.content("/d/a") == b"rotten"
