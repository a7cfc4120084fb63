"""`tiertree serve` as a process: a real model, signals, and a restart on the same disk."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_support import SECONDS, Process, client, serving, until

from tiertree.cli import main

SYSTEM = {"role": "system", "content": "You are a model with random weights. " * 10}


def talk(url: str, turns: int) -> list[tuple[str, dict[str, int]]]:
    """A conversation: the answer of every turn, and where its prompt's tokens were."""
    api = client(url)
    messages: list[Any] = [SYSTEM]
    found = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"This is turn {turn}; what do you say?"})
        answer = api.chat.completions.create(
            model="tiny-llama", messages=messages, max_tokens=24, temperature=0, user="somebody"
        )
        text = answer.choices[0].message.content
        found.append((text, answer.usage.prompt_tokens_details.model_extra["cached_tokens_details"]))
        messages.append({"role": "assistant", "content": text})
    return found


def test_a_conversation_survives_a_restart_from_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with serving("--model", "tiny-llama", disk=disk) as first:
        before = talk(first.url, 3)
        device = [tiers["device"] for _, tiers in before]
        assert device[0] == 0 < device[1] < device[2]
        assert all(tiers["host"] == tiers["storage"] == 0 for _, tiers in before)
        stream = begin(first, 500)
        first.process.terminate()
        until(lambda: health(first) != 200, "it does not drain")
        assert list(stream)[-1].choices[0].finish_reason == "length", "what runs is finished"
        assert first.ended() == (0, "SIGTERM: finishing what runs\n")
    with serving("--model", "tiny-llama", disk=disk) as second:
        after = talk(second.url, 3)
        assert [text for text, _ in after] == [text for text, _ in before]
        assert after[0][1]["storage"] > 0, "its first prompt comes from disk"
        assert after[2][1]["device"] > 0
        stream = begin(second, 4000, prompts=6)
        second.process.send_signal(signal.SIGINT)
        until(lambda: health(second) == 503, "it does not drain")
        second.process.send_signal(signal.SIGINT)
        assert second.process.wait(SECONDS) == 130, "the second signal does not wait"
        with pytest.raises((httpx.TransportError, openai.APIError)):
            list(stream)


def begin(server: Process, tokens: int, prompts: int = 1) -> Iterator[Any]:
    """A stream that has had its first token."""
    stream = iter(
        client(server.url).completions.create(
            model="tiny-llama",
            prompt="Hello",
            max_tokens=tokens,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    next(stream)
    return stream


def health(server: Process) -> int:
    """The status of GET /health; 0 when nobody answers."""
    try:
        return httpx.get(f"{server.url}/health", timeout=SECONDS).status_code
    except httpx.TransportError:
        return 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            "--model nothing",
            "--model: nothing is neither a directory nor a tiny model; allowed: tiny, ",
        ),
        ("--model tiny-nothing --port 0", "--model: tiny-nothing is neither"),
        ("--model . --port 0", "--model: . cannot be loaded: "),
        ("--model tiny --port 65536", "--port: 65536 is not allowed"),
        ("--model tiny --port 1.5", "--port: '1.5' is not a whole number"),
        ("--model tiny --host 203.0.113.1", "--host, --port: 203.0.113.1:8000 cannot be used: "),
        ("--model tiny --disk x --host-memory 0", "--disk: pages reach disk through host"),
        ("--model tiny --device-memory much --port 0", "--device-memory: 'much' is not a size"),
        ("--model tiny --device-memory 1KiB --port 0", "device"),
        ("--model tiny --torch-device none --port 0", "--torch-device: none cannot be used: "),
        ("--model tiny --torch-device meta --port 0", "--torch-device: meta cannot be used: "),
        ("--model tiny --chunk-tokens 17 --port 0", "chunk_tokens: 17 is not allowed"),
        ("--model tiny --request-seconds nan", "--request-seconds: nan is not allowed"),
        ("--model tiny --drain-seconds soon", "--drain-seconds: 'soon' is not a number of seconds"),
        ("", "the following arguments are required: --model"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    options: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = (
        options.split() if "--port" in options or "--host " in options else [*options.split(), "--port", "0"]
    )
    try:
        status: object = main(["serve", *arguments])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    assert words in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "transformers"])
def test_without_the_extra_it_says_which(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith(("tiertree.server", "tiertree.engines.hf"))]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("tiertree.engines.hf", "tiertree.server"):
        monkeypatch.delattr(name, raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["serve", "--model", "nothing"]) == 2
    assert capsys.readouterr().err == 'tiertree serve needs the extra: pip install "tiertree[serve]"\n'
