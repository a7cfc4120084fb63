"""Real models on pages that went through the tiers: the bytes that were saved, and the tokens of a cold run.

Every path is taken by every architecture of `tiny`. Compared are

- the bytes of all that a request finds, of every kind and with sidecars, with those that were saved when the
  tree took them over: bit for bit, always;
- the tokens, greedy, with those of an engine that has nothing cached: exactly, always;
- the logits with that engine's: bit for bit where a prompt is computed in the same chunks from the hit on,
  which is so when the hit is at the end of a chunk. Where it is not, another matrix product gives other last
  digits, and they are compared within `APART`.

That a path was really taken is seen by the tiers of `Reply.cached` and by the first pass, which must begin
behind the hit and read all that going on there needs.
"""

from __future__ import annotations

import copy

import pytest
import torch
from exact_support import (
    APART,
    CHUNK,
    COUNT,
    DEVICE,
    HOST,
    LENGTH,
    SHARED,
    close,
    cold,
    control,
    engine_of,
    hit,
    pools_of,
    same_bits,
    where,
)
from hf_support import Plain, model_of, tokens_of

from tiertree.engines.hf import NAMES
from tiertree.engines.request import Cached, Request
from tiertree.types import FULL, MAMBA, SWA

PROMPT = tokens_of(1, LENGTH)
OTHER = PROMPT[:SHARED] + tokens_of(2, 12)
"""Shares two chunks with PROMPT."""
WINDOWED, RECURRENT = ("gemma3", "gpt-oss"), ("falcon-h1", "bamba", "qwen3-next")
CHECKPOINT = {"write_through": None, "write_through_selective": CHUNK, "write_back": CHUNK}
"""By write policy, where a window is kept besides before the end of what was inserted at once. One that is
not copied at the end of a chunk is copied when the answer has made its edge longer."""

each_model = pytest.mark.parametrize("name", NAMES)
each_page = pytest.mark.parametrize("page", [4, 16])


def on_device(tokens: int) -> Cached:
    return Cached(device=tokens)


@each_page
@each_model
def test_a_cold_run_is_that_of_transformers(name: str, page: int) -> None:
    model, run = model_of(name), cold(name, page, PROMPT)
    ids = torch.tensor([PROMPT])
    answer = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=COUNT, pad_token_id=0
    )
    assert run.tokens == answer[0, LENGTH:].tolist()
    plain, tokens = Plain(model), PROMPT + run.tokens
    for start, count, _ in run.passes:
        assert torch.equal(plain.feed(tokens[start : start + count])[0], run.logits[start + count]), start


@each_page
@each_model
def test_found_on_device(name: str, page: int) -> None:
    with engine_of(name, page) as engine:
        same_bits(engine.say(PROMPT), cold(name, page, PROMPT), "first")
        for what, tokens in (("again", PROMPT), ("another tail", OTHER), ("and again", PROMPT)):
            run = engine.say(tokens)
            hit(engine, run, on_device(SHARED), what)
            same_bits(run, cold(name, page, tokens), what)
        if page == 4:
            control(engine, DEVICE, PROMPT, on_device(SHARED), lambda: None)


@pytest.mark.parametrize(
    ("policy", "page"), [*((policy, 4) for policy in CHECKPOINT), ("write_through", 16), ("write_back", 16)]
)
@each_model
def test_backed_up_evicted_and_loaded_back(name: str, policy: str, page: int) -> None:
    """Under write_back a window goes to host only where it is worth a place there: see `CHECKPOINT`."""
    with engine_of(name, page, host=True, policy=policy, checkpoint=CHECKPOINT[policy]) as engine:
        engine.say(PROMPT)
        if policy == "write_through_selective":
            engine.say(PROMPT)  # the hit that it takes
        for what, tokens in (("again", PROMPT), ("another tail", OTHER)):
            engine.evict(DEVICE)
            assert (where(engine.cache, engine.key(PROMPT), FULL, HOST) >= 0).all()
            run = engine.say(tokens)
            hit(engine, run, Cached(host=SHARED), what)
            same_bits(run, cold(name, page, tokens), what)
        assert engine.cache.stats().loaded_back >= 2 * SHARED // page
        if policy == "write_through" and page == 4:
            control(engine, HOST, PROMPT, Cached(host=SHARED), lambda: engine.evict(DEVICE))


@each_model
def test_a_conversation_goes_on_from_host(name: str) -> None:
    with engine_of(name, host=True, policy="write_back") as engine:
        tokens = list(PROMPT)
        for turn in range(3):
            run = engine.say(tokens)
            cached = (len(tokens) - 12) // 4 * 4 if turn else 0
            hit(engine, run, Cached(host=cached), f"turn {turn}")
            close(run, cold(name, 4, tokens), APART[name], f"turn {turn}")
            engine.evict(DEVICE)
            tokens += [*run.tokens, *tokens_of(10 + turn, 12)]


