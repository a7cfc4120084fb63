"""Random requests on real models over small tiers: what is found has the bytes that were saved, and every
answer is the one that transformers gives when it computes all of it at once.

Requests share heads and go on from one another's answers, come while others are served, are aborted; pages of
any kind are taken away at any time, from device and host. A seed makes the requests; when transfers end is
the machine's business.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import pytest
import torch
from engine_world import seconds
from exact_support import APART, DEVICE, HOST, Watched, config_of
from hf_support import model_of, tokens_of

from tiertree.engines.hf import NAMES
from tiertree.engines.request import Limits, Reply, Request
from tiertree.storage.memory import MemoryStorage

STEPS_MAX = 20_000
PROMPT_MAX = 150
POLICIES = ("write_through", "write_through_selective", "write_back")


class World:
    """Random requests to the model `name`, drawn from `seed`. `seen` counts what has happened."""

    def __init__(self, name: str, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.name = name
        self.seen: Counter[str] = Counter()
        self.live: list[Reply] = []
        self.done: list[Reply] = []
        page = rng.choice((4, 8, 16))
        self.host = rng.random() < 0.8
        config = config_of(
            model_of(name),
            page,
            device=rng.choice((200, 260, 400)) // page,
            host=self.host,
            policy=rng.choice(POLICIES),
            checkpoint=rng.choice((None, 64)),
        )
        limits = Limits(
            chunk_tokens=page * rng.choice((1, 2, 4, 8)),
            max_running=rng.choice((1, 3, 6)),
            burst_tokens=rng.choice((1, 64, 1024)),
            yields=rng.choice((0, 2, 8)),
        )
        self.heads = [tokens_of(rng.randrange(1000), rng.randrange(1, 120)) for _ in range(3)]
        self.engine = Watched(model_of(name), config, limits)
        if self.host and rng.random() < 0.6:
            self.engine.cache.attach_storage(MemoryStorage(64 << 20))

    def run(self) -> None:
        """Everything, until nobody is left."""
        left = self.rng.randrange(8, 16)
        with self.engine as engine:
            for _ in range(STEPS_MAX):
                if left and self.rng.random() < 0.3:
                    left -= 1
                    self.live.append(self.ask())
                engine.step()
                if engine.idle:
                    engine.wait(0.002)
                self.disturb()
                for reply in [each for each in self.live if each.finish is not None]:
                    self.live.remove(reply)
                    self.ended(reply)
                assert not engine.wrong
                if not left and not engine.busy:
                    break
            assert not self.live
            engine.cache.check()

    def ask(self) -> Reply:
        """A prompt that goes on from a head or from an answer, whole or not."""
        rng = self.rng
        start = list(rng.choice(self.heads))
        if self.done and rng.random() < 0.5:
            before = rng.choice(self.done)
            start = [*before.request.tokens, *before.tokens]
        if rng.random() < 0.5:
            del start[rng.randrange(1, len(start) + 1) :]
        prompt = start + tokens_of(rng.randrange(10**6), rng.randrange(40))
        return self.engine.submit(Request(tokens=prompt[:PROMPT_MAX], max_new_tokens=rng.randrange(1, 20)))

    def disturb(self) -> None:
        """Now and then an abort, and pages taken away."""
        rng, cache = self.rng, self.engine.cache
        if self.live and rng.random() < 0.02:
            self.engine.abort(rng.choice(self.live))
        if rng.random() < 0.1:
            kind = rng.choice([*cache.config.kind_pages(DEVICE)])
            tier = HOST if self.host and rng.random() < 0.5 else DEVICE
            cache.evict(rng.randrange(1, 40), tier, deadline_s=0.5, kind=kind)
            cache.check()

    def ended(self, reply: Reply) -> None:
        """The answer is right. Where two tokens are as good as equally likely, what follows is not
        compared."""
        assert reply.finish in ("length", "abort"), reply
        self.seen["preempted"] += reply.preemptions
        self.seen.update(tier for tier, count in reply.cached._asdict().items() if count)
        if reply.finish == "abort":
            return
        self.done.append(reply)
        prompt = reply.request.tokens
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *reply.tokens[:-1]]])
            logits = model_of(self.name)(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        for token, each in zip(reply.tokens, logits, strict=True):
            self.seen["compared"] += 1
            if int(each.argmax()) != token:
                assert each.max() - each[token] <= 2 * APART[self.name], (prompt, reply.tokens, token)
                return


@pytest.mark.parametrize("name", NAMES)
def test_random_requests(name: str) -> None:
    for seed in (1, 2):
        print(f"{name}, seed {seed}")
        World(name, seed).run()


@pytest.mark.soak
def test_random_requests_soak() -> None:
    end = time.monotonic() + seconds(0.2)
    seen: Counter[str] = Counter()
    seed = 1000
    while time.monotonic() < end:
        name = NAMES[seed % len(NAMES)]
        print(f"{name}, seed {seed}")
        world = World(name, seed)
        world.run()
        seen += world.seen
        seed += 1
    print(f"{seed - 1000} worlds: {dict(seen)}")
    if seed > 1200:  # enough for what is rare
        assert not {"device", "host", "storage", "preempted", "compared"} - seen.keys(), seen
