"""The disk tier: conformance, reopening, capacity, reclaiming, locking, threads, a set as oracle."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from disk_support import CAPACITY, CountedFiles, abandon, flipped
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tiertree.storage import segment as segment_module
from tiertree.storage.base import Got, Storage, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.tamper import flip_byte
from tiertree.testing.conformance import check_storage, held, page_content, page_key, read, write
from tiertree.types import ConfigError, StorageLocked


@pytest.mark.parametrize("durability", ["none", "batch"])
def test_disk_storage_conforms(tmp_path: Path, durability: str) -> None:
    def make(capacity: int) -> DiskStorage:
        path = tmp_path / uuid4().hex
        return DiskStorage(path, capacity, durability=durability, files=CountedFiles(path, capacity))

    def reopen(storage: Storage) -> DiskStorage:
        assert isinstance(storage, DiskStorage)
        path, capacity = Path(storage.path), storage.stats().capacity_bytes
        return DiskStorage(path, capacity, durability=durability, files=CountedFiles(path, capacity))

    check_storage(make, flipped, reopen)


def test_pages_longer_than_one_read_round_trip(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path / "d", 64 << 20)
    half = 512 << 10
    for number, length in enumerate([0, 1, half - 1, half, half + 1, 2 * half + 1, 5 * half + 3]):
        assert write(storage, number, length=length) == (Wrote.STORED,)
        assert read(storage, number, length) == (Got.HIT, bytes(page_content(number, length)))
        if length:
            flip_byte(storage, page_key(number), length - 1)
            assert read(storage, number, length)[0] is Got.CORRUPT
    storage.close()


def test_reopening_goes_on_in_the_last_segment(tmp_path: Path) -> None:
    for number in range(20):
        storage = DiskStorage(tmp_path / "d", CAPACITY)
        assert all(held(storage, *range(number)))
        write(storage, number, length=100)
        storage.close()
    assert len(list((tmp_path / "d").glob("seg-*"))) == 1


def test_a_smaller_capacity_removes_the_oldest(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY, segment_bytes=16 << 10)
    write(storage, *range(100))
    storage.close()
    smaller = DiskStorage(path, CAPACITY // 4, segment_bytes=16 << 10)
    stats = smaller.stats()
    assert stats.bytes == sum(file.stat().st_size for file in path.iterdir()) <= CAPACITY // 4
    assert stats.pages > 40
    assert held(smaller, *range(100)) == [n >= 100 - stats.pages for n in range(100)]
    smaller.close()


def test_pages_that_were_hit_get_another_round(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY, segment_bytes=64 << 10, files=CountedFiles(path, CAPACITY))
    hot = range(0, 200, 10)
    write(storage, *range(200))
    for number in range(200, 800):
        write(storage, number)
        for n in hot:
            assert read(storage, n)[0] is Got.HIT
    stats = storage.stats()
    assert stats.reinserted >= len(hot) * 2
    assert held(storage, 1) == [False]
    for number in range(1000, 1600):
        write(storage, number)
    assert not any(held(storage, *hot)), "another round is not for ever"
    storage.close()


def test_a_reclaim_always_frees_half(tmp_path: Path) -> None:
    """Every page is hit all the time, and yet one put rewrites no more than a part of one segment or two."""

    class Counting(CountedFiles):
        unlinked = 0

        def unlink(self, path: str) -> None:
            self.unlinked += 1
            super().unlink(path)

    path = tmp_path / "d"
    files = Counting(path, 64 << 10)
    storage = DiskStorage(path, 64 << 10, segment_bytes=8 << 10, files=files)
    for number in range(300):
        files.unlinked = 0
        assert write(storage, number, length=500) == (Wrote.STORED,)
        assert files.unlinked <= 2
        for n in range(max(0, number - 100), number + 1):
            read(storage, n, 500)
    assert storage.stats().reinserted > 50
    storage.close()


def test_no_capacity_is_overstepped_by_a_byte(tmp_path: Path) -> None:
    """Whatever remainder the records leave, sealing after any put finds the room for the footer."""
    for capacity in range(9000, 9800, 16):
        path = tmp_path / str(capacity)
        for first in range(0, 40, 3):
            storage = DiskStorage(path, capacity, segment_bytes=4096, files=CountedFiles(path, capacity))
            assert Wrote.STORED in write(storage, *range(first, first + 3), length=300)
            assert storage._room.free >= 0
            storage.close()


def test_a_new_segment_is_paid_for(tmp_path: Path) -> None:
    """A second segment fits beside a full one, or does not: to the byte."""
    first = 64 + (128 + 3900) + 64 + 64
    second = 64 + (128 + 300) + 64 + 64
    for capacity in range(48 + first + second - 140, 48 + first + second + 12, 4):
        path = tmp_path / str(capacity)
        storage = DiskStorage(path, capacity, segment_bytes=4096, files=CountedFiles(path, capacity))
        write(storage, 1, length=3900)
        assert write(storage, 2, length=300) == (Wrote.STORED,)
        assert storage.stats().pages == (2 if capacity >= 48 + first + second else 1)
        storage.close()


def test_quarantine_outlives_reopening_and_a_new_put_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for close in (abandon, DiskStorage.close):
        storage = DiskStorage(path, CAPACITY)
        write(storage, 1, 2, 3)
        for number in (1, 2):
            flip_byte(storage, page_key(number), 100)
            assert read(storage, number)[0] is Got.CORRUPT
        assert write(storage, 2) == (Wrote.STORED,)
        close(storage)
        storage = DiskStorage(path, CAPACITY)
        assert held(storage, 1, 2, 3) == [False, True, True]
        assert read(storage, 2) == (Got.HIT, bytes(page_content(2)))
        storage.clear()
        storage.close()


def test_a_tombstone_that_waited_does_not_hide_a_newer_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader leaves its tombstone to a writer at work; the page may be stored anew before it is written."""
    storage = DiskStorage(tmp_path / "d", CAPACITY)
    write(storage, 1, 2)
    flip_byte(storage, page_key(1), 100)
    with monkeypatch.context() as busy:
        busy.setattr(DiskStorage, "_bury", lambda self: None)
        assert read(storage, 1)[0] is Got.CORRUPT
        assert write(storage, 1) == (Wrote.STORED,)
    assert read(storage, 2)[0] is Got.HIT
    assert not storage._quarantined
    abandon(storage)
    storage = DiskStorage(tmp_path / "d", CAPACITY)
    assert read(storage, 1) == (Got.HIT, bytes(page_content(1)))
    storage.close()


