"""Many seeds, one after another or on several processes; the same sums either way."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence

from .plan import draw_plan
from .report import Campaign, RunReport
from .run import simulate

Watcher = Callable[[Campaign], None]


def run_seed(
    seed: int,
    requests: int,
    faults: Sequence[str] | None = None,
    only: Sequence[int] | None = None,
    without: Sequence[str] = (),
    lines_max: int = 0,
) -> RunReport:
    """One seed; arguments as for `draw_plan`."""
    return simulate(draw_plan(seed, requests, faults, only, without), lines_max)


def run_seeds(
    seeds: Sequence[int], run: Callable[[int], RunReport], jobs: int = 1, watch: Watcher | None = None
) -> Campaign:
    """Every seed by `run` (which other processes must be able to import), added up in order."""
    campaign = Campaign()
    for report in _reports(seeds, run, jobs):
        campaign.add(report)
        if watch is not None:
            watch(campaign)
    return campaign


def _reports(seeds: Sequence[int], run: Callable[[int], RunReport], jobs: int) -> Iterator[RunReport]:
    if jobs == 1:
        yield from map(run, seeds)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _leave_interrupts_to_the_parent) as pool:
        yield from pool.imap(run, seeds, chunksize=4)


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that asked ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
