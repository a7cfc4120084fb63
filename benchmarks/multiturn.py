"""Time to first token and hit rate of multi-turn chats, per turn, for every way to keep what was computed.

    python benchmarks/multiturn.py --vllm venvs/vllm/bin/python      # with vLLM where it is installed

Closed-loop clients: every user says the next thing as soon as the answer is complete, and a prompt is
all that was said so far behind a system prompt that all share. The model is a Llama with random weights.

    no cache             plain transformers, a DynamicCache made anew for each request
    DynamicCache each    plain transformers, one cache kept per conversation, without bound
    recomputed           tiertree's engine, every request in a namespace of its own
    device               tiertree, a device that holds a fourth of all pages
    + host, + disk       and a host that holds all; and a disk
    after a restart      a new process on that disk
    vllm                 its prefix cache on CPU, as many tokens on device as tiertree has
    vllm, all on device  the same with room for everything

Plain transformers serve one request at a time, engines all of them together. The second part asks what
tiers cost where nothing is ever asked twice: all users' first turns, each in a namespace of its own, on
device, host and disk beside the device alone, in alternated pairs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import process_time
from typing import Any

import common
from common import Result, Spread

TARGETS = {"+ disk": 4.0, "after a restart": 1 / 0.35}
"""Recomputed time to first token from turn 2 on / theirs, on the workload of `tiertree demo`."""
COST_TARGET = 1 / 1.05
VLLM = "TIERTREE_VLLM_PYTHON"
VLLM_BLOCK = 32

Side = tuple[str, Callable[[], Any]]


class Chats:
    """One workload, one model, and the sides that serve it."""

    def __init__(self, setting: Any, vllm: Path | None) -> None:
        self.setting = setting
        self.vllm = vllm
        self.model = setting.model()

    def plain(self, keep: bool, workload: Any = None) -> Any:
        """transformers by itself."""
        from tiertree.chat import clients, plain

        engine = plain.PlainEngine(self.model, keep)
        who = clients.alone if keep else clients.apart
        return clients.converse(
            workload or self.setting.workload, engine, parallel=self.setting.parallel, namespace=who
        )

    def engine(self, config: Any, share: bool, setting: Any = None) -> tuple[Any, float]:
        """tiertree's engine; also the CPU seconds of all threads until everything was where it belongs."""
        from tiertree.chat import clients
        from tiertree.engines.hf import HFEngine

        chosen = setting or self.setting
        who = clients.together if share else clients.apart
        engine = HFEngine(self.model, config, chosen.limits)
        begin = process_time()
        try:
            course = clients.converse(chosen.workload, engine, parallel=chosen.parallel, namespace=who)
        finally:
            engine.close(deadline_s=60)
        return course, process_time() - begin

    def sides(self, directory: str) -> list[Side]:
        """What serves the workload; the last two of tiertree's belong together, by `directory`."""
        from tiertree.chat.runs import restarted

        setting, model = self.setting, self.model
        found: list[Side] = [
            ("no cache", lambda: self.plain(keep=False)),
            ("DynamicCache each", lambda: self.plain(keep=True)),
            ("recomputed", lambda: self.engine(setting.device_alone(model), share=False)[0]),
            ("device", lambda: self.engine(setting.tiers(model, host=False), share=True)[0]),
            ("+ host", lambda: self.engine(setting.tiers(model), share=True)[0]),
            ("+ disk", lambda: self.engine(setting.tiers(model, directory=directory), share=True)[0]),
            ("after a restart", lambda: restarted(setting, directory)),
        ]
        if self.vllm is not None:
            found.append(("vllm", lambda: self.ask_vllm(setting.device_pages)))
            found.append(("vllm, all on device", lambda: self.ask_vllm(2 * setting.all_pages)))
        return found

    def ask_vllm(self, pages: int) -> Any:
        """vLLM in an environment and a process of its own, with as many blocks as have these tokens."""
        from tiertree.chat import Course, Served

        blocks = -(-pages * self.setting.page_size // VLLM_BLOCK) + 1  # it keeps one for itself
        with tempfile.TemporaryDirectory(prefix="tiertree-vllm-") as folder:
            self.model.save_pretrained(folder)
            asked = {**self.setting.plain(), "model": folder, "blocks": blocks, "block": VLLM_BLOCK}
            done = subprocess.run(
                [str(self.vllm), str(Path(__file__).parent / "multiturn_vllm.py"), json.dumps(asked)],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(common.ROOT / "src")},
            )
        said = json.loads(done.stdout.splitlines()[-1])
        return Course([Served.read(each) for each in said["served"]], said["seconds"])


def show(workload: Any, courses: dict[str, Any]) -> None:
    """Every turn of every side."""
    print(f"\n  {'':21}{'turn':>6}{'mean':>9}{'p50':>9}{'p99':>9}  ms{'hit rate':>10}")
    for name, course in courses.items():
        spans = [(str(turn), turn, turn) for turn in range(1, workload.turns + 1)]
        for title, first, last in [*spans, ("2 on", 2, workload.turns)][: workload.turns + 1]:
            if course.of(first, last):
                times = [course.mean_ttft(first, last), *(course.ttft(q, first, last) for q in (0.5, 0.99))]
                columns = "".join(f"{1000 * each:9.0f}" for each in times)
                print(f"  {name:21}{title:>6}{columns}{course.hit_rate(first, last):14.3f}")
                name = ""
        print(f"  {'':21}{course.seconds:.1f} s, {course.throughput:.1f} tokens/s", flush=True)


