"""The second process of `test_hf_exact_disk.py`: serves a prompt from the directories of a first one.

Reads a list of cases (JSON) from standard input, writes what became of each to standard output.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from exact_support import engine_of, pass_digests

from tiertree import Kind


def serve(case: dict[str, Any]) -> dict[str, Any]:
    """Open the directory of `case`, and go on with its prompt."""
    saved = {(Kind(kind), bytes.fromhex(page)): set(bytes_) for kind, page, bytes_ in case["saved"]}
    with engine_of(case["name"], case["page"], saved, host=True, path=case["path"]) as engine:
        run = engine.say(case["prompt"])
        return {
            "tokens": run.tokens,
            "cached": run.cached,
            "passes": run.passes,
            "logits": pass_digests(run),
            "found": run.found[0],
            "wrong": sorted(engine.wrong),
            "loaded_back": engine.cache.stats().loaded_back,
            "prefetched": engine.cache.stats().prefetched,
        }


if __name__ == "__main__":
    json.dump([serve(case) for case in json.load(sys.stdin)], sys.stdout)
