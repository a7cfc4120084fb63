"""What further kinds of attention state cost the tree, and whether FULL alone has become slower.

    python benchmarks/kinds.py                      # FULL beside FULL+SWA and FULL+MAMBA
    git worktree add /tmp/before COMMIT && python benchmarks/kinds.py --before /tmp/before
                                                    # and FULL of that commit beside FULL of now

The operations are those of `tree.py`, with keys and slots made before the clock starts. The sides:

    full            FULL alone
    before          FULL alone, as it was in the directory given by --before
    full+swa        a window of 1,024 tokens; a prompt brings the pages of its last window, as an engine
                    does that lets go of earlier ones while it prefills
    full+swa whole  the same window; a prompt brings every page
    full+mamba      a state after every 2,048 tokens and at the end of the prompt

Ratios are full ÷ before (at most 1 where nothing became slower) and other ÷ full (at most 2 asked).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np
import sides as contenders
import tree
from common import Result

WINDOW, EVERY = 1024, 2048
HEADS = 30
COSTS_AT_MOST = 2.0


class Full(contenders.Tiertree):
    """FULL alone. Where a prompt parts from another there is no window and no state, so matches are judged
    by how far FULL reaches."""

    def matched(self, result: Any) -> int:
        return int(result.full_reach) * self.page_size


class Hybrid(Full):
    """FULL and one partial kind, of which a prompt brings the pages that `brought` says."""

    def __init__(
        self, page_size: int, tokens: int, name: str, package: Any, rules: Any, brought: Callable[[int], Any]
    ) -> None:
        kind = package.KindConfig(rules=rules, device=-(-tokens // page_size))
        super().__init__(page_size, tokens, name, package, kinds=(kind,))
        self._kind = rules.kind
        self._brought = brought

    def slots(self, tokens: int) -> Any:
        pages = tokens // self.page_size
        partial = np.full(pages, -1, np.int64)
        brought = self._brought(pages)
        partial[brought] = self.cache.allocate(len(brought), kind=self._kind)
        return self.cache.allocate(pages), {self._kind: partial}

    def insert(self, key: Any, slots: Any) -> Any:
        return self.cache.insert(key, slots[0], partial=slots[1])


def sides(package: Any, before: Any | None, page_size: int, tokens: int) -> list[Any]:
    """Fresh sides with room for `tokens` tokens."""
    window = -(-WINDOW // page_size)
    every = EVERY // page_size

    def states(pages: int) -> Any:
        return np.union1d(np.arange(every - 1, pages, every), [pages - 1])

    def last(pages: int) -> Any:
        return np.arange(max(0, pages - window), pages)

    swa, mamba = package.SlidingWindow(window=WINDOW), package.Mamba()
    found: list[Any] = [Full(page_size, tokens, "full", package)]
    if before is not None:
        found.append(Full(page_size, tokens, "before", before))
    found.append(Hybrid(page_size, tokens, "full+swa", package, swa, last))
    found.append(Hybrid(page_size, tokens, "full+swa whole", package, swa, np.arange))
    found.append(Hybrid(page_size, tokens, "full+mamba", package, mamba, states))
    return found


def load(directory: Path | None) -> Any:
    """The package tiertree in `directory` (None: this one), apart from any that was loaded before."""
    for name in [name for name in sys.modules if name.split(".")[0] == "tiertree"]:
        del sys.modules[name]
    if directory is None:
        return importlib.import_module("tiertree")
    sys.path.insert(0, str(directory / "src"))
    package = importlib.import_module("tiertree")
    sys.path.pop(0)
    if not Path(str(package.__file__)).is_relative_to(directory):
        raise SystemExit(f"--before {directory}: {package.__file__} was imported instead")
    return package


def compare(contest: tree.Contest) -> list[Result]:
    """full ÷ before, and every hybrid ÷ full; printed as well."""
    found = []
    for name in contest.times:
        for operation in tree.OPERATIONS[1:] if name != "full" else ():
            theirs, full = contest.times[name][operation], contest.times["full"][operation]
            what = f"page {contest.page_size} {contest.tokens:>5} {operation}: "
            if name == "before":
                found.append(Result(what + "full / before", common.ratios(full, theirs), 1.0, at_most=True))
            else:
                ratio = common.ratios(theirs, full)
                found.append(Result(what + f"{name} / full", ratio, COSTS_AT_MOST, at_most=True))
    contest.show(found)
    return found


def main() -> None:
    def flags(parser: Any) -> None:
        parser.add_argument("--pages", default="16,64", help="page sizes in tokens")
        parser.add_argument("--lengths", default="1024,8192,65536", help="prompt lengths in tokens")
        parser.add_argument("--batch", type=int, default=20, help="prompts per pair, at most")
        parser.add_argument("--warm-megabytes", type=int, default=0, help="heap to touch beforehand")
        parser.add_argument("--before", type=Path, help="a checkout of another commit to compare with")
        parser.add_argument("--sides", help="only these beside full, comma-separated")

    options = common.parse_arguments(__doc__, flags)
    report: dict[str, Any] = {"environment": common.print_environment()}
    print(common.warm_memory(options.warm_megabytes), flush=True)
    before = None if options.before is None else load(options.before.resolve())
    package = load(None)
    wanted = options.sides.split(",") if options.sides else None

    def make_sides(page_size: int, room: int) -> list[Any]:
        every = sides(package, before, page_size, room)
        return [side for side in every if wanted is None or side.name in ("full", *wanted)]

    everything: list[Result] = []
    for page_size in map(int, options.pages.split(",")):
        for tokens in [1024] if options.quick else map(int, options.lengths.split(",")):
            everything += compare(tree.run_contest(page_size, tokens, options, make_sides, HEADS))
    report["results"] = [result.plain() for result in everything]
    common.closing(everything)
    common.write_json(options.json, report)


if __name__ == "__main__":
    main()
