"""Tree operations of tiertree beside those of SGLang's radix caches, in one process.

    python benchmarks/tree.py                       # with SGLang in the environment it is compared

10,000 sequences are in each tree (100 beginnings of 256 tokens, 100 endings of 256 under each). Then,
for prompts of 1k, 8k and 64k tokens that no side has seen:

    key         make the side's key from the tokens (a row of its own; every other row has it ready-made)
    insert      the prompt, with slots that were allocated before
    match       the same prompt: everything hits
    match split the prompt changed at its middle page: the first such match may split a node
    match again the same changed prompt once more
    miss        a prompt of which nothing is stored
    evict       as many tokens as a prompt has, least recently used first; as many are put back, untimed

Each pair is one batch of prompts per side, the sides one after the other in changing order. The garbage
collector is on and nothing is frozen.
"""

from __future__ import annotations

import gc
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import common
import sides as contenders
from common import Result, Times, timed_ns

OPERATIONS = ("key", "insert", "match", "match split", "match again", "miss", "evict")
TARGETS: dict[tuple[str, str], dict[int, float]] = {
    ("sglang-rust", "match"): {1024: 1.5, 8192: 1.5, 65536: 2.0},
    ("sglang-rust", "insert"): {1024: 1.5, 8192: 1.5, 65536: 2.0},
    ("sglang-rust", "evict"): {1024: 5.0, 8192: 5.0, 65536: 5.0},
    ("sglang-python", "match"): {1024: 4.0, 8192: 4.0, 65536: 4.0},
    ("sglang-python", "insert"): {1024: 4.0, 8192: 4.0, 65536: 4.0},
    ("sglang-python", "evict"): {1024: 50.0, 8192: 50.0, 65536: 50.0},
}
HEADS, TAILS, HEAD_TOKENS, TAIL_TOKENS = 100, 100, 256, 256


