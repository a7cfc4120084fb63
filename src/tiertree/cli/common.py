"""What several commands do alike: options that are numbers, files of JSON, tables on stdout."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from errno import EACCES, EROFS
from io import StringIO
from typing import TYPE_CHECKING, Any

from ..types import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from ..replay.options import ReplayOptions
    from ..replay.report import Report


def _whole_number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def numbers(group: Any) -> Callable[[str, str, int | None, str], None]:
    """A function (name, metavar, default, text) that adds options which take an integer to `group`, a parser
    or a group of one; it says their default in the help text."""

    def add(name: str, metavar: str, default: int | None, text: str) -> None:
        shown = "" if default is None else " (default: %(default)s)"
        group.add_argument(name, type=_whole_number, metavar=metavar, default=default, help=text + shown)

    return add


def check_writable(path: str | None, option: str = "--json") -> None:
    """Raises `ConfigError` if the file `path` of `option` could not be written (None: it need not be): so a
    user finds out before a long run, not after it."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder) or os.path.isdir(path):
        raise ConfigError(f"{option}: {path} is not a file in a directory that exists")
    if not os.access(path if os.path.exists(path) else folder, os.W_OK):
        why = os.strerror(EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else EACCES)
        raise ConfigError(f"{option}: {path} cannot be written: {why}")


def write_json(path: str, value: dict[str, Any], option: str = "--json", indent: int | None = 2) -> None:
    """Write `value` to the file `path` that `option` named. Raises `ConfigError` if that fails."""
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=indent) + "\n")
    except OSError as error:
        raise ConfigError(f"{option}: {path} cannot be written: {error.strerror}") from error


def some(count: int, one: str) -> str:
    """A count and its noun."""
    return f"{count:,} {one if count == 1 else one + 's'}"


def shown(text: str) -> str:
    """`text` of somebody else's making as it may go to a terminal: what does not print is escaped."""
    return text if text.isprintable() else ascii(text)


def ago(seconds: float) -> str:
    """How long ago something was, in the largest unit of which there is at least one."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.0f} {unit} ago"
    return f"{max(seconds, 0):,.0f} s ago"


def plain_table(*titles: str, left: int = 1) -> Table:
    """A table without lines; its first `left` columns hold words, the others numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="")
    for i, title in enumerate(titles):
        table.add_column(title, justify="left" if i < left else "right")
    return table


def say(*things: RenderableType | None) -> None:
    """Print tables and lines as wide as the terminal, no spaces at ends of lines. None is nothing."""
    from rich.console import Console

    paper = StringIO()  # a console on stdout would exit by itself, with another status, if nobody reads it
    console = Console(file=paper, width=Console().width)
    for each in things:
        if each is not None:
            console.print(each)
    for line in paper.getvalue().splitlines():
        print(line.rstrip())


def say_report(report: Report, options: ReplayOptions) -> None:
    """Print what a replay found: tables, and sentences as they are, however long."""
    from ..replay.show import kinds, results, sentences

    say(results(report), kinds(report))
    for line in sentences(report, options.real_bytes):
        print(line.rstrip())
