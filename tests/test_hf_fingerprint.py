"""Keys tell models, weights and adapters apart, in every process alike."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_support import Prompt, World, model_of, tokens_of
from transformers import PreTrainedModel

from tiertree.engines.hf import (
    NAMES,
    HFEngine,
    UnsupportedModel,
    adapter_digest,
    cache_config,
    fingerprint,
    tiny,
    unwrapped,
)
from tiertree.engines.hf.adapters import Adapters
from tiertree.engines.request import Finish, InvalidRequest, Limits, Reply, Request

PROMPT = tokens_of(1, 70)


def with_adapters(*names: str, seed: int = 0, alpha: int = 16) -> Any:
    """A tiny Llama with LoRA adapters of random weights, as peft wraps it."""
    wrapped: Any = None
    with torch.random.fork_rng(devices=[]):
        for number, name in enumerate(names):
            torch.manual_seed(1000 * seed + number)
            config = peft.LoraConfig(
                r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"], init_lora_weights=False
            )
            if wrapped is None:
                wrapped = peft.get_peft_model(tiny("llama"), config, adapter_name=name)
            else:
                wrapped.add_adapter(name, config)
    return wrapped.eval()


# -- models and weights ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_same_weights_same_text(name: str) -> None:
    assert fingerprint(tiny(name)) == fingerprint(model_of(name))
    assert fingerprint(tiny(name, seed=1))[1] != fingerprint(model_of(name))[1]


def test_no_two_models_share_a_text() -> None:
    texts = [fingerprint(model_of(name)) for name in NAMES]
    assert len({model for model, _ in texts}) == len({revision for _, revision in texts}) == len(NAMES)


def test_same_text_in_another_process() -> None:
    code = (
        "from tiertree.engines.hf import fingerprint, tiny;"
        "print(*fingerprint(tiny('llama')), *fingerprint(tiny('falcon-h1')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = (*fingerprint(model_of("llama")), *fingerprint(model_of("falcon-h1")))
    assert done.stdout.split() == list(expected)


def one_bit(model: PreTrainedModel) -> None:
    weight = model.get_input_embeddings().weight.data
    weight.view(torch.int32)[500, 3] ^= 1


def last_layer(model: PreTrainedModel) -> None:
    model.model.layers[-1].mlp.down_proj.weight.data[0, 0] += 1


def a_buffer(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq.mul_(2)


def transposed(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.T.contiguous()


def reshaped(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.view(*reversed(weight.shape))


def swapped(model: PreTrainedModel) -> None:
    first, second = (model.model.layers[index].mlp.up_proj.weight for index in (0, 1))
    first.data, second.data = second.data, first.data


@pytest.mark.parametrize("change", [one_bit, last_layer, a_buffer, transposed, reshaped, swapped])
def test_any_change_of_weights_is_another_revision(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny("llama")
    before = fingerprint(model)
    change(model)
    after = fingerprint(model)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_config_element_type_and_attention_are_part_of_the_text() -> None:
    base = fingerprint(tiny("llama"))
    others = [
        fingerprint(tiny("llama", rms_norm_eps=1e-5)),
        fingerprint(tiny("llama", max_position_embeddings=1024)),
        fingerprint(tiny("llama").to(torch.bfloat16)),
        fingerprint(tiny("llama", attn_implementation="eager")),
    ]
    assert len({base[0], *(each[0] for each in others)}) == 5


def test_where_a_model_was_saved_does_not_count(tmp_path: Path) -> None:
    model = tiny("llama")
    model.save_pretrained(tmp_path / "here")
    loaded = type(model).from_pretrained(tmp_path / "here").eval()
    assert fingerprint(loaded) == fingerprint(model)


def test_weights_changed_forgets_what_the_old_ones_computed() -> None:
    model = tiny("llama")
    with HFEngine(model, cache_config(model, device="1MiB", page_size=8), Limits(chunk_tokens=64)) as engine:
        answer(engine)
        assert answer(engine).cached.total > 0
        last_layer(model)
        waiting = engine.submit(Request(tokens=PROMPT))
        with pytest.raises(RuntimeError, match="being served"):
            engine.weights_changed()
        engine.abort(waiting)
        engine.weights_changed()
        assert engine.cache.revision == fingerprint(model)[1]
        assert answer(engine).cached.total == 0
        assert answer(engine).cached.total > 0


# -- adapters -------------------------------------------------------------------------------------


def answer(engine: HFEngine, adapter: str = "", namespace: str = "") -> Reply:
    """What `engine` says to PROMPT."""
    (reply,) = engine.generate([PROMPT], 6, adapter=adapter, namespace=namespace)
    assert reply.finish is Finish.LENGTH
    return reply


def test_a_model_is_the_same_with_and_without_adapters() -> None:
    assert fingerprint(unwrapped(with_adapters("one", "two"))) == fingerprint(tiny("llama"))
    plain = tiny("llama")
    plain.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="c")
    assert fingerprint(plain.eval()) == fingerprint(tiny("llama"))


def test_digests_of_adapters() -> None:
    first, again = (Adapters(unwrapped(with_adapters("one", "two"))) for _ in range(2))
    seeded = Adapters(unwrapped(with_adapters("one", seed=1)))
    stronger = Adapters(unwrapped(with_adapters("one", alpha=32)))
    renamed = Adapters(unwrapped(with_adapters("three")))
    digest = adapter_digest(first, "one")
    assert digest == adapter_digest(again, "one") == adapter_digest(renamed, "three")
    others = [
        adapter_digest(first, "two"),
        adapter_digest(seeded, "one"),
        adapter_digest(stronger, "one"),
    ]
    assert len({digest, *others}) == 4


def test_weights_and_strengths_of_every_part_of_an_adapter_count() -> None:
    """Adapters of embeddings keep their weights in another way; a strength may be set by hand."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["embed_tokens", "o_proj"], init_lora_weights=False)
        model = unwrapped(peft.get_peft_model(tiny("llama"), config, adapter_name="one").eval())
    adapters = Adapters(model)
    seen = {adapter_digest(adapters, "one")}
    parts = [tensor for name, tensor in model.named_parameters() if "lora_" in name]
    for part in parts:
        part.data.flatten()[0] += 1
        seen.add(adapter_digest(adapters, "one"))
    next(iter(adapters.layers.values())).scaling["one"] = 7.0
    seen.add(adapter_digest(adapters, "one"))
    assert len(parts) == 2 + 2 * 4
    assert len(seen) == 2 + len(parts)
    assert fingerprint(model)[1] == fingerprint(tiny("llama"))[1]


