"""Do the tests notice? Plants one small fault at a time in the code and sees whether a test fails.

    this process: imports torch, numpy, hypothesis, pytest, but nothing of tiertree
       │ fork, one child per area
       ├──▶ survey: every statement leaves a mark; which test runs which, and how long does it take?
       │ fork, one child per mutant
       └──▶ one module of tiertree is made from a changed syntax tree; runs the tests that run the changed
            statement, the quick ones first, up to the first failure; no file is ever changed

    killed       a test failed
    timed out    a test used far more time than any does: the fault makes something endless
    survived     all tests passed, or none runs that line: a hole, or a change that makes no difference

    python tests/mutants.py --sample 500 --seed 1 --jobs 2

The sample takes files in proportion to what can be changed in them, and a few of each. `--again` takes
those that survived according to an earlier report, to see whether new tests find them. Of a test with many
parameters a mutant meets a few: what survives the sample may still fall with `--variants 0`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutations
from mutants_child import Area, be_tested, survey
from mutations import Mutation

LEAST_PER_FILE = 4
DISK = (
    "disk",
    "writer",
    "recover",
    "reclaimer",
    "segment",
    "reader",
    "index",
    "format",
    "lock",
    "files",
    "page",
)

AREAS = (
    Area(
        "tree",
        ("tree", "components"),
        (),
        "ledger tree api api_errors api_insert events executor persist load_back prefetch policies promises "
        "weather faults components kinds kinds_attacks kinds_attacks_room kinds_bytes kinds_errors "
        "kinds_random kinds_tiers hard_case_1 hard_case_2 hard_case_3 hard_case_4 hard_case_5 "
        "state_machine breaker stuck conformance mutants_tree mutants_room",
    ),
    Area(
        "disk",
        (),
        tuple(f"storage/{name}.py" for name in DISK),
        "disk_format memory_storage disk disk_races disk_faults disk_full disk_rot disk_crash mutants_disk",
    ),
)


# -- all of them -----------------------------------------------------------------------------------


@dataclass
class Verdict:
    """What became of one mutant: "killed", "timed out" or "survived", by which test, after how long."""

    mutation: Mutation
    tests: dict[str, float]
    outcome: str = ""
    by: str = ""
    seconds: float = 0.0


class Survey:
    """Which tests of an area run which statements. Of a test with many parameters a mutant meets
    `variants_max` (0: all), the quickest."""

    def __init__(self, area: Area, variants_max: int) -> None:
        self.variants_max = variants_max
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            home = Path(folder)
            pid = fork(lambda: survey(area, home))
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            if status:
                log = (home / "log").read_text()
                sys.exit(f"{log}\nthe tests of {area.name} fail without any fault ({status})")
            found = json.loads((home / "survey").read_text())
        self.first: dict[str, int] = found["first"]
        self.always = set(found["always"])
        self.tests = {
            name: (seconds, set(marks))
            for name, (seconds, marks) in sorted(found["tests"].items(), key=lambda each: each[1][0])
        }

    def tests_of(self, mutation: Mutation) -> dict[str, float]:
        """The tests that run the changed statement, the quickest first, each with its seconds."""
        number = self.first[mutation.path] + mutation.statement
        everywhere = mutation.statement < 0 or number in self.always
        chosen: dict[str, float] = {}
        variants: Counter[str] = Counter()
        for name, (seconds, marks) in self.tests.items():
            function = name.split("[")[0]
            if (everywhere or number in marks) and not 0 < self.variants_max <= variants[function]:
                variants[function] += 1
                chosen[name] = seconds
        return chosen


def fork(live: Callable[[], int]) -> int:
    """A child whose exit status is what `live` returns."""
    sys.stdout.flush()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = live()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return pid


class Children:
    """At most `jobs` children at a time."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self.homes = Path(tempfile.mkdtemp(prefix="mutants-"))
        self.alive: dict[int, tuple[Verdict, Path]] = {}

    def start(self, verdict: Verdict) -> None:
        """Fork a child for what `verdict` is about."""
        home = Path(tempfile.mkdtemp(dir=self.homes))
        pid = fork(lambda: be_tested(verdict.mutation, verdict.tests, home))
        self.alive[pid] = (verdict, home)

    def wait(self) -> Verdict:
        """The next one that is over."""
        pid, status, usage = os.wait4(-1, 0)
        verdict, home = self.alive.pop(pid)
        with contextlib.suppress(OSError):
            os.killpg(pid, signal.SIGKILL)
        verdict.seconds = round(usage.ru_utime + usage.ru_stime, 2)
        code = os.waitstatus_to_exitcode(status)
        late = code in (-signal.SIGPROF, -signal.SIGALRM)
        verdict.outcome = "timed out" if late else "killed" if code else "survived"
        failed = home / "failed"
        verdict.by = failed.read_text() if failed.exists() else f"exit status {code}" if code else ""
        shutil.rmtree(home, ignore_errors=True)
        return verdict

    def run(self, verdicts: Sequence[Verdict]) -> None:
        """Bring every one of `verdicts` to its end, and say how it goes."""
        began, over = time.monotonic(), 0
        for verdict in verdicts:
            if not verdict.tests:
                verdict.outcome, verdict.by = "survived", "no test runs this"
                over += tell(verdict, over, len(verdicts), began)
                continue
            if len(self.alive) == self.jobs:
                over += tell(self.wait(), over, len(verdicts), began)
            self.start(verdict)
        while self.alive:
            over += tell(self.wait(), over, len(verdicts), began)
        shutil.rmtree(self.homes, ignore_errors=True)


