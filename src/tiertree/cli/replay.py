"""`tiertree replay`: a request trace through the tiers, and what each of them hits."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import TYPE_CHECKING, Any

from ..policy.eviction import POLICIES
from ..types import ConfigError, StopRule, WritePolicy
from .common import check_writable, numbers, say_report, write_json

if TYPE_CHECKING:
    from ..replay.options import ReplayOptions

PAGE_BYTES = 4096
KIND_OPTIONS = (
    ("swa_window", "TOKENS", "the model has sliding-window layers that look back so far"),
    ("swa_device_pages", "N", "their pages on device (default: unbounded, one for each of --device-pages)"),
    ("swa_host_pages", "N", "their pages on host (default: unbounded, one for each page in memory)"),
    ("swa_checkpoint", "TOKENS", "save a window at every multiple too (default: where prompts end or part)"),
    ("swa_page_bytes", "N", "--bytes real: bytes of one of their pages (default: as --page-bytes)"),
    ("mamba_every", "TOKENS", "the model has recurrent layers; save a state at every multiple"),
    ("mamba_device_states", "N", "states on device (default: unbounded, one for each of --device-pages)"),
    ("mamba_host_states", "N", "states on host (default: unbounded, one for each page in memory)"),
    ("mamba_per_path", "N", "states that one path may have on device (default: any number)"),
    ("mamba_state_bytes", "N", "--bytes real: bytes of a state (default: as --page-bytes)"),
)
"""Options of `ReplayOptions` about kinds beside FULL."""


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "replay",
        help="replay a request trace and count what each tier hits",
        description="Replay a trace in the Mooncake format (timestamp, input_length, output_length, "
        "hash_ids): one request at a time, in file order, each in no time, the cache cold at the start.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("trace", metavar="TRACE", help="the trace, one JSON object per line")
    number = numbers(parser)
    number("--limit", "N", None, "only the first N requests")
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as one JSON object")
    parser.add_argument(
        "--tree", metavar="FILE", help="write the tree as it is at the end, for tiertree inspect"
    )
    _add_tiers(parser)
    _add_kinds(parser)
    _add_policies(parser)
    pages = parser.add_argument_group("pages")
    number = numbers(pages)
    number("--block-tokens", "N", 512, "tokens of a block of the trace")
    number("--page-tokens", "N", None, "tokens of a page, a divisor of --block-tokens (default: the same)")
    pages.add_argument(
        "--bytes",
        choices=("none", "real"),
        default="none",
        help="none: metadata only; real: move real pages and compare every page that a hit returns "
        "(default: %(default)s)",
    )
    number("--page-bytes", "N", None, f"--bytes real: bytes of a page, at least 8 (default: {PAGE_BYTES})")
    number(
        "--corrupt",
        "N",
        0,
        "--bytes real: flip one byte in each of N resident pages of each tier meanwhile, or of as many as "
        "there are",
    )
    number("--seed", "N", 0, "of the payloads and of --corrupt")


def _add_tiers(parser: argparse.ArgumentParser) -> None:
    tiers = parser.add_argument_group("tiers")
    number = numbers(tiers)
    number("--device-pages", "N", None, "pages on device (default: unbounded)")
    number("--host-pages", "N", 0, "pages on host, 0 for no such tier")
    number("--disk-pages", "N", 0, "pages on disk, 0 for no such tier; needs a host tier")
    tiers.add_argument(
        "--disk-dir",
        metavar="DIR",
        help="directory of the disk tier, new or empty, and kept (default: a temporary one)",
    )


def _add_kinds(parser: Any) -> None:
    kinds = parser.add_argument_group("layers of other kinds, with slots of their own")
    number = numbers(kinds)
    for name, metavar, text in KIND_OPTIONS:
        number(f"--{name.replace('_', '-')}", metavar, None, text)


def _add_policies(parser: argparse.ArgumentParser) -> None:
    policies = parser.add_argument_group("policies")
    number = numbers(policies)
    policies.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host: on insert, on its n-th hit, on eviction; of no effect without a host "
        "tier (default: %(default)s)",
    )
    number("--selective-hits", "N", None, "write_through_selective: the n of the n-th hit (default: 1)")
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
        help="when a request stops waiting for pages from disk: at once, when all are there, after a time; "
        "of no effect without a disk tier (default: %(default)s)",
    )
    number("--load-back-min", "TOKENS", 0, "compute host pages again rather than load fewer tokens than this")


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..replay.driver import Replay
    from ..replay.show import ProgressBar
    from ..replay.trace import read_trace

    options = _options(arguments)
    check_writable(arguments.json)
    check_writable(arguments.tree, "--tree")
    requests = read_trace(arguments.trace, options.block_tokens, arguments.limit)
    console = Console(stderr=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        replay = Replay(options, requests)
    for each in caught:
        note = ""
        if options.device_pages is None and str(each.message).startswith("host.size:"):
            note = f" (device unbounded: sized for the trace, {replay.cache.config.device_pages})"
        print(f"tiertree replay: warning: {each.message}{note}", file=sys.stderr)
    with replay:
        if console.is_terminal:
            with ProgressBar(console, len(requests)) as bar:
                report = replay.run(bar)
        else:
            report = replay.run()
        if arguments.tree is not None:
            write_json(arguments.tree, replay.cache.tree().as_dict(), "--tree", indent=None)
    report.settings.update(trace=arguments.trace, limit=arguments.limit)
    try:
        say_report(report, options)
    finally:
        if arguments.json is not None:
            write_json(arguments.json, report.as_dict())
    return 1 if report.tally.mismatched and not options.corrupt else 0


def _options(arguments: argparse.Namespace) -> ReplayOptions:
    """What was asked for. What could not have any effect is refused where it says more than a size."""
    from ..replay.options import ReplayOptions

    real, policy = arguments.bytes == "real", WritePolicy(arguments.write_policy)
    page_bytes, hits = arguments.page_bytes, arguments.selective_hits
    if arguments.limit is not None and arguments.limit < 1:
        raise ConfigError(f"--limit: {arguments.limit} is not allowed; allowed: at least 1")
    if page_bytes is not None and not real:
        raise ConfigError("--page-bytes: pages have no bytes; allowed: only with --bytes real")
    if hits is not None and policy is not WritePolicy.WRITE_THROUGH_SELECTIVE:
        raise ConfigError("--selective-hits: allowed: only with --write-policy write_through_selective")
    return ReplayOptions(
        device_pages=arguments.device_pages,
        host_pages=arguments.host_pages,
        disk_pages=arguments.disk_pages,
        write_policy=policy,
        selective_hits=1 if hits is None else hits,
        eviction=arguments.eviction,
        prefetch=StopRule(arguments.prefetch),
        load_back_min=arguments.load_back_min,
        block_tokens=arguments.block_tokens,
        page_tokens=arguments.page_tokens,
        page_bytes=None if not real else PAGE_BYTES if page_bytes is None else page_bytes,
        corrupt=arguments.corrupt,
        disk_dir=arguments.disk_dir,
        seed=arguments.seed,
        **{name: getattr(arguments, name) for name, _, _ in KIND_OPTIONS},
    )