def test_what_a_get_evicted_is_not_said_to_be_evicted_by_the_put_that_stores_it(tmp_path: Path) -> None:
    """A tombstone takes room, so a get may evict; the next put reports that, but for what it stored."""
    for cleared in (False, True):
        storage = DiskStorage(tmp_path / str(cleared), 24 << 10, segment_bytes=4096)
        write(storage, *range(20), length=500)
        write(storage, *range(20, 40), length=500)
        present = {n for n in range(40) if held(storage, n)[0]}
        vanished: set[int] = set()
        before = storage.stats().evicted
        while not vanished:
            rotten = max(present)
            flip_byte(storage, page_key(rotten), 7)
            assert read(storage, rotten, 500)[0] is Got.CORRUPT
            present.remove(rotten)
            vanished = {n for n in present if not held(storage, n)[0]}
        assert storage.stats().evicted - before == len(vanished) > 1, "counted when it happens"
        back, *others = sorted(vanished)
        if cleared:
            storage.clear()
            others = []
        result = storage.put([page_key(back)], [page_content(back, 500)])
        assert result.outcomes == (Wrote.STORED,)
        assert list(result.evicted) == [page_key(n) for n in others]
        assert held(storage, back) == [True]
        assert storage.put([], []).evicted == (), "said once"
        storage.close()


def test_clear_is_durable_and_frees_everything(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY)
    write(storage, *range(50))
    storage.clear()
    assert sorted(os.listdir(path)) == ["FORMAT", "LOCK"]
    assert storage.stats().bytes == 48
    abandon(storage)
    assert DiskStorage(path, CAPACITY).stats().pages == 0