@dataclass(slots=True)
class Batch:
    """The prompts of one pair: the same for every side."""

    prompts: list[array[int]]
    changed: list[array[int]]
    unseen: list[array[int]]

    @classmethod
    def make(cls, count: int, tokens: int, page_size: int, rng: random.Random) -> Batch:
        prompts = [common.random_tokens(tokens, rng) for _ in range(count)]
        changed = [prompt[:] for prompt in prompts]
        for prompt in changed:
            prompt[tokens // 2 // page_size * page_size] ^= 1
        return cls(prompts, changed, [common.random_tokens(tokens, rng) for _ in range(count)])


@dataclass(slots=True)
class Contest:
    """The sides at one page size and prompt length, and the times they took."""

    page_size: int
    tokens: int
    sides: list[Any]
    times: dict[str, dict[str, Times]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.times = {side.name: {operation: Times() for operation in OPERATIONS} for side in self.sides}

    def populate(self, heads: int) -> None:
        """Give each tree `heads * TAILS` sequences."""
        for sequence in common.populations(heads, TAILS, HEAD_TOKENS, TAIL_TOKENS):
            for side in self.sides:
                side.insert(side.key(sequence), side.slots(len(sequence)))

    def run_pair(self, turn: int, batch: Batch) -> None:
        """Every operation by every side, on the prompts of `batch`."""
        tokens, half = self.tokens, self.tokens // 2 // self.page_size * self.page_size
        for operation in OPERATIONS:
            for side in common.rotated(self.sides, turn):
                if operation == "key":
                    took = [timed_ns(side.key, prompt)[0] for prompt in batch.prompts]
                elif operation == "insert":
                    took = self._insert(side, batch.prompts)
                elif operation == "match":
                    took = self._match(side, batch.prompts, tokens)
                elif operation == "miss":
                    took = self._match(side, batch.unseen, 0)
                elif operation == "evict":
                    took = self._evict(side, len(batch.prompts))
                else:
                    took = self._match(side, batch.changed, half)
                self.times[side.name][operation].add(took)

    def _insert(self, side: Any, prompts: list[array[int]]) -> list[int]:
        ready = [(side.key(prompt), side.slots(len(prompt))) for prompt in prompts]
        return [timed_ns(side.insert, key, slots)[0] for key, slots in ready]

    def _match(self, side: Any, prompts: list[array[int]], expected: int) -> list[int]:
        found = [timed_ns(side.match, key) for key in [side.key(prompt) for prompt in prompts]]
        wrong = [side.matched(match) for _, match in found if side.matched(match) != expected]
        if wrong:
            raise AssertionError(f"{side.name} matched {wrong[0]} tokens instead of {expected}")
        return [took for took, _ in found]

    def _evict(self, side: Any, count: int) -> list[int]:
        done = [timed_ns(side.evict, self.tokens) for _ in range(count)]
        freed = [side.evicted(result) for _, result in done]
        if min(freed) < self.tokens:
            raise AssertionError(f"{side.name} evicted {min(freed)} tokens instead of {self.tokens}")
        return [took for took, _ in done]

    def refill(self, evicted: int, rng: random.Random, heads: list[array[int]]) -> None:
        """Put back as many endings as `evicted` tokens were, so that the trees keep their size."""
        for number in range(evicted // TAIL_TOKENS):
            sequence = heads[number % len(heads)] + common.random_tokens(TAIL_TOKENS, rng)
            for side in self.sides:
                side.insert(side.key(sequence), side.slots(len(sequence)))

    def results(self) -> list[Result]:
        """The ratios beside each peer, with their targets."""
        if "tiertree" not in self.times:
            return []
        found = []
        for peer in self.times:
            for operation in OPERATIONS if peer != "tiertree" else ():
                ratio = common.ratios(self.times[peer][operation], self.times["tiertree"][operation])
                target = TARGETS.get((peer, operation), {}).get(self.tokens)
                what = f"page {self.page_size} {self.tokens:>5} {operation} beside {peer}"
                found.append(Result(what, ratio, target))
        return found

    def show(self, results: list[Result]) -> None:
        """Print times and ratios."""
        print(f"\npage {self.page_size}, prompts of {self.tokens} tokens")
        print(f"  {'median, p99 in us':12}" + "".join(f"{side.name:>22}" for side in self.sides))
        for operation in OPERATIONS:
            row = "".join(f"  {self.times[side.name][operation]}" for side in self.sides)
            print(f"  {operation:<17}{row}")
        for result in results:
            print(f"  {result.what:<48} {result.ratio!s:<44} {result.verdict()}")


def run_contest(
    page_size: int, tokens: int, options: Any, make_sides: Callable[[int, int], list[Any]], heads: int = HEADS
) -> Contest:
    """One page size, one length: fresh trees with `heads * TAILS` sequences, `options.pairs` pairs.
    `make_sides(page_size, room)` gives empty sides with room for `room` tokens."""
    heads = 10 if options.quick else heads
    population = heads * TAILS * TAIL_TOKENS
    # Evictions must take from the population only, never from the prompts of earlier pairs.
    batch = max(1, min(options.batch, population * 9 // 10 // (options.pairs * tokens)))
    rng = random.Random(options.seed)
    room = 2 * population + heads * HEAD_TOKENS + 3 * options.pairs * batch * tokens + (1 << 16)
    contest = Contest(page_size, tokens, make_sides(page_size, room))
    contest.populate(heads)
    beginnings = [s[:HEAD_TOKENS] for s in common.populations(heads, 1, HEAD_TOKENS, 0)]
    gc.collect()
    for turn in range(options.pairs):
        contest.run_pair(turn, Batch.make(batch, tokens, page_size, rng))
        contest.refill(batch * tokens, rng, beginnings)
    return contest


def main() -> None:
    def flags(parser: Any) -> None:
        parser.add_argument("--pages", default="16,64", help="page sizes in tokens")
        parser.add_argument("--lengths", default="1024,8192,65536", help="prompt lengths in tokens")
        parser.add_argument("--batch", type=int, default=20, help="prompts per pair, at most")
        parser.add_argument("--warm-megabytes", type=int, default=0, help="heap to touch beforehand")
        parser.add_argument("--sides", help="only these: sglang-rust, sglang-python, tiertree")

    options = common.parse_arguments(__doc__, flags)
    report: dict[str, Any] = {"environment": common.print_environment(), "contests": []}
    report["memory"] = common.warm_memory(options.warm_megabytes)
    print(report["memory"], flush=True)
    lengths = [1024] if options.quick else [int(length) for length in options.lengths.split(",")]
    longest = max(*lengths, HEAD_TOKENS + TAIL_TOKENS)

    def make_sides(page_size: int, room: int) -> list[Any]:
        return contenders.available_sides(page_size, room, longest, options.sides)

    everything: list[Result] = []
    for page_size in map(int, options.pages.split(",")):
        for tokens in lengths:
            contest = run_contest(page_size, tokens, options, make_sides)
            results = contest.results()
            contest.show(results)
            everything += results
            times = {
                name: {operation: times.summary_us() for operation, times in rows.items()}
                for name, rows in contest.times.items()
            }
            report["contests"].append({"page_size": page_size, "tokens": tokens, "times_us": times})
    report["results"] = [result.plain() for result in everything]
    common.closing(everything)
    common.write_json(options.json, report)


if __name__ == "__main__":
    main()
