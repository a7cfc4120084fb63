"""Disk tier beside plain sequential file I/O of the same bytes; what checksums cost; how long opening takes.

    python benchmarks/disk.py [--pairs 11] [--only throughput checksums open] [--json FILE] [--quick]
                              [--dir DIR]

Each pair does the same work twice, in alternating order: once through `DiskStorage` (checksums on), once
with `os.write` or `os.readv`, one call per page, on one file. Both move the same pages from and into the
same memory, sync at the same points (after each batch, or never), and find the page cache in the same
state: all of it cached, or all of it dropped with POSIX_FADV_DONTNEED. The ratio is the tier's speed
divided by the plain file's; the target is 0.8 or more. Making, syncing and removing files before and
after is not timed; opening and sealing the tier's segments on the way is.

What checksums cost is measured batch by batch, the tier beside the tier without the digests of its pages
(which the product has no option for: they are patched out here). The ratio is the tier's speed divided by
its speed without them; the target is 0.9 or more.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

from tiertree.storage.base import KEY_BYTES, Got, Wrote
from tiertree.storage.disk import DiskStorage

KIB = 1024
MIB = 1024 * KIB
PAGE_BYTES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
CHECKED_PAGE_BYTES = (64 * KIB, 512 * KIB, 2 * MIB)
PARTS = ("throughput", "checksums", "open")
PAIRS_MIN = 11
BATCH_BYTES = 16 * MIB
"""What one put or get call carries, and what the plain file syncs after."""


class Work:
    """Pages to move: `source` holds random bytes, `target` is where reads go; both have been touched."""

    def __init__(self, page_bytes: int, total_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.count = total_bytes // page_bytes
        self.source = _pages(bytearray(os.urandom(total_bytes)), page_bytes)
        self.target = _pages(bytearray(b"\1") * total_bytes, page_bytes)
        self.keys = [i.to_bytes(KEY_BYTES, "little") for i in range(self.count)]
        step = max(1, BATCH_BYTES // page_bytes)
        self.batches = [slice(i, min(i + step, self.count)) for i in range(0, self.count, step)]


def _pages(memory: bytearray, page_bytes: int) -> list[memoryview]:
    view = memoryview(memory)
    return [view[i : i + page_bytes] for i in range(0, len(memory), page_bytes)]


class PlainFile:
    """One file, written and read from front to back."""

    def __init__(self, directory: Path, sync: bool) -> None:
        self._path = directory / "plain"
        self._sync = sync
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)

    def write(self, work: Work) -> None:
        for batch in work.batches:
            for page in work.source[batch]:
                assert os.write(self._fd, page) == len(page)
            if self._sync:
                os.fdatasync(self._fd)

    def read(self, work: Work) -> None:
        os.lseek(self._fd, 0, os.SEEK_SET)
        for page in work.target:
            assert os.readv(self._fd, [page]) == len(page)

    def drop(self) -> None:
        os.fdatasync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def remove(self) -> None:
        os.close(self._fd)
        self._path.unlink()


class Tier:
    """The disk tier in a directory of its own."""

    def __init__(self, directory: Path, sync: bool, work: Work, name: str = "tier") -> None:
        self._path = directory / name
        capacity = work.count * (work.page_bytes + 4 * KIB) + 64 * MIB
        durability = "batch" if sync else "none"
        self._storage = DiskStorage(self._path, capacity, segment_bytes=64 * MIB, durability=durability)

    def write(self, work: Work, batches: Sequence[slice] | None = None) -> None:
        for batch in batches or work.batches:
            outcomes = self._storage.put(work.keys[batch], work.source[batch]).outcomes
            assert outcomes.count(Wrote.STORED) == len(outcomes)

    def read(self, work: Work, batches: Sequence[slice] | None = None) -> None:
        for batch in batches or work.batches:
            results = self._storage.get(work.keys[batch], work.target[batch])
            assert results.count(Got.HIT) == len(results)

    def drop(self) -> None:
        for name in self._path.iterdir():
            fd = os.open(name, os.O_RDWR)
            os.fdatasync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)

    def remove(self) -> None:
        self._storage.close()
        shutil.rmtree(self._path)


def seconds(run: Callable[..., None], *arguments: object) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


def write_pair(directory: Path, work: Work, sync: bool, tier_first: bool) -> tuple[float, float]:
    """Seconds of tier and plain, each into fresh files."""
    took = {}
    for side in ("tier", "plain") if tier_first else ("plain", "tier"):
        store = Tier(directory, sync, work) if side == "tier" else PlainFile(directory, sync)
        took[side] = seconds(store.write, work)
        store.remove()
    return took["tier"], took["plain"]


def read_pairs(directory: Path, work: Work, cached: bool, pairs: int) -> list[tuple[float, float]]:
    """Seconds of tier and plain, each from the same files every time."""
    tier, plain = Tier(directory, False, work), PlainFile(directory, False)
    tier.write(work)
    plain.write(work)
    times = []
    for pair in range(-1, pairs):  # the first pair warms up and does not count
        took = {}
        for store in (tier, plain) if pair % 2 else (plain, tier):
            if not cached:
                store.drop()
            took[store] = seconds(store.read, work)
        if pair >= 0:
            times.append((took[tier], took[plain]))
    tier.remove()
    plain.remove()
    return times


def _no_digest(key: bytes, payload: memoryview) -> bytes:
    return bytes(16)


@contextmanager
def without_checksums() -> Iterator[None]:
    """No page has a digest: neither taken when it is written nor compared when it is read."""
    state = SimpleNamespace(update=lambda data: None, digest=lambda: bytes(16))
    stub = SimpleNamespace(xxh3_128=lambda key: state)
    with (
        mock.patch("tiertree.storage.writer.page_digest", _no_digest),
        mock.patch("tiertree.storage.reader.page_digest", _no_digest),
        mock.patch("tiertree.storage.reader.xxhash", stub),
    ):
        yield


SIDES: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "with": nullcontext,
    "without": without_checksums,
}


def both(run: Callable[..., None], *arguments: object) -> tuple[float, float]:
    """Seconds by the clock, and of the processor on this thread's behalf."""
    start, start_cpu = time.perf_counter(), time.thread_time()
    run(*arguments)
    return time.perf_counter() - start, time.thread_time() - start_cpu


