"""What an attacker has found in the engine and its adapter to transformers: wrong tokens without an error."""

from __future__ import annotations

import peft
import pytest
import torch
from hf_support import model_of, tokens_of
from transformers import (
    BertConfig,
    BertLMHeadModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GitConfig,
    GitForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from tiertree.config import CacheConfig, DeviceConfig
from tiertree.engines.hf import HFEngine, Request, Span, UnsupportedModel, cache_config, make_plan, tiny
from tiertree.engines.hf.fingerprint import fingerprint
from tiertree.engines.request import Finish, InvalidRequest
from tiertree.types import ConfigError, InvalidNamespace

SIZES = {
    "vocab_size": 200,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}


def engine_of(model: object) -> HFEngine:
    return HFEngine(model, cache_config(model, device=200, page_size=4))  # type: ignore[arg-type]


def test_positions_that_a_model_counts_otherwise_are_refused() -> None:
    """RoBERTa's begin behind its padding token's number."""
    model = RobertaForCausalLM(RobertaConfig(**SIZES, num_hidden_layers=2, is_decoder=True)).eval()
    with pytest.raises(UnsupportedModel, match="comes in pieces"):
        make_plan(model)


def test_a_state_that_is_forgotten_between_chunks_is_refused() -> None:
    """Jamba's mixer goes on from its state for single tokens only."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = JambaConfig(
            **SIZES,
            num_hidden_layers=4,
            num_key_value_heads=2,
            attn_layer_period=2,
            attn_layer_offset=1,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=8,
            use_mamba_kernels=False,
        )
        model = JambaForCausalLM(config).eval()
    with pytest.raises(UnsupportedModel, match="comes in pieces"):
        make_plan(model)


def test_vectors_that_the_caller_writes_to_again_are_those_of_the_request() -> None:
    first, second = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(1))
    prompt = [1] * 8 + tokens_of(1, 20)

    def ask(engine: HFEngine, vectors: torch.Tensor) -> list[int]:
        request = Request(tokens=prompt, spans=(Span(start=0, vectors=vectors),), max_new_tokens=6)
        reply = engine.submit(request)
        vectors.copy_(second)
        engine.run()
        return reply.tokens

    with engine_of(model_of("llama")) as engine:
        expected = ask(engine, first.clone())
    with engine_of(model_of("llama")) as engine:
        buffer = first.clone()
        assert ask(engine, buffer) == expected
        assert ask(engine, first.clone()) == expected
        assert ask(engine, buffer) != expected


def test_autocast_around_the_engine_changes_nothing() -> None:
    prompt = tokens_of(2, 40)
    with engine_of(model_of("llama")) as engine, torch.autocast("cpu", torch.bfloat16):
        [reply] = engine.generate([prompt], 6)
        lease = engine.cache.acquire(engine.cache.match(engine.cache.key(prompt)))
        assert engine.cache.device_pools is not None
        pool = engine.cache.device_pools["full"].main.logical
        within = pool[torch.from_numpy(lease.slots.copy())].clone()
        lease.release()
    with engine_of(model_of("llama")) as engine:
        [plain] = engine.generate([prompt], 6)
        lease = engine.cache.acquire(engine.cache.match(engine.cache.key(prompt)))
        assert engine.cache.device_pools is not None
        pool = engine.cache.device_pools["full"].main.logical
        assert torch.equal(within, pool[torch.from_numpy(lease.slots.copy())])
        lease.release()
    assert reply.tokens == plain.tokens


def test_an_adapter_that_goes_while_its_request_waits_is_not_answered_by_the_model_alone() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    with engine_of(model.eval().get_base_model()) as engine:
        reply = engine.submit(Request(tokens=tokens_of(3, 20), adapter="b"))
        model.delete_adapter("b")
        with pytest.raises(InvalidRequest, match="'b' is not known"):
            engine.run()
        assert (reply.finish, reply.tokens) == (Finish.ERROR, [])
        assert not engine.busy


def test_adapters_without_a_scaling_are_refused_by_name() -> None:
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    model = peft.get_peft_model(tiny("llama"), config, adapter_name="a").eval()
    with pytest.raises(UnsupportedModel, match=r"adapters: .*q_proj has a .*; supported: LoRA"):
        engine_of(model)


def test_another_attention_kernel_needs_a_new_engine() -> None:
    model = tiny("llama")
    with engine_of(model) as engine:
        model.set_attn_implementation("eager")
        with pytest.raises(ConfigError, match="make a new engine"):
            engine.weights_changed()


@pytest.mark.parametrize("layers", [1, 2, 4])
@pytest.mark.parametrize("width", [0.02, 0.3])
def test_a_model_that_looks_ahead_is_refused(layers: int, width: float) -> None:
    """BERT's config has no `is_causal`, and it fills a cache all the same."""
    sizes = {**SIZES, "num_hidden_layers": layers, "initializer_range": width}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertLMHeadModel(BertConfig(**sizes)).eval()
        causal = BertLMHeadModel(BertConfig(**sizes, is_decoder=True)).eval()
    with pytest.raises(UnsupportedModel, match="when other tokens follow"):
        make_plan(model)
    assert len(make_plan(causal).layers) == layers


def test_rows_of_a_model_that_does_not_mask_padding_go_alone() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GitConfig(**SIZES, num_hidden_layers=2, initializer_range=0.3)
        model = GitForCausalLM(config).eval()
    prompts = [[each % 200 for each in tokens_of(4, count)] for count in (30, 11)]
    with engine_of(model) as engine:
        alone = [engine.generate([each], 6)[0].tokens for each in prompts]
    with engine_of(model) as engine:
        assert [each.tokens for each in engine.generate(prompts, 6)] == alone
    assert "attention_mask" in make_plan(model_of("llama")).accepts


def test_a_merged_adapter_answers_nobody() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config, adapter_name="a").eval()
    model.add_adapter("b", config)
    with engine_of(model.eval()) as engine:
        [expected] = engine.generate([tokens_of(5, 20)], 6, adapter="b")
        model.merge_adapter(["a"])
        for name in ("b", ""):
            with pytest.raises(UnsupportedModel, match="unmerge"):
                engine.generate([tokens_of(6, 20)], 6, adapter=name)
        model.unmerge_adapter()
        assert len(engine.generate([tokens_of(5, 20)], 6, adapter="b")[0].tokens) == len(expected.tokens)


