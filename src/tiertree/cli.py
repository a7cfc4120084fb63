"""The command line: `tiertree replay` and `tiertree demo`. docs/cli.md shows all of it.

Exit status: 0 when all is well, 1 when bytes came back wrong (and nobody asked for that), 2 for files,
lines and options that cannot be used, each with a message that names it, 130 when interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from rich.console import Console

from .policy.eviction import POLICIES
from .replay.demo import demo_options, demo_requests
from .replay.driver import Replay
from .replay.options import ReplayOptions
from .replay.report import Report
from .replay.show import Lines, LiveHits, ProgressBar, results, sentences
from .replay.trace import read_trace
from .types import ConfigError, StopRule, StorageError, TraceError, WritePolicy

DEMO_REQUESTS = 2000


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is without the program's name (None: the process's own). Returns the exit
    status. What argparse refuses exits with status 2 by itself."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ConfigError, TraceError, StorageError) as error:
        print(f"tiertree {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"tiertree {arguments.command}: interrupted", file=sys.stderr)
        return 130
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one subparser per command."""
    parser = argparse.ArgumentParser(
        prog="tiertree", description="A hierarchical prefix KV cache for LLM inference."
    )
    parser.add_argument("--version", action="version", version=f"tiertree {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_replay(commands)
    _add_demo(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("tiertree")
    except metadata.PackageNotFoundError:
        return "(not installed)"


# -- tiertree replay --------------------------------------------------------------------------------


def _add_replay(commands: Any) -> None:
    parser = commands.add_parser(
        "replay",
        help="replay a request trace and count what each tier hits",
        description="Replay a trace in the Mooncake format (timestamp, input_length, output_length, "
        "hash_ids): one request at a time, in file order, each in no time, the cache cold at the start.",
    )
    parser.set_defaults(run=_replay)
    parser.add_argument("trace", metavar="TRACE", help="the trace, one JSON object per line")
    number = _numbers(parser)
    number("--limit", "N", None, "only the first N requests")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as one JSON object")
    _add_tiers(parser)
    _add_policies(parser)
    pages = parser.add_argument_group("pages")
    number = _numbers(pages)
    number("--block-tokens", "N", 512, "tokens of a block of the trace")
    number("--page-tokens", "N", None, "tokens of a page, a divisor of --block-tokens (default: the same)")
    pages.add_argument(
        "--bytes",
        choices=("none", "real"),
        default="none",
        help="none: metadata only; real: move real pages and compare every page that a hit returns "
        "(default: %(default)s)",
    )
    number("--page-bytes", "N", 4096, "--bytes real: bytes of a page, at least 8")
    number("--corrupt", "N", 0, "--bytes real: flip one byte in N resident pages of each tier meanwhile")
    number("--seed", "N", 0, "of the payloads and of --corrupt")


def _add_tiers(parser: argparse.ArgumentParser) -> None:
    tiers = parser.add_argument_group("tiers")
    number = _numbers(tiers)
    number("--device-pages", "N", None, "pages on device (default: unbounded)")
    number("--host-pages", "N", 0, "pages on host, 0 for no such tier")
    number("--disk-pages", "N", 0, "pages on disk, 0 for no such tier; needs a host tier")
    tiers.add_argument(
        "--disk-dir",
        metavar="DIR",
        help="directory of the disk tier, new or empty, and kept (default: a temporary one)",
    )


def _add_policies(parser: argparse.ArgumentParser) -> None:
    policies = parser.add_argument_group("policies")
    number = _numbers(policies)
    policies.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host: on insert, on its n-th hit, on eviction (default: %(default)s)",
    )
    number("--selective-hits", "N", 1, "write_through_selective: the n of the n-th hit")
    policies.add_argument(
        "--eviction",
        choices=sorted(POLICIES),
        default="lru",
        help="which pages leave first (default: %(default)s)",
    )
    policies.add_argument(
        "--prefetch",
        choices=[str(each) for each in StopRule],
        default=str(StopRule.WAIT_COMPLETE),
        help="when a request stops waiting for pages from disk: at once, when all are there, after a time "
        "(default: %(default)s)",
    )
    number("--load-back-min", "TOKENS", 0, "compute host pages again rather than load fewer tokens than this")


def _numbers(group: Any) -> Callable[[str, str, int | None, str], None]:
    """Adds options that take an integer, their default in the help text."""

    def add(name: str, metavar: str, default: int | None, text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=int, metavar=metavar, default=default, help=text + shown)

    return add


def _replay(arguments: argparse.Namespace) -> int:
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit: {arguments.limit} is not allowed; allowed: at least 1")
    _check_writable(arguments.json)
    options = ReplayOptions(
        device_pages=arguments.device_pages,
        host_pages=arguments.host_pages,
        disk_pages=arguments.disk_pages,
        write_policy=WritePolicy(arguments.write_policy),
        selective_hits=arguments.selective_hits,
        eviction=arguments.eviction,
        prefetch=StopRule(arguments.prefetch),
        load_back_min=arguments.load_back_min,
        block_tokens=arguments.block_tokens,
        page_tokens=arguments.page_tokens,
        page_bytes=arguments.page_bytes if arguments.bytes == "real" else None,
        corrupt=arguments.corrupt,
        disk_dir=arguments.disk_dir,
        seed=arguments.seed,
    )
    requests = read_trace(arguments.trace, options.block_tokens, arguments.limit)
    console = Console(stderr=True)
    with _said_warnings("replay"):
        replay = Replay(options, requests)
    with replay:
        if console.is_terminal:
            with ProgressBar(console, len(requests)) as bar:
                report = replay.run(bar)
        else:
            report = replay.run()
    report.settings.update(trace=arguments.trace, limit=arguments.limit)
    _say(report, options)
    if arguments.json is not None:
        _write_json(arguments.json, report)
    return 1 if report.tally.mismatched and not options.corrupt else 0


def _check_writable(path: str | None) -> None:
    """Find out before a long run, not after it."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise ConfigError(f"--json: {path} is not a file in a directory that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        raise ConfigError(f"--json: {path} cannot be written")


def _write_json(path: str, report: Report) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}") from error


@contextmanager
def _said_warnings(command: str) -> Iterator[None]:
    """Warnings of the configuration become lines on stderr."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for each in caught:
        print(f"tiertree {command}: warning: {each.message}", file=sys.stderr)


def _say(report: Report, options: ReplayOptions) -> None:
    Console().print(results(report))
    for line in sentences(report, options.real_bytes):
        print(line)


# -- tiertree demo ----------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="show three tiers at work on a made-up workload",
        description="Make up a multi-turn chat workload behind one system prompt, replay it with real bytes "
        "through a device, a host and a disk that are all too small for it, and compare every page hit.",
    )
    parser.set_defaults(run=_demo)
    number = _numbers(parser)
    number("--requests", "N", DEMO_REQUESTS, "turns of all conversations together")
    number("--seed", "N", 0, "of the workload and of the payloads")
    parser.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host (default: %(default)s)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    if arguments.requests < 1:
        raise ConfigError(f"--requests: {arguments.requests} is not allowed; allowed: at least 1")
    options = demo_options(WritePolicy(arguments.write_policy), arguments.seed)
    requests = demo_requests(arguments.requests, arguments.seed)
    print(
        f"{len(requests):,} chat turns, pages of {options.page_bytes or 0:,} bytes; room for "
        f"{options.device_pages} on device, {options.host_pages} on host, {options.disk_pages} on disk"
    )
    console = Console()
    with Replay(options, requests) as replay:
        live = LiveHits(console, len(requests)) if console.is_terminal else Lines(print, len(requests))
        with live:
            report = replay.run(live)
    _say(report, options)
    return 1 if report.tally.mismatched else 0