def tell(verdict: Verdict, over: int, total: int, began: float) -> int:
    """One line about one that is over; returns 1, to be counted."""
    seconds = time.monotonic() - began
    what = f"{verdict.seconds:6.1f} s  {verdict.outcome:9}  {verdict.mutation}"
    print(f"{over + 1:5}/{total} {seconds:6.0f} s {what}", file=sys.stderr, flush=True)
    return 1


# -- which, and what came of it --------------------------------------------------------------------


def sampled(found: dict[str, list[Mutation]], size: int, rng: random.Random) -> list[Mutation]:
    """`size` of all mutations (0: all): of each file in proportion to what can be changed in it, and at
    least a few. In random order."""
    total = sum(map(len, found.values()))
    if not size or size >= total:
        chosen = [each for of_file in found.values() for each in of_file]
    else:
        chosen, spare = [], []
        for of_file in found.values():
            shuffled = rng.sample(of_file, len(of_file))
            count = max(min(LEAST_PER_FILE, len(of_file)), size * len(of_file) // total)
            chosen += shuffled[:count]
            spare += shuffled[count:]
        chosen = rng.sample(chosen, min(len(chosen), size))
        chosen += rng.sample(spare, max(0, size - len(chosen)))
    rng.shuffle(chosen)
    return chosen


def table(verdicts: Iterable[Verdict]) -> str:
    """Per file how many mutants there were and what became of them, and every one that was not killed."""
    rows: dict[str, list[Verdict]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.mutation.path, []).append(verdict)
    lines = [f"{'file':32} mutants  killed  timed out  survived"]
    everything = [each for of_file in rows.values() for each in of_file]
    for path, of_file in [*sorted(rows.items()), ("all", everything)]:
        outcomes = [verdict.outcome for verdict in of_file]
        killed, late, alive = (outcomes.count(each) for each in ("killed", "timed out", "survived"))
        lines.append(f"{path:32} {len(of_file):7} {killed:7} {late:10} {alive:9}")
    for outcome in ("timed out", "survived"):
        lines += ["", f"{outcome}:"]
        found = [each for each in everything if each.outcome == outcome]
        lines += sorted(f"  {each.mutation}  {each.by and f'[{each.by}]'}".rstrip() for each in found)
    return "\n".join(lines)


def report(verdicts: Iterable[Verdict], options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """The whole run, for a machine."""
    mutants = [
        {
            "path": each.mutation.path,
            "line": each.mutation.line,
            "before": each.mutation.before,
            "after": each.mutation.after,
            "outcome": each.outcome,
            "by": each.by,
            "seconds": each.seconds,
        }
        for each in verdicts
    ]
    return {"seed": options.seed, "sample": options.sample, "seconds": round(seconds), "mutants": mutants}


def wanted(options: argparse.Namespace) -> list[Verdict]:
    """The mutants that the command line asks for, and the tests for each."""
    found: dict[str, list[Mutation]] = {}
    surveys: dict[str, Survey] = {}
    for area in AREAS:
        sources = {path: text for path, text in area.sources().items() if options.file in path}
        if sources and options.area in ("all", area.name):
            found |= {path: mutations.mutations(path, text) for path, text in sources.items()}
            surveys |= dict.fromkeys(sources, Survey(area, options.variants))
    chosen = sampled(found, options.sample, random.Random(options.seed))
    if options.again:
        before = json.loads(Path(options.again).read_text())["mutants"]
        chosen = [each for m in before if m["outcome"] == "survived" for each in same(m, found)]
    return [Verdict(mutation, surveys[mutation.path].tests_of(mutation)) for mutation in chosen]


def same(mutant: dict[str, Any], found: dict[str, list[Mutation]]) -> list[Mutation]:
    """That mutant of an earlier report, at the nearest line if the file has changed since; none if it is
    gone."""
    alike = [
        each
        for each in found.get(mutant["path"], ())
        if (each.before, each.after) == (mutant["before"], mutant["after"])
    ]
    return sorted(alike, key=lambda each: abs(each.line - mutant["line"]))[:1]


def main() -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=500, help="how many mutants; 0: all (500)")
    parser.add_argument("--seed", type=int, default=1, help="which ones (1)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    parser.add_argument("--area", choices=["all", *(area.name for area in AREAS)], default="all")
    parser.add_argument("--file", default="", help="only files whose path has this in it")
    parser.add_argument("--variants", type=int, default=6, help="of one test at most; 0: all (6)")
    parser.add_argument("--again", metavar="FILE.json", help="those that survived in this report")
    parser.add_argument("--json", metavar="FILE.json", help="write the report here")
    options = parser.parse_args()
    verdicts = wanted(options)
    began = time.monotonic()
    Children(options.jobs).run(verdicts)
    seconds = time.monotonic() - began
    if options.json:
        Path(options.json).write_text(json.dumps(report(verdicts, options, seconds), indent=1))
    print(f"{len(verdicts)} mutants, seed {options.seed}, {seconds:.0f} s, {options.jobs} at a time\n")
    print(table(verdicts))
    sys.exit(any(verdict.outcome == "survived" for verdict in verdicts))


if __name__ == "__main__":
    main()
