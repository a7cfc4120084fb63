"""Chats: what users say, closed-loop clients against a made-up engine, plain transformers, the tables."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from tiertree import ConfigError
from tiertree.chat import Course, Served, Workload, converse, first_difference
from tiertree.chat.clients import ConversationFailed, Namespace, alone, apart, together
from tiertree.chat.plain import PlainEngine
from tiertree.chat.runs import Setting
from tiertree.chat.show import Lines, LiveBoard, side_by_side, verdict
from tiertree.engines.hf import tiny
from tiertree.engines.request import Cached, Finish, Reply, Request

SMALL = Workload(users=3, turns=3, system_tokens=5, turn_tokens=4, answer_tokens=2, vocab=100)


class Echo:
    """One token per step for the oldest request, each step a second; an answer is a function of the prompt.
    What was asked before in the same namespace counts as on device."""

    def __init__(self, finish: Finish = Finish.LENGTH) -> None:
        self.now = 0.0
        self.idle = False
        self.finish = finish
        self.slept = 0
        self.asked: list[Request] = []
        self.most = 0
        self._serving: list[Reply] = []
        self._known: dict[str, list[list[int]]] = {}

    def clock(self) -> float:
        return self.now

    def submit(self, request: Request) -> Reply:
        reply = Reply(request, len(self.asked), arrived=self.now)
        self.asked.append(request)
        self._serving.append(reply)
        self.most = max(self.most, len(self._serving))
        return reply

    def step(self) -> list[Reply]:
        self.idle = not self.idle  # every second step there is nothing to do
        if self.idle:
            return []
        self.now += 1
        reply = self._serving[0]
        request = reply.request
        if not reply.tokens:
            prompt, known = list(request.tokens), self._known.setdefault(request.namespace, [])
            reply.cached = Cached(device=max((common(prompt, each) for each in known), default=0))
            known.append(prompt)
            reply.first_token = self.now
        reply.tokens.append(zlib.crc32(repr((request.tokens, reply.tokens)).encode()) % SMALL.vocab)
        if len(reply.tokens) == request.max_new_tokens:
            reply.finish, reply.finished, reply.error = self.finish, self.now, "the stub says so"
            self._serving.pop(0)
        return [reply]

    def wait(self, seconds: float) -> None:
        assert self.idle
        assert seconds > 0
        self.slept += 1


def common(one: list[int], other: list[int]) -> int:
    """Length of the common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(other))


def echoed(
    workload: Workload = SMALL,
    parallel: int | None = None,
    namespace: Namespace = together,
    watch: Callable[[Course, int], None] | None = None,
) -> tuple[Course, Echo]:
    """The course of `workload` at an engine that echoes, and that engine."""
    engine = Echo()
    course = converse(
        workload, engine, parallel=parallel, namespace=namespace, watch=watch, clock=engine.clock
    )
    return course, engine


# -- what users say -----------------------------------------------------------------------------------


def test_equal_arguments_say_the_same() -> None:
    again = replace(SMALL)
    assert SMALL.prompt(1, [[7, 8]]) == again.prompt(1, [[7, 8]])
    for other in (replace(SMALL, seed=1), replace(SMALL, vocab=99)):
        assert other.prompt(1, []) != SMALL.prompt(1, [])
        assert all(0 <= token < other.vocab for token in other.prompt(1, []))
    assert SMALL.said(0, 1) != SMALL.said(1, 1) != SMALL.said(1, 2)


def test_a_prompt_is_all_that_was_said_so_far() -> None:
    first, second = SMALL.prompt(2, []), SMALL.prompt(2, [[7, 8]])
    assert first[:5] == SMALL.prompt(0, [])[:5]
    assert first[5:] == SMALL.said(2, 1)
    assert second == [*first, 7, 8, *SMALL.said(2, 2)]
    assert [len(SMALL.prompt(2, [[7, 8]] * turn)) for turn in range(3)] == [9, 15, 21]
    assert [SMALL.prompt_tokens(turn) for turn in (1, 2, 3)] == [9, 15, 21]
    assert (SMALL.requests, SMALL.longest) == (9, 23)


