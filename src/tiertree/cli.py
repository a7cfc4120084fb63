"""The command line: `tiertree replay` and `tiertree demo`. docs/cli.md shows all of it.

Exit status: 0 when all is well, 1 when bytes came back wrong (and nobody asked for that), 2 for files,
lines and options that cannot be used and for memory that cannot be had, each with one line that names it.
As a shell has it for the signals: 130 when interrupted, 141 when nobody reads the output any more, 143
when terminated; temporary files are removed then as well.

What takes long to import is imported by the command that needs it, so that help is quick and an
interrupt finds `main` at work.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from errno import EACCES, EROFS
from importlib import metadata
from io import StringIO
from typing import TYPE_CHECKING, Any, NoReturn

from .policy.eviction import POLICIES
from .types import ConfigError, StopRule, StorageError, TraceError, WritePolicy

if TYPE_CHECKING:
    from .replay.options import ReplayOptions
    from .replay.report import Report

DEMO_REQUESTS = 2000
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
INTERRUPTED, UNREAD, TERMINATED = (128 + each for each in (signal.SIGINT, signal.SIGPIPE, signal.SIGTERM))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` is without the program's name (None: the process's own). Returns the exit
    status. What argparse refuses exits with status 2 by itself."""
    try:
        try:
            with _terminable():
                return _run(argv)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _say_no_more()
        return UNREAD


def _run(argv: Sequence[str] | None) -> int:
    name = "tiertree"
    try:
        arguments = build_parser().parse_args(argv)
        name = f"tiertree {arguments.command}"
        status: int = arguments.run(arguments)
        return status
    except (ConfigError, TraceError, StorageError) as error:
        why, status = f"error: {error}", 2
    except MemoryError as error:
        why, status = f"error: not enough memory for so many or such large pages: {error}", 2
    except KeyboardInterrupt:
        why, status = "interrupted", INTERRUPTED
    except _Terminated:
        why, status = "terminated", TERMINATED
    print(f"{name}: {why}", file=sys.stderr)
    return status


class _Terminated(BaseException):
    """SIGTERM: leave in good order."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises `_Terminated`, once; later ones do not disturb the cleaning up. Elsewhere than in the
    main thread, where signals do not arrive, it stays what it was."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def _say_no_more() -> None:
    """Let what is still buffered go nowhere, so that the interpreter does not fail to flush it."""
    with contextlib.suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Refuses in one line, as everything else here does."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and `message`."""
        self.exit(2, f"{self.prog}: error: {message.removeprefix('argument ')}\n")


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one subparser per command."""
    parser = _Parser(prog="tiertree", description="A hierarchical prefix KV cache for LLM inference.")
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
    _add_kinds(parser)
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
    number = _numbers(tiers)
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
    number = _numbers(kinds)
    for name, metavar, text in KIND_OPTIONS:
        number(f"--{name.replace('_', '-')}", metavar, None, text)


def _add_policies(parser: argparse.ArgumentParser) -> None:
    policies = parser.add_argument_group("policies")
    number = _numbers(policies)
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


def _numbers(group: Any) -> Callable[[str, str, int | None, str], None]:
    """Adds options that take an integer, their default in the help text."""

    def add(name: str, metavar: str, default: int | None, text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=_whole_number, metavar=metavar, default=default, help=text + shown)

    return add


def _replay(arguments: argparse.Namespace) -> int:
    from rich.console import Console

    from .replay.driver import Replay
    from .replay.show import ProgressBar
    from .replay.trace import read_trace

    options = _options(arguments)
    _check_writable(arguments.json)
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
    report.settings.update(trace=arguments.trace, limit=arguments.limit)
    try:
        _say(report, options)
    finally:
        if arguments.json is not None:
            _write_json(arguments.json, report)
    return 1 if report.tally.mismatched and not options.corrupt else 0


def _options(arguments: argparse.Namespace) -> ReplayOptions:
    """What was asked for. What could not have any effect is refused where it says more than a size."""
    from .replay.options import ReplayOptions

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


def _check_writable(path: str | None) -> None:
    """Find out before a long run, not after it."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise ConfigError(f"--json: {path} is not a file in a directory that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        why = os.strerror(EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else EACCES)
        raise ConfigError(f"--json: {path} cannot be written: {why}")


def _write_json(path: str, report: Report) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(report.as_dict(), indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json: {path} cannot be written: {error.strerror}") from error


def _say(report: Report, options: ReplayOptions) -> None:
    from rich.console import Console

    from .replay.show import kinds, results, sentences

    table = StringIO()  # a console on stdout would exit by itself, with another status, if nobody reads it
    paper = Console(file=table, width=Console().width)
    for each in (results(report), kinds(report)):
        if each is not None:
            paper.print(each)
    for line in (*table.getvalue().splitlines(), *sentences(report, options.real_bytes)):
        print(line.rstrip())


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
    from rich.console import Console

    from .replay.demo import demo_options, demo_requests
    from .replay.driver import Replay
    from .replay.show import Lines, LiveHits

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
