"""`tiertree simulate`: the cache in a made-up world where everything that can go wrong does."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from ..types import ConfigError
from .common import check_writable, numbers, plain_table, say, some, write_json

if TYPE_CHECKING:
    from ..simulate.compare import Comparison
    from ..simulate.report import Campaign

REQUESTS = 100
LINES_MAX = 2000


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "simulate",
        help="run the cache in a made-up world where everything that can go wrong does",
        description="Run the real cache in virtual time under requests that come, leave and are preempted, "
        "over transfers and a storage that fail, hang, lie and forget. What a seed stands for is the same on "
        "every machine. Exit status 1 when a page was wrong, a call late, a request never served or a slot "
        "lost; the run is then cut down to the smallest that shows it.",
    )
    parser.set_defaults(run=_run)
    number = numbers(parser)
    number("--seed", "N", 0, "the first seed")
    number("--seeds", "N", 1, "how many seeds, one run each")
    number("--requests", "M", REQUESTS, "requests of a run")
    parser.add_argument(
        "--faults",
        metavar="NAMES",
        help="faults that are on, separated by commas; also: none, storage, all (default: drawn by the seed)",
    )
    parser.add_argument("--without", metavar="NAMES", default="", help="faults and habits to leave out")
    parser.add_argument("--only", metavar="NUMBERS", help="requests that arrive (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as one JSON object")
    parser.add_argument("--trace", action="store_true", help="print what is decided, the last 2,000 lines")
    number("--jobs", "N", 1, "processes that share the seeds")
    parser.add_argument(
        "--against-no-storage",
        action="store_true",
        help="run each seed without storage and with every fault of storage at once, and compare how long "
        "each request takes",
    )


def _run(arguments: argparse.Namespace) -> int:
    for name, least in (("seed", 0), ("seeds", 1), ("requests", 1), ("jobs", 1)):
        if (value := getattr(arguments, name)) < least:
            raise ConfigError(f"--{name}: {value} is not allowed; allowed: at least {least}")
    check_writable(arguments.json)
    if arguments.trace and arguments.seeds > 1:
        raise ConfigError("--trace: one run at a time can be shown; allowed: only with --seeds 1")
    if not arguments.against_no_storage:
        return _campaign(arguments)
    for name, given in (
        ("faults", arguments.faults is not None),
        ("without", bool(arguments.without)),
        ("only", arguments.only is not None),
        ("trace", arguments.trace),
        ("jobs", arguments.jobs > 1),
    ):
        if given:
            raise ConfigError(f"--{name}: of no effect; allowed: only without --against-no-storage")
    return _compare(arguments)


# -- one world per seed -------------------------------------------------------------------------------


def _campaign(arguments: argparse.Namespace) -> int:
    from ..simulate.campaign import run_seed, run_seeds
    from ..simulate.plan import draw_plan

    faults = None if arguments.faults is None else _faults(arguments.faults)
    only = None if arguments.only is None else _numbers(arguments.only)
    choice: dict[str, Any] = {
        "requests": arguments.requests,
        "faults": faults,
        "only": only,
        "without": _names(arguments.without),
    }
    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    draw_plan(arguments.seed, **choice)
    if arguments.trace:
        report = run_seed(arguments.seed, **choice, lines_max=LINES_MAX)
        for line in report.lines[-LINES_MAX:]:
            print(line)
    with _Progress(len(seeds)) as progress:
        campaign = run_seeds(seeds, partial(run_seed, **choice), arguments.jobs, progress.watch)
    say(_table(campaign))
    found = campaign.as_dict()
    if campaign.violations:
        found["smallest"] = _explain(campaign, choice)
    else:
        print("no violation")
    print(f"digest {found['digest']}")
    if arguments.json is not None:
        write_json(arguments.json, found)
    return 1 if campaign.violations else 0


def _names(text: str) -> list[str]:
    return [each.strip() for each in text.split(",") if each.strip()]


def _faults(text: str) -> list[str]:
    if not (found := _names(text)):
        raise ConfigError(f"--faults: {text!r} names nothing; allowed: names, or none, storage, all")
    return found


def _numbers(text: str) -> list[int]:
    try:
        found = [int(each) for each in _names(text)]
    except ValueError:
        found = []
    if not found:
        raise ConfigError(f"--only: {text!r} is not a list of numbers; allowed: as 3,5,8")
    return found


class _Progress:
    """A bar on stderr, where that is a terminal."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        self._bar = Progress(console=console, disable=not console.is_terminal, transient=True)
        self._task = self._bar.add_task("seeds", total=total)

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def watch(self, campaign: Campaign) -> None:
        """One more seed is done."""
        self._bar.update(self._task, completed=campaign.runs)