def test_a_part_in_training_mode_is_refused() -> None:
    model = tiny("llama")
    layer = model.model.layers[1]
    layer.train()
    with pytest.raises(UnsupportedModel, match=r"model, its part model\.layers\.1: is in training mode"):
        make_plan(model)
    layer.eval()
    with engine_of(model) as engine:
        layer.self_attn.train()
        with pytest.raises(UnsupportedModel, match="training mode"):
            engine.generate([tokens_of(7, 20)], 6)


def test_kernels_of_parts_and_experts_are_told_apart() -> None:
    model = tiny("gpt-oss")
    before = fingerprint(model)[0]
    model.set_experts_implementation("batched_mm")
    assert fingerprint(model)[0] != before
    text = {**SIZES, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})
    both = Gemma3ForConditionalGeneration(config).eval()
    before = fingerprint(both)[0]
    both.set_attn_implementation({"text_config": "eager"})
    assert fingerprint(both)[0] != before


def test_messages_and_sizes_that_a_user_meets_first() -> None:
    model = model_of("llama")
    with HFEngine(model, CacheConfig(device=DeviceConfig(size=40), page_size=3)) as engine:
        assert engine.limits.chunk_tokens % 3 == 0
        with pytest.raises(InvalidRequest, match=r"stop: must be a sequence of integers, as \[1\], not one"):
            engine.generate([[1, 2]], 2, stop=1)  # type: ignore[arg-type]


def test_a_namespace_may_be_as_long_with_an_adapter() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny("llama"), config, adapter_name="a").eval()
    names = [1024 * "n", 1023 * "n" + "m", "plain:" + 1018 * "n", "plain#" + 64 * "0", "plain", "n"]
    with engine_of(model) as engine:
        asked = [Request(tokens=[1], namespace=name, adapter=each) for name in names for each in ("", "a")]
        scopes = {engine.scope(each) for each in asked}
        assert len(scopes) == len(asked)
        assert max(map(len, scopes)) <= 1024
        with pytest.raises(InvalidNamespace):
            engine.submit(Request(tokens=[1], namespace=1025 * "n", adapter="a"))


def test_a_model_of_another_type_later_is_refused() -> None:
    model = tiny("llama")
    with engine_of(model) as engine:
        model.to(torch.bfloat16)
        with pytest.raises(UnsupportedModel, match="make a new engine"):
            engine.generate([tokens_of(8, 20)], 6)
