"""A hundred clients at once, who chat, change their minds and hang up; at the end nothing is left of them."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from server_support import SECONDS, Process, serving, until

SEED = int(os.environ.get("SOAK_SEED", "0"))
MOST_SECONDS = 120.0
CLIENTS = 100


class Crowd:
    """Clients against `url` until `end`; what became of each request is counted."""

    def __init__(self, url: str, model: str, seconds: float) -> None:
        limits = httpx.Limits(max_connections=None)
        self.api = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            max_retries=0,
            timeout=SECONDS,
            http_client=openai.DefaultAsyncHttpxClient(limits=limits),
        )
        self.model = model
        self.end = time.monotonic() + seconds
        self.counts: Counter[str] = Counter()
        self.open = self.most_open = 0

    async def run(self) -> None:
        """All of them."""
        async with asyncio.TaskGroup() as group:
            for number in range(CLIENTS):
                group.create_task(self._client(number, random.Random(f"{SEED} {number}")))
        await self.api.close()

    async def _client(self, number: int, rng: random.Random) -> None:
        messages: list[Any] = []
        while time.monotonic() < self.end:
            if not messages or len(messages) > 7:
                messages = [{"role": "system", "content": f"System prompt {rng.randrange(4)}. " * 12}]
            words = " ".join(
                rng.choice(["one", "two", "three", "four", "five", "six"])
                for _ in range(rng.randrange(1, 30))
            )
            messages.append({"role": "user", "content": words})
            self.open += 1
            self.most_open = max(self.most_open, self.open)
            answer = await self._turn(messages, f"tenant {number % 3}", rng)
            self.open -= 1
            if answer is None:
                messages = []
                await asyncio.sleep(rng.random() * 0.2)
            else:
                messages.append({"role": "assistant", "content": answer})

    async def _turn(self, messages: list[Any], salt: str, rng: random.Random) -> str | None:
        """One streamed answer; None if there is none."""
        leaves_after = rng.randrange(12) if rng.random() < 0.2 else None
        ask: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": rng.randrange(1, 40),
            "temperature": rng.choice((0, 1)),
            "stop": rng.choice((None, "a", ["e", "xyz"])),
            "extra_body": {"cache_salt": salt},
        }
        try:
            if leaves_after is not None and rng.random() < 0.3:
                async with asyncio.timeout(rng.random() * 0.3):
                    await self.api.chat.completions.create(**ask)
                self.counts["answered"] += 1
                return None
            stream = await self.api.chat.completions.create(stream=True, **ask)
            text, finish, pieces = "", None, 0
            async with stream:
                async for chunk in stream:
                    text += chunk.choices[0].delta.content or ""
                    finish = chunk.choices[0].finish_reason
                    pieces += 1
                    if leaves_after is not None and pieces > leaves_after:
                        self.counts["left"] += 1
                        return None
            self.counts[f"answered: {finish}"] += 1
            return text
        except TimeoutError:
            self.counts["left early"] += 1
        except openai.RateLimitError:
            self.counts["429"] += 1
        return None


def stats(server: Process) -> Any:
    """What GET /stats says."""
    return httpx.get(f"{server.url}/stats", timeout=SECONDS).raise_for_status().json()


def settled(server: Process) -> bool:
    """Whether nobody is served and nothing is under way."""
    found = stats(server)
    return not (found["waiting"] or found["running"] or found["cache"]["operations_in_flight"])


@pytest.mark.soak
@pytest.mark.parametrize(("model", "share"), [("tiny-llama", 1.0), ("tiny-gemma3", 0.25)])
def test_a_crowd_leaves_nothing_behind(
    model: str, share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = min(float(os.environ.get("SOAK_SECONDS", "600")), MOST_SECONDS) * share
    options = (
        "--device-memory",
        "2MiB",
        "--host-memory",
        "4MiB",
        "--max-waiting",
        "80",
        "--chunk-tokens",
        "256",
    )
    with serving("--model", model, *options, disk=tmp_path / "disk") as server:
        crowd = Crowd(server.url, model, seconds)
        asyncio.run(crowd.run())
        until(lambda: settled(server), "something is still under way")
        memory = stats(server)["cache"]
        for each in (memory, *memory["kinds"].values()):
            for tier in (each["device"], each["host"]):
                assert tier["free"] + tier["resident"] + tier["detached"] == tier["capacity"], tier
                assert (tier["protected"], tier["requests"], tier["operations"], tier["lost"]) == (0, 0, 0, 0)
        assert (memory["leases"], memory["stuck"], memory["late_operations"]) == (0, 0, 0)
        assert httpx.get(f"{server.url}/health").status_code == 200
        status, said = server.end()
        assert (status, said) == (0, "SIGTERM: finishing what runs\n")
    assert crowd.open == 0
    assert crowd.most_open == CLIENTS
    assert crowd.counts["left"]
    assert crowd.counts["left early"]
    with capsys.disabled():
        figures = {name: memory[name] for name in ("backed_up", "loaded_back", "persisted", "prefetched")}
        print(f"\n{model}, {seconds:.0f} s, seed {SEED}: {dict(crowd.counts)}, {figures}")