def compare_turns(chats: Chats, rounds: int, judged: bool, report: dict[str, Any]) -> list[Result]:
    """All sides serve the workload in turn, `rounds` times; prints the last round."""
    from tiertree.chat import first_difference

    ratios: dict[str, list[float]] = {}
    for number in range(rounds):
        courses: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="tiertree-multiturn-") as directory:
            sides = chats.sides(directory)
            order = sides if number % 2 == 0 else [*sides[5:], *sides[:5]]
            for name, serve in order:
                courses[name] = serve()
        courses = {name: courses[name] for name, _ in sides}
        show(chats.setting.workload, courses)
        report.setdefault("rounds", []).append(
            {name: [each.plain() for each in course.served] for name, course in courses.items()}
        )
        base = courses["recomputed"].mean_ttft(2)
        for name, course in courses.items():
            if base is not None and name != "recomputed":
                ratios.setdefault(name, []).append(base / course.mean_ttft(2))
        for name, course in courses.items():
            if (found := first_difference(("no cache", name), (courses["no cache"], course))) is not None:
                print(f"  other tokens, {found}")
    return [
        Result(
            f"recomputed / {name}, from turn 2 on", Spread.of(found), TARGETS.get(name) if judged else None
        )
        for name, found in ratios.items()
    ]


def compare_costs(chats: Chats, pairs: int, report: dict[str, Any]) -> list[Result]:
    """Prompts that nobody asks twice: what host and disk cost."""
    from tiertree import HostConfig

    once = replace(chats.setting, workload=replace(chats.setting.workload, turns=1))
    model = chats.model
    alone = once.device_alone(model).device
    twice = HostConfig(size=2 * once.device_alone(model).device_pages)
    times: dict[str, list[float]] = {}

    def device() -> None:
        course, cpu = chats.engine(once.device_alone(model), share=False, setting=once)
        times.setdefault("device alone", []).append(course.seconds)
        times.setdefault("device alone, CPU", []).append(cpu)

    def tiers() -> None:
        with tempfile.TemporaryDirectory(prefix="tiertree-multiturn-") as directory:
            config = replace(once.tiers(model, directory=directory), device=alone, host=twice)
            course, cpu = chats.engine(config, share=False, setting=once)
        times.setdefault("three tiers", []).append(course.seconds)
        times.setdefault("three tiers, CPU", []).append(cpu)

    def plain() -> None:
        times.setdefault("plain", []).append(chats.plain(False, once.workload).seconds)

    for turn in range(pairs):
        for run in common.rotated([device, tiers, plain], turn):
            run()
    report["costs"] = times
    compared = (
        ("device alone", "three tiers", COST_TARGET),
        ("device alone, CPU", "three tiers, CPU", None),
        ("plain", "three tiers", None),
    )
    return [
        Result(
            f"no reuse: {reference} / {ours}",
            Spread.of([a / b for a, b in zip(times[reference], times[ours], strict=True)]),
            target,
        )
        for reference, ours, target in compared
    ]


def vllm_python(named: Path | None) -> Path | None:
    """vLLM's Python; says why there is none."""
    path = named or (Path(os.environ[VLLM]) if os.environ.get(VLLM) else None)
    if path is None:
        print(f"vllm: skipped, no Python that has it (--vllm or ${VLLM})")
        return None
    probe = subprocess.run([str(path), "-c", "import vllm"], capture_output=True, text=True)
    if probe.returncode:
        print(f"vllm: skipped, {path} cannot import it: {probe.stderr.strip().splitlines()[-1:]}")
        return None
    return path


def flags(parser: Any) -> None:
    """The options of this benchmark."""
    parser.set_defaults(seed=0)
    parser.add_argument("--clients", type=int, help="conversations, all at once (8)")
    parser.add_argument("--parallel", type=int, help="requests in flight at most (one of every client)")
    parser.add_argument("--turns", type=int, help="of each conversation (4)")
    parser.add_argument("--system-tokens", type=int, help="of the prompt that all share (512)")
    parser.add_argument("--turn-tokens", type=int, help="that a user says at each turn (512)")
    parser.add_argument("--answer-tokens", type=int, help="of each answer (32)")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1, help="how often all sides serve the chats")
    parser.add_argument("--parts", choices=("all", "turns", "costs"), default="all")
    parser.add_argument("--vllm", type=Path, metavar="PYTHON", help=f"of an environment with vLLM (${VLLM})")


def main() -> None:
    options = common.parse_arguments(__doc__, flags)
    report: dict[str, Any] = {"environment": common.print_environment()}
    try:
        from tiertree.chat.runs import Setting
    except ModuleNotFoundError as missing:
        print(f"skipped: {missing} (pip install 'tiertree[hf]')", file=sys.stderr)
        return
    from tiertree.chat import Workload

    small = {"users": 4, "turns": 2, "system_tokens": 128, "turn_tokens": 128, "answer_tokens": 8}
    given = {
        "users": options.clients,
        **{name: getattr(options, name) for name in small if name != "users"},
    }
    chosen = (small if options.quick else {}) | {k: v for k, v in given.items() if v is not None}
    workload = Workload(**chosen, seed=options.seed)
    setting = Setting(workload=workload, parallel=options.parallel, page_size=options.page_size)
    print(f"{workload}; {setting.all_pages} pages in the end, {setting.device_pages} of them on device")
    chats = Chats(setting, vllm_python(options.vllm))
    results: list[Result] = []
    if options.parts != "costs":
        judged = setting == Setting()
        results += compare_turns(chats, options.rounds, judged, report)
    if options.parts != "turns":
        results += compare_costs(chats, options.pairs, report)
    print()
    for result in results:
        print(f"  {result.what:<46} {result.ratio!s:<36} {result.verdict()}")
    common.closing(results)
    report |= {"setting": setting.plain(), "results": [result.plain() for result in results]}
    common.write_json(options.json, report)


if __name__ == "__main__":
    main()