@each_page
@each_model
def test_split(name: str, page: int) -> None:
    """The second prompt leaves the first inside of a chunk, and of an edge. With recurrent state it goes on
    from the chunk before, and leaves a state where the two part."""
    kept = 96
    fork = PROMPT[: kept + 2] + tokens_of(3, LENGTH - kept - 2)
    with engine_of(name, page, host=True) as engine:
        engine.say(PROMPT)
        before = engine.cache.stats().nodes
        run = engine.say(fork)
        assert engine.cache.stats().nodes > before + 1
        hit(engine, run, on_device(CHUNK if name in RECURRENT else kept), "fork")
        close(run, cold(name, page, fork), APART[name], "fork")
        run = engine.say(PROMPT)
        hit(engine, run, on_device(SHARED), "first again")
        same_bits(run, cold(name, page, PROMPT), "first again")
        third = PROMPT[: kept + 2] + tokens_of(4, 30)
        run = engine.say(third)
        hit(engine, run, on_device(kept), "where the two part")
        close(run, cold(name, page, third), APART[name], "where the two part")
        engine.evict(DEVICE)
        run = engine.say(fork)
        hit(engine, run, Cached(host=SHARED), "fork, from host")
        close(run, cold(name, page, fork), APART[name], "fork, from host")
        if page == 4:
            control(engine, HOST, PROMPT, Cached(host=SHARED), lambda: engine.evict(DEVICE))


@each_page
@pytest.mark.parametrize("name", WINDOWED + RECURRENT)
def test_tombstone_recovered(name: str, page: int) -> None:
    """Of the window or the states so much goes that a hit is shorter, or none is left. What is computed again
    is inserted again, with the same bytes, since it was computed in the same chunks."""
    kind = SWA if name in WINDOWED else MAMBA
    with engine_of(name, page) as engine:
        engine.say(PROMPT)
        saved, key = copy.deepcopy(engine.saved), engine.key(PROMPT[:SHARED])
        for rest in (SHARED - page, 0):
            while engine.cache.peek(key).device_boundary * page > rest:
                assert engine.cache.evict(1, kind=kind).freed == 1
            left = engine.cache.peek(key).device_boundary * page
            assert (where(engine.cache, key, FULL, DEVICE) >= 0).all()
            recovered = engine.cache.stats().kinds[kind].recovered
            run = engine.say(PROMPT)
            hit(engine, run, on_device(left), f"behind {left}")
            assert engine.cache.stats().kinds[kind].recovered > recovered
            same_bits(run, cold(name, page, PROMPT), f"behind {left}")
            assert engine.saved == saved
            run = engine.say(PROMPT)
            hit(engine, run, on_device(SHARED), f"recovered behind {left}")
            same_bits(run, cold(name, page, PROMPT), f"recovered behind {left}")
        if page == 4:
            control(engine, DEVICE, PROMPT, on_device(SHARED), lambda: None)


@each_page
@each_model
def test_preempted_in_the_middle_of_an_answer(name: str, page: int) -> None:
    """It gives way where its tokens fill whole pages, so that it goes on as if nothing had been: the next
    pass is again of one token, and every bit is the same."""
    tokens, between, count = tokens_of(5, 142), tokens_of(6, LENGTH), 5
    with engine_of(name, page, device=-(-240 // page), host=True) as engine:
        reply = engine.submit(Request(tokens=tokens, max_new_tokens=count))
        while len(reply.tokens) < 3:
            engine.step()
        other = engine.submit(Request(tokens=between, max_new_tokens=1))
        engine.run()
        assert (reply.preemptions, other.preemptions) == (1, 0)
        run, start = engine.ran(reply), 144
        back = [start for start, _, _ in run.passes].index(start)
        assert run.found[back] == engine.reads(start // page)
        assert engine.cache.stats().loaded_back > 0
        assert not engine.wrong
        same_bits(run, cold(name, page, tokens, count), "resumed")
        same_bits(engine.ran(other), cold(name, page, between, 1), "who came between")


@each_model
def test_preempted_control(name: str) -> None:
    """A bit that flips in host memory while somebody has given way."""
    tokens = tokens_of(5, 142)
    with engine_of(name, 4, device=60, host=True) as engine:
        for kind, pool in pools_of(engine.cache.device_pools):
            reply = engine.submit(Request(tokens=tokens, max_new_tokens=5, namespace=f"{kind}{pool}"))
            while len(reply.tokens) < 3:
                engine.step()
            other = engine.submit(Request(tokens=tokens_of(6, LENGTH), max_new_tokens=1))
            while other.first_token is None:
                engine.step()
            assert (reply.preemptions, engine.waiting) == (1, 1)
            engine.evict(DEVICE)
            key = engine.cache.key([*tokens, *reply.tokens], f"{kind}{pool}")
            engine.flip(HOST, key, kind, 35, pool)
            engine.run()
            assert engine.wrong == {(kind, 35)}
            engine.wrong.clear()


@each_page
@each_model
def test_two_that_share_a_prefix_in_one_batch(name: str, page: int) -> None:
    """They decode together, which is another matrix product than decoding alone."""
    with engine_of(name, page) as engine:
        replies = [engine.submit(Request(tokens=each, max_new_tokens=COUNT)) for each in (PROMPT, OTHER)]
        engine.run()
        first, second = map(engine.ran, replies)
        hit(engine, second, on_device(SHARED), "second")
        assert {rows for _, _, rows in first.passes} == {1, 2}
        close(first, cold(name, page, PROMPT), APART[name], "first")
        close(second, cold(name, page, OTHER), APART[name], "second")


@each_page
@each_model
def test_a_hit_in_the_middle_of_a_chunk(name: str, page: int) -> None:
    """From the hit on the chunks are not those of a cold run. A state is there only where a prompt ended."""
    start = PROMPT[:98]
    with engine_of(name, page, host=True) as engine:
        engine.say(start, 1)
        for tail, tier, cached in ((7, (), on_device(96)), (8, (DEVICE,), Cached(host=96))):
            engine.evict(*tier)
            tokens = start + tokens_of(tail, 60)
            run = engine.say(tokens)
            hit(engine, run, cached, str(cached))
            assert run.passes[0][0] % CHUNK
            close(run, cold(name, page, tokens), APART[name], str(cached))
