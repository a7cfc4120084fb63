"""What chats look like: a live table on a terminal, lines elsewhere, and at the end all runs side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .clients import Watch
from .course import Course, first_difference
from .workload import Workload

SECONDS_BETWEEN_LOOKS = 0.1
LINES = 4
TURNS_MAX = 6
"""Turns that the live table has columns for."""
NOTHING = "–"


class Board(Protocol):
    """Shows several runs of one workload as they go; a context manager."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...

    def watch(self, name: str) -> Watch:
        """What the clients of the run `name` are to tell."""
        ...


class LiveBoard:
    """A table with a row for each run. Nothing stays of it."""

    def __init__(self, console: Console, workload: Workload, names: tuple[str, ...]) -> None:
        self._workload = workload
        self._runs: dict[str, tuple[Course, int]] = {name: (Course(), 0) for name in names}
        self._live = Live(self._table(), console=console, auto_refresh=False, transient=True)
        self._looked = 0.0

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()

    def watch(self, name: str) -> Watch:
        """What the clients of the run `name` are to tell."""

        def look(course: Course, running: int) -> None:
            self._runs[name] = (course, running)
            if time.monotonic() - self._looked >= SECONDS_BETWEEN_LOOKS or not running:
                self._live.update(self._table(), refresh=True)
                self._looked = time.monotonic()

        return look

    def _table(self) -> Table:
        table = Table(title="mean time to first token, and where the tokens of prompts came from")
        table.title_justify = "left"
        table.add_column("")
        turns = range(1, min(self._workload.turns, TURNS_MAX) + 1)
        titles = ["answered", "in flight", *(f"turn {turn}" for turn in turns)]
        for title in [*titles, "device", "host", "disk", "computed"]:
            table.add_column(title, justify="right")
        for name, (course, running) in self._runs.items():
            times = [_seconds(course.mean_ttft(turn, turn)) for turn in turns]
            shares = _shares(course) if course.served else [NOTHING] * 4
            answered = f"{len(course.served)} of {self._workload.requests}"
            table.add_row(name, answered, str(running), *times, *shares)
        return table


class Lines:
    """One line of text after every fourth of the requests of each run."""

    def __init__(self, write: Callable[[str], None], workload: Workload) -> None:
        self._write = write
        self._workload = workload

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def watch(self, name: str) -> Watch:
        """What the clients of the run `name` are to tell."""
        told = 0

        def look(course: Course, running: int) -> None:
            nonlocal told
            answered, requests = len(course.served), self._workload.requests
            if (quarters := answered * LINES // requests) == told:
                return
            told = quarters
            device, host, disk, computed = _shares(course)
            self._write(
                f"{name}: {answered} of {requests} answered in {course.seconds:.1f} s, first token after "
                f"{_seconds(course.mean_ttft())}; "
                f"device {device}  host {host}  disk {disk}  computed {computed}"
            )

        return look


def side_by_side(workload: Workload, courses: Mapping[str, Course]) -> Table:
    """All runs, one column each; the first is the one that the others are measured by."""
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("mean time to first token")
    for name in courses:
        table.add_column(name, justify="right")
    runs = list(courses.values())
    for turn in range(1, workload.turns + 1):
        table.add_row(f"  turn {turn}", *(_seconds(each.mean_ttft(turn, turn)) for each in runs))
    if workload.turns > 1:
        later = [each.mean_ttft(2) for each in runs]
        table.add_row("  from turn 2 on", *(_seconds(each) for each in later))
        table.add_row(f"  … beside {next(iter(courses))}", *(_ratio(each, later[0]) for each in later))
    table.add_row("tokens of prompts")
    for place, tier in enumerate(("device", "host", "disk")):
        table.add_row(f"  from {tier}", *(f"{each.cached()[place]:,}" for each in runs))
    table.add_row("  computed", *(f"{each.prompt_tokens() - each.cached().total:,}" for each in runs))
    table.add_row("tokens answered per second", *(f"{each.throughput:.1f}" for each in runs))
    table.add_row("seconds", *(f"{each.seconds:.1f}" for each in runs))
    return table


def verdict(courses: Mapping[str, Course]) -> tuple[bool, str]:
    """Whether all runs answered the same, and the line that says so."""
    found = first_difference(tuple(courses), tuple(courses.values()))
    tokens = next(iter(courses.values())).answer_tokens
    if found is None:
        return True, f"identical tokens: yes ({tokens:,} in each run)"
    return False, f"identical tokens: no ({found})"


def _shares(course: Course) -> list[str]:
    """What part of the prompts' tokens came from each tier, and was computed."""
    every = max(1, course.prompt_tokens())
    cached = course.cached()
    return [f"{count / every:.0%}" for count in (*cached, course.prompt_tokens() - cached.total)]


def _seconds(value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def _ratio(value: float | None, by: float | None) -> str:
    return NOTHING if value is None or not by else f"{value / by:.2f}"
