"""The reference engine: chunks, batches, requests that come and go, stop rules, sharing, refusals."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import HIDDEN, PAGE, VOCAB, Bench, FakeRunner, answer, make_config, prompt, sized

from tiertree import MAMBA, SWA, LoadBackConfig, Mamba, PrefixCache, SlidingWindow
from tiertree.engines.engine import Engine
from tiertree.engines.request import (
    InvalidRequest,
    Limits,
    Overloaded,
    Reply,
    Request,
    Sampling,
    Span,
)
from tiertree.engines.row import Row
from tiertree.types import ConfigError, InvalidNamespace

WINDOW = sized(SlidingWindow(window=7), 24, 48)
STATE = sized(Mamba(), 16, 32)
each_model = pytest.mark.parametrize(
    "kinds", [(), (WINDOW,), (STATE,), (WINDOW, STATE)], ids=["full", "window", "state", "all"]
)
WARM = Sampling(temperature=1.0)


def starts(bench: Bench) -> list[list[tuple[int, int]]]:
    """The passes since the last look."""
    passes, bench.runner.passes = bench.runner.passes, []
    return passes


# -- chunks and batches ---------------------------------------------------------------------------


@each_model
def test_a_prompt_is_computed_in_chunks_and_then_token_by_token(kinds: Any) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        reply = bench.say(prompt(1, 21), 2)
        rest = [[(16, 4)], [(20, 1)]] if STATE in kinds else [[(16, 5)]]  # a state is saved at page 5
        assert starts(bench) == [[(0, 8)], [(8, 8)], *rest, [(21, 1)]]
        assert (reply.finish, len(reply.tokens), reply.cached.total) == ("length", 2, 0)


@each_model
def test_a_chunk_is_shared_as_soon_as_it_is_computed(kinds: Any) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        tokens = prompt(2, 24)
        bench.submit(tokens)
        bench.step(2)
        late = bench.submit([*tokens[:16], 1, 2])
        bench.run()
        assert late.cached.device == 16


@each_model
def test_twins_are_computed_once(kinds: Any) -> None:
    """Admitted together, the second finds what the first has computed when its turn comes."""
    with Bench(make_config(kinds=kinds)) as bench:
        twins = [bench.submit(prompt(2, 40), 1) for _ in range(2)]
        bench.run()
        assert [each.cached.device for each in twins] == [0, 36]
        assert bench.runner.computed == 80 - 36


def test_a_twin_that_cannot_be_loaded_is_computed_and_no_oftener() -> None:
    """What the cache has of it on host is refused, and where it is its state is not kept."""
    state = sized(Mamba(grid_tokens=2 * PAGE), 8, 16)
    refusing = LoadBackConfig(min_tokens=1000)
    with Bench(make_config(kinds=(state,), load_back=refusing), {"chunk_tokens": PAGE}) as bench:
        bench.say(prompt(1, 40), 1)
        bench.evict()
        before = bench.runner.computed
        bench.say(prompt(1, 40), 1)
        assert bench.runner.computed == before + 40


@each_model
def test_requests_of_any_length_decode_together(kinds: Any) -> None:
    with Bench(make_config(80, kinds=kinds)) as bench:
        for number, length in enumerate((1, 3, 4, 10, 18, 30)):
            bench.submit(prompt(number, length), 6)
        bench.run()
        assert max(len(rows) for rows in bench.runner.passes) == 6
        together = [rows for rows in bench.runner.passes if len(rows) == 6]
        assert {start for start, _ in together[0]} == {1, 3, 4, 10, 18, 30}


def test_requests_join_and_leave_at_any_step() -> None:
    with Bench() as bench:
        replies = []
        for number in range(8):
            replies.append(bench.submit(prompt(number, 5 + number), 2 + number % 3))
            bench.step(2)
        bench.run()
        assert {reply.finish for reply in replies} == {"length"}
        assert max(len(rows) for rows in bench.runner.passes) > 1


def test_who_decodes_gets_a_token_after_every_burst_of_prompts() -> None:
    with Bench(limits={"burst_tokens": 16}) as bench:
        first = bench.submit(prompt(1, 4), 10)
        bench.until(lambda: first.first_token is not None)
        bench.submit(prompt(2, 64), 1)
        grown = []
        for _ in range(8):
            bench.step()
            grown.append(len(first.tokens))
        assert grown == [1, 2, 2, 3, 3, 4, 4, 5]
        bench.run()


def test_no_more_run_than_may() -> None:
    with Bench(limits={"max_running": 2}) as bench:
        for number in range(5):
            bench.submit(prompt(number, 4), 3)
        while bench.engine.busy:
            bench.step()
            assert bench.engine.running <= 2
        bench.verify()


def test_step_returns_who_has_grown_or_ended() -> None:
    with Bench() as bench:
        one, two = bench.submit(prompt(1, 4), 1), bench.submit(prompt(2, 12), 2)
        assert bench.step() == [one]
        assert bench.step() == []
        assert bench.step() == [two]
        assert (one.ttft, one.finished) == (0.0, 0.0)
        seen: list[Reply] = []
        bench.engine.run(seen.extend)
        assert seen == [two]
        assert two.finished is not None


# -- how an answer ends ---------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 5])
def test_an_answer_ends_at_its_length(count: int) -> None:
    with Bench() as bench:
        reply = bench.say(prompt(3, 6), count)
        assert (len(reply.tokens), reply.finish) == (count, "length")


@each_model
@pytest.mark.parametrize("at", [0, 1, 5])
def test_an_answer_ends_behind_a_stop_token(kinds: Any, at: int) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        asked = Request(tokens=prompt(1, 6), max_new_tokens=10)
        said = answer(asked)
        assert said[at] not in said[:at]
        reply = bench.say(prompt(1, 6), 10, stop=[VOCAB - 1, said[at]])
        assert (reply.tokens, reply.finish) == (said[: at + 1], "stop")


@each_model
@pytest.mark.parametrize("length", [5, 6, 7, 8])
def test_every_whole_page_of_an_answer_is_kept_its_last_token_too(kinds: Any, length: int) -> None:
    """One more pass completes the page when the last token is its last; nobody waits for it."""
    with Bench(make_config(kinds=kinds)) as bench:
        reply = bench.submit(prompt(4, length), 5)
        bench.until(lambda: reply.finish is not None)
        closing = (length + 5) % PAGE == 0
        assert bench.engine.busy == closing
        bench.run()
        later = bench.say([*prompt(4, length), *reply.tokens, 1, 2], 1)
        assert later.cached.device == (length + 5) // PAGE * PAGE


def test_seeds_repeat_whoever_else_is_served() -> None:
    sampling = Sampling(temperature=1.5, top_p=0.95, top_k=30, seed=9)
    with Bench() as bench:
        alone = bench.say(prompt(1, 9), 12, sampling=sampling).tokens
        assert bench.say(prompt(1, 9), 12, sampling=sampling).tokens == alone
        crowd = [bench.submit(prompt(number, 20), 12, sampling=WARM) for number in range(8)]
        again = bench.submit(prompt(1, 9), 12, sampling=sampling)
        bench.run()
        assert again.tokens == alone
        assert sum(each.preemptions for each in [again, *crowd]) > 0
        assert len({tuple(each.tokens) for each in crowd}) == 8


def test_without_a_seed_the_engine_gives_one() -> None:
    def said(seed: int) -> list[list[int]]:
        with Bench(limits={"seed": seed}) as bench:
            return [bench.say(prompt(1, 5), 9, sampling=WARM).tokens for _ in range(2)]

    one, two = said(1), said(2)
    assert one == said(1)
    assert one[0] != one[1]
    assert one[0] != two[0]


# -- who shares -----------------------------------------------------------------------------------


@each_model
def test_namespaces_never_share(kinds: Any) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        bench.say(prompt(1, 20), namespace="a")
        assert bench.say(prompt(1, 20), namespace="b").cached.total == 0
        assert bench.say(prompt(1, 20), namespace="a").cached.total == 16


@each_model
def test_images_share_when_they_are_the_same_and_not_when_they_differ(kinds: Any) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        tokens = prompt(1, 30)
        same, other = torch.ones(6, HIDDEN), torch.ones(6, HIDDEN)
        other[5, 1] = 2
        for vectors, hit in ((same, 0), (same, 28), (other, 8), (same.clone(), 28)):
            reply = bench.say(tokens, spans=(Span(start=10, vectors=vectors),))
            assert reply.cached.total == hit
        assert bench.say(tokens).cached.total == 8
        assert bench.runner.embedded > 0


def test_an_image_stands_for_itself_whatever_its_type_or_place() -> None:
    one = torch.ones(2, HIDDEN)
    units = Span(start=0, vectors=one).units()
    assert (units >> 62 == 1).all()
    assert len(set(units.tolist())) == 2
    assert (units == Span(start=5, vectors=one).units()).all()
    assert (units != Span(start=0, vectors=one.double()).units()).all()
    assert (units != Span(start=0, vectors=torch.ones(2, HIDDEN + 1)).units()).all()
    turned = torch.ones(HIDDEN, 2).T
    assert (units == Span(start=0, vectors=turned).units()).all()


# -- leaving --------------------------------------------------------------------------------------


@each_model
def test_an_abort_ends_a_request_wherever_it_is(kinds: Any) -> None:
    """Waiting, in its prompt, decoding: after so many steps."""
    for steps in range(9):
        with Bench(make_config(kinds=kinds), {"max_running": 2}) as bench:
            first, second = bench.submit(prompt(1, 17), 6), bench.submit(prompt(2, 9), 6)
            third = bench.submit(prompt(3, 9), 2)
            bench.step(steps)
            assert {each.finish for each in (first, second, third)} == {None}
            for each in (first, third):
                bench.engine.abort(each)
                bench.cache.check()
                assert each.finish == "abort"
                bench.engine.abort(each)
            bench.run()
            assert (second.finish, first.finish) == ("length", "abort")


def test_what_an_aborted_request_has_computed_stays() -> None:
    with Bench() as bench:
        reply = bench.submit(prompt(1, 20), 20)
        bench.until(lambda: len(reply.tokens) == 9)
        bench.engine.abort(reply)
        assert bench.say([*prompt(1, 20), *reply.tokens, 1]).cached.device == 28


def test_an_abort_of_an_answer_that_has_ended_changes_nothing() -> None:
    with Bench() as bench:
        reply = bench.submit(prompt(1, 6), 2)
        bench.until(lambda: reply.finish is not None)
        assert bench.engine.busy  # its last page is being completed
        bench.engine.abort(reply)
        assert reply.finish == "length"
        bench.run()
        assert bench.say([*prompt(1, 6), *reply.tokens, 1]).cached.device == 8


def test_abort_all_ends_everybody() -> None:
    with Bench(limits={"max_running": 2}) as bench:
        replies = [bench.submit(prompt(number, 6), 2 + number) for number in range(4)]
        bench.until(lambda: replies[0].finish is not None)
        bench.engine.abort_all()
        assert not bench.engine.busy
        assert [each.finish for each in replies] == ["length", "abort", "abort", "abort"]


# -- many at once, and one by one -----------------------------------------------------------------


def test_generate_takes_more_prompts_than_may_wait() -> None:
    with Bench(limits={"max_waiting": 2, "max_running": 3}) as bench:
        other = bench.submit(prompt(50, 9), 30)
        prompts = [prompt(number, 3 + number) for number in range(9)]
        replies = bench.engine.generate(prompts, 5, namespace="x", stop=[1])
        assert [each.request.tokens for each in replies] == prompts
        assert [each.tokens for each in replies] == [answer(each.request) for each in replies]
        assert other.finish == "length"
        assert bench.engine.generate([]) == []


def test_generate_refuses_before_anything_is_computed() -> None:
    with Bench() as bench:
        with pytest.raises(InvalidRequest, match=r"^tokens: "):
            bench.engine.generate([[1, 2], [VOCAB]])
        with pytest.raises(InvalidRequest, match=r"^adapter: "):
            bench.engine.generate([[1, 2]], adapter="x")
        assert not bench.engine.busy
        assert bench.runner.passes == []


def test_generate_leaves_nobody_behind_when_it_is_interrupted() -> None:
    with Bench() as bench:

        def interrupt(rows: Sequence[Row]) -> None:
            if len(bench.runner.passes) == 2:
                raise KeyboardInterrupt

        bench.runner.before = interrupt
        with pytest.raises(KeyboardInterrupt):
            bench.engine.generate([prompt(number, 9) for number in range(4)], 9)
        assert not bench.engine.busy


def test_a_stream_gives_tokens_as_they_come() -> None:
    with Bench() as bench:
        request = Request(tokens=prompt(1, 9), max_new_tokens=5)
        stream = bench.engine.stream(request)
        said = answer(request)
        for count, token in enumerate(stream, 1):
            assert token == said[count - 1]
            assert len(starts(bench)) == (2 if count == 1 else 1)
        bench.run()


def test_a_stream_that_is_closed_early_aborts() -> None:
    with Bench() as bench:
        stream = bench.engine.stream(Request(tokens=prompt(1, 9), max_new_tokens=50))
        next(stream)
        next(stream)
        stream.close()
        assert not bench.engine.busy


def test_streams_that_take_turns_lose_no_token() -> None:
    """While one is asked for its next token, all others grow."""
    with Bench() as bench:
        requests = [Request(tokens=prompt(number, 3), max_new_tokens=4 + 3 * number) for number in range(3)]
        streams = [bench.engine.stream(each) for each in requests]
        said = list(zip_longest(*streams))
        for number, request in enumerate(requests):
            assert [each[number] for each in said if each[number] is not None] == answer(request)
        bench.run()


def test_wait_ends_when_somebody_wakes_the_cache() -> None:
    with PrefixCache(make_config()) as cache:
        engine = Engine(cache, FakeRunner(cache), Limits(chunk_tokens=PAGE))
        waker = threading.Timer(0.01, cache.wake)
        waker.start()
        engine.wait(600)
        waker.join()
        cache.poll()
        engine.wait(0.001)
        assert engine.generate([[1, 2, 3]])[0].tokens == answer(Request(tokens=[1, 2, 3]))


# -- refusals -------------------------------------------------------------------------------------

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"tokens": []}, "tokens: there are none"),
    "no prompt, as an array": ({"tokens": np.empty(0, np.int64)}, "tokens: there are none"),
    "a token beyond the vocabulary": ({"tokens": [1, VOCAB]}, f"tokens: 1 to {VOCAB}; allowed: 0 to 39"),
    "a negative token": ({"tokens": [-1]}, "tokens: -1"),
    "a text": ({"tokens": "abc"}, "tokens: must be"),
    "floats": ({"tokens": [1.0]}, "tokens: must be"),
    "truths": ({"tokens": [True]}, "tokens: must be"),
    "a list of prompts": ({"tokens": [[1], [2]]}, "tokens: must be"),
    "a list of uneven prompts": ({"tokens": [[1], [2, 3]]}, "tokens: must be"),
    "a list of nothing": ({"tokens": [[]]}, "tokens: must be"),
    "an enormous token": ({"tokens": [1 << 70]}, "tokens: must be"),
    "nothing at all": ({"tokens": None}, "tokens: must be"),
    "a stop token beyond": ({"stop": [VOCAB]}, "stop: "),
    "a stop token alone": ({"stop": 3}, "stop: must be"),
    "no answer": ({"max_new_tokens": 0}, "max_new_tokens: 0"),
    "half an answer": ({"max_new_tokens": 1.5}, "max_new_tokens: 1.5"),
    "yes": ({"max_new_tokens": True}, "max_new_tokens: True"),
    "more than device": ({"tokens": [1] * 100, "max_new_tokens": 29}, "allowed: 128"),
    "an adapter": ({"adapter": "x"}, "adapter: 'x'"),
    "a flat span": ({"spans": (Span(start=0, vectors=torch.ones(2)),)}, r"spans\[0\].vectors"),
    "an empty span": ({"spans": (Span(start=0, vectors=torch.ones(0, HIDDEN)),)}, r"spans\[0\].vectors"),
    "a wide span": ({"spans": (Span(start=0, vectors=torch.ones(2, 9)),)}, r"spans\[0\].vectors"),
    "a span before": ({"spans": (Span(start=-1, vectors=torch.ones(2, HIDDEN)),)}, r"spans\[0\]: -1 to 1"),
    "a span beyond": ({"spans": (Span(start=3, vectors=torch.ones(2, HIDDEN)),)}, r"spans\[0\]: 3 to 5"),
    "spans that overlap": (
        {"spans": tuple(Span(start=start, vectors=torch.ones(2, HIDDEN)) for start in (0, 1))},
        r"spans\[1\]: 1 to 3",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_can_never_be_served_is_refused_by_name(name: str) -> None:
    options, message = INVALID[name]
    with Bench() as bench:
        with pytest.raises(InvalidRequest, match=f"^{message}" if "allowed" not in message else message):
            bench.engine.submit(Request(**{"tokens": [1, 2, 3, 4], **options}))
        assert not bench.engine.busy


def test_the_longest_request_that_is_allowed_is_served() -> None:
    for limit, allowed in ((1 << 20, 128), (50, 50)):
        with Bench(limits={"max_tokens": limit}) as bench:
            with pytest.raises(InvalidRequest, match=f"allowed: {allowed}"):
                bench.submit([1] * (allowed - 8), 9)
            assert bench.say([1] * (allowed - 8), 8).finish == "length"


def test_spans_need_wide_units_and_a_namespace_is_checked() -> None:
    with Bench(make_config(unit_bits=32)) as bench:
        with pytest.raises(InvalidRequest, match="unit_bits 64"):
            bench.submit([1, 2], spans=(Span(start=0, vectors=torch.ones(1, HIDDEN)),))
        with pytest.raises(InvalidNamespace):
            bench.submit([1, 2], namespace="x" * 5000)


def test_overload_is_refused_until_somebody_is_admitted() -> None:
    with Bench(limits={"max_running": 1, "max_waiting": 2}) as bench:
        bench.submit([1])
        bench.submit([2])
        with pytest.raises(Overloaded, match="2 requests wait already; allowed: 2"):
            bench.submit([3])
        bench.step()
        assert bench.engine.waiting == 1
        bench.submit([3])
        bench.run()


@pytest.mark.parametrize(
    ("kinds", "chunk", "message"),
    [
        ((), 6, "^chunk_tokens: 6"),
        (
            (sized(SlidingWindow(window=7), 2, None),),
            4,
            "^kinds: 2 pages of swa are too few; allowed: at least 4",
        ),
        ((sized(Mamba(), 2, None),), 4, "^kinds: 2 slots of mamba are too few; allowed: 3"),
    ],
)
def test_limits_that_do_not_fit_the_cache_are_refused(kinds: Any, chunk: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Bench(make_config(host=None, kinds=kinds), {"chunk_tokens": chunk})
    with pytest.raises(ConfigError, match="max_running"):
        Limits(max_running=0)


@pytest.mark.parametrize(("kind", "slots"), [(SWA, 4), (MAMBA, 3)])
def test_the_fewest_slots_that_are_allowed_are_enough(kind: str, slots: int) -> None:
    rules = SlidingWindow(window=7) if kind == SWA else Mamba()
    with Bench(make_config(kinds=(sized(rules, slots, 8),))) as bench:
        for number in range(4):
            bench.submit(prompt(number % 2, 15 + number), 15)
        bench.run()


def test_three_states_are_enough_for_a_request_to_go_on_undisturbed() -> None:
    with Bench(make_config(kinds=(sized(Mamba(), 3, 8),))) as bench:
        assert bench.say(prompt(1, 15), 40).preemptions == 0
