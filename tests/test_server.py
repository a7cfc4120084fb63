"""The server over loopback with the official client, over a model whose answers are written down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import httpx
import openai
import pytest
from server_support import SECONDS, Running, ScriptEngine, client, running, until

from tiertree.engines.request import Reply, Request
from tiertree.engines.row import Row
from tiertree.server.tokens import END
from tiertree.types import InvariantViolated

SCRIPT = list("Wörld of €5, END. ".encode())
PROMPT = "x" * 10


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One that answers SCRIPT over and over."""
    with running(lambda: ScriptEngine(SCRIPT)) as found:
        yield found
        memory = found.stats()["cache"]
        assert isinstance(memory, dict)
        assert memory["leases"] == memory["device"]["requests"] == 0


class Gate:
    """Stops the engine in a forward pass until it is opened."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.opened.set()

    def __call__(self, rows: Sequence[Row]) -> None:
        assert self.opened.wait(SECONDS)


# -- answers ----------------------------------------------------------------------------------------


def test_a_completion_whole_and_streamed(server: Running) -> None:
    api = client(server.url)
    whole = api.completions.create(model="script", prompt=PROMPT, max_tokens=20, temperature=0)
    assert whole.choices[0].finish_reason == "length"
    text = whole.choices[0].text
    assert text.encode() == bytes((SCRIPT * 2)[:20])
    assert whole.id.startswith("cmpl-")
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (
        10,
        20,
        30,
    )
    chunks = list(
        api.completions.create(model="script", prompt=PROMPT, max_tokens=20, temperature=0, stream=True)
    )
    assert "".join(each.choices[0].text for each in chunks) == text
    assert len(chunks) == len(text), "one event per character"
    assert [each.choices[0].finish_reason for each in chunks] == [None] * (len(text) - 1) + ["length"]
    assert all(each.usage is None for each in chunks)


def test_several_prompts_and_prompts_of_tokens(server: Running) -> None:
    api = client(server.url)
    tokens = list(PROMPT.encode())
    many = api.completions.create(model="script", prompt=[PROMPT, "another one"], max_tokens=7, temperature=0)
    assert [(each.index, each.text) for each in many.choices] == [(0, "Wörld "), (1, "Wörld ")]
    assert many.usage is not None
    assert (many.usage.prompt_tokens, many.usage.completion_tokens) == (21, 14)
    alone = api.completions.create(model="script", prompt=tokens, max_tokens=7, temperature=0)
    assert alone.usage is not None
    assert alone.usage.prompt_tokens_details is not None
    assert alone.usage.prompt_tokens_details.cached_tokens == 8, "the same tokens as the text"
    texts = ["", ""]
    for chunk in api.completions.create(
        model="script",
        prompt=[tokens, [1, 2, 3]],
        max_tokens=7,
        stream=True,
        temperature=0,
        stream_options={"include_usage": True},
    ):
        for each in chunk.choices:
            texts[each.index] += each.text
    assert texts == ["Wörld ", "Wörld "]
    assert chunk.usage is not None
    assert (chunk.choices, chunk.usage.total_tokens) == ([], 27)


def test_a_chat_streams_deltas_and_usage(server: Running) -> None:
    api = client(server.url)
    ask: dict[str, Any] = {"model": "script", "temperature": 0, "max_completion_tokens": 9}
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hello"}]
    whole = api.chat.completions.create(messages=messages, **ask)
    assert whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.content == "Wörld of"
    chunks = list(
        api.chat.completions.create(
            messages=messages, stream=True, stream_options={"include_usage": True}, **ask
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(each.choices[0].delta.content or "" for each in chunks[:-1]) == "Wörld of"
    assert chunks[-2].choices[0].finish_reason == "length"
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], 9)


def test_cached_tokens_grow_over_the_turns(server: Running) -> None:
    api = client(server.url)
    messages = [{"role": "user", "content": "tell me something long, please"}]
    seen = []
    for turn in range(3):
        answer = api.chat.completions.create(model="script", messages=messages, max_tokens=18, temperature=0)
        details = answer.usage.prompt_tokens_details
        tiers = details.model_extra["cached_tokens_details"]
        assert details.cached_tokens == sum(tiers.values())
        seen.append((details.cached_tokens, answer.usage.prompt_tokens))
        messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        messages.append({"role": "user", "content": f"and turn {turn}?"})
    assert seen[0][0] == 0
    for (_, before), (cached, _) in pairwise(seen):
        assert cached >= (before + 18) // 4 * 4, "the prompt before and its answer, in whole pages"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ("€5", "Wörld of ", 14),
        (["nothing", "ld o", "rld of"], "Wör", 8),
        ("END", "Wörld of €5, ", 19),
        ("no such", "Wörld of €5, END. Wörl", 26),
    ],
)
def test_stop_strings_cut_across_tokens(server: Running, stop: Any, text: str, tokens: int) -> None:
    api = client(server.url)
    ask: dict[str, Any] = {
        "model": "script",
        "prompt": PROMPT,
        "max_tokens": 26,
        "temperature": 0,
        "stop": stop,
    }
    whole = api.completions.create(**ask)
    finish = "length" if tokens == 26 else "stop"
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text, finish)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == tokens
    chunks = list(api.completions.create(stream=True, **ask))
    assert "".join(each.choices[0].text for each in chunks) == text
    assert chunks[-1].choices[0].finish_reason == finish


def test_stop_tokens_end_an_answer_and_do_not_show() -> None:
    with running(lambda: ScriptEngine([65, 66, END, 67])) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 6, "temperature": 0}
        for extra, text, finish in (
            ({}, "AB", "stop"),
            ({"ignore_eos": True}, "ABCAB", "length"),
            ({"stop_token_ids": [66]}, "A", "stop"),
            ({"ignore_eos": True, "stop_token_ids": [67]}, "AB", "stop"),
        ):
            choice = api.completions.create(extra_body=extra, **ask).choices[0]
            assert (choice.text, choice.finish_reason) == (text, finish), extra


def test_salts_share_nothing(server: Running) -> None:
    api = client(server.url)

    def cached(**extra: Any) -> int:
        answer = api.completions.create(
            model="script", prompt="a prompt of twenty-six", max_tokens=1, temperature=0, **extra
        )
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        return answer.usage.prompt_tokens_details.cached_tokens or 0

    ways: list[dict[str, Any]] = [
        {},
        {"user": "a"},
        {"extra_body": {"cache_salt": "a"}},
        {"extra_headers": {"X-Cache-Salt": "b"}},
    ]
    assert [cached(**each) for each in ways] == [0, 0, 0, 0]
    assert [cached(**each) for each in ways] == [20, 20, 20, 20]
    assert cached(extra_body={"cache_salt": "b"}, user="a") == 20


# -- refusals ---------------------------------------------------------------------------------------


def post(server: Running, body: Any, path: str = "completions") -> httpx.Response:
    """A request as no official client would send it."""
    headers = {"content-type": "application/json"}
    return httpx.post(f"{server.url}/v1/{path}", content=json.dumps(body), headers=headers, timeout=SECONDS)


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        ({"prompt": "x", "temperature": 3}, "temperature", "invalid_value"),
        ({"prompt": "x", "n": 2}, "n", "unsupported_value"),
        ({"prompt": "x", "logprobs": 1}, "logprobs", "unsupported_value"),
        ({"prompt": [512]}, "prompt", "invalid_value"),
        ({"prompt": [-1]}, "prompt", "invalid_value"),
        ({"prompt": [10**40]}, "prompt", "invalid_value"),
        ({"prompt": "\ud800"}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": ["x"] * 9}, "prompt", "invalid_value"),
        ({"prompt": "x", "stop_token_ids": [512]}, "stop_token_ids", "invalid_value"),
        ({"prompt": "x", "max_tokens": 1024}, "prompt", "context_length_exceeded"),
        ({"prompt": "x" * 1024}, "prompt", "context_length_exceeded"),
        ({"prompt": "x", "user": "u" * 1001}, "user", "invalid_value"),
        ({"max_tokens": 5}, "prompt", "invalid_value"),
        ([], None, None),
        ("x", None, None),
    ],
)
def test_a_wrong_request_is_400_in_the_form_of_the_api(
    server: Running, body: Any, param: str | None, code: str | None
) -> None:
    answer = post(server, body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert set(error) == {"message", "type", "param", "code"}


def test_other_refusals_have_that_form_too(server: Running) -> None:
    api = client(server.url)
    with pytest.raises(openai.NotFoundError) as missing:
        api.completions.create(model="other", prompt=PROMPT)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        api.chat.completions.create(model="script", messages=[{"role": "user", "content": "x"}], n=2)
    assert wrong.value.param == "n"
    assert httpx.get(f"{server.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{server.url}/v1/completions").status_code == 405
    for body in (b"{", b"\xff", b"[" * 50_000, b'{"prompt": 1e9999}'):
        answer = httpx.post(
            f"{server.url}/v1/completions", content=body, headers={"content-type": "application/json"}
        )
        assert answer.status_code == 400
        assert answer.json()["error"]["message"]
    assert api.models.list().data[0].id == api.models.retrieve("script").id == "script"
    with pytest.raises(openai.NotFoundError):
        api.models.retrieve("other/one")
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def test_a_body_that_is_too_long_for_the_model(server: Running) -> None:
    most = 16 * server.worker.longest + (1 << 20)
    assert most < 2 << 20
    frame = len(json.dumps({"prompt": "x", "user": ""}))
    assert post(server, {"prompt": "x", "user": "u" * (most - frame)}).status_code == 400, "it is read"
    answer = post(server, {"prompt": "x", "user": "u" * (most - frame + 1)})
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "invalid_request_error")


# -- load, time, and those who leave ----------------------------------------------------------------


def busy(server: Running) -> tuple[Any, Any]:
    """How many wait and run."""
    found = server.stats()
    return found["waiting"], found["running"]


def test_overload_is_429_and_passes() -> None:
    with running(lambda: ScriptEngine(SCRIPT, max_waiting=1)) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
        server.pause(True)
        stream = api.completions.create(stream=True, **ask)
        assert busy(server) == (1, 0)
        with pytest.raises(openai.RateLimitError) as full:
            api.completions.create(**ask)
        assert full.value.response.headers["retry-after"] == "1"
        assert full.value.code == "rate_limit_exceeded"
        with pytest.raises(openai.RateLimitError):
            api.completions.create(stream=True, **ask)
        with pytest.raises(openai.RateLimitError):
            api.completions.create(**ask | {"prompt": "another"})
        assert busy(server) == (1, 0)
        server.pause(False)
        assert len(list(stream)) == len("Wörld of €5, END.")
        assert api.completions.create(**ask).choices[0].finish_reason == "length"


def test_many_prompts_are_taken_together_or_not_at_all() -> None:
    with running(lambda: ScriptEngine(SCRIPT, max_waiting=3)) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "max_tokens": 2, "temperature": 0}
        server.pause(True)
        stream = api.completions.create(stream=True, prompt=["a", "b"], **ask)
        with pytest.raises(openai.RateLimitError):
            api.completions.create(prompt=["c", "d"], **ask)
        assert busy(server) == (2, 0)
        server.pause(False)
        assert len(list(stream)) == 2 * 2


def test_who_hangs_up_is_aborted() -> None:
    gate = Gate()
    replies: list[Reply] = []
    with running(lambda: ScriptEngine(SCRIPT, gate)) as server:
        engine = server.engines[0]
        assert isinstance(engine, ScriptEngine)
        submit = engine.submit

        def watched(request: Request) -> Reply:
            replies.append(submit(request))
            return replies[-1]

        engine.submit = watched  # type: ignore[method-assign]
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0}
        gate.opened.clear()
        with httpx.Client() as first, httpx.Client() as second:
            url = f"{server.url}/v1/completions"
            for each in (first, second):  # one that computes, one that waits; neither has had a byte
                with pytest.raises(httpx.ReadTimeout):
                    each.post(url, json=ask, timeout=0.2)
        gate.opened.set()
        until(lambda: busy(server) == (0, 0), "requests whose clients have gone still run")
        assert {str(each.finish) for each in replies} <= {"abort"}
        engine.pause_at = 5
        stream = api.completions.create(stream=True, **ask)
        next(iter(stream))
        stream.close()
        until(lambda: busy(server) == (0, 0), "a stream whose client has gone still runs")
        assert replies[-1].finish == "abort"
        assert len(replies[-1].tokens) <= 5
        memory: Any = server.stats()["cache"]
        assert memory["leases"] == memory["device"]["requests"] == 0


def test_a_request_has_a_deadline() -> None:
    gate = Gate()
    with running(lambda: ScriptEngine(SCRIPT, gate), request_seconds=0.3) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 1000, "temperature": 0}
        gate.opened.clear()
        with pytest.raises(openai.InternalServerError) as late:
            api.completions.create(**ask)
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        gate.opened.set()
        until(lambda: busy(server) == (0, 0), "a request past its deadline still runs")
        server.pause(True)
        stream = api.completions.create(stream=True, **ask)
        with pytest.raises(openai.APIError) as later:
            list(stream)
        assert later.value.code == "timeout"
        server.pause(False)
        until(lambda: busy(server) == (0, 0), "requests past their deadline still run")


# -- failures ---------------------------------------------------------------------------------------


def test_a_pass_that_fails_is_500_and_the_next_works() -> None:
    fail = threading.Event()

    def before(rows: Sequence[Row]) -> None:
        if fail.is_set():
            fail.clear()
            raise RuntimeError("a secret of the model")

    with running(lambda: ScriptEngine(SCRIPT, before)) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
        for _ in range(5):
            fail.set()
            with pytest.raises(openai.InternalServerError) as failed:
                api.completions.create(**ask)
            assert failed.value.status_code == 500
            assert api.completions.create(**ask).choices[0].text == "Wör"
        fail.set()
        with pytest.raises(openai.APIError) as streamed:
            list(api.completions.create(stream=True, **ask))
        assert streamed.value.code == "engine_error"
        assert httpx.get(f"{server.url}/health").status_code == 200


@pytest.mark.parametrize(("error", "steps"), [(RuntimeError("x"), 3), (InvariantViolated("x"), 1)])
def test_an_engine_that_is_broken_says_so(error: Exception, steps: int) -> None:
    gate, raised = Gate(), []

    def make() -> ScriptEngine:
        engine = ScriptEngine(SCRIPT, gate)
        step = engine.step

        def failing() -> list[Reply]:
            if len(raised) < steps and (raised or engine.busy):
                raised.append(1)
                raise error
            return step()

        engine.step = failing  # type: ignore[method-assign]
        return engine

    with running(make) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 4}
        with pytest.raises(openai.InternalServerError) as failed:
            api.completions.create(**ask)
        assert failed.value.status_code == 500
        until(lambda: httpx.get(f"{server.url}/health").status_code == 503, "the dead are healthy")
        assert httpx.get(f"{server.url}/health").json() == {"status": "dead"}
        with pytest.raises(openai.InternalServerError) as after:
            api.completions.create(**ask)
        assert (after.value.status_code, after.value.code) == (503, "engine_dead")
        assert httpx.get(f"{server.url}/stats").status_code == 503
        assert server.worker.error is error
        assert len(raised) == steps


def test_an_engine_that_cannot_be_opened_is_told_at_the_start() -> None:
    def make() -> ScriptEngine:
        raise MemoryError("no pools")

    with pytest.raises(MemoryError, match="no pools"), running(make):
        pass


def test_leaving_finishes_what_runs_and_refuses_what_comes() -> None:
    with running(lambda: ScriptEngine(SCRIPT, pause_at=5)) as server:
        api = client(server.url)
        ask: dict[str, Any] = {"model": "script", "prompt": PROMPT, "max_tokens": 100, "temperature": 0}
        stream = iter(api.completions.create(stream=True, **ask))
        text = next(stream).choices[0].text
        server.server.leave()
        with pytest.raises(openai.InternalServerError) as refused:
            api.completions.create(**ask)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        server.pause(False)
        text += "".join(each.choices[0].text for each in stream)
        assert text.encode() == bytes((SCRIPT * 9)[:100])
        server.thread.join(SECONDS)
        assert not server.thread.is_alive()
        assert server.worker.error is None


def test_leaving_does_not_wait_for_ever() -> None:
    with running(lambda: ScriptEngine(SCRIPT, pause_at=5)) as server:
        api = client(server.url)
        stream = iter(api.completions.create(model="script", prompt=PROMPT, max_tokens=1000, stream=True))
        next(stream)
        server.worker.stop(0)
        with pytest.raises(openai.APIError) as cut:
            list(stream)
        assert cut.value.code == "shutting_down"
        assert server.worker.join(SECONDS)
