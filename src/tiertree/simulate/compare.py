"""What a broken storage costs a request: the same run without storage, and with all of its faults at once.

So that nothing but waiting can differ, the world is calm: every request has room, its computing takes no
time from others, and it is charged as if nothing had been cached. Both runs lose what is in memory now and
then, so that storage is asked.

    latency with storage − latency without  ≤  the deadlines of what the request did, added up
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import CacheConfig, DeviceConfig
from ..policy.prefetch import patience_seconds
from ..types import StopRule
from .engine import STEP_SECONDS
from .plan import LONGEST_PAGES, STORE_FAULTS, Plan, draw_plan
from .report import RunReport
from .run import simulate

RUNNING = 64
RATES = (0.1, 0.3, 0.6, 1.0)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One pair of runs. `slower_s` is by how much each request was slower with storage, `deadline_s` how much
    it may be."""

    seed: int
    without: RunReport
    broken: RunReport
    slower_s: Mapping[int, float]
    deadline_s: float

    @property
    def over(self) -> dict[int, float]:
        """Requests that were slower by more than their deadline."""
        return {number: slower for number, slower in self.slower_s.items() if slower > self.deadline_s}


def compare(seed: int, requests: int) -> Comparison:
    """Run `seed` twice. O(two runs)."""
    plan = _calm(draw_plan(seed, requests, three_tiers=True))
    rates = {name: RATES[(seed + at) % len(RATES)] for at, name in enumerate((*STORE_FAULTS, "cancel_deaf"))}
    without = simulate(replace(plan, faults={}, storage=None))
    broken = simulate(replace(plan, faults=rates, storage=plan.storage))
    slower = {
        number: round(latency - without.latencies[number], 9)
        for number, latency in broken.latencies.items()
        if number in without.latencies
    }
    return Comparison(seed, without, broken, slower, deadline_seconds(plan.config))


def _calm(plan: Plan) -> Plan:
    pages = RUNNING * LONGEST_PAGES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a device this large is for the sake of the comparison
        config = replace(
            plan.config,
            device=DeviceConfig(size=pages),
            kinds=tuple(replace(each, device=4 * pages) for each in plan.config.kinds),
            max_operations=1024,
        )
    return replace(plan, habits={}, config=config, running_max=RUNNING, arrivals_s=0.05, calm=True)


def deadline_seconds(config: CacheConfig) -> float:
    """What the operations of one request may take together: a prefetch (for as long as its stop rule is
    patient; a patient one asks and then reads) and a load-back; each may be noticed a step later."""
    rules = config.prefetch
    pages = LONGEST_PAGES * config.page_size
    patience = patience_seconds(rules.stop_rule, rules.base_seconds, rules.per_1024_tokens_seconds, pages)
    prefetch = min(patience, 2 * config.op_deadline_seconds)
    if rules.stop_rule is StopRule.BEST_EFFORT:
        prefetch = 0.0
    return prefetch + config.op_deadline_seconds + 3 * STEP_SECONDS