def test_shared_pages_are_counted_once() -> None:
    assert SMALL.pages(1) == 5 + 3 * 18
    assert SMALL.pages(4) == 1 + 3 * (6 - 1)
    assert Workload().pages(16) == 32 + 8 * 4 * 34


@pytest.mark.parametrize("wrong", [{"users": 0}, {"turns": 0}, {"answer_tokens": 0}, {"seed": -1}])
def test_what_cannot_be_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        replace(SMALL, **wrong)


# -- clients ------------------------------------------------------------------------------------------


def test_the_next_turn_contains_the_answer() -> None:
    course, engine = echoed()
    assert len(engine.asked) == len(course.served) == SMALL.requests
    answers = course.answers
    for user in range(SMALL.users):
        for turn in range(1, SMALL.turns + 1):
            before = [answers[user, each] for each in range(1, turn)]
            assert SMALL.prompt(user, before) in [request.tokens for request in engine.asked]
    assert {len(each.answer) for each in course.served} == {SMALL.answer_tokens}
    assert engine.slept > 0


def test_times_are_those_of_the_engine() -> None:
    course, engine = echoed()
    by_order = [(each.user, each.turn, each.ttft, each.seconds) for each in course.served[:4]]
    assert by_order == [(0, 1, 1, 2), (1, 1, 3, 4), (2, 1, 5, 6), (0, 2, 5, 6)]
    assert course.seconds == engine.now == 18
    assert course.mean_ttft(1, 1) == 3
    assert course.mean_ttft(2) == 5
    assert (course.ttft(0.5, 1, 1), course.ttft(0.99, 1, 1)) == (3, 5)
    assert course.throughput == 1
    assert Course().mean_ttft() is Course().ttft(0.5) is None


def test_at_most_so_many_are_in_flight_and_the_first_to_wait_goes_first() -> None:
    course, engine = echoed(parallel=2)
    assert engine.most == 2
    assert [(each.user, each.turn) for each in course.served[:5]] == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 2)]
    assert echoed()[1].most == SMALL.users


@pytest.mark.parametrize(
    ("namespace", "cached"), [(apart, 0), (alone, 3 * (9 + 15)), (together, 3 * (9 + 15) + 2 * 5)]
)
def test_who_shares_with_whom(namespace: Namespace, cached: int) -> None:
    course, _ = echoed(namespace=namespace)
    assert course.cached() == Cached(device=cached)
    assert course.hit_rate() == cached / (3 * (9 + 15 + 21))
    assert course.answers == echoed()[0].answers


def test_a_request_that_fails_ends_the_conversation() -> None:
    with pytest.raises(ConversationFailed, match="user 1, turn 1: ended by error: the stub says so"):
        converse(SMALL, Echo(Finish.ERROR))


def test_a_course_survives_json() -> None:
    course, _ = echoed()
    text = json.dumps([each.plain() for each in course.served])
    assert [Served.read(each) for each in json.loads(text)] == course.served


def test_a_setting_survives_json() -> None:
    setting = Setting(workload=SMALL, parallel=2, page_size=8)
    assert Setting.read(json.loads(json.dumps(setting.plain()))) == setting
    whole = Setting()
    assert (whole.all_pages, whole.device_pages) == (1120, 280)
    assert Setting(workload=SMALL, page_size=1).device_pages == 24


# -- plain transformers -------------------------------------------------------------------------------


def test_a_kept_cache_answers_as_a_new_one_does() -> None:
    model = tiny("llama", vocab_size=SMALL.vocab)
    new, kept = PlainEngine(model), PlainEngine(model, keep=True)
    recomputed = converse(SMALL, new, namespace=alone)
    continued = converse(SMALL, kept, namespace=alone)
    assert continued.answers == recomputed.answers
    assert recomputed.cached().total == 0
    # The last token of an answer was never the input of anything, so it is computed with the next turn.
    assert continued.cached() == Cached(device=3 * ((9 + 1) + (15 + 1)))
    assert not new.busy
    assert new.step() == []


