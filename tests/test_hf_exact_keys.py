"""Who may share on real models: adapters, images, tenants; and that sampling does not see a hit.

What is compared is told in `test_hf_exact.py`.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from exact_support import (
    APART,
    CHUNK,
    COUNT,
    DEVICE,
    LENGTH,
    SHARED,
    Run,
    Watched,
    close,
    computed,
    config_of,
    engine_of,
    hit,
    same_bits,
)
from hf_support import model_of, tokens_of

from tiertree.engines.hf import NAMES, tiny, unwrapped
from tiertree.engines.request import Cached, Limits, Sampling, Span

PROMPT = tokens_of(1, LENGTH)
ON_DEVICE, ON_HOST = Cached(device=SHARED), Cached(host=SHARED)
NOWHERE = Cached()


def adapted(name: str, **seeds: int) -> Any:
    """A model with LoRA adapters of these names, with weights drawn from seeds."""
    wrapped: Any = None
    with torch.random.fork_rng(devices=[]):
        for adapter, seed in seeds.items():
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
            if wrapped is None:
                wrapped = peft.get_peft_model(tiny(name), config, adapter_name=adapter)
            else:
                wrapped.add_adapter(adapter, config)
    return wrapped.eval()


def watched(wrapped: Any, host: bool) -> Watched:
    return Watched(wrapped, config_of(unwrapped(wrapped), host=host), Limits(chunk_tokens=CHUNK))


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1"])
def test_adapters_share_with_their_like_alone(name: str) -> None:
    model = adapted(name, one=1, two=2, twin=1)
    alone: dict[str, Run] = {}
    for adapter in ("", "one", "two"):
        with watched(model, host=False) as engine:
            alone[adapter] = engine.say(PROMPT, adapter=adapter)
    same_bits(alone[""], computed(name, 4, PROMPT, COUNT), "no adapter")
    assert len({tuple(run.logits[LENGTH].tolist()) for run in alone.values()}) == 3
    with watched(model, host=True) as engine:
        for cached in (NOWHERE, ON_DEVICE, ON_HOST):
            if cached == ON_HOST:
                engine.evict(DEVICE)
            for adapter, reference in alone.items():
                run = engine.say(PROMPT, adapter=adapter)
                hit(engine, run, cached, f"{adapter!r}, {cached}")
                same_bits(run, reference, f"{adapter!r}, {cached}")
        run = engine.say(PROMPT, adapter="twin")
        hit(engine, run, ON_DEVICE, "the same weights under another name")
        same_bits(run, alone["one"], "the same weights under another name")
        for adapter in alone:
            run = engine.say(PROMPT, adapter=adapter, namespace="tenant")
            hit(engine, run, NOWHERE, f"{adapter!r} of a tenant")


def image(name: str, seed: int, start: int) -> tuple[Span, ...]:
    """Vectors about as large as those of tokens, for twenty positions."""
    size = model_of(name).config.hidden_size
    vectors = torch.randn(20, size, generator=torch.Generator().manual_seed(seed))
    return (Span(start=start, vectors=vectors),)


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-h1", "deepseek-v3"])
def test_images_share_with_their_like_alone(name: str) -> None:
    """The image lies over the end of the first chunk; what is before it is shared. A recurrent model has no
    state there until somebody else has left the prompt at that place."""
    start = 56
    first, second = image(name, 1, start), image(name, 2, start)
    others = PROMPT[:start] + tokens_of(3, 20) + PROMPT[start + 20 :]
    references = [computed(name, 4, PROMPT, COUNT, spans=each) for each in (first, second, ())]
    assert len({tuple(run.logits[LENGTH].tolist()) for run in references}) == 3
    with engine_of(name, host=True) as engine:
        hit(engine, engine.say(PROMPT, spans=first), NOWHERE, "first")
        for spans, reference in zip((second, ()), references[1:], strict=True):
            run = engine.say(PROMPT, spans=spans)
            before = 0 if spans and name == "falcon-h1" else start
            hit(engine, run, Cached(device=before), "another image, or none")
            close(run, reference, APART[name], "another image, or none")
        run = engine.say(PROMPT, spans=image(name, 1, start))
        hit(engine, run, ON_DEVICE, "the first again")
        same_bits(run, references[0], "the first again")
        run = engine.say(others, spans=first)
        hit(engine, run, ON_DEVICE, "other tokens under the image")
        same_bits(run, references[0], "other tokens under the image")
        engine.evict(DEVICE)
        run = engine.say(PROMPT, spans=first)
        hit(engine, run, ON_HOST, "the first, from host")
        same_bits(run, references[0], "the first, from host")


@pytest.mark.parametrize("name", NAMES)
def test_a_sampled_answer_does_not_depend_on_hits(name: str) -> None:
    warm = Sampling(temperature=0.8, seed=5)
    reference = computed(name, 4, PROMPT, 8, sampling=warm)
    assert reference.tokens != computed(name, 4, PROMPT, 8).tokens
    with engine_of(name, host=True) as engine:
        engine.say(PROMPT, 1)
        for cached in (ON_DEVICE, ON_HOST):
            if cached == ON_HOST:
                engine.evict(DEVICE)
            run = engine.say(PROMPT, 8, sampling=warm)
            hit(engine, run, cached, str(cached))
            same_bits(run, reference, str(cached))
