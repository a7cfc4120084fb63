"""The command line: `tiertree COMMAND`, one file per command. docs/cli.md shows all of it.

    __init__   the parser, signals, exit statuses        replay, demo, …   one command each: `add(commands)`
    common     what several commands do alike

Exit status: 0 when all is well, 1 when bytes came back wrong (and nobody asked for that), runs of the demo
answered differently, or `fsck` has found damage, 2 for files, lines and options that cannot be used and for
memory that cannot be had, each with one line that names it.
As a shell has it for the signals: 130 when interrupted, 141 when nobody reads the output any more, 143
when terminated; temporary files are removed then as well.

What takes long to import is imported by the command that needs it, so that help is quick and an
interrupt finds `main` at work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import NoReturn

from ..types import ConfigError, StorageError, TraceError, ViewError
from . import demo, fsck, inspect, replay, serve, simulate

__all__ = ["COMMANDS", "INTERRUPTED", "TERMINATED", "UNREAD", "build_parser", "main"]

COMMANDS = (serve, replay, demo, simulate, fsck, inspect)
"""The files of the commands, in the order of the help text."""
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
    except (ConfigError, TraceError, StorageError, ViewError) as error:
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


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line, one subparser per command."""
    parser = _Parser(prog="tiertree", description="A hierarchical prefix KV cache for LLM inference.")
    parser.add_argument("--version", action="version", version=f"tiertree {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for each in COMMANDS:
        each.add(commands)
    return parser


def _version() -> str:
    try:
        return metadata.version("tiertree")
    except metadata.PackageNotFoundError:
        return "(not installed)"
