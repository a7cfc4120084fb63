"""`tiertree demo`: what a cache of three tiers does for a chat with a real model."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from functools import partial
from typing import TYPE_CHECKING, Any

from ..types import ConfigError, WritePolicy
from .common import numbers, say, some

if TYPE_CHECKING:
    from ..chat.course import Course
    from ..chat.runs import Setting
    from ..chat.show import Board


def add(commands: Any) -> None:
    """Add the command to the parser's subparsers."""
    parser = commands.add_parser(
        "demo",
        help="chat with a small model: without reuse, with three tiers, and after a restart",
        description="Let several users chat with a small Llama of random weights, behind one system prompt: "
        "first every prompt is computed from its first token, then pages are shared through a device too "
        "small for them, a host and a disk, then a new process starts from that disk. Prints the time to the "
        "first token and the hits of each tier side by side, and whether all three answered the same.",
    )
    parser.set_defaults(run=_run)
    number = numbers(parser)
    number("--users", "N", 8, "conversations, all at once")
    number("--turns", "N", 4, "turns of each conversation")
    number("--system-tokens", "N", 512, "length of the system prompt that all share")
    number("--turn-tokens", "N", 512, "what a user says at each turn")
    number("--answer-tokens", "N", 32, "what the model answers")
    number("--parallel", "N", None, "requests in flight at most (default: one of every user)")
    number("--page-size", "N", 16, "tokens of a page")
    number("--seed", "N", 0, "of what the users say")
    parser.add_argument(
        "--write-policy",
        choices=[str(each) for each in WritePolicy],
        default=str(WritePolicy.WRITE_THROUGH),
        help="when a page goes to host (default: %(default)s)",
    )


def _run(arguments: argparse.Namespace) -> int:
    for name in ("users", "turns", "turn_tokens", "answer_tokens", "parallel", "page_size"):
        _at_least(1, name, getattr(arguments, name))
    for name in ("system_tokens", "seed"):
        _at_least(0, name, getattr(arguments, name))
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError("transformers is not installed; install the extra: pip install 'tiertree[hf]'")
    from rich.console import Console

    from ..chat.clients import ConversationFailed
    from ..chat.runs import RUNS, RestartFailed
    from ..chat.show import Lines, LiveBoard, side_by_side, verdict

    setting = _setting(arguments)
    workload = setting.workload
    for line in _introduction(setting):
        print(line, flush=True)
    console = Console()
    board: Board = (
        LiveBoard(console, workload, RUNS)
        if console.is_terminal
        else Lines(partial(print, flush=True), workload)
    )
    try:
        with board, tempfile.TemporaryDirectory(prefix="tiertree-demo-") as directory:
            courses = _courses(setting, directory, board)
    except (ConversationFailed, RestartFailed) as error:
        print(f"tiertree demo: {error}", file=sys.stderr)
        return 1
    say(side_by_side(workload, courses))
    same, line = verdict(courses)
    print(line)
    return 0 if same else 1


def _courses(setting: Setting, directory: str, board: Board) -> dict[str, Course]:
    """All three runs, by name."""
    from ..chat.runs import RECOMPUTED, RESTARTED, TIERTREE, recomputed, restarted, tiered

    model = setting.model()
    return {
        RECOMPUTED: recomputed(setting, model, board.watch(RECOMPUTED)),
        TIERTREE: tiered(setting, model, directory, board.watch(TIERTREE)),
        RESTARTED: restarted(setting, directory, board.watch(RESTARTED)),
    }


def _setting(arguments: argparse.Namespace) -> Setting:
    from ..chat.runs import Setting
    from ..chat.workload import Workload

    return Setting(
        workload=Workload(
            users=arguments.users,
            turns=arguments.turns,
            system_tokens=arguments.system_tokens,
            turn_tokens=arguments.turn_tokens,
            answer_tokens=arguments.answer_tokens,
            seed=arguments.seed,
        ),
        parallel=arguments.parallel,
        page_size=arguments.page_size,
        write_policy=WritePolicy(arguments.write_policy),
    )


def _introduction(setting: Setting) -> list[str]:
    """What is going to happen."""
    workload = setting.workload
    return [
        f"{some(workload.users, 'user')}, {some(workload.turns, 'turn')} each, behind a system prompt of "
        f"{workload.system_tokens:,} tokens; {workload.turn_tokens:,} new tokens and "
        f"{workload.answer_tokens:,} of answer per turn",
        f"{setting.all_pages:,} pages of {setting.page_size:,} tokens in the end; room for "
        f"{setting.device_pages:,} on device, for all on host and on disk",
    ]


def _at_least(least: int, name: str, value: int | None) -> None:
    if value is not None and value < least:
        option = name.replace("_", "-")
        raise ConfigError(f"--{option}: {value} is not allowed; allowed: at least {least}")
