"""What every benchmark here shares: the command line, timing in alternated pairs, and printing.

One *pair* is the same work done by two sides one right after the other, on inputs that neither has
seen, in an order that changes from pair to pair. Its *ratio* is the time of the reference divided by
the time of tiertree, so more is better and 1 is a draw. A result is the median of at least 11 ratios
with their spread; absolute times are printed beside it for orientation only.

Import this module before numpy or torch: it pins both to one thread.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import ctypes
import gc
import json
import platform
import random
import statistics
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from time import perf_counter_ns
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "src"))

VOCABULARY = 128_000
PAIRS_MIN = 11

T = TypeVar("T")


def parse_arguments(
    description: str | None, extra: Callable[[argparse.ArgumentParser], None] | None = None
) -> Any:
    """The flags of every benchmark (`--pairs`, `--json`, `--quick`), and those that `extra` adds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="alternated pairs per result (at least 11)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--quick", action="store_true", help="a smoke run: small, its figures mean little")
    parser.add_argument("--seed", type=int, default=7)
    if extra is not None:
        extra(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.pairs = min(arguments.pairs, 3)
    elif arguments.pairs < PAIRS_MIN:
        parser.error(f"--pairs must be at least {PAIRS_MIN} (or use --quick)")
    return arguments


def environment() -> dict[str, Any]:
    """Where the figures were taken; without this they mean nothing."""
    versions = {}
    for name in ("numpy", "torch", "sglang"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "load_1_minute": round(os.getloadavg()[0], 2),
        "omp_threads": os.environ["OMP_NUM_THREADS"],
        "gc": "on" if gc.isenabled() else "off",
        **versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "?")


def print_environment() -> dict[str, Any]:
    """Print `environment()` on one line and return it."""
    found = environment()
    print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def random_tokens(count: int, rng: random.Random) -> array[int]:
    """`count` token ids below `VOCABULARY` as `array('q')`, the type SGLang keeps its keys in."""
    import numpy as np

    raw = np.frombuffer(rng.randbytes(4 * count), dtype=np.uint32) % VOCABULARY
    return array("q", raw.astype(np.int64).tobytes())


def populations(
    heads: int, tails: int, head_tokens: int = 256, tail_tokens: int = 256, seed: int = 1
) -> Iterator[array[int]]:
    """`heads * tails` sequences: each of `heads` shared beginnings under `tails` endings of their own."""
    rng = random.Random(seed)
    shared = [random_tokens(head_tokens, rng) for _ in range(heads)]
    for number in range(heads * tails):
        yield shared[number % heads] + random_tokens(tail_tokens, rng)


def timed_ns(call: Callable[..., Any], *arguments: Any) -> tuple[int, Any]:
    """Nanoseconds that `call(*arguments)` took, and what it returned."""
    begin = perf_counter_ns()
    result = call(*arguments)
    return perf_counter_ns() - begin, result


def rotated(items: Sequence[T], turn: int) -> list[T]:
    """`items` beginning with a different one at each `turn`, so that nobody always goes first."""
    shift = turn % len(items)
    return [*items[shift:], *items[:shift]]


def quantile(values: Sequence[float], q: float) -> float:
    """The smallest value that at least the fraction `q` of `values` does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


@dataclass(slots=True)
class Spread:
    """Median, quartiles and extremes of the ratios of the pairs."""

    pairs: int
    median: float
    q1: float
    q3: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of `values` (at least one)."""
        quartiles = (
            statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
        )
        return cls(
            len(values), statistics.median(values), quartiles[0], quartiles[2], min(values), max(values)
        )

    def __str__(self) -> str:
        return f"{self.median:7.2f}x [{self.q1:.2f}, {self.q3:.2f}] {self.low:.2f}..{self.high:.2f}"


@dataclass(slots=True)
class Times:
    """Every single time of one side at one operation (ns), pair by pair."""

    by_pair: list[list[int]] = field(default_factory=list)

    def add(self, batch: list[int]) -> None:
        """One more pair's times."""
        self.by_pair.append(batch)

    def all_us(self) -> list[float]:
        """All of them, in microseconds."""
        return [time / 1000 for batch in self.by_pair for time in batch]

    def summary_us(self) -> dict[str, float]:
        """Count, median, p99 and maximum in microseconds."""
        every = self.all_us()
        return {
            "count": len(every),
            "median": statistics.median(every),
            "p99": quantile(every, 0.99),
            "max": max(every),
        }

    def __str__(self) -> str:
        found = self.summary_us()
        return f"{found['median']:9.1f} {found['p99']:10.1f}"


def ratios(reference: Times, ours: Times) -> Spread:
    """Reference time / our time of each pair, each pair counted by the median of its batch."""
    pairs = zip(reference.by_pair, ours.by_pair, strict=True)
    return Spread.of([statistics.median(theirs) / statistics.median(mine) for theirs, mine in pairs])


@dataclass(slots=True)
class Result:
    """One line of a report: what was compared, how it came out, and what it should be."""

    what: str
    ratio: Spread
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Is the target met by the median? None where there is none."""
        if self.target is None:
            return None
        return self.ratio.median <= self.target if self.at_most else self.ratio.median >= self.target

    def verdict(self) -> str:
        """The target and whether it is met, in words."""
        if self.target is None:
            return ""
        sign = "<=" if self.at_most else ">="
        return f"target {sign} {self.target:g}x: {'met' if self.met else 'MISSED'}"

    def plain(self) -> dict[str, Any]:
        """The result as JSON-ready data."""
        return {**asdict(self), "met": self.met}


def closing(results: Sequence[Result]) -> None:
    """Say at the end how many targets were met and name those that were not."""
    judged = [result for result in results if result.met is not None]
    missed = [result for result in judged if not result.met]
    if not judged:
        print("no targets were judged")
        return
    print(f"\n{len(judged) - len(missed)} of {len(judged)} targets met")
    for result in missed:
        print(f"  MISSED {result.what}: {result.ratio}  {result.verdict()}")


def write_json(path: Path | None, report: dict[str, Any]) -> None:
    """Write `report` to `path`, where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(report, indent=1, default=str) + "\n")
        print(f"wrote {path}")


def warm_memory(megabytes: int) -> str:
    """Make the C heap keep `megabytes` that were touched already, and say what was done.

    On many virtual machines the first touch of a page of memory costs far more than any tree operation
    (10 us and more), and then an insert measures the hypervisor and how much each side stores. A cache
    in service recycles memory that eviction gave back, which is what this imitates.
    """
    if not megabytes:
        return "fresh memory"
    if not sys.platform.startswith("linux"):
        return "fresh memory (the heap cannot be warmed here)"
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold, most = -1, -3, 32 << 20
    if not (libc.mallopt(trim_threshold, (1 << 31) - 1) and libc.mallopt(mmap_threshold, most)):
        return "fresh memory (the C library refused)"
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(1 << 20) for _ in range(megabytes)]
    for block in blocks:
        ctypes.memset(block, 1, 1 << 20)
    for block in blocks:
        libc.free(block)
    return f"{megabytes} MB of warm memory"


def resident_bytes() -> int:
    """Bytes of this process in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