def test_a_kept_cache_of_something_else_is_not_used() -> None:
    engine = PlainEngine(tiny("llama"), keep=True)
    for tokens in ([1, 2, 3, 4], [1, 2, 9, 4, 5, 6]):
        reply = engine.submit(Request(tokens=tokens, max_new_tokens=2, stop=()))
        while engine.busy:
            engine.step()
    assert reply.cached == Cached()
    assert reply.finish is Finish.LENGTH
    stopped = engine.submit(Request(tokens=[1, 2, 9, 4, 5, 6], max_new_tokens=9, stop=[reply.tokens[0]]))
    while engine.busy:
        engine.step()
    assert (stopped.finish, stopped.tokens) == (Finish.STOP, reply.tokens[:1])


# -- tables -------------------------------------------------------------------------------------------


def printed(thing: object) -> str:
    """What a wide terminal shows."""
    paper = StringIO()
    Console(file=paper, width=120).print(thing)
    return paper.getvalue()


def test_all_runs_stand_side_by_side() -> None:
    courses = {"slow": echoed(namespace=apart)[0], "fast": echoed()[0]}
    courses["fast"].served = [replace(each, ttft=each.ttft / 10) for each in courses["fast"].served]
    rows = {
        line[:26].strip(): line[26:].split() for line in printed(side_by_side(SMALL, courses)).splitlines()
    }
    assert rows["turn 1"] == ["3.00", "s", "300", "ms"]
    assert rows["from turn 2 on"] == ["5.00", "s", "500", "ms"]
    assert rows["… beside slow"] == ["1.00", "0.10"]
    assert rows["from device"] == ["0", "82"]
    assert rows["computed"] == ["135", "53"]
    assert rows["seconds"] == ["18.0", "18.0"]


def test_one_turn_has_no_later_ones() -> None:
    workload = replace(SMALL, turns=1)
    assert "from turn 2 on" not in printed(side_by_side(workload, {"slow": echoed(workload)[0]}))


def test_equal_answers_are_told_from_others() -> None:
    one, two = echoed()[0], echoed(namespace=apart)[0]
    assert verdict({"slow": one, "fast": two}) == (True, "identical tokens: yes (18 in each run)")
    at = next(i for i, each in enumerate(two.served) if (each.user, each.turn) == (1, 2))
    first, last = two.served[at].answer
    two.served[at] = replace(two.served[at], answer=(first, last + 1))
    line = f"user 2, turn 2, token 2: {last} slow, {last + 1} fast"
    assert verdict({"slow": one, "fast": two}) == (False, f"identical tokens: no ({line})")
    two.served[at] = replace(two.served[at], answer=(first,))
    assert first_difference(("slow", "fast"), (one, two)) == "user 2, turn 2: 2 tokens slow, 1 fast"
    del two.served[at]
    assert first_difference(("slow", "fast"), (one, two)) == "user 2, turn 2: answered slow only"
    assert first_difference(("fast", "slow"), (two, one)) == "user 2, turn 2: answered slow only"


def test_lines_tell_each_quarter() -> None:
    lines: list[str] = []
    with Lines(lines.append, SMALL) as board:
        for name in ("slow", "fast"):
            echoed(watch=board.watch(name))
    assert len(lines) == 8
    assert lines[0] == (
        "slow: 3 of 9 answered in 6.0 s, first token after 3.00 s; device 37%  host 0%  disk 0%  computed 63%"
    )
    assert lines[-1].startswith("fast: 9 of 9 answered in 18.0 s, first token after ")


def test_a_terminal_sees_all_runs_grow() -> None:
    screen = StringIO()
    with LiveBoard(Console(file=screen, force_terminal=True, width=140), SMALL, ("slow", "fast")) as board:
        echoed(watch=board.watch("slow"))
    said = screen.getvalue()
    for words in ("slow", "fast", "0 of 9", "9 of 9", "turn 3", "3.00 s", "device", "computed", "61%"):
        assert words in said
