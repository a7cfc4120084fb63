"""`tiertree inspect`: a tree, or the directory of a disk tier, as a person would want to see it."""

from __future__ import annotations

import argparse
import os
from typing import Any

from ..types import ConfigError
from .common import numbers

DEPTH = 8
LIMIT = 40


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "inspect",
        help="show a tree, or a disk tier's directory",
        description="Show a tree that tiertree replay --tree has written, or a disk tier's directory, which "
        "may be in use. Changes nothing, and reads no page: that is what tiertree fsck does.",
    )
    parser.set_defaults(run=_run)
    parser.add_argument("path", metavar="PATH", help="a file that holds a tree, or a directory")
    number = numbers(parser)
    number("--limit", "N", LIMIT, "so many nodes, leases, operations or segments at most; 0: all")
    number("--depth", "N", None, f"a tree: down to so many forks; 0: as many as fit (default: {DEPTH})")
    parser.add_argument("--keys", action="store_true", help="a directory: list every page")


def _run(arguments: argparse.Namespace) -> int:
    for name in ("limit", "depth"):
        if (getattr(arguments, name) or 0) < 0:
            raise ConfigError(f"--{name}: {getattr(arguments, name)} is not allowed; allowed: at least 0")
    limit = arguments.limit or None
    if os.path.isdir(arguments.path):
        from .draw_disk import draw

        if arguments.depth is not None:
            raise ConfigError("--depth: allowed: only with a tree")
        draw(arguments.path, limit, arguments.keys)
    else:
        from ..treeview import read_view
        from .draw_tree import draw as draw_tree

        if arguments.keys:
            raise ConfigError("--keys: allowed: only with a directory")
        depth = DEPTH if arguments.depth is None else arguments.depth
        draw_tree(read_view(arguments.path), limit, depth or None)
    return 0
