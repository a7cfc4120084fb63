"""Rot, torn files, full disks, failing syncs, death at every step: exact bytes or a miss, nothing lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from disk_support import (
    CAPACITY,
    CountedFiles,
    FullFiles,
    Killed,
    MortalFiles,
    UnsyncedFiles,
    abandon,
    assert_served,
)

from tiertree.storage.base import Got, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.storage.tamper import flip_byte
from tiertree.testing.conformance import held, page_content, page_key, read, write
from tiertree.types import StorageError


def small_directory(path: Path) -> dict[int, bytes]:
    """Two sealed segments and one that was being written, with a tombstone in it."""
    storage = DiskStorage(path, CAPACITY, segment_bytes=4096)
    write(storage, 0, 1, length=100)
    write(storage, 2, length=3900)
    write(storage, 3, 4, length=90)
    flip_byte(storage, page_key(3), 5)
    assert read(storage, 3, 90)[0] is Got.CORRUPT
    write(storage, 5, length=80)
    abandon(storage)
    lengths = {0: 100, 1: 100, 2: 3900, 4: 90, 5: 80}
    return {n: bytes(page_content(n, length)) for n, length in lengths.items()}


def served(path: Path, expected: dict[int, bytes]) -> dict[int, Got] | None:
    """What a directory gives for each page, none of it wrong; None if it does not open."""
    try:
        storage = DiskStorage(path, CAPACITY, segment_bytes=4096)
    except StorageError as error:
        message = str(error)
    else:
        return _all_served(storage, expected)
    assert str(path) in message
    return None


def _all_served(storage: DiskStorage, expected: dict[int, bytes]) -> dict[int, Got]:
    results = {}
    for number, content in expected.items():
        got, data = read(storage, number, len(content))
        assert got is not Got.HIT or data == content, f"page {number}: wrong bytes"
        results[number] = got
    assert read(storage, 3, 90)[0] in (Got.MISS, Got.CORRUPT), "a quarantined page came back whole"
    storage.close()
    return results


@pytest.mark.parametrize("sealed", [False, True])
def test_no_flipped_byte_is_ever_served(tmp_path: Path, sealed: bool) -> None:
    path = tmp_path / "d"
    expected = small_directory(path)
    if sealed:
        DiskStorage(path, CAPACITY, segment_bytes=4096).close()
    assert served(Path(shutil.copytree(path, tmp_path / "copy")), expected) == dict.fromkeys(
        expected, Got.HIT
    )
    unopened = lost = 0
    work = tmp_path / "work"
    shutil.copytree(path, work)
    for name in sorted(os.listdir(path)):
        size = (path / name).stat().st_size
        # The inside of the one long payload is all alike: every byte of the rest, every 97th of that.
        for position in [p for p in range(size) if not 300 < p % 4400 < 4000 or p % 97 == 0]:
            for file in os.listdir(work):
                os.unlink(work / file)
            for file in os.listdir(path):
                shutil.copyfile(path / file, work / file)
            data = bytearray((work / name).read_bytes())
            data[position] ^= 1 << position % 8
            (work / name).write_bytes(data)
            results = served(work, expected)
            if results is None:
                unopened += 1
                continue
            bad = [n for n, got in results.items() if got is not Got.HIT]
            lost += bool(bad)
            again = served(work, expected)
            assert again is not None
            assert all(again[n] is Got.MISS for n in bad), f"{name} byte {position}: resurrected"
    assert unopened == 16, "each flip in FORMAT is refused, no other is"
    assert lost > 500, "flips in payloads and headers must be noticed"


def test_a_segment_cut_anywhere_gives_what_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY)
    write(storage, *range(3), length=70)
    abandon(storage)
    name = "seg-0000000000000001.tts"
    unsealed = (path / name).read_bytes()
    DiskStorage(path, CAPACITY).close()
    sealed = (path / name).read_bytes()
    assert sealed[: len(unsealed)] == unsealed
    for size in range(len(sealed) + 1):
        (path / name).write_bytes(sealed[:size])
        storage = DiskStorage(path, CAPACITY)
        file = path / name
        whole = min(3, max(0, size - 64) // (128 + 70))
        assert held(storage, *range(3)) == [number < whole for number in range(3)]
        assert storage.stats().pages == whole
        assert file.stat().st_size == 64 + whole * (128 + 70 + 64) + 64 if whole else not file.exists()
        for number in range(whole):
            assert read(storage, number, 70) == (Got.HIT, bytes(page_content(number, 70)))
        assert write(storage, 9, length=70) == (Wrote.STORED,)
        used = storage.stats().bytes
        storage.close()
        assert used < sum(f.stat().st_size for f in path.iterdir())
        for segment in path.glob("seg-*"):
            segment.unlink()


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("durability", ["none", "batch"])
def test_a_full_disk_refuses_and_loses_nothing(tmp_path: Path, truncates: bool, durability: str) -> None:
    for extra in (0, 1, 63, 64, 100, 4095, 4096 + 128, 5000, 9000):
        path = tmp_path / str(extra)
        files = FullFiles(1 << 20)
        storage = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, durability=durability, files=files)
        write(storage, 0, 1)
        files.room, files.truncates = extra, truncates
        outcomes = write(storage, 2, 3, 4)
        assert outcomes[-1] is Wrote.REFUSED
        kept = [0, 1, *(n for n, o in zip((2, 3, 4), outcomes, strict=True) if o is Wrote.STORED)]
        assert_served(storage, kept)
        assert storage.stats().pages == len(kept)
        assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
        files.room = 1 << 20
        assert write(storage, 5) == (Wrote.STORED,)
        storage.close()
        storage = DiskStorage(path, CAPACITY)
        assert_served(storage, [*kept, 5])
        storage.close()


def test_a_file_whose_sync_failed_is_never_trusted_again(tmp_path: Path) -> None:
    files = UnsyncedFiles()
    storage = DiskStorage(tmp_path / "d", CAPACITY, durability="batch", files=files)
    write(storage, 0, 1)
    files.broken = True
    for number in (2, 3, 4):
        assert write(storage, number) == (Wrote.REFUSED,)
    files.broken = False
    assert len(list((tmp_path / "d").glob("seg-*"))) == 1, "files that hold nothing pile up"
    assert write(storage, 5) == (Wrote.STORED,)
    assert_served(storage, [0, 1, 5])
    storage.close()
    assert len(files.failed) == 3
    storage = DiskStorage(tmp_path / "d", CAPACITY, durability="batch")
    assert_served(storage, [0, 1, 5])
    assert storage.stats().pages == 3, "a refused page came back"
    storage.close()


def test_batch_syncs_before_it_acknowledges(tmp_path: Path) -> None:
    """Every byte that a put wrote is followed by a sync of that file before the put returns."""
    dirty: set[int] = set()
    synced: set[int] = set()
    synced_directories: list[str] = []

    class Tracked(Files):
        def pwritev(self, fd, buffers, offset):  # type: ignore[no-untyped-def]
            dirty.add(os.fstat(fd).st_ino)
            return super().pwritev(fd, buffers, offset)

        def fdatasync(self, fd: int) -> None:
            super().fdatasync(fd)
            dirty.discard(os.fstat(fd).st_ino)
            synced.add(os.fstat(fd).st_ino)

        def fsync_directory(self, path: str) -> None:
            super().fsync_directory(path)
            synced_directories.append(path)

    path = tmp_path / "d"
    unsynced = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, files=Tracked())
    write(unsynced, *range(100, 110))
    unsynced.close()
    assert len(dirty) >= 3, "durability none has synced"
    dirty.clear()
    synced.clear()
    synced_directories.clear()
    storage = DiskStorage(path, CAPACITY, segment_bytes=16 << 10, durability="batch", files=Tracked())
    assert synced_directories == [str(path)], "what was there before is not durable yet"
    assert synced == {file.stat().st_ino for file in path.glob("seg-*")}
    storage.clear()
    opened = len(synced_directories)
    sealed = 0
    for number in range(0, 60, 6):
        dirty.clear()
        write(storage, *range(number, number + 6))
        names = sorted(path.glob("seg-*"))
        # A segment sealed on the way has got its footer after its sync: that may be lost, its records not.
        assert dirty <= {name.stat().st_ino for name in names[sealed:-1]}
        sealed = len(names) - 1
        assert len(synced_directories) - opened == len(names)
    storage.close()


def workload(files: MortalFiles, path: Path, state: dict[str, set[int]], durability: str) -> None:
    """`sure` must be served after a death, `maybe` may be, nothing else."""

    def opened() -> DiskStorage:
        return DiskStorage(path, files.capacity, segment_bytes=4096, durability=durability, files=files)

    def put(storage: DiskStorage, *numbers: int) -> None:
        state["maybe"] |= set(numbers)
        keys = [page_key(n) for n in numbers]
        result = storage.put(keys, [page_content(n, 600) for n in numbers])
        evicted = {n for n in state["sure"] if page_key(n) in result.evicted}
        state["sure"] = (state["sure"] - evicted) | set(numbers)

    storage = opened()
    put(storage, 0, 1, 2)
    put(storage, 3, 4, 5, 6, 7)
    flip_byte(storage, page_key(1), 3)
    state["sure"].discard(1)
    assert read(storage, 1, 600)[0] is Got.CORRUPT
    state["maybe"].discard(1)
    put(storage, 8, 1)
    storage.close()
    storage = opened()
    put(storage, 9, 10)
    state["sure"].clear()
    storage.clear()
    state["maybe"].clear()
    put(storage, 11, 12)
    storage.close()


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_death_at_every_step(tmp_path: Path, durability: str) -> None:
    """Count the operations, then die at each; what was acknowledged is there, and what was not is whole."""
    lives = 0
    died = True
    while died:
        path = tmp_path / str(lives)
        files = MortalFiles(path, 32 << 10, lives)
        state: dict[str, set[int]] = {"sure": set(), "maybe": set()}
        try:
            workload(files, path, state, durability)
            died = False
        except Killed:
            release_lock(path)
        check_after_death(path, 32 << 10, state["sure"], state["maybe"])
        lives += 1
    assert lives > 20


def release_lock(path: Path) -> None:
    """Close the descriptors that a dead process would have lost."""
    for name in os.listdir("/proc/self/fd"):
        link = f"/proc/self/fd/{name}"
        if os.path.lexists(link) and os.readlink(link).startswith(str(path) + "/"):
            os.close(int(name))


def check_after_death(path: Path, capacity: int, sure: set[int], maybe: set[int]) -> None:
    storage = DiskStorage(path, capacity, segment_bytes=4096, files=CountedFiles(path, capacity))
    assert not [name for name in os.listdir(path) if name.endswith(".tmp")]
    assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir()) <= capacity
    for number in range(13):
        got, content = read(storage, number, 600)
        assert got is not Got.HIT or content == bytes(page_content(number, 600))
        assert got is Got.HIT or number not in sure, f"page {number} was acknowledged and is gone"
        assert got is not Got.HIT or number in maybe, f"page {number} must not be there"
    storage.close()


WRITER = """
import sys
from tiertree.storage.disk import DiskStorage
from tiertree.testing.conformance import page_key, page_content
path, capacity, durability = sys.argv[1], int(sys.argv[2]), sys.argv[3]
storage = DiskStorage(path, capacity, segment_bytes=64 << 10, durability=durability)
for first in range(0, 100_000, 4):
    numbers = range(first, first + 4)
    result = storage.put([page_key(n) for n in numbers], [page_content(n, 5000) for n in numbers])
    assert all(outcome.value == "stored" for outcome in result.outcomes)
    print(first + 4, flush=True)