def _table(campaign: Campaign) -> Any:
    counts = campaign.counts
    table = plain_table("", "")
    for name, value in (
        ("runs", campaign.runs),
        ("requests", campaign.requests),
        *((f"  {how}", counts[how]) for how in ("finished", "aborted")),
        ("  preempted (times)", counts["preempted"]),
        ("operations", sum(campaign.operations.values())),
        *((f"  {name}", count) for name, count in sorted(campaign.operations.items())),
        ("faults", sum(campaign.faults.values())),
        *((f"  {name}", count) for name, count in sorted(campaign.faults.items())),
        ("pages verified", campaign.pages_verified),
        ("violations", len(campaign.violations)),
    ):
        table.add_row(name, f"{value:,}")
    return table


def _explain(campaign: Campaign, choice: dict[str, Any]) -> dict[str, Any]:
    """The first violation, as small as it gets."""
    from ..simulate.minimise import minimise

    for seed, each in campaign.violations[:10]:
        print(f"seed {seed}, after {each.seconds:.3f} s: {each.kind}: {each.detail}")
    seed, first = campaign.violations[0]
    if choice["only"] is None:
        smallest = minimise(seed, choice["requests"], choice["faults"], choice["without"], first.kind)
        plan, report, command = smallest.plan, smallest.report, smallest.command
        print(
            f"the smallest run found that shows {first.kind!r}: {some(len(plan.numbers()), 'request')}, "
            f"faults {', '.join(plan.faults) or 'none'}, habits {', '.join(plan.habits) or 'none'}"
        )
        for line in report.lines[-40:]:
            print(f"  {line}")
        print(f"run it again: {command}")
        return {"seed": seed, "kind": first.kind, "command": command, "lines": list(report.lines[-40:])}
    return {"seed": seed, "kind": first.kind}


# -- with and without storage -------------------------------------------------------------------------


def _compare(arguments: argparse.Namespace) -> int:
    from ..simulate.compare import compare

    seeds = range(arguments.seed, arguments.seed + arguments.seeds)
    found = [compare(seed, arguments.requests) for seed in seeds]
    table = plain_table("seed", "requests", "faults", "slowest by", "its deadline", "over", left=0)
    for each in found:
        slowest = max(each.slower_s.values(), default=0.0)
        table.add_row(
            str(each.seed),
            str(len(each.slower_s)),
            str(sum(each.broken.faults.values())),
            f"{slowest:.3f} s",
            f"{each.deadline_s:.3f} s",
            str(len(each.over)),
        )
    say(table)
    wrong = [f"seed {each.seed}: {text}" for each in found for text in _wrong(each)]
    for line in wrong:
        print(line)
    if not wrong:
        print("no request was slower than without storage by more than its deadline")
    if arguments.json is not None:
        write_json(arguments.json, {"runs": [_pair(each) for each in found], "violations": wrong})
    return 1 if wrong else 0


def _wrong(pair: Comparison) -> list[str]:
    violations = (*pair.without.violations, *pair.broken.violations)
    wrong = [f"{each.kind}: {each.detail}" for each in violations]
    return wrong + [
        f"request {number} was slower by {slower:.3f} s; its deadline is {pair.deadline_s:.3f} s"
        for number, slower in pair.over.items()
    ]


def _pair(pair: Comparison) -> dict[str, Any]:
    return {
        "seed": pair.seed,
        "requests": len(pair.slower_s),
        "faults": dict(pair.broken.faults),
        "slowest_s": max(pair.slower_s.values(), default=0.0),
        "deadline_s": pair.deadline_s,
        "over": len(pair.over),
        "digest": pair.broken.digest,
    }
