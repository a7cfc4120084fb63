"""`tiertree fsck`: is every page of a disk tier's directory what was written? With --repair: see to it that
what is not is never served."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .common import check_writable, shown, some, write_json

if TYPE_CHECKING:
    from ..storage.faults import Finding
    from ..storage.fsck import FsckReport, Watcher

SHOWN_MAX = 200
"""So many findings are printed; the rest is counted, and --json has all."""


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "fsck",
        help="check a disk tier's directory, and repair it",
        description="Read every file of a disk tier's directory that no cache has open, and hold every "
        "header, page and footer against its checksum. Changes nothing without --repair.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("directory", metavar="DIR", help="the directory of the disk tier")
    parser.add_argument(
        "--repair",
        action="store_true",
        help="quarantine damaged pages, write anew what can be proven, and leave the rest as opening would",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was found as one JSON object")


def _run(arguments: argparse.Namespace) -> int:
    from ..storage.fsck import fsck

    check_writable(arguments.json)
    with _bar() as watch:
        report = fsck(arguments.directory, arguments.repair, watch=watch)
    try:
        _say(report)
    finally:
        if arguments.json is not None:
            write_json(arguments.json, report.as_dict())
    return 0 if report.sound else 1


@contextlib.contextmanager
def _bar() -> Iterator[Watcher | None]:
    """A progress bar in bytes, on a terminal; nothing stays of it."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("checking"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, whole: bar.update(task, completed=done, total=whole)


def _say(report: FsckReport) -> None:
    for each in report.findings[:SHOWN_MAX]:
        print(_line(each, report.repaired))
    if len(report.findings) > SHOWN_MAX:
        print(f"and {some(len(report.findings) - SHOWN_MAX, 'finding')} more: --json FILE has them all")
    found = report.totals
    print(
        f"{some(found.segments, 'segment')}, {found.bytes:,} bytes, {found.garbage_bytes:,} of them garbage: "
        f"{some(found.live, 'page')} live, {found.superseded:,} superseded, "
        f"{some(found.tombstones, 'tombstone')}"
    )
    if report.sound:
        print("sound")
        return
    damage = some(sum(each.damage for each in report.findings), "damage")
    print(
        f"{damage} found{' and repaired' if report.repaired else ''}: a cache would not "
        f"{'have served' if report.repaired else 'serve'} {some(found.damaged, 'live page')} of these"
    )


def _line(each: Finding, repaired: bool) -> str:
    """One finding, its page's key on a line of its own. Names of files are whatever somebody made."""
    from ..storage.faults import FAULTS

    row = FAULTS[each.fault]
    name = shown(each.file)
    where = name if each.offset is None else f"{name} at {each.offset:,}"
    what = f"{where}: {each.what}. A cache {row.cache}"
    if repaired:
        what += f"; here: {row.repair}"
    return what if each.key is None else f"{what}\n    key {each.key.hex()}"
