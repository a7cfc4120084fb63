"""Copies between host and device pools, beside one plain copy of the same bytes in the same run.

    python benchmarks/copies.py [--pairs 11] [--quick] [--json FILE]

    ratio = time of one plain contiguous copy / time of the tiertree transfer (1.0: as fast; higher is better)

Each figure is the median over alternated pairs (plain then tiertree, tiertree then plain, …) with the
quartiles and the range. A transfer goes through the engine: submit, wait, poll. Its slots are a random
half of each pool in random order, and the pools are larger than the caches. On CPU both run on one core,
the plain copy in the main thread and the engine in its own: cores of a shared machine differ.

    same      page_first → page_first, page_first_direct → page_first_direct      target on CPU 0.8
    mixed     page_first ↔ page_first_direct: every page is transposed            reported
    layer     layer_first on one side or both                                     reported

With a CUDA device also: the same against one plain pinned copy in each direction (target 0.9), and how
much of a layer-by-layer load-back hides behind a stand-in forward pass (target 0.9).
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy and torch: one thread beside one thread

import argparse
import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from tiertree.config import KVLayout, MemoryOrder
from tiertree.pools.paged import Pool
from tiertree.transfer.cpu import CpuEngine
from tiertree.transfer.cuda import CudaEngine
from tiertree.transfer.op import PoolMove, Transfer

LAYER_FIRST, PAGE_FIRST, DIRECT = MemoryOrder
PAGE_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
LAYERS = 16
DEADLINE_S = 120.0
CPU_TARGET, CUDA_TARGET, HIDDEN_TARGET = 0.8, 0.9, 0.9


@dataclass(frozen=True)
class Row:
    """One line of the report: ratios of the pairs, and the plain copy's median throughput."""

    device: str
    page_bytes: int
    source: str
    target: str
    group: str
    ratios: list[float]
    plain_gb_s: float

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)


def layout_of(page_bytes: int) -> KVLayout:
    """16 layers of 4 KV heads of 128 bfloat16 elements, as many tokens as make the page."""
    tokens = page_bytes // (LAYERS * 2 * 4 * 128 * 2)
    return KVLayout(layers=LAYERS, kv_heads=4, head_size=128, page_size=tokens)


def group_of(source: MemoryOrder, target: MemoryOrder) -> str:
    """Which of the three groups of the report a pair belongs to."""
    if LAYER_FIRST in (source, target):
        return "layer"
    return "same" if source is target else "mixed"


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def alternated(
    plain: Callable[[], None], ours: Callable[[], None], pairs: int
) -> tuple[list[float], list[float]]:
    """Seconds of `plain` and of `ours`, pair by pair, each first in every other pair; one warm-up each."""
    plain()
    ours()
    seconds: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for which in (0, 1) if pair % 2 == 0 else (1, 0):
            seconds[which].append(timed((plain, ours)[which]))
    return seconds


def filled(layout: KVLayout, order: MemoryOrder, pages: int, device: str = "cpu") -> Pool:
    """A pool with every byte written once, so that no page fault is timed."""
    pool = Pool(layout, order, pages, device, pinned=True)
    pool.words.fill_(1)
    return pool


def moved(source: Pool, target: Pool, pages: int, seed: int) -> PoolMove:
    """A move of `pages` random slots to random slots."""
    rng = np.random.default_rng(seed)
    return PoolMove(
        source, rng.permutation(source.pages)[:pages], target, rng.permutation(target.pages)[:pages]
    )