Pair = tuple[tuple[float, float], tuple[float, float]]


def alternated(tiers: dict[str, Tier], verb: str, work: Work) -> list[Pair]:
    """One batch after the other, with and without checksums, in changing order."""
    found = []
    for i, batch in enumerate(work.batches):
        took = {}
        for side in ("with", "without") if i % 2 else ("without", "with"):
            with SIDES[side]():
                took[side] = both(getattr(tiers[side], verb), work, [batch])
        found.append((took["with"], took["without"]))
    return found


def checked(directory: Path, work: Work, access: str, pairs: int) -> list[Pair]:
    """Pairs of single batches, too short for other load on the machine to come and go within one. The first
    round of all batches warms up and does not count."""
    found: list[Pair] = []
    for turn in range(-1, pairs):
        tiers = {side: Tier(directory, access == "put, sync per batch", work, side) for side in SIDES}
        times = alternated(tiers, "write", work)
        for tier in tiers.values() if access == "get, uncached" else ():
            tier.drop()
        if access.startswith("get"):
            times = alternated(tiers, "read", work)
        for tier in tiers.values():
            tier.remove()
        found += times if turn >= 0 else []
    return found


def checksum_cost(directory: Path, pairs: int, total_bytes: int) -> list[dict[str, object]]:
    """One row per page size and kind of access."""
    rows: list[dict[str, object]] = []
    print(f"\nchecksums, in batches of {BATCH_BYTES // MIB} MiB; ratio = with ÷ without, target 0.9")
    print("by the clock, and in seconds of the processor, which other load disturbs less\n")
    print(
        f"{'page':>9}  {'access':<20}{'clock':>7}  {'quartiles':<11}{'processor':>9}  {'quartiles':<12} pairs"
    )
    for page_bytes in CHECKED_PAGE_BYTES:
        work = Work(page_bytes, total_bytes)
        for access in ("put, no sync", "put, sync per batch", "get, cached", "get, uncached"):
            times = checked(directory, work, access, pairs)
            row: dict[str, object] = {"page_bytes": page_bytes, "access": access, "pairs": len(times)}
            line = f"{page_bytes // KIB:>5} KiB  {access:<20}"
            for i, measure in enumerate(("clock", "processor")):
                s = summary([(a[i], b[i]) for a, b in times], BATCH_BYTES, "without")
                row[measure] = s
                low, high = s["ratio_low_quartile"], s["ratio_high_quartile"]
                line += f"{s['ratio']:>7.2f}  {f'{low:.2f}–{high:.2f}':<13}"
            rows.append(row)
            print(f"{line}{len(times)}", flush=True)
    return rows


