"""`fsck` finds what is wrong with a directory, changes nothing unless asked to, and repairs without losing
anything good. What it says a cache would do is what a cache does."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from disk_support import abandon

from tiertree.cli import main
from tiertree.storage import format as fmt
from tiertree.storage.base import Got
from tiertree.storage.disk import DiskStorage
from tiertree.storage.faults import FAULTS
from tiertree.storage.files import Files
from tiertree.storage.fsck import WINDOW_BYTES, FsckReport, fsck
from tiertree.testing.conformance import page_content, page_key, read
from tiertree.types import StorageError, StorageLocked

CAPACITY = 1 << 22
SEGMENT = 4096
PAGE = 600
PAGES = 14
RECORD = fmt.RECORD_HEADER_BYTES + PAGE
FIRST = "seg-0000000000000001.tts"


def put(storage: DiskStorage, *numbers: int, length: int = PAGE) -> None:
    storage.put([page_key(n) for n in numbers], [page_content(n, length) for n in numbers])


def filled(path: Path, sealed: bool = True) -> Path:
    """Segments of five pages, the last of them with four; number 3 was quarantined and written again."""
    storage = DiskStorage(path, CAPACITY, SEGMENT)
    for number in range(PAGES):
        put(storage, number)
    place = storage.locate(page_key(3))
    assert place is not None
    flip(Path(place[0]), place[1] + 5)
    assert read(storage, 3, PAGE)[0] is Got.CORRUPT
    flip(Path(place[0]), place[1] + 5)
    put(storage, 3)
    if sealed:
        storage.close()
    else:
        abandon(storage)
    return path


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return filled(tmp_path / "disk")


def flip(path: Path, offset: int, mask: int = 0x10) -> None:
    """Change one byte; a negative offset counts from the end."""
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def state(path: Path) -> dict[str, tuple[object, ...]]:
    """Everything about a directory that a look at it must not change."""
    each = {".": path.stat(), **{entry.name: entry.lstat() for entry in path.iterdir()}}
    return {
        name: (
            (path / name).read_bytes() if (path / name).is_file() else b"",
            found.st_mtime_ns,
            found.st_ctime_ns,
            found.st_mode,
            found.st_ino,
        )
        for name, found in each.items()
    }


def faults(report: FsckReport) -> list[str]:
    return [each.fault for each in report.findings]


def served(path: Path, numbers: Sequence[int] = range(PAGES)) -> dict[int, Got]:
    """What a cache makes of a copy of the directory, page by page; right bytes or none."""
    copy = path.with_name("copy")
    shutil.copytree(path, copy)
    storage = DiskStorage(copy, CAPACITY, SEGMENT)
    found = {}
    for number in numbers:
        got, data = read(storage, number, PAGE)
        assert got is not Got.HIT or data == bytes(page_content(number, PAGE)), f"wrong bytes of {number}"
        found[number] = got
    storage.close()
    shutil.rmtree(copy)
    return found


def hits(path: Path) -> set[int]:
    return {number for number, got in served(path).items() if got is Got.HIT}


# -- looking ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sealed", [True, False])
def test_a_good_directory_is_sound_and_stays_as_it_is(tmp_path: Path, sealed: bool) -> None:
    path = filled(tmp_path / "disk", sealed)
    before = state(path)
    report = fsck(path)
    assert report.sound
    assert faults(report) == ([] if sealed else ["unsealed"])
    assert state(path) == before
    found = report.totals
    assert (found.live, found.superseded, found.tombstones, found.damaged) == (PAGES, 1, 1, 0)
    assert found.segments == 3
    assert found.bytes == sum(entry.stat().st_size for entry in path.iterdir())
    entries = fmt.ENTRY_BYTES * (2 if sealed else 1)
    assert found.garbage_bytes == 2 * fmt.RECORD_HEADER_BYTES + PAGE + entries


def test_a_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    storage = DiskStorage(tmp_path / "disk", CAPACITY)
    with pytest.raises(StorageLocked, match=f"pid {os.getpid()}"):
        fsck(tmp_path / "disk")
    assert main(["fsck", str(tmp_path / "disk")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    storage.close()
    assert fsck(tmp_path / "disk").sound


def test_what_is_no_directory_of_ours_is_refused(tmp_path: Path, disk: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("somebody's")
    for path, words in (
        (tmp_path / "none", "cannot be read: No such file"),
        (disk / FIRST, "cannot be read: Not a directory"),
        (tmp_path / "other", "has no FORMAT file"),
    ):
        with pytest.raises(StorageError, match=words):
            fsck(path, repair=True)
    assert os.listdir(tmp_path / "other") == ["file"]


def test_another_version_is_refused_and_left_alone(disk: Path) -> None:
    header = fmt._sealed(fmt._SEGMENT.pack(fmt.SEGMENT_MAGIC, 2, 64, 1))
    (disk / FIRST).write_bytes(header + b"new")
    before = state(disk)
    with pytest.raises(StorageError, match="disk format 2"):
        fsck(disk, repair=True)
    assert state(disk) == before
    (disk / "FORMAT").write_text("tiertree-disk 9\n")
    with pytest.raises(StorageError, match="disk format 9"):
        fsck(disk, repair=True)


def in_payload(path: Path) -> None:
    flip(path / FIRST, 64 + 128 + 77)


def in_a_hidden_page(path: Path) -> None:
    flip(path / FIRST, 64 + 3 * RECORD + 128 + 77)


def in_a_checksum_of_a_header(path: Path) -> None:
    flip(path / FIRST, 64 + RECORD + 125)


def in_a_header(path: Path) -> None:
    flip(path / FIRST, 64 + RECORD + 17)


def in_a_digest(path: Path) -> None:
    flip(path / FIRST, 64 + RECORD + 70)


def in_a_footer(path: Path) -> None:
    flip(path / FIRST, -80)


def in_a_trailer(path: Path) -> None:
    flip(path / FIRST, -30)


def in_the_file_header(path: Path) -> None:
    flip(path / FIRST, 17)


def in_everything(path: Path) -> None:
    (path / FIRST).write_bytes(b"\xa5" * (path / FIRST).stat().st_size)


def cut_in_a_page(path: Path) -> None:
    os.truncate(path / FIRST, 64 + 2 * RECORD + 300)


def cut_in_a_header(path: Path) -> None:
    os.truncate(path / FIRST, 64 + 2 * RECORD + 3)


def cut_in_the_footer(path: Path) -> None:
    os.truncate(path / FIRST, (path / FIRST).stat().st_size - 70)


def cut_in_the_file_header(path: Path) -> None:
    os.truncate(path / FIRST, 20)


def lengthened(path: Path) -> None:
    with open(path / FIRST, "ab") as file:
        file.write(bytes(500))


def renamed(path: Path) -> None:
    (path / FIRST).rename(path / "seg-00000000000000aa.tts")


def others(path: Path) -> None:
    (path / "FORMAT.tmp").write_bytes(b"tier")
    (path / "notes.txt").write_text("mine")
    (path / "seg-1.tts").write_text("not quite a name of ours")
    (path / "LOCK").write_bytes(b"")


@pytest.mark.parametrize(
    ("harm", "expected", "lost_before", "lost_after"),
    [
        (in_payload, ["page"], {0}, {0}),
        (in_a_hidden_page, ["page-hidden"], set(), set()),
        (in_a_checksum_of_a_header, ["record-check"], set(), set()),
        (in_a_header, ["record-header"], {1}, set()),
        (in_a_digest, ["page"], {1}, {1}),
        (in_a_footer, ["footer"], set(), set()),
        (in_a_trailer, ["footer"], set(), set()),
        (in_the_file_header, ["segment-header"], {0, 1, 2, 4}, set()),
        (in_everything, ["segment-unusable"], {0, 1, 2, 4}, {0, 1, 2, 4}),
        (cut_in_a_page, ["unsealed", "unfinished"], {2, 4}, {2, 4}),
        (cut_in_a_header, ["unsealed", "unfinished"], {2, 4}, {2, 4}),
        (cut_in_the_footer, ["unsealed", "unfinished"], set(), set()),
        (cut_in_the_file_header, ["empty"], {0, 1, 2, 4}, {0, 1, 2, 4}),
        (lengthened, ["tail"], set(), set()),
        (renamed, ["segment-renamed"], {0, 1, 2, 4}, {0, 1, 2, 4}),
        (others, ["lock", "temporary", "foreign", "foreign"], set(), set()),
    ],
)
def test_every_fault_is_named_and_repaired(
    disk: Path, harm: Callable[[Path], None], expected: list[str], lost_before: set[int], lost_after: set[int]
) -> None:
    harm(disk)
    before = state(disk)
    report = fsck(disk)
    assert faults(report) == expected
    assert state(disk) == before
    assert hits(disk) == set(range(PAGES)) - lost_before
    repaired = fsck(disk, repair=True)
    assert (repaired.sound, faults(repaired)) == (report.sound, expected)
    again = fsck(disk)
    assert again.sound
    assert set(faults(again)) <= {"page-hidden", "foreign"}
    found = served(disk)
    assert {number for number, got in found.items() if got is Got.HIT} == set(range(PAGES)) - lost_after
    assert Got.CORRUPT not in found.values()


def test_a_damaged_page_of_a_file_that_would_be_removed_counts_once(disk: Path) -> None:
    in_payload(disk)
    in_the_file_header(disk)
    report = fsck(disk, repair=True)
    assert faults(report) == ["segment-header", "page"]
    assert report.totals.damaged == 4
    assert hits(disk) == set(range(PAGES)) - {0}


def test_a_damaged_page_says_where_it_is_and_whose(disk: Path) -> None:
    in_payload(disk)
    (found,) = fsck(disk).findings
    assert (found.file, found.offset, found.key, found.damage) == (FIRST, 64, page_key(0), True)
    assert found.as_dict()["key"] == page_key(0).hex()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "Illegal seek"),
        (lambda path: path.symlink_to("seg-0000000000000002.tts"), "Too many levels of symbolic links"),
    ],
    ids=["folder", "pipe", "link"],
)
def test_what_has_our_name_and_is_no_file_is_found_and_not_repaired(
    disk: Path, make: Callable[[Path], object], why: str
) -> None:
    (disk / FIRST).unlink()
    make(disk / FIRST)
    before = state(disk)
    report = fsck(disk)
    assert faults(report) == ["segment-unreadable"]
    assert why in report.findings[0].what
    with pytest.raises(StorageError, match=f"cannot be repaired: {FIRST} cannot be read: {why}"):
        fsck(disk, repair=True)
    assert state(disk) == before


def test_a_footer_that_names_other_pages_is_found(disk: Path) -> None:
    """Only a fault in a program makes one, or malice: its checksums are right."""
    path = disk / FIRST
    data = path.read_bytes()
    trailer = fmt.decode_trailer(data[-64:], 1, len(data))
    assert trailer is not None
    entries = fmt.decode_entries(data[trailer.data_end : -64], trailer)
    assert entries is not None
    entries = entries.copy()
    entries["key"][1] = page_key(99)
    path.write_bytes(data[: trailer.data_end] + b"".join(fmt.encode_footer(entries, 1, trailer.data_end)))
    report = fsck(disk)
    assert faults(report) == ["page"]
    assert "the footer names another one here" in report.findings[0].what
    fsck(disk, repair=True)
    assert fsck(disk).sound
    assert hits(disk) == set(range(PAGES)) - {1}


# -- against the disk tier itself -------------------------------------------------------------------


def harmed(path: Path, seed: int) -> str:
    """Some bytes of some segments changed, zeroed or cut off; returns what."""
    dice = random.Random(seed)
    done = []
    for _ in range(dice.randint(1, 4)):
        victim = dice.choice(sorted(path.glob("seg-*")))
        data = bytearray(victim.read_bytes())
        at = dice.randrange(len(data))
        how = dice.choice(["bit", "bit", "header", "zero", "cut", "grow"])
        if how == "bit":
            data[at] ^= 1 << dice.randrange(8)
        elif how == "header":
            at = min(64 + dice.randrange(6) * RECORD + dice.randrange(128), len(data) - 1)
            data[at] ^= 1 << dice.randrange(8)
        elif how == "zero":
            data[at : at + 512] = bytes(len(data[at : at + 512]))
        elif how == "cut":
            at = dice.randint(max(1, len(data) - 200), len(data))
            del data[at:]
        else:
            data += dice.randbytes(dice.choice([1, 64, 300]))
        victim.write_bytes(data)
        done.append(f"{how} at {at} of {victim.name}")
    return f"seed {seed}: {'; '.join(done)}"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("fsck")
    return filled(folder / "sealed"), filled(folder / "unsealed", sealed=False)


@pytest.mark.parametrize("seed", range(60))
def test_it_foretells_what_a_cache_would_serve(
    tmp_path: Path, originals: tuple[Path, Path], seed: int
) -> None:
    path = tmp_path / "disk"
    shutil.copytree(originals[seed % 2], path)
    what = harmed(path, seed)
    before = state(path)
    report = fsck(path)
    assert state(path) == before, what
    now = served(path)
    keys = {page_key(number): number for number in range(PAGES)}
    corrupt = {
        keys[each.key]
        for each in report.findings
        if each.key is not None and each.fault in ("page", "record-header")
    }
    headless = "segment-header" in faults(report)
    if not headless:
        assert {number for number, got in now.items() if got is Got.CORRUPT} == corrupt, what
        hit = sum(got is Got.HIT for got in now.values())
        assert hit == report.totals.live - report.totals.damaged, what
        assert report.totals.damaged == len(corrupt), what
    fsck(path, repair=True)
    again = fsck(path)
    assert again.sound, what
    after = served(path)
    assert Got.CORRUPT not in after.values(), what
    lost = {n for n, got in now.items() if got is Got.HIT and after[n] is not Got.HIT}
    assert not lost or headless, f"{what}: the repair lost {lost}"
    assert again.totals.live == sum(got is Got.HIT for got in after.values()), what


def test_repairs_stay_in_the_byte_bound_of_a_cache_that_has_room(disk: Path) -> None:
    """A tombstone may be the last straw: then the oldest segment goes, as for any put, and no other."""
    in_payload(disk)
    before = sum(entry.stat().st_size for entry in disk.iterdir())
    fsck(disk, repair=True)
    after = sum(entry.stat().st_size for entry in disk.iterdir())
    assert before < after <= before + fmt.RECORD_HEADER_BYTES + fmt.ENTRY_BYTES
    storage = DiskStorage(disk, after, SEGMENT)
    assert len(storage.keys()) == PAGES - 1
    storage.close()
    storage = DiskStorage(disk, before, SEGMENT)
    assert len(storage.keys()) >= PAGES - 5
    storage.close()


# -- disks that fail --------------------------------------------------------------------------------


class BadSector(Files):
    """Reading one byte of the first segment fails, the first `times` times."""

    def __init__(self, offset: int, times: int) -> None:
        self.at = offset
        self.times = times

    def preadv(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        inside = offset <= self.at < offset + sum(map(len, buffers))
        if inside and self.times and os.readlink(f"/proc/self/fd/{fd}").endswith(FIRST):
            self.times -= 1
            raise OSError(errno.EIO, "Input/output error")
        return super().preadv(fd, buffers, offset)


def test_a_bad_sector_takes_only_its_page_along(disk: Path) -> None:
    sector = BadSector(64 + 2 * RECORD + 300, times=10**9)
    report = fsck(disk, files=sector)
    assert [(each.fault, each.key) for each in report.findings] == [("page-unreadable", page_key(2))]
    assert "Input/output error" in report.findings[0].what
    fsck(disk, repair=True, files=sector)
    assert hits(disk) == set(range(PAGES)) - {2}


def test_a_page_that_is_right_when_read_again_is_kept(disk: Path) -> None:
    windows = 3  # one for each record; then the record alone
    report = fsck(disk, repair=True, files=BadSector(64 + 2 * RECORD + 300, times=windows + 1))
    assert (faults(report), report.sound) == (["page-again"], True)
    assert hits(disk) == set(range(PAGES))


class FullDisk(Files):
    """No segment can grow, nor be written to."""

    def pwritev(self, fd: int, buffers: Sequence[Any], offset: int) -> int:
        if "/seg-" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().pwritev(fd, buffers, offset)


def test_a_quarantine_that_cannot_be_written_is_an_error(disk: Path) -> None:
    in_payload(disk)
    with pytest.raises(StorageError, match="1 damaged pages could not be quarantined"):
        fsck(disk, repair=True, files=FullDisk())
    assert "page" in faults(fsck(disk))


class ReadOnly(Files):
    """Files cannot be opened for writing."""

    def open(self, path: str, flags: int) -> int:
        if flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system")
        return super().open(path, flags)


def test_a_read_only_disk_is_checked_and_not_repaired(disk: Path) -> None:
    in_a_header(disk)
    assert faults(fsck(disk, files=ReadOnly())) == ["record-header"]
    with pytest.raises(StorageError, match=r"cannot be repaired: .*Read-only"):
        fsck(disk, repair=True, files=ReadOnly())


def test_large_pages_need_no_large_memory_and_progress_is_told(tmp_path: Path) -> None:
    length = 24 * WINDOW_BYTES
    storage = DiskStorage(tmp_path / "disk", 4 * length)
    put(storage, 1, 2, length=length)
    storage.close()
    told: list[tuple[int, int]] = []
    tracemalloc.start()
    report = fsck(tmp_path / "disk", watch=lambda done, whole: told.append((done, whole)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.sound
    assert report.totals.live == 2
    assert peak < 2 * WINDOW_BYTES
    whole = sum(each.stat().st_size for each in (tmp_path / "disk").glob("seg-*"))
    assert told == sorted(told)
    assert told[-1] == (whole, whole)


def test_the_document_has_every_fault(root: Path) -> None:
    text = (root / "docs" / "cli.md").read_text()
    for name, row in FAULTS.items():
        damage = "yes" if row.damage else ""
        assert f"| `{name}` | {damage} | {row.what} | {row.cache} | {row.repair} |\n" in text


# -- the command ------------------------------------------------------------------------------------


def test_the_command_reports_and_repairs(
    disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    assert main(["fsck", str(disk)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sound"
    in_payload(disk)
    (disk / "\x1b[2Jname").write_text("")
    assert main(["fsck", str(disk), "--json", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err == ""
    assert f"{FIRST} at 64: not the bytes that were written" in said.out
    assert f"key {page_key(0).hex()}" in said.out
    assert "\x1b" not in said.out
    found = json.loads(out.read_text())
    assert (found["sound"], found["repaired"], found["live"], found["damaged"]) == (False, False, PAGES, 1)
    assert [each["fault"] for each in found["findings"]] == ["foreign", "page"]
    assert main(["fsck", str(disk), "--repair"]) == 1
    assert "1 damage found and repaired" in capsys.readouterr().out
    assert main(["fsck", str(disk), "--repair"]) == 0
    assert main(["fsck", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["fsck", str(disk), "--json", "/nowhere/at/all.json"]) == 2


def test_a_terminal_has_a_progress_bar(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fsck", str(disk)]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["fsck", str(disk)]) == 0
    said = capsys.readouterr()
    assert "checking" in said.err
    assert said.out.endswith("sound\n")


def test_the_command_counts_what_it_does_not_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = filled(tmp_path / "disk")
    monkeypatch.setattr("tiertree.cli.fsck.SHOWN_MAX", 1)
    for name in ("a", "b", "c"):
        (path / name).write_text("")
    assert main(["fsck", str(path)]) == 0
    assert "and 2 findings more" in capsys.readouterr().out
