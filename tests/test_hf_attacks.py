"""What an attacker has found in the engine and its adapter to transformers: wrong tokens without an error."""

from __future__ import annotations

import peft
import pytest
import torch
from hf_support import model_of, tokens_of
from transformers import JambaConfig, JambaForCausalLM, RobertaConfig, RobertaForCausalLM

from tiertree.engines.hf import HFEngine, UnsupportedModel, cache_config, make_plan, tiny
from tiertree.engines.request import Finish, InvalidRequest, Request, Span
from tiertree.types import ConfigError

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