def summary(times: Sequence[tuple[float, float]], total_bytes: int, other: str = "plain") -> dict[str, float]:
    ratios = sorted(plain / tier for tier, plain in times)
    low, median, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": median,
        "ratio_low_quartile": low,
        "ratio_high_quartile": high,
        "tier_gb_per_s": total_bytes / statistics.median(t for t, _ in times) / 1e9,
        f"{other}_gb_per_s": total_bytes / statistics.median(p for _, p in times) / 1e9,
        "pairs": len(times),
    }


def throughput(directory: Path, pairs: int, total_bytes: int) -> list[dict[str, object]]:
    """One row per page size and kind of access."""
    rows: list[dict[str, object]] = []
    print(f"{total_bytes // MIB} MiB, {pairs} alternated pairs; ratio = tier ÷ plain file, target 0.8\n")
    print(f"{'page':>9}  {'access':<22}{'ratio':>6}  {'quartiles':<13}{'tier GB/s':>10}{'plain GB/s':>11}")
    for page_bytes in PAGE_BYTES:
        work = Work(page_bytes, total_bytes)
        measured = {
            f"write, {name}": [write_pair(directory, work, sync, i % 2 == 0) for i in range(-1, pairs)][1:]
            for name, sync in (("no sync", False), ("sync per batch", True))
        }
        for name, cached in (("cached", True), ("uncached", False)):
            measured[f"read, {name}"] = read_pairs(directory, work, cached, pairs)
        for access, times in measured.items():
            s = summary(times, total_bytes)
            rows.append({"page_bytes": page_bytes, "access": access, **s})
            spread = f"{s['ratio_low_quartile']:.2f}–{s['ratio_high_quartile']:.2f}"
            speeds = f"{s['tier_gb_per_s']:>10.2f}{s['plain_gb_per_s']:>11.2f}"
            print(
                f"{page_bytes // KIB:>5} KiB  {access:<22}{s['ratio']:>6.2f}  {spread:<13}{speeds}",
                flush=True,
            )
    return rows


def open_time(directory: Path, count: int, repeats: int) -> dict[str, object]:
    """Seconds to open a directory of `count` tiny pages whose segments are sealed."""
    path = directory / "many"
    capacity = 1 << 40
    storage = DiskStorage(path, capacity)
    payload = memoryview(b"tiny page of 32 bytes for opens ")
    start = time.perf_counter()
    for first in range(0, count, 1024):
        keys = [i.to_bytes(KEY_BYTES, "little") for i in range(first, min(first + 1024, count))]
        storage.put(keys, [payload] * len(keys))
    filled = time.perf_counter() - start
    storage.close()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        storage = DiskStorage(path, capacity)
        times.append(time.perf_counter() - start)
        assert storage.stats().pages == count
        storage.close()
    shutil.rmtree(path)
    row = {"pages": count, "open_seconds": statistics.median(times), "fill_seconds": filled}
    print(f"\nopen {count:,} pages: {row['open_seconds']:.2f} s (median of {repeats}, cached)")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=PAIRS_MIN, help="alternated pairs per row (at least 11)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--quick", action="store_true", help="a few seconds, to see that it runs")
    parser.add_argument(
        "--dir", metavar="DIR", help="measure in DIR's file system (default: the temporary one)"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="measure these alone")
    options = parser.parse_args()
    if options.pairs < PAIRS_MIN and not options.quick:
        parser.error(f"--pairs must be at least {PAIRS_MIN}")
    pairs, total, count = (3, 16 * MIB, 20_000) if options.quick else (options.pairs, 128 * MIB, 1_000_000)
    with tempfile.TemporaryDirectory(prefix="tiertree-bench-", dir=options.dir) as name:
        measure: dict[str, Callable[[], object]] = {
            "throughput": lambda: throughput(Path(name), pairs, total),
            "checksums": lambda: checksum_cost(Path(name), pairs, total),
            "open": lambda: open_time(Path(name), count, repeats=3),
        }
        found = {part: measure[part]() for part in PARTS if part in options.only}
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