def test_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "d"
    storage = DiskStorage(path, CAPACITY)
    with pytest.raises(StorageLocked, match=f"{path}: already open in the process with pid {os.getpid()}"):
        DiskStorage(path, CAPACITY)
    script = (
        "import sys; from tiertree.storage.disk import DiskStorage\n"
        "try: DiskStorage(sys.argv[1], 1 << 20)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(path)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert said.startswith("StorageLocked")
    assert str(os.getpid()) in said
    storage.close()
    DiskStorage(path, CAPACITY).close()


def test_impossible_arguments(tmp_path: Path) -> None:
    for arguments, field in (
        ({"capacity_bytes": 100}, "capacity_bytes"),
        ({"capacity_bytes": CAPACITY, "segment_bytes": 2 * CAPACITY}, "segment_bytes"),
        ({"capacity_bytes": CAPACITY, "durability": "always"}, "durability"),
    ):
        with pytest.raises(ConfigError, match=field):
            DiskStorage(tmp_path / "d", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "d").exists()


def test_readers_and_a_writer_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many small segments come and go, few descriptors are kept, and no read is ever wrong or lost."""
    monkeypatch.setattr(segment_module, "HANDLES_MAX", 3)
    storage = DiskStorage(tmp_path / "d", 256 << 10, segment_bytes=16 << 10)
    stop = threading.Event()
    failures: list[str] = []

    def reading(seed: int) -> None:
        number = seed
        while not stop.is_set():
            number = (number * 1103515245 + 12345) % 400
            got, content = read(storage, number, 1500)
            if got is Got.CORRUPT or (got is Got.HIT and content != bytes(page_content(number, 1500))):
                failures.append(f"page {number}: {got}")

    threads = [threading.Thread(target=reading, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for round_number in range(4):
        for number in range(0, 400, 5):
            outcomes = write(storage, *range(number, number + 5), length=1500)
            assert Wrote.REFUSED not in outcomes, f"round {round_number}"
    stop.set()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = storage.stats()
    assert stats.evicted > 500
    assert stats.checksum_failures == 0
    descriptors = [os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors()]
    assert sum(str(tmp_path) in target for target in descriptors) <= 3 + 2
    storage.close()
    assert not any(str(tmp_path) in os.readlink(f"/proc/self/fd/{fd}") for fd in _descriptors())


def _descriptors() -> Iterator[str]:
    for fd in os.listdir("/proc/self/fd"):
        if os.path.lexists(f"/proc/self/fd/{fd}"):
            yield fd


class DiskMachine(RuleBasedStateMachine):
    """Puts, gets, rot, crashes and reopenings against the set of what must be there."""

    numbers = st.integers(0, 30)

    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory(prefix="tiertree-test-")
        self.path = Path(self.directory.name) / "d"
        self.capacity = 24 << 10
        self.present: set[int] = set()
        self.unreported: set[int] = set()
        """Evicted by a get that had to write a tombstone; the next put says so."""
        self.open()

    def open(self) -> None:
        self.files = CountedFiles(self.path, self.capacity)
        self.storage = DiskStorage(self.path, self.capacity, segment_bytes=4096, files=self.files)

    @staticmethod
    def length(number: int) -> int:
        return 100 + number * 37

    def held(self) -> set[int]:
        return {n for n, each in enumerate(held(self.storage, *range(31))) if each}

    @rule(numbers=st.lists(numbers, max_size=6))
    def put(self, numbers: list[int]) -> None:
        evicted_before = self.storage.stats().evicted
        stored = set()
        pages = [page_content(n, self.length(n)) for n in numbers]
        result = self.storage.put([page_key(n) for n in numbers], pages)
        for number, outcome in zip(numbers, result.outcomes, strict=True):
            if outcome is Wrote.STORED:
                assert number not in self.present
                self.present.add(number)
                stored.add(number)
            assert outcome is Wrote.REFUSED or number in self.present
        keys = {page_key(n): n for n in range(31)}
        evicted = [keys[key] for key in result.evicted]
        assert self.unreported - stored <= set(evicted) <= (self.present | self.unreported) - stored
        assert len(set(evicted)) == len(evicted)
        newly = set(evicted) - self.unreported
        assert self.storage.stats().evicted - evicted_before == len(newly)
        self.present -= newly
        self.unreported.clear()

    @rule(numbers=st.lists(numbers, max_size=8))
    def get(self, numbers: list[int]) -> None:
        into = [memoryview(bytearray(self.length(n))) for n in numbers]
        results = self.storage.get([page_key(n) for n in numbers], into)
        for number, got, data in zip(numbers, results, into, strict=True):
            assert got is (Got.HIT if number in self.present else Got.MISS)
            assert got is Got.MISS or data == page_content(number, self.length(number))

    @rule(number=numbers, position=st.integers(0, 99))
    def rot(self, number: int, position: int) -> None:
        evicted_before = self.storage.stats().evicted
        if flip_byte(self.storage, page_key(number), position):
            assert number in self.present
            assert read(self.storage, number, self.length(number))[0] is Got.CORRUPT
            self.present.remove(number)
            evicted = self.present - self.held()
            assert self.storage.stats().evicted - evicted_before == len(evicted)
            self.present -= evicted
            self.unreported |= evicted

    @rule(crash=st.booleans())
    def reopen(self, crash: bool) -> None:
        if crash:
            abandon(self.storage)
        else:
            self.storage.close()
        self.open()
        self.unreported.clear()

    @rule()
    def clear(self) -> None:
        self.storage.clear()
        self.present.clear()
        self.unreported.clear()

    @invariant()
    def books_are_right(self) -> None:
        stats = self.storage.stats()
        assert stats.pages == len(self.present)
        assert stats.bytes == self.files.used() <= self.capacity
        assert self.held() == self.present

    def teardown(self) -> None:
        try:
            self.storage.close()
        finally:
            self.directory.cleanup()


DiskMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestDiskMachine = DiskMachine.TestCase
