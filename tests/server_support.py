"""Servers for tests: one over a model whose answers are written down, and the command in its own process."""

from __future__ import annotations

import math
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import torch

from tiertree import CacheConfig, DeviceConfig, HostConfig, KVLayout, PrefixCache
from tiertree.engines.engine import Engine
from tiertree.engines.request import Limits, Reply
from tiertree.engines.row import Row
from tiertree.server.routes import Service
from tiertree.server.run import Server, bind
from tiertree.server.tokens import ByteTokenizer
from tiertree.server.worker import Worker

SECONDS = 60.0
"""How long anything may take that must happen; far more than it does."""
START_SECONDS = 5 * SECONDS
"""The same for a process that has modules and a model to load."""


class ScriptRunner:
    """A model that answers every prompt with `script`, over and over; `before` is called in every pass."""

    vocab_size = 512
    hidden_size = 8

    def __init__(self, script: Sequence[int], before: Callable[[Sequence[Row]], None]) -> None:
        self.script = list(script)
        self.before = before
        self.prompts: dict[int, int] = {}

    def forward(self, rows: Sequence[Row], adapter: str = "") -> torch.Tensor:
        """The next token of the script: where a prompt ends, at its beginning."""
        self.before(rows)
        logits = torch.zeros(len(rows), self.vocab_size)
        for logit, row in zip(logits, rows, strict=True):
            end = row.start + len(row.tokens)
            if len(row.tokens) > 1 or end not in self.prompts:
                self.prompts[end] = 0
            at = self.prompts.pop(end)
            self.prompts[end + 1] = at + 1
            logit[self.script[at % len(self.script)]] = 100
        return logits


class ScriptEngine(Engine):
    """An engine over a `ScriptRunner`, one request at a time."""

    def __init__(
        self,
        script: Sequence[int],
        before: Callable[[Sequence[Row]], None] = lambda rows: None,
        max_waiting: int = 8,
        pause_at: float = math.inf,
    ) -> None:
        layout = KVLayout(layers=1, kv_heads=1, head_size=4, dtype="float32", page_size=4)
        config = CacheConfig(
            device=DeviceConfig(size=256), host=HostConfig(size=512), page_size=4, unit_bits=64, layout=layout
        )
        limits = Limits(max_running=1, max_waiting=max_waiting, chunk_tokens=256)
        super().__init__(PrefixCache(config).open(), ScriptRunner(script, before), limits)
        self.paused = False
        self.pause_at = pause_at

    def step(self) -> list[Reply]:
        """Nothing while it is `paused`: whoever comes waits. An answer of `pause_at` tokens pauses it."""
        if self.paused:
            self.idle = True
            return []
        changed = super().step()
        if any(len(each.tokens) >= self.pause_at for each in changed):
            self.paused = True
        return changed

    def close(self, deadline_s: float = 10.0) -> tuple[int, ...]:
        """End everybody and close the cache."""
        self.abort_all()
        return self.cache.close(deadline_s)


class Running:
    """A server that runs in a thread of this process."""

    def __init__(self, make: Callable[[], Engine], request_seconds: float) -> None:
        self.engines: list[Engine] = []

        def opened() -> Engine:
            self.engines.append(make())
            return self.engines[0]

        self.worker = Worker(opened)
        self.worker.start()
        service = Service(
            worker=self.worker,
            tokenizer=ByteTokenizer(),
            name="script",
            vocab_size=512,
            request_seconds=request_seconds,
        )
        self.listener = bind("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        ready = threading.Event()
        self.server = Server(service, 5.0, ready.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        assert ready.wait(SECONDS)

    def pause(self, paused: bool) -> None:
        """Let a `ScriptEngine` compute nothing, or go on."""
        engine = self.engines[0]
        assert isinstance(engine, ScriptEngine)
        engine.pause_at, engine.paused = math.inf, paused
        engine.cache.wake()

    def stats(self) -> dict[str, object]:
        """What GET /stats says."""
        found: dict[str, object] = httpx.get(f"{self.url}/stats", timeout=SECONDS).raise_for_status().json()
        return found


@contextmanager
def running(make: Callable[[], Engine], request_seconds: float = SECONDS) -> Iterator[Running]:
    """A server over the engine that `make` opens, until the end of the block."""
    server = Running(make, request_seconds)
    try:
        yield server
    finally:
        server.server.leave()
        server.thread.join(SECONDS)
        assert server.worker.join(SECONDS)
        server.listener.close()


def client(url: str, retries: int = 0) -> openai.OpenAI:
    """The official client."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=retries, timeout=SECONDS)


def until(happened: Callable[[], bool], what: str) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.005)


class Process:
    """`tiertree serve` in a process of its own."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "tiertree", "serve", "--port", "0", *arguments]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  # no pipe, which would fill up
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._said, env=environment, text=True
        )
        self.url = ""

    def wait_until_ready(self) -> None:
        """Wait for its first line, which says where it listens."""
        out = self.process.stdout
        assert out is not None
        assert select.select([out], [], [], START_SECONDS)[0], f"it does not start: {self.said}"
        self.url = out.readline().removeprefix("listening on ").strip()
        assert self.url.startswith("http"), self.said

    @property
    def said(self) -> str:
        """What it has said on stderr."""
        return os.pread(self._said.fileno(), 1 << 20, 0).decode()  # the process's own place stays

    def ended(self) -> tuple[int, str]:
        """Wait for its end. Returns its exit status and what it said on stderr."""
        return self.process.wait(SECONDS), self.said

    def end(self) -> tuple[int, str]:
        """Terminate it. Returns its exit status and what it said on stderr."""
        self.process.terminate()
        return self.ended()

    def kill(self) -> None:
        """Be rid of it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._said.close()


@contextmanager
def serving(*arguments: str, disk: Path | None = None) -> Iterator[Process]:
    """`tiertree serve` with a tiny model, killed at the end if it still runs."""
    where = () if disk is None else ("--disk", str(disk), "--disk-size", "64MiB")
    process = Process("--device-memory", "4MiB", "--host-memory", "16MiB", *where, *arguments)
    try:
        process.wait_until_ready()
        yield process
    finally:
        process.kill()
