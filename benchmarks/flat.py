"""What tiertree's tree costs as it grows: time in a small and in a large tree, and memory.

    python benchmarks/flat.py

Two caches in one process, one of 10,000 nodes and one of 1,000,000: beginnings of 256 tokens with
endings of 64 tokens under them, pages of 16 tokens. Then prompts of 1,024 tokens, in alternated pairs:
insert, match, match of two resident nodes (a beginning and its ending, at random), miss, and evict of
1,024 tokens (16 endings; as many are put back, untimed). The ratio is the time in the large tree divided
by the time in the small one. The garbage collector is on and nothing is frozen, and tiertree is alone in
the process, so the p99 here is its own.

Memory is measured three ways: `tracemalloc` over trees of nodes of 1 and of 64 pages, which gives bytes
per node and per page; the books of a pool per slot; and resident memory per node of the large tree.
"""

from __future__ import annotations

import gc
import random
import tracemalloc
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import common
import sides as contenders
from common import Result, Times, timed_ns

PAGE_SIZE = 16
HEAD_TOKENS, TAIL_TOKENS, PROMPT_TOKENS = 256, 64, 1024
OPERATIONS = ("insert", "match", "match resident", "miss", "evict")
GROWTH_MOST = 2.0


@dataclass(slots=True)
class Forest:
    """A cache of about `nodes` nodes, and the times that its operations took."""

    nodes: int
    rng: random.Random
    side: Any = None
    heads: list[array[int]] = field(default_factory=list)
    resident: deque[array[int]] = field(default_factory=lambda: deque(maxlen=1024))
    stride: int = 1
    times: dict[str, Times] = field(default_factory=lambda: {name: Times() for name in OPERATIONS})

    def grow(self, spare_tokens: int) -> None:
        """Build the tree: one node per beginning, one per ending."""
        count = max(1, round(self.nodes**0.5))
        tails = self.nodes - count
        room = count * HEAD_TOKENS + tails * TAIL_TOKENS + spare_tokens
        self.side = contenders.Tiertree(PAGE_SIZE, room)
        # A sample of the younger half: what eviction will not reach while this runs.
        self.stride = max(1, tails // 2048)
        self.heads = [common.random_tokens(HEAD_TOKENS, self.rng) for _ in range(count)]
        for number in range(tails):
            self.add(number)

    def add(self, number: int) -> None:
        """Insert one more ending under a beginning."""
        sequence = self.heads[number % len(self.heads)] + common.random_tokens(TAIL_TOKENS, self.rng)
        self.side.insert(self.side.key(sequence), self.side.slots(len(sequence)))
        if number % self.stride == 0:
            self.resident.append(sequence)

    def run_pair(self, prompts: list[array[int]], unseen: list[array[int]], operation: str) -> None:
        """One batch of one operation."""
        side = self.side
        if operation == "insert":
            ready = [(side.key(prompt), side.slots(len(prompt))) for prompt in prompts]
            took = [timed_ns(side.insert, key, slots)[0] for key, slots in ready]
        elif operation == "evict":
            done = [timed_ns(side.evict, PROMPT_TOKENS) for _ in prompts]
            assert all(side.evicted(result) == PROMPT_TOKENS for _, result in done)
            took = [time for time, _ in done]
            for number in range(len(prompts) * PROMPT_TOKENS // TAIL_TOKENS):
                self.add(number)
        else:
            wanted = {"match": prompts, "miss": unseen}.get(operation)
            if wanted is None:
                wanted = self.rng.sample(list(self.resident), len(prompts))
            expected = 0 if operation == "miss" else len(wanted[0])
            found = [timed_ns(side.match, key) for key in [side.key(tokens) for tokens in wanted]]
            assert all(side.matched(match) == expected for _, match in found)
            took = [time for time, _ in found]
        self.times[operation].add(took)


def flatness(small_nodes: int, large_nodes: int, options: Any) -> tuple[list[Result], dict[str, Any]]:
    """Time in the large tree over time in the small one."""
    batch = 2 if options.quick else 20
    spare = 3 * options.pairs * batch * PROMPT_TOKENS + (1 << 16)
    before = common.resident_bytes()
    forests = [Forest(nodes, random.Random(options.seed)) for nodes in (large_nodes, small_nodes)]
    forests[0].grow(spare)
    resident = common.resident_bytes() - before
    forests[1].grow(spare)
    large, small = forests
    gc.collect()
    rng = random.Random(options.seed + 1)
    for turn in range(options.pairs):
        prompts, unseen = ([common.random_tokens(PROMPT_TOKENS, rng) for _ in range(batch)] for _ in range(2))
        for operation in OPERATIONS:
            for forest in common.rotated(forests, turn):
                forest.run_pair(prompts, unseen, operation)
    print(f"\n  {'median, p99 in us':18}{f'{small_nodes} nodes':>22}{f'{large_nodes} nodes':>22}")
    results = []
    for operation in OPERATIONS:
        ratio = common.ratios(large.times[operation], small.times[operation])
        target = GROWTH_MOST if operation in ("insert", "match", "evict") else None
        result = Result(f"{operation}: {large_nodes} nodes / {small_nodes}", ratio, target, at_most=True)
        print(f"  {operation:18}  {small.times[operation]}  {large.times[operation]}", end="")
        print(f"   {ratio}  {result.verdict()}")
        results.append(result)
    print(f"  resident memory of the large tree: {resident / large_nodes:.0f} bytes per node", end="")
    print(f" ({TAIL_TOKENS // PAGE_SIZE} pages in each)")
    times = {
        f"{forest.nodes}": {name: times.summary_us() for name, times in forest.times.items()}
        for forest in forests
    }
    for forest in forests:
        forest.side.close()
    return results, {"times_us": times, "resident_bytes_per_node": resident / large_nodes}


def traced_bytes(sequences: int, tokens: int, rng: random.Random) -> float:
    """Bytes per sequence that a tree of `sequences` unrelated nodes of `tokens` tokens holds."""
    side = contenders.Tiertree(PAGE_SIZE, sequences * tokens)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(sequences):
        side.insert(side.key(common.random_tokens(tokens, rng)), side.slots(tokens))
    gc.collect()
    after = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    side.close()
    return (after - before) / sequences


def books_bytes() -> float:
    """Bytes of an empty cache per slot of its pool."""

    def empty(pages: int) -> int:
        gc.collect()
        tracemalloc.start()
        side = contenders.Tiertree(PAGE_SIZE, pages * PAGE_SIZE)
        used = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        side.close()
        return used

    small, large = 1 << 14, 1 << 20
    return (empty(large) - empty(small)) / (large - small)


def memory(options: Any) -> dict[str, float]:
    """Bytes per node and per page."""
    rng = random.Random(options.seed)
    count, wide = (500 if options.quick else 5000), 64
    one, many = traced_bytes(count, PAGE_SIZE, rng), traced_bytes(count, PAGE_SIZE * wide, rng)
    per_page = (many - one) / (wide - 1)
    found = {
        "per_node": one - per_page,
        "per_page": per_page,
        "per_page_beyond_tokens": per_page - 4 * PAGE_SIZE,
        "per_slot_of_pool": books_bytes(),
    }
    print(f"\n  memory (tracemalloc): {found['per_node']:.0f} bytes per node", end="")
    print(f" + {per_page:.1f} per page of {PAGE_SIZE} tokens", end="")
    print(f" ({found['per_page_beyond_tokens']:.1f} beside the 32-bit tokens)", end="")
    print(f" + {found['per_slot_of_pool']:.1f} per slot of the pool")
    return found


def main() -> None:
    def flags(parser: Any) -> None:
        parser.add_argument("--small", type=int, default=10_000, help="nodes of the small tree")
        parser.add_argument("--large", type=int, default=1_000_000, help="nodes of the large tree")

    options = common.parse_arguments(__doc__, flags)
    report: dict[str, Any] = {"environment": common.print_environment()}
    small, large = (1000, 20_000) if options.quick else (options.small, options.large)
    results, report["flatness"] = flatness(small, large, options)
    report["memory_bytes"] = memory(options)
    report["results"] = [result.plain() for result in results]
    common.closing(results)
    common.write_json(options.json, report)


if __name__ == "__main__":
    main()
