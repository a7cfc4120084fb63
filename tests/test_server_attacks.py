"""What one client, or a signal at a bad time, must not do to the server and to everybody else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_support import SECONDS, Running, ScriptEngine, running, serving

from tiertree import ConfigError
from tiertree.server.asked import Completion
from tiertree.server.run import bind
from tiertree.server.tokens import ByteTokenizer


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    """One that answers "A", over and over; it takes 8 prompts at once."""
    with running(lambda: ScriptEngine([65])) as found:
        yield found


def ask(server: Running, path: str = "completions", **body: object) -> httpx.Response:
    """A request for one token."""
    return httpx.post(f"{server.url}/v1/{path}", json={"max_tokens": 1, **body}, timeout=SECONDS)


def test_nobody_waits_for_the_tokens_of_another(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, opened, encode = threading.Event(), threading.Event(), ByteTokenizer.encode

    def slow(self: ByteTokenizer, text: str) -> list[int]:
        if text == "slow":
            begun.set()
            assert opened.wait(SECONDS)
        return encode(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", slow)
    messages = [{"role": "user", "content": "slow"}]
    with ThreadPoolExecutor() as pool:
        for path, body in (("completions", {"prompt": "slow"}), ("chat/completions", {"messages": messages})):
            begun.clear()
            opened.clear()
            late = pool.submit(ask, server, path, **body)
            assert begun.wait(SECONDS)
            try:
                assert httpx.get(f"{server.url}/health", timeout=SECONDS / 4).status_code == 200
                assert ask(server, prompt="other").status_code == 200
                assert not late.done()
            finally:
                opened.set()
            assert late.result().status_code == 200


def test_what_is_refused_anyhow_is_not_tokenized(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: seen.append(text) or [1])
    chat = [{"role": "user", "content": "x"}]
    assert ask(server, prompt="x", model="other").status_code == 404
    assert ask(server, "chat/completions", messages=chat, model="other").status_code == 404
    assert ask(server, prompt=["x"] * 9).json()["error"]["param"] == "prompt"
    assert ask(server, prompt="x", stop_token_ids=[512]).json()["error"]["param"] == "stop_token_ids"
    assert ask(server, prompt="x", min_p=0.5).json()["error"]["param"] == "min_p"
    assert seen == []
    assert ask(server, prompt=["x"] * 8).status_code == 200
    assert len(seen) == 8


def test_text_without_a_tokenizer_is_not_called_empty(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ByteTokenizer, "encode", lambda self, text: [])
    monkeypatch.setattr(ByteTokenizer, "chat", lambda self, turns: [])
    answers = {
        "prompt": ask(server, prompt="x"),
        "messages": ask(server, "chat/completions", messages=[{"role": "user", "content": "x"}]),
    }
    for field, answer in answers.items():
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, field)
        assert "the model's tokenizer makes no token" in error["message"]
    assert ask(server, prompt=[1, 2]).status_code == 200
    assert "is empty" in ask(server, prompt="").json()["error"]["message"]


def test_a_body_that_is_not_called_json(server: Running) -> None:
    for headers in ({}, {"content-type": "text/plain"}):
        answer = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "x"}', headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (415, "Content-Type")
        assert "application/json" in answer.json()["error"]["message"]


def test_salts_have_a_length(server: Running) -> None:
    for name in ("user", "cache_salt"):
        assert ask(server, prompt="x", **{name: "é" * 500}).status_code == 200, "1,000 bytes"
        answer = ask(server, prompt="x", **{name: "é" * 500 + "x"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name)
    for length, status in ((1000, 200), (1001, 400)):
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"prompt": "x", "max_tokens": 1},
            headers={"X-Cache-Salt": "s" * length},
        )
        assert answer.status_code == status
    assert answer.json()["error"]["param"] == "X-Cache-Salt"


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("min_tokens", 5, 0),
        ("min_p", 0.1, 0),
        ("bad_words", ["x"], []),
        ("guided_json", {}, None),
        ("structured_outputs", {"choice": ["a"]}, None),
        ("use_beam_search", True, False),
        ("length_penalty", 2, 1.0),
        ("truncate_prompt_tokens", 5, None),
        ("prompt_logprobs", 1, None),
        ("add_generation_prompt", False, True),
        ("tool_choice", "required", "auto"),
        ("function_call", {"name": "f"}, "none"),
    ],
)
def test_fields_that_change_answers_elsewhere(
    server: Running, field: str, value: object, neutral: object
) -> None:
    error = ask(server, prompt="x", **{field: value}).json()["error"]
    assert (error["param"], error["code"]) == (field, "unsupported_value")
    Completion.model_validate({"prompt": "x", field: neutral}).check()


def test_a_port_belongs_to_who_was_first() -> None:
    first = bind("127.0.0.1", 0)
    try:
        with pytest.raises(ConfigError, match="cannot be used"):
            bind("127.0.0.1", first.getsockname()[1])
    finally:
        first.close()


def test_clients_cannot_write_to_stderr() -> None:
    with serving("--model", "tiny-llama") as server:
        host, port = server.url.removeprefix("http://").split(":")
        for _ in range(20):
            with socket.create_connection((host, int(port)), SECONDS) as link:
                link.sendall(b"nonsense\r\n\r\n")
                assert link.recv(1000).startswith(b"HTTP/1.1 400")
        assert server.end() == (0, "SIGTERM: finishing what runs\n")


SWALLOWED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path, target=None):
        if name == "tiertree.server.load":
            try:
                os.kill(os.getpid(), signal.{name})
            except BaseException:
                pass
sys.meta_path.insert(0, Finder())
from tiertree.cli import main
sys.exit(main(["serve", "--model", "nothing", "--port", "0"]))
"""
"""A process that gets a signal while it imports, in a module that would swallow any exception."""


@pytest.mark.parametrize(
    ("name", "word"), [("SIGINT", "interrupted"), ("SIGTERM", "terminated")], ids=["int", "term"]
)
def test_a_signal_while_it_starts_ends_it(name: str, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED.replace("{name}", name)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=5 * SECONDS,
        check=False,
    )
    status = 128 + getattr(signal, name)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", f"tiertree serve: {word}\n")
