"""Small models of each architecture with random weights: for tests, demos and the curious.

name          keeps
llama         keys and values
gemma3        keys and values, most layers with a window of 32
gpt-oss       the same, every other layer with a window, and attention sinks
falcon-h1     keys and values and states, in every layer
bamba         states, one layer with keys and values
qwen3-next    states of a delta rule, one layer with keys and values
deepseek-v3   latents of keys and values (MLA)
"""

from __future__ import annotations

from typing import Any, Final

import torch
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from ...types import ConfigError
from ...validate import suggestion

_SHARED: Final[dict[str, Any]] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_GAIN: Final = 1.6
"""Weights are drawn this wide, over the root of the hidden size: wide enough that answers do not repeat one
token."""
_WINDOWS: Final = {"head_dim": 16, "sliding_window": 32}
_MAMBA: Final = {
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_CONFIGS: Final[dict[str, tuple[Any, dict[str, Any]]]] = {
    "llama": (LlamaConfig, {"head_dim": 16}),
    "gemma3": (
        Gemma3TextConfig,
        _WINDOWS
        | {
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 4,
            "tie_word_embeddings": False,  # tied ones answer with the token they were asked
            "layer_types": [*["sliding_attention"] * 2, "full_attention"] * 2,
        },
    ),
    "gpt-oss": (
        GptOssConfig,
        _WINDOWS
        | {
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 131072,  # what its rope is scaled to
        },
    ),
    "falcon-h1": (FalconH1Config, _MAMBA | {"num_hidden_layers": 3, "mamba_d_ssm": 128}),
    "bamba": (BambaConfig, _MAMBA | {"attn_layer_indices": [1]}),
    "qwen3-next": (
        Qwen3NextConfig,
        {
            "head_dim": 16,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    "deepseek-v3": (
        DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "num_hidden_layers": 3,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
        },
    ),
}
NAMES: Final = tuple(_CONFIGS)
"""The architectures that there are."""


def tiny(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A model of the architecture `name` with weights drawn from `seed`, float32, on CPU, ready to run; below
    a million parameters unless `overrides`, fields of its config, say otherwise. The same arguments give the
    same weights. Leaves torch's own random numbers as they are. Raises ConfigError for an unknown name."""
    if name not in _CONFIGS:
        raise ConfigError(f"name: {name!r} is unknown{suggestion(name, NAMES)}; allowed: {', '.join(NAMES)}")
    configure, values = _CONFIGS[name]
    fields = _SHARED | values | overrides
    config = configure(**{"initializer_range": _GAIN / fields["hidden_size"] ** 0.5} | fields)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        make = AutoModelForCausalLM.from_config
        model: PreTrainedModel = make(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.train(False)
    return model
