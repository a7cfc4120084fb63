"""`tiertree demo`: three tiers at work on a made-up workload."""

from __future__ import annotations

import argparse
from typing import Any

from ..types import ConfigError, WritePolicy
from .common import numbers, say_report

DEMO_REQUESTS = 2000


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "demo",
        help="show three tiers at work on a made-up workload",
        description="Make up a multi-turn chat workload behind one system prompt, replay it with real bytes "
        "through a device, a host and a disk that are all too small for it, and compare every page hit.",
    )
    parser.set_defaults(run=_run)
    number = numbers(parser)
    number("--requests", "N", DEMO_REQUESTS, "turns of all conversations together")
    number("--seed", "N", 0, "of the workload and of the payloads")
    parser.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from ..replay.demo import demo_options, demo_requests
    from ..replay.driver import Replay
    from ..replay.show import Lines, LiveHits

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
    say_report(report, options)
    return 1 if report.tally.mismatched else 0