"""


@pytest.mark.parametrize(
    ("capacity", "durability", "acknowledged"),
    [(64 << 20, "none", 40), (64 << 20, "batch", 100), (512 << 10, "none", 333)],
)
def test_kill_9(tmp_path: Path, capacity: int, durability: str, acknowledged: int) -> None:
    path = tmp_path / "d"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(path), str(capacity), durability]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
        assert writer.stdout is not None
        stored = 0
        while stored < acknowledged:
            stored = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().split("\n")
        stored = max([stored, *map(int, filter(None, rest[:-1]))])
    storage = DiskStorage(path, capacity, files=CountedFiles(path, capacity))
    assert storage.stats().bytes == sum(file.stat().st_size for file in path.iterdir())
    results = [read(storage, n, 5000) for n in range(stored)]
    assert all(got is not Got.CORRUPT for got, _ in results)
    assert all(data == page_content(n, 5000) for n, (got, data) in enumerate(results) if got is Got.HIT)
    hits = [got is Got.HIT for got, _ in results]
    # Without eviction all of it is there; with it, the newest, at least what half of the capacity holds.
    assert all(hits if capacity > 1 << 20 else hits[-capacity // 2 // 5200 :])
    storage.close()


def test_a_child_after_fork_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = DiskStorage(tmp_path / "d", CAPACITY)
    monkeypatch.setattr(os, "getpid", lambda: storage._pid + 1)
    with pytest.raises(StorageError, match="before a fork"):
        write(storage, 1)
    monkeypatch.undo()
    storage.close()
