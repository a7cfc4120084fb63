"""`tiertree.simulate`: no violation where the cache is right, and one where it has been made wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from tiertree.policy import prefetch as patience
from tiertree.simulate import FAULTS, HABITS, RunReport, draw_plan, simulate
from tiertree.simulate import compare as comparing
from tiertree.simulate.campaign import run_seed, run_seeds
from tiertree.simulate.dice import Dice
from tiertree.simulate.minimise import minimise
from tiertree.simulate.report import Campaign
from tiertree.storage import memory, page, reader, writer
from tiertree.tree.actions import Completion
from tiertree.tree.core import Core
from tiertree.tree.ledger import Ledger
from tiertree.tree.operation import Operation, Operations
from tiertree.tree.pagehash import PageHashes
from tiertree.tree.radix import Radix
from tiertree.types import ConfigError, Slots

Patch = pytest.MonkeyPatch


def fine(report: RunReport) -> None:
    """Nothing was wrong, and the run was not an idle one."""
    assert not report.violations, f"tiertree simulate --seed {report.seed}: {report.violations}"
    assert report.counts["finished"] + report.counts.get("aborted", 0) == report.requests
    assert report.pages_verified


@pytest.mark.parametrize("seed", range(10))
def test_a_seed_has_no_violation(seed: int) -> None:
    fine(run_seed(seed, 30))


@pytest.mark.parametrize("faults", ["none", "storage", "all"])
def test_every_choice_of_faults_has_no_violation(faults: str) -> None:
    for seed in range(100, 104):
        report = run_seed(seed, 30, [faults])
        fine(report)
        assert bool(report.faults) == (faults != "none")


def test_a_campaign_meets_every_fault_and_adds_up() -> None:
    campaign = run_seeds(range(12), lambda seed: run_seed(seed, 25, ["all"]))
    found = campaign.as_dict()
    assert (found["runs"], found["requests"], found["violations"]) == (12, 300, [])
    assert found["operations"] == sum(found["operations_by_type"].values()) > 0
    assert set(found["faults"]) == set(FAULTS)


DIGESTS = """
from tiertree.simulate.campaign import run_seed
for seed in range(4): print(run_seed(seed, 20).digest)
"""


def test_a_seed_is_the_same_run_whatever_the_hash_seed() -> None:
    here = [run_seed(seed, 20).digest for seed in range(4)]
    for hash_seed in ("0", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == here
    assert len(set(here)) == 4


@pytest.mark.soak
def test_soak(capsys: pytest.CaptureFixture[str]) -> None:
    end = time.monotonic() + 0.4 * float(os.environ.get("SOAK_SECONDS", "600"))
    first = int(os.environ.get("SOAK_SEED", random.SystemRandom().randrange(1 << 32)))
    campaign = Campaign()
    with capsys.disabled():
        print(f"\nSOAK_SEED={first}", flush=True)
        while time.monotonic() < end:
            report = run_seed(first + campaign.runs, 100)
            fine(report)
            campaign.add(report)
        print(json.dumps(campaign.as_dict(), indent=2))


def test_processes_find_what_one_finds() -> None:
    one, two = (run_seeds(range(3), run_seed_of_ten, jobs) for jobs in (1, 2))
    assert one.as_dict() == two.as_dict()


def run_seed_of_ten(seed: int) -> RunReport:
    return run_seed(seed, 10)


def test_dice_do_not_depend_on_each_other() -> None:
    dice = Dice(7)
    assert dice.roll("a", 1) == Dice(7).roll("a", 1) != dice.roll("a", 2)
    assert Dice(8).roll("a", 1) != dice.roll("a", 1)
    rolls = [dice.roll("many", each) for each in range(4000)]
    assert 0 <= min(rolls) < 0.01
    assert 0.99 < max(rolls) < 1
    assert 0.48 < sum(rolls) / len(rolls) < 0.52
    assert {dice.below(3, "three", each) for each in range(50)} == {0, 1, 2}


def test_leaving_something_out_of_a_plan_changes_nothing_else() -> None:
    whole = draw_plan(5, 40, ["all"])
    less = draw_plan(5, 40, ["all"], only=[3, 4, 9], without=["store_flips", *whole.habits])
    assert less.faults == {name: rate for name, rate in whole.faults.items() if name != "store_flips"}
    assert less.habits == {}
    assert replace(less, faults=whole.faults, habits=whole.habits, only=None) == whole


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"requests": 0}, "--requests: 0"),
        ({"faults": ["rain"]}, "--faults: 'rain' is not known"),
        ({"without": ["rain"]}, "--without: 'rain' is not known"),
        ({"only": [100]}, "--only: there is no request 100"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(choice: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        draw_plan(0, **choice)
    assert len(set(FAULTS) | set(HABITS)) == len(FAULTS) + len(HABITS)


# -- a cache that has been made wrong -----------------------------------------------------------------


def failures_pass_for_successes(patch: Patch) -> None:
    complete = Core.complete
    patch.setattr(
        Core, "complete", lambda core, done, now: complete(core, replace(done, error=None, broken=False), now)
    )


def checksums_are_not_looked_at(patch: Patch) -> None:
    for module in (memory, page, reader, writer):
        if hasattr(module, "page_digest"):
            patch.setattr(module, "page_digest", lambda key, payload: bytes(16))


def namespaces_share(patch: Patch) -> None:
    """On storage: the page hashes of all of them are rooted in the same."""
    root = PageHashes.root
    patch.setattr(PageHashes, "root", lambda hashes, namespace: root(hashes, ""))


def leases_stay(patch: Patch) -> None:
    """Those that end at page 5."""
    unhold = Radix.unhold

    def forgetful(radix: Radix, hold: Any) -> None:
        if hold.end.end != 5:
            unhold(radix, hold)

    patch.setattr(Radix, "unhold", forgetful)


def late_operations_give_their_slots_back(patch: Patch) -> None:
    lose = Operations.lose

    def careless(operations: Operations, operation: Operation) -> None:
        lose(operations, operation)
        for ledger, slots in operations.named(operation):
            ledger.unpin(slots)
        operation.target = operation.target[:0]
        operation.source = operation.source[:0]
        operation.parts = ()

    patch.setattr(Operations, "lose", careless)


def deadlines_are_not_kept(patch: Patch) -> None:
    patch.setattr(Operations, "overdue", lambda operations, now: [])


def pins_are_not_counted(patch: Patch) -> None:
    drop = Ledger.drop

    def careless(ledger: Ledger, slots: Slots) -> int:
        pins, ledger.pins = ledger.pins, ledger.pins * 0
        try:
            return drop(ledger, slots)
        finally:
            ledger.pins = pins

    patch.setattr(Ledger, "drop", careless)


def half_of_a_copy_is_enough(patch: Patch) -> None:
    """A load-back is said to be done when it has only begun."""
    submit = Core.take_actions

    def hasty(core: Core) -> Any:
        actions = submit(core)
        for each in actions:
            operation = core.operations.in_flight.get(each.op)
            if operation is not None and operation.purpose == "load_back" and not operation.late:
                core.complete(Completion(each.op, operation.count), 0.0)
        return actions

    patch.setattr(Core, "take_actions", hasty)


SABOTAGE: Sequence[tuple[Callable[[Patch], None], Sequence[str] | None]] = (
    (failures_pass_for_successes, None),
    (checksums_are_not_looked_at, ["store_flips"]),
    (leases_stay, None),
    (namespaces_share, ["none"]),
    (late_operations_give_their_slots_back, ["copy_hang", "store_hang", "cancel_deaf"]),
    (deadlines_are_not_kept, ["copy_hang", "store_hang"]),
    (pins_are_not_counted, ["copy_slow", "store_slow"]),
    (half_of_a_copy_is_enough, ["copy_slow"]),
)


@pytest.mark.parametrize(("sabotage", "faults"), SABOTAGE, ids=[each.__name__ for each, _ in SABOTAGE])
def test_a_cache_that_is_wrong_is_found_out(
    monkeypatch: Patch, sabotage: Callable[[Patch], None], faults: Sequence[str] | None
) -> None:
    sabotage(monkeypatch)
    found = (simulate(draw_plan(seed, 40, faults)) for seed in range(200, 260))
    assert any(report.violations for report in found), "60 seeds have noticed nothing"


def test_a_failing_seed_is_cut_down(monkeypatch: Patch) -> None:
    leases_stay(monkeypatch)
    seed, report = next(
        (seed, report) for seed in range(300, 320) for report in [run_seed(seed, 40)] if report.violations
    )
    kind = report.violations[0].kind
    smallest = minimise(seed, 40, None, [], kind)
    assert len(smallest.plan.numbers()) < 40
    assert kind in {each.kind for each in smallest.report.violations}
    assert smallest.command.startswith(f"tiertree simulate --seed {seed} --requests 40")
    assert smallest.report.lines[-1].endswith(f"violation: {kind}")


# -- with and without storage -------------------------------------------------------------------------


def test_a_broken_storage_costs_no_more_than_deadlines() -> None:
    asked = 0
    for seed in range(4):
        pair = comparing.compare(seed, 20)
        assert not pair.without.violations + pair.broken.violations, f"seed {seed}"
        assert len(pair.slower_s) == 20
        assert not pair.over, f"seed {seed}: {pair.over} over {pair.deadline_s}"
        asked += pair.broken.operations.get("query", 0)
    assert asked > 30, "storage was hardly asked"


def test_waiting_too_long_for_storage_is_found_out(monkeypatch: Patch) -> None:
    monkeypatch.setattr("tiertree.cache.patience_seconds", lambda *rule: 2.9)
    monkeypatch.setattr(comparing, "deadline_seconds", lambda config: 1.0)
    assert patience.patience_seconds is not None
    assert any(comparing.compare(seed, 20).over for seed in range(6))
