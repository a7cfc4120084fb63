"""Cuts a failing run down: fewer requests, fewer faults, fewer habits, and the same violation.

Dice do not depend on each other, so what is left out changes nothing about the rest but its consequences.
Requests are dropped in halves, then quarters, then one by one (delta debugging: Zeller, Hildebrandt,
*Simplifying and Isolating Failure-Inducing Input*, 2002); faults and habits one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .plan import Plan, draw_plan
from .report import RunReport
from .run import simulate

RUNS_MAX = 300
LINES_MAX = 40


@dataclass(frozen=True, slots=True)
class Smallest:
    """The smallest run found that still shows a violation of one kind, and what it decided at last."""

    plan: Plan
    report: RunReport
    command: str
    """How to run it again."""


def minimise(
    seed: int, requests: int, faults: Sequence[str] | None, without: Sequence[str], kind: str
) -> Smallest:
    """The smallest run of `seed` that has a violation of `kind`, after at most RUNS_MAX runs."""
    left = [RUNS_MAX]
    only: list[int] = list(range(requests))
    names = sorted(set(without))

    def shows(plan: Plan) -> bool:
        left[0] -= 1
        return any(each.kind == kind for each in simulate(plan).violations)

    def with_requests(numbers: list[int]) -> bool:
        return shows(draw_plan(seed, requests, faults, numbers, names))

    only = _fewer(only, with_requests, left)
    whole = draw_plan(seed, requests, faults, only, names)
    for name in (*whole.faults, *whole.habits):
        if left[0] > 0 and shows(draw_plan(seed, requests, faults, only, [*names, name])):
            names.append(name)
    only = _fewer(only, with_requests, left)
    plan = draw_plan(seed, requests, faults, only, names)
    return Smallest(plan, simulate(plan, LINES_MAX), command(plan, faults, names))


def _fewer(numbers: list[int], shows: Callable[[list[int]], bool], left: list[int]) -> list[int]:
    """As few of `numbers` as still show it."""
    size = max(1, len(numbers) // 2)
    while left[0] > 0:
        dropped = False
        for low in range(0, len(numbers), size):
            rest = numbers[:low] + numbers[low + size :]
            if rest and left[0] > 0 and shows(rest):
                numbers, dropped = rest, True
                break
        if not dropped and size == 1:
            break
        if not dropped:
            size = max(1, size // 2)
        size = min(size, max(1, len(numbers) // 2))
    return numbers


def command(plan: Plan, faults: Sequence[str] | None, without: Sequence[str]) -> str:
    """The command line that runs `plan` and prints what it decides."""
    words = ["tiertree simulate", f"--seed {plan.seed}", f"--requests {plan.requests}"]
    if faults is not None:
        words.append(f"--faults {','.join(faults)}")
    if plan.only is not None and len(plan.only) < plan.requests:
        words.append(f"--only {','.join(map(str, plan.only))}")
    if without:
        words.append(f"--without {','.join(without)}")
    return " ".join([*words, "--trace"])