def cpu_rows(total_bytes: int, pairs: int, seed: int) -> list[Row]:
    """Every two orders and page size in main memory, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    finished = threading.Semaphore(0)
    engine = CpuEngine(finished.release)
    plain_source, plain_target = (np.ones(total_bytes // 8, np.int64) for _ in range(2))
    rows = []
    for page_bytes in PAGE_BYTES:
        pages, layout = total_bytes // page_bytes, layout_of(page_bytes)
        for source_order in MemoryOrder:
            for target_order in MemoryOrder:
                source, target = (filled(layout, order, 2 * pages) for order in (source_order, target_order))
                transfer = Transfer(1, (moved(source, target, pages, seed),))

                def ours(transfer: Transfer = transfer) -> None:
                    engine.submit(transfer)
                    assert finished.acquire(timeout=DEADLINE_S)
                    assert [result.error for result in engine.poll()] == [None]

                plain_s, ours_s = alternated(lambda: np.copyto(plain_target, plain_source), ours, pairs)
                rows.append(
                    row_of("cpu", page_bytes, source_order, target_order, plain_s, ours_s, total_bytes)
                )
                print_row(rows[-1])
    engine.close(DEADLINE_S)
    os.sched_setaffinity(0, cores)
    return rows


def row_of(
    device: str,
    page_bytes: int,
    source: MemoryOrder,
    target: MemoryOrder,
    plain_s: list[float],
    ours_s: list[float],
    total_bytes: int,
) -> Row:
    ratios = [plain / ours for plain, ours in zip(plain_s, ours_s, strict=True)]
    speed = total_bytes / statistics.median(plain_s) / 1e9
    return Row(device, page_bytes, source.value, target.value, group_of(source, target), ratios, speed)


def cuda_rows(total_bytes: int, pairs: int, seed: int) -> list[Row]:
    """Every two orders and page size between pinned host and device, in both directions."""
    engine = CudaEngine("cuda", lambda: None)
    plain_host = torch.ones(total_bytes // 8, dtype=torch.int64).pin_memory()
    plain_device = torch.ones(total_bytes // 8, dtype=torch.int64, device="cuda")
    rows = []
    for page_bytes in PAGE_BYTES:
        pages, layout = total_bytes // page_bytes, layout_of(page_bytes)
        for host_order in MemoryOrder:
            for device_order in MemoryOrder:
                host = filled(layout, host_order, 2 * pages)
                device = filled(layout, device_order, 2 * pages, "cuda")
                for source, target, plain_source, plain_target, name in (
                    (host, device, plain_host, plain_device, "cuda load"),
                    (device, host, plain_device, plain_host, "cuda backup"),
                ):
                    transfer = Transfer(1, (moved(source, target, pages, seed),))

                    def plain(there: torch.Tensor = plain_target, here: torch.Tensor = plain_source) -> None:
                        there.copy_(here, non_blocking=True)
                        torch.cuda.synchronize()

                    def ours(transfer: Transfer = transfer) -> None:
                        engine.submit(transfer)
                        torch.cuda.synchronize()
                        assert [result.error for result in engine.poll()] == [None]

                    plain_s, ours_s = alternated(plain, ours, pairs)
                    rows.append(
                        row_of(name, page_bytes, source.order, target.order, plain_s, ours_s, total_bytes)
                    )
                    print_row(rows[-1])
    engine.close(DEADLINE_S)
    return rows


def hidden_fractions(total_bytes: int, pairs: int, seed: int) -> list[float]:
    """How much of a load-back hides behind a forward pass that waits for it layer by layer.

    With L layers, a load of `load` seconds and a pass of `work` seconds alone, the first layer's load hides
    behind nothing and the last layer's work hides nothing: what could be hidden is min(load, work) ·
    (L - 1) / L. What was hidden is load + work - both. The pass is about 1.5 times as long as the load."""
    page_bytes = 1 << 20
    pages, layout = total_bytes // page_bytes, layout_of(page_bytes)
    host, device = filled(layout, DIRECT, 2 * pages), filled(layout, LAYER_FIRST, 2 * pages, "cuda")
    transfer = Transfer(1, (moved(host, device, pages, seed),))
    engine = CudaEngine("cuda", lambda: None)
    matrix = torch.randn(4096, 4096, dtype=torch.bfloat16, device="cuda")

    def load() -> None:
        engine.submit(transfer)
        torch.cuda.synchronize()
        engine.poll()

    def forward(products: int, waiting: bool) -> None:
        for layer in range(LAYERS):
            if waiting:
                engine.wait_layer(1, layer)
            for _ in range(products):
                torch.mm(matrix, matrix)

    def work(products: int) -> None:
        forward(products, waiting=False)
        torch.cuda.synchronize()

    def both(products: int) -> None:
        engine.submit(transfer)
        forward(products, waiting=True)
        torch.cuda.synchronize()
        engine.poll()

    load()
    work(20)
    products = max(1, round(20 * 1.5 * timed(load) / timed(lambda: work(20))))
    both(products)
    fractions = []
    for _ in range(pairs):
        load_s, work_s, both_s = timed(load), timed(lambda: work(products)), timed(lambda: both(products))
        fractions.append((load_s + work_s - both_s) / (min(load_s, work_s) * (LAYERS - 1) / LAYERS))
    engine.close(DEADLINE_S)
    return fractions


def spread(values: list[float]) -> str:
    """Median, quartiles and range."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:5.2f}  [{low:.2f} {high:.2f}]  ({min(values):.2f} … {max(values):.2f})"


def print_row(row: Row) -> None:
    size = f"{row.page_bytes >> 10} KiB"
    print(
        f"{row.device:<11} {size:>9}  {row.source:>17} → {row.target:<17} {row.group:<5} "
        f"{spread(row.ratios)}   plain {row.plain_gb_s:5.1f} GB/s",
        flush=True,
    )


def verdict(rows: list[Row], target: float) -> str:
    worst = min((row for row in rows if row.group == "same"), key=lambda row: row.median)
    outcome = "met" if worst.median >= target else "MISSED"
    return (
        f"between page_first orders of one kind: lowest median {worst.median:.2f} ({worst.device}, "
        f"{worst.page_bytes >> 10} KiB, {worst.source}); target {target}: {outcome}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Copies between pools beside one plain copy of the same bytes."
    )
    parser.add_argument("--pairs", type=int, default=11, help="alternated pairs per figure (default 11)")
    parser.add_argument(
        "--quick", action="store_true", help="a quarter of the bytes: noisier, four times faster"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random slots (default 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all ratios here")
    options = parser.parse_args()
    if options.pairs < 2:
        parser.error("--pairs: at least 2")
    total = (64 if options.quick else 256) << 20
    print(f"{total >> 20} MiB per copy, {options.pairs} alternated pairs, seed {options.seed}")
    if options.quick:
        print("--quick: starting a transfer weighs four times as much here, so read the verdicts as hints")
    print("ratio to one plain copy: median  [quartiles]  (range)\n")
    rows = cpu_rows(total, options.pairs, options.seed)
    print(f"\nCPU, {verdict(rows, CPU_TARGET)}")
    report: dict[str, object] = {"pairs": options.pairs, "bytes": total, "machine": platform.processor()}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_name()
        print(f"\n{card}: {total >> 20} MiB per copy\n")
        on_card = cuda_rows(total, options.pairs, options.seed)
        print(f"\n{card}, {verdict(on_card, CUDA_TARGET)}")
        hidden = hidden_fractions(total, options.pairs, options.seed)
        outcome = "met" if statistics.median(hidden) >= HIDDEN_TARGET else "MISSED"
        print(f"load-back hidden of what could be: {spread(hidden)}; target {HIDDEN_TARGET}: {outcome}")
        report |= {"card": card, "hidden": hidden}
        rows += on_card
    else:
        print("CUDA: no device here, so its copies and the hidden load-back were not measured")
    if options.json:
        options.json.write_text(json.dumps(report | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
