"""Requests per second of one trace through tiertree and through SGLang's radix caches, metadata only.

    python benchmarks/replay.py                     # with SGLang in the environment it is compared

Every side is driven by the same loop, one request at a time: match, lock the matched path, evict if
there is no room, allocate the missing pages, insert, unlock. Pages have 512 tokens, the device tier
10,000 pages, and there is no other tier. All sides get the same arrays of token ids, a function of the
`hash_ids` of a Mooncake trace; making the arrays is not timed, and making each side's key from them is
timed apart, so that both readings are printed.

The trace is cut into as many slices as there are pairs. Each side serves a slice before the next slice
begins, in changing order, on a tree that lives through the whole trace: so the slices are the pairs, and
their sum is the whole trace.

The trace: $TIERTREE_TRACE, or shared/traces/mooncake_conversation.jsonl beside the checkout.
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import common
import sides as contenders
from common import Result, Spread

BLOCK_TOKENS = 512
TARGETS = {"sglang-python": 3.0, "sglang-rust": 1.0}
EXPECTED_HIT_RATIO, HIT_RATIO_TOLERANCE, EXPECTED_REQUESTS = 0.2116, 0.0005, 12_031


def trace_path() -> Path:
    """Where the trace should be."""
    beside = common.ROOT.parent / "shared" / "traces" / "mooncake_conversation.jsonl"
    return Path(os.environ.get("TIERTREE_TRACE", beside))


def read_blocks(path: Path, limit: int | None) -> list[list[int]]:
    """The `hash_ids` of each request, in file order."""
    with path.open() as lines:
        requests = [json.loads(line)["hash_ids"] for line in lines if line.strip()]
    return requests[:limit]


def tokens_of(blocks: list[int]) -> array[int]:
    """512 token ids per block: two of them spell the block's number, so equal blocks <=> equal tokens."""
    import numpy as np

    number = np.array(blocks, dtype=np.uint64)[:, None]
    mixed = number * np.uint64(0x9E3779B97F4A7C15) + np.arange(BLOCK_TOKENS, dtype=np.uint64)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    tokens = (mixed % np.uint64(common.VOCABULARY)).astype(np.int64)
    tokens[:, 0] = np.array(blocks) % common.VOCABULARY
    tokens[:, 1] = np.array(blocks) // common.VOCABULARY
    return array("q", tokens.tobytes())


@dataclass(slots=True)
class Course:
    """What one side did, slice by slice."""

    loop_ns: list[int] = field(default_factory=list)
    keys_ns: list[int] = field(default_factory=list)
    hit_tokens: int = 0

    def run(self, side: Any, requests: list[array[int]]) -> None:
        """Serve one slice; the loop and the making of the keys are timed one after the other."""
        gc.collect()
        begin = perf_counter_ns()
        keys = [side.key(tokens) for tokens in requests]
        made = perf_counter_ns()
        hit = 0
        for key in keys:
            hit += side.serve(key)
        done = perf_counter_ns()
        self.keys_ns.append(made - begin)
        self.loop_ns.append(done - made)
        self.hit_tokens += hit

    def with_keys_ns(self) -> list[int]:
        """Loop and keys together."""
        return [loop + keys for loop, keys in zip(self.loop_ns, self.keys_ns, strict=True)]


def compare(courses: dict[str, Course]) -> list[Result]:
    """tiertree beside each peer, keys ready-made and keys included."""
    if "tiertree" not in courses:
        return []
    ours, found = courses["tiertree"], []
    for peer, theirs in courses.items():
        if peer == "tiertree":
            continue
        loops = [a / b for a, b in zip(theirs.loop_ns, ours.loop_ns, strict=True)]
        both = [a / b for a, b in zip(theirs.with_keys_ns(), ours.with_keys_ns(), strict=True)]
        found.append(Result(f"replay beside {peer}, keys ready-made", Spread.of(loops), TARGETS[peer]))
        found.append(Result(f"replay beside {peer}, keys included", Spread.of(both), TARGETS[peer]))
        whole = sum(theirs.loop_ns) / sum(ours.loop_ns)
        found.append(Result(f"whole trace beside {peer}, keys ready-made", Spread.of([whole]), TARGETS[peer]))
    return found


def show(courses: dict[str, Course], requests: int, pages: int, whole: bool) -> bool:
    """Requests per second and hit ratio of each side; returns whether tiertree's hit ratio is wrong.

    SGLang evicts a whole leaf node at a time, hence more than was asked for, and hits a little less.
    """
    wrong = False
    print(f"\n  {'':14}{'requests/s':>12}{'keys included':>15}{'seconds':>9}{'hit ratio':>11}")
    for name, course in courses.items():
        loop, both = sum(course.loop_ns) / 1e9, sum(course.with_keys_ns()) / 1e9
        ratio = course.hit_tokens / BLOCK_TOKENS / pages
        verdict = ""
        if whole:
            near = abs(ratio - EXPECTED_HIT_RATIO) <= HIT_RATIO_TOLERANCE
            verdict = f"  (LRU by page: {EXPECTED_HIT_RATIO} +- {HIT_RATIO_TOLERANCE})"
            wrong |= name == "tiertree" and not near
        print(f"  {name:14}{requests / loop:12.0f}{requests / both:15.0f}{loop:9.2f}{ratio:11.4f}{verdict}")
    return wrong


def main() -> None:
    def flags(parser: Any) -> None:
        parser.add_argument("--limit", type=int, help="only the first requests of the trace")
        parser.add_argument("--device-pages", type=int, default=10_000)
        parser.add_argument("--sides", help="only these: sglang-rust, sglang-python, tiertree")

    options = common.parse_arguments(__doc__, flags)
    report: dict[str, Any] = {"environment": common.print_environment()}
    path = trace_path()
    if not path.exists():
        print(f"skipped: no trace at {path} (set TIERTREE_TRACE)")
        return
    trace = read_blocks(path, 600 if options.quick else options.limit)
    pages = sum(map(len, trace))
    longest = max(map(len, trace)) * BLOCK_TOKENS
    room = options.device_pages * BLOCK_TOKENS
    courses: dict[str, Course] = {}
    sides = contenders.available_sides(BLOCK_TOKENS, room, longest, options.sides)
    for side in sides:
        courses[side.name] = Course()
    print(f"{path.name}: {len(trace)} requests, {pages} pages, {options.pairs} slices")
    bounds = [len(trace) * k // options.pairs for k in range(options.pairs + 1)]
    for turn in range(options.pairs):
        requests = [tokens_of(blocks) for blocks in trace[bounds[turn] : bounds[turn + 1]]]
        for side in common.rotated(sides, turn):
            courses[side.name].run(side, requests)
    whole = len(trace) == EXPECTED_REQUESTS and options.device_pages == 10_000
    wrong = show(courses, len(trace), pages, whole)
    results = compare(courses)
    for result in results:
        print(f"  {result.what:<52} {result.ratio!s:<44} {result.verdict()}")
    common.closing(results)
    report |= {
        "wrong_hit_ratio": wrong,
        "requests": len(trace),
        "pages": pages,
        "sides": {
            name: {
                "loop_ns": c.loop_ns,
                "keys_ns": c.keys_ns,
                "hit_ratio": c.hit_tokens / BLOCK_TOKENS / pages,
            }
            for name, c in courses.items()
        },
        "results": [result.plain() for result in results],
    }
    common.write_json(options.json, report)
    if wrong:
        raise SystemExit("tiertree's hit ratio is not that of LRU: its times mean nothing")


if __name__ == "__main__":
    main()