def test_adapters_compute_what_peft_computes() -> None:
    wrapped = with_adapters("one", "two")
    ids = torch.tensor([PROMPT])
    expected = {}
    with torch.no_grad():
        for name in ("one", "two"):
            wrapped.set_adapter(name)
            expected[name] = wrapped(input_ids=ids, logits_to_keep=1).logits[:, -1]
        with wrapped.disable_adapter():
            expected[""] = wrapped(input_ids=ids, logits_to_keep=1).logits[:, -1]
    world = World(unwrapped(wrapped), seed=1)
    for name in ("", "one", "two", "one", ""):
        prompt = Prompt(world, 20)
        found = world.runner.forward([prompt.row(PROMPT)], name)
        assert torch.equal(found, expected[name]), name
        for other in expected.keys() - {name}:
            assert not torch.allclose(found, expected[other], atol=1e-3)
    wrapped.set_adapter("two")  # somebody else's doing
    assert torch.equal(world.runner.forward([Prompt(world, 20).row(PROMPT)]), expected[""])
    with pytest.raises(InvalidRequest, match="adapter: 'c' is not known; allowed: '', 'one', 'two'"):
        world.runner.forward([Prompt(world, 20).row(PROMPT)], "c")


def test_adapters_share_nothing() -> None:
    wrapped = with_adapters("one", "two")
    limits = Limits(chunk_tokens=64)
    alone = {}
    for name in ("", "one", "two"):
        with HFEngine(wrapped, cache_config(unwrapped(wrapped), page_size=8), limits) as engine:
            alone[name] = answer(engine, name).tokens
    assert len({tuple(each) for each in alone.values()}) == 3
    with HFEngine(wrapped, cache_config(unwrapped(wrapped), page_size=8), limits) as engine:
        for _ in range(2):
            for name, tokens in alone.items():
                for namespace in ("", "tenant"):
                    assert answer(engine, name, namespace).tokens == tokens
        replies = [answer(engine, name) for name in alone]
        assert all(reply.cached.device == 64 for reply in replies)
        together = [engine.submit(Request(tokens=PROMPT, max_new_tokens=6, adapter=name)) for name in alone]
        engine.run()
        assert [reply.tokens for reply in together] == list(alone.values())
        with pytest.raises(InvalidRequest, match="'c' is not known"):
            engine.submit(Request(tokens=PROMPT, adapter="c"))


def test_no_tenant_looks_like_an_adapter() -> None:
    wrapped = with_adapters("one", "two")
    with HFEngine(wrapped, cache_config(unwrapped(wrapped), page_size=8)) as engine:
        digests = [adapter_digest(Adapters(unwrapped(wrapped)), name) for name in ("one", "two")]
        names = ["", "x", "lora:", "plain:", "plain:lora:", "plain:plain:"]
        names += [f"lora:{digest}:{name}" for digest in digests for name in ("", "x", "lora:")]
        scopes = [
            engine.scope(Request(tokens=[1], namespace=namespace, adapter=adapter))
            for namespace in names
            for adapter in ("", "one", "two")
        ]
    assert len(set(scopes)) == len(scopes)


def test_an_adapter_with_other_weights_is_another() -> None:
    wrapped = with_adapters("one")
    with HFEngine(wrapped, cache_config(unwrapped(wrapped), page_size=8), Limits(chunk_tokens=64)) as engine:
        before = answer(engine, "one").tokens
        scope = engine.scope(Request(tokens=PROMPT, adapter="one"))
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name:
                weight.data.mul_(-3)
        engine.weights_changed()
        reply = answer(engine, "one")
        assert reply.cached.total == 0
        assert reply.tokens != before
        assert engine.scope(Request(tokens=PROMPT, adapter="one")) != scope


def test_adapters_that_cannot_be_switched_are_refused() -> None:
    merged = with_adapters("one")
    merged.merge_adapter()
    with pytest.raises(UnsupportedModel, match="merged into the weights"):
        HFEngine(merged)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    prompts = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(UnsupportedModel, match="supported: LoRA"):
        HFEngine(prompts.eval())
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    whole = peft.get_peft_model(tiny("llama"), config)
    with pytest.raises(UnsupportedModel, match="modules_to_save"):
        HFEngine(whole.eval())
