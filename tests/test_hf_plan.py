"""What is read from a model, what is refused, and what a cache for it is made of."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hf_support import model_of
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from tiertree import (
    CacheConfig,
    ConfigError,
    DeviceConfig,
    HostConfig,
    KindConfig,
    KVLayout,
    Mamba,
    PrefixCache,
    SlidingWindow,
    StateLayout,
    StorageConfig,
)
from tiertree.config import SidecarConfig
from tiertree.engines.hf import (
    NAMES,
    HFEngine,
    Plan,
    UnsupportedModel,
    cache_config,
    make_plan,
    tiny,
    unwrapped,
)
from tiertree.engines.hf.plan import HOLDS, KVShape, kinds_of
from tiertree.engines.request import InvalidRequest, Limits, Request
from tiertree.types import FULL, MAMBA, SWA, Kind, Tier

SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def model(kind: str, **fields: Any) -> PreTrainedModel:
    """A small model of transformers' own type `kind`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: PreTrainedModel = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(kind, **SMALL | fields), dtype=torch.float32
        )
    return made.eval()


def places(plan: Plan) -> list[str]:
    """Each layer in short: "full 0", "swa 1 + 0"."""
    found = []
    for each in plan.layers:
        parts = [] if each.place is None else [f"{each.place.kind} {each.place.layer}"]
        found.append(" + ".join([*parts, *map(str, each.states)]))
    return found


# -- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", ["full 0", "full 1", "full 2", "full 3"]),
        ("gemma3", ["swa 0", "swa 1", "full 0", "swa 2", "swa 3", "full 1"]),
        ("gpt-oss", ["swa 0", "full 0", "swa 1", "full 1"]),
        ("falcon-h1", ["full 0 + 0", "full 1 + 1", "full 2 + 2"]),
        ("bamba", ["0", "full 0", "1", "2"]),
        ("qwen3-next", ["0", "1", "2", "full 0"]),
        ("deepseek-v3", ["full 0", "full 1", "full 2"]),
    ],
)
def test_layers_have_places(name: str, expected: list[str]) -> None:
    plan = make_plan(model_of(name))
    assert places(plan) == expected
    assert (plan.vocab_size, plan.hidden_size) == (512, 64)


def test_layouts() -> None:
    page = 8
    assert make_plan(model_of("llama")).layout(FULL, page) == KVLayout(
        layers=4, kv_heads=2, head_size=16, dtype="float32", page_size=page
    )
    assert make_plan(model_of("gemma3")).layout(SWA, page).layers == 4
    latents = make_plan(model_of("deepseek-v3")).layout(FULL, page)
    assert latents == KVLayout(
        layers=3, kv_heads=1, head_size=40, dtype="float32", attention="mla", page_size=page
    )
    plan = make_plan(model_of("bamba"))
    assert plan.state_layout() == StateLayout(layers=3, elements=8 * 16 * 16)
    assert plan.sidecars() == (
        SidecarConfig(name="conv", kind=MAMBA, layout=StateLayout(layers=3, elements=160 * 4)),
    )


def test_element_types_are_those_of_the_model() -> None:
    plan = make_plan(tiny("falcon-h1").to(torch.bfloat16))
    assert plan.shapes[FULL].dtype == "bfloat16"
    assert plan.conv is not None
    assert plan.recurrent is not None
    assert (plan.conv.dtype, plan.recurrent.dtype) == ("bfloat16", "float32")


def test_a_model_of_windows_only_has_them_as_full() -> None:
    plan = make_plan(model("mistral", sliding_window=32, head_dim=16))
    assert places(plan) == ["full 0", "full 1"]
    assert plan.shapes[FULL].window == 32
    assert not plan.windows


def test_the_widest_of_several_windows_is_full() -> None:
    narrow, wide = (KVShape(2, 16, 16, "float32", window) for window in (8, 32))
    other = replace(narrow, heads=4)
    assert kinds_of([narrow, None, wide, other, narrow]) == {FULL: wide, SWA: narrow, Kind("swa-2"): other}
    everything = replace(narrow, window=None)
    assert kinds_of([narrow, everything]) == {FULL: everything, SWA: narrow}
    with pytest.raises(UnsupportedModel, match=r"layers\[1\]: .* supported: full attention of one shape"):
        kinds_of([everything, replace(everything, heads=4)])


def test_windows_of_two_shapes_are_two_kinds() -> None:
    """Gemma 4 has other heads in layers with all tokens than in those with a window."""
    plan = make_plan(model("gemma4_text", head_dim=16, global_head_dim=32, sliding_window=32))
    assert {kind: (shape.key_size, shape.window) for kind, shape in plan.shapes.items()} == {
        FULL: (32, None),
        SWA: (16, 32),
    }


def test_convolutions_without_recurrent_states_are_the_main_pool() -> None:
    plan = make_plan(model("lfm2", layer_types=["conv", "full_attention"]))
    assert plan.recurrent is None
    layout = plan.state_layout()
    assert layout is not None
    assert layout.layers == 1
    assert plan.sidecars() == ()


def test_how_many_tokens_there_are_positions_for() -> None:
    assert make_plan(model("llama", max_position_embeddings=300)).max_tokens == 300
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert make_plan(model("llama", max_position_embeddings=300, rope_parameters=dynamic)).max_tokens == 299
    longrope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    }
    fields = {"original_max_position_embeddings": 128, "rope_parameters": longrope}
    plan = make_plan(model("phi3", max_position_embeddings=300, **fields))
    assert plan.max_tokens == 128


# -- what is refused ------------------------------------------------------------------------------


def test_an_unsupported_layer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    index = next(iter(HOLDS))
    monkeypatch.delitem(HOLDS, index)
    with pytest.raises(UnsupportedModel, match=r"layers\[2\]: DynamicLayer is not supported; supported: "):
        make_plan(tiny("gemma3"))


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("mamba2", {"num_heads": 8, "head_dim": 16, "n_groups": 1}, "layers: none has keys and values"),
        ("falcon_mamba", {}, "layers: none has keys and values"),
        ("deepseek_v32", {}, r"layers\[0\]: DynamicIndexedLayer is not supported"),
        ("recurrent_gemma", {}, "RecurrentGemmaForCausalLM cannot compute four tokens"),
        ("minimax", {"num_local_experts": 4, "head_dim": 16}, "cannot compute four tokens"),
        ("gemma3_text", {"head_dim": 16, "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"is_causal": False}, "is_causal: False"),
    ],
)
def test_models_that_cannot_be_kept_in_pages(kind: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        make_plan(model(kind, **fields))


def test_training_mode_and_encoders_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match=r"training mode; required: model\.eval\(\)"):
        make_plan(tiny("llama").train())
    shape = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    with pytest.raises(UnsupportedModel, match="is_encoder_decoder"):
        make_plan(T5ForConditionalGeneration(T5Config(**shape)).eval())
    with pytest.raises(TypeError, match="Linear is not a model of transformers"):
        unwrapped(torch.nn.Linear(1, 1))


# -- configurations -------------------------------------------------------------------------------


def total(config: CacheConfig, tier: Tier) -> int:
    """Bytes of all pools of a tier."""
    return sum(count * config.slot_bytes[kind] for kind, count in config.kind_pages(tier).items())


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_shared_among_the_kinds(name: str) -> None:
    wanted = 1 << 20
    config = cache_config(model_of(name), device="1MiB", host="3MiB", page_size=8)
    widest = max(config.slot_bytes.values())
    for tier, size in ((Tier.DEVICE, wanted), (Tier.HOST, 3 * wanted)):
        assert size - len(config.slot_bytes) * widest < total(config, tier) <= size
        pages = config.kind_pages(tier)
        assert all(pages[kind] <= pages[FULL] for kind in pages)
        for kind, count in pages.items():
            share = count * config.slot_bytes[kind]
            fair = size // len(pages) - widest
            assert share >= fair or (kind != FULL and count == pages[FULL]), (kind, share)
    assert config.unit_bits == 64
    assert config.device.torch_device == "cpu"


def test_a_partial_kind_has_no_more_slots_than_full_has_pages() -> None:
    """One layer with a window beside three without: its pages are a third as wide."""
    types = ["sliding_attention", *["full_attention"] * 3]
    model = tiny("gemma3", num_hidden_layers=4, layer_types=types)
    pages = cache_config(model, device="1MiB", page_size=8).kind_pages(Tier.DEVICE)
    assert pages == {FULL: 128, SWA: 128}


def test_a_size_in_pages_is_that_of_full() -> None:
    config = cache_config(model_of("gemma3"), device=50, host=70, page_size=8)
    assert config.kind_pages(Tier.DEVICE) == {FULL: 50, SWA: 25}
    assert config.kind_pages(Tier.HOST) == {FULL: 70, SWA: 35}
    config = cache_config(model_of("bamba"), device=4, page_size=8)
    assert config.kind_pages(Tier.DEVICE) == {FULL: 4, MAMBA: 3}


def test_windows_need_one_token_less_than_they_see() -> None:
    kinds = {each.kind: each.rules for each in cache_config(model_of("gemma3")).kinds}
    assert kinds == {SWA: SlidingWindow(window=31)}


def test_own_kinds_stand_instead() -> None:
    own = KindConfig(rules=SlidingWindow(window=64), device=17, host="256KiB")
    config = cache_config(model_of("gemma3"), device="1MiB", host="2MiB", page_size=8, kinds=[own])
    layout = config.layouts[SWA]
    assert config.kinds == (replace(own, layout=layout),)
    assert config.kind_pages(Tier.HOST)[SWA] == (256 << 10) // layout.page_bytes
    for tier, size in ((Tier.DEVICE, 1 << 20), (Tier.HOST, 2 << 20)):
        assert size - config.slot_bytes[FULL] < total(config, tier) <= size
    with pytest.raises(ConfigError, match=r"kinds: \['other'\] are not the model's; allowed: 'swa'"):
        cache_config(model_of("gemma3"), kinds=[KindConfig(rules=Mamba(name="other"), device=3)], page_size=8)


@pytest.mark.parametrize("name", NAMES)
def test_the_least_size_is_told_and_suffices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device\.size: '1KiB' is too small for one request") as caught:
        cache_config(model_of(name), device="1KiB", page_size=8)
    least = int(str(caught.value).split()[-2])
    config = cache_config(model_of(name), device=f"{least}B", page_size=8)
    with HFEngine(model_of(name), config, Limits(chunk_tokens=8)) as engine:
        (reply,) = engine.generate([[1, 2, 3, 4]], max_new_tokens=4)
        assert reply.error is None
        assert len(reply.tokens) == 4
    with pytest.raises(ConfigError, match="too small"):
        cache_config(model_of(name), device=f"{least - 1}B", page_size=8)


def test_fields_of_the_configuration_pass_through(tmp_path: Any) -> None:
    storage = StorageConfig(path=str(tmp_path), size="1MiB")
    config = cache_config(
        model_of("llama"),
        device=DeviceConfig(size="1MiB"),
        host=HostConfig(size="1MiB"),
        storage=storage,
        page_size=4,
        eviction="lru",
        selective_hits=3,
        model="mine",
    )
    assert (config.storage, config.page_size, config.selective_hits, config.model) == (storage, 4, 3, "mine")
    assert config.device_pages == 1 << 20 >> 12


def test_an_engine_fills_in_a_configuration_without_layout() -> None:
    config = CacheConfig(device=DeviceConfig(size=60), host=HostConfig(size=90), page_size=8, events=True)
    with HFEngine(model_of("gemma3"), config) as engine:
        filled = engine.cache.config
    expected = cache_config(model_of("gemma3"), device=60, host=90, page_size=8, events=True)
    assert filled == expected


def test_an_engine_without_a_configuration() -> None:
    with HFEngine(model_of("llama")) as engine:
        assert engine.cache.config == cache_config(model_of("llama"))


def misfits() -> list[tuple[str, dict[str, Any]]]:
    """Changes to a configuration for gemma3 by the start of the message that refuses them."""
    config = cache_config(model_of("gemma3"), device="1MiB", page_size=8)
    (kind,) = config.kinds
    layout = config.layout
    assert layout is not None
    state = StateLayout(layers=1, elements=8)
    renamed = SlidingWindow(window=31, name="other")
    return [
        ("layout.layers: 3 is not the model's; allowed: 2", {"layout": replace(layout, layers=3)}),
        ("layout.dtype: 'bfloat16'", {"layout": replace(layout, dtype="bfloat16")}),
        ("layout.attention", {"layout": replace(layout, attention="mla")}),
        ("kinds[0].layout.kv_heads", {"kinds": (replace(kind, layout=replace(kind.layout, kv_heads=1)),)}),
        ("kinds[0].layout: a StateLayout", {"kinds": (replace(kind, layout=state),)}),
        ("kinds[0].rules", {"kinds": (replace(kind, rules=SlidingWindow(window=8)),)}),
        ("kinds: ['full'] are not", {"kinds": ()}),
        ("kinds: ['full', 'other']", {"kinds": (replace(kind, rules=renamed),)}),
        ("sidecars", {"sidecars": (SidecarConfig(name="more", layout=layout),)}),
        ("revision", {"revision": "other"}),
        ("device.order", {"device": replace(config.device, order="page_first")}),
        ("device.torch_device: 'meta'", {"device": replace(config.device, torch_device="meta")}),
        ("bigram", {"bigram": True}),
    ]


@pytest.mark.parametrize("index", range(13))
def test_a_configuration_that_does_not_fit_is_refused(index: int) -> None:
    begins, changes = misfits()[index]
    config = replace(cache_config(model_of("gemma3"), device="1MiB", page_size=8), **changes)
    with pytest.raises(ConfigError) as caught:
        HFEngine(model_of("gemma3"), config)
    assert str(caught.value).startswith(begins)


def test_wider_rules_than_the_model_needs_are_well() -> None:
    own = KindConfig(rules=SlidingWindow(window=100, checkpoint_tokens=16), device=40)
    config = cache_config(model_of("gemma3"), device="1MiB", page_size=8, kinds=[own])
    with HFEngine(model_of("gemma3"), config, Limits(chunk_tokens=64)) as engine:
        (reply,) = engine.generate([[*range(70)]], max_new_tokens=4)
    with HFEngine(model_of("gemma3"), None, Limits(chunk_tokens=64)) as engine:
        (expected,) = engine.generate([[*range(70)]], max_new_tokens=4)
    assert reply.tokens == expected.tokens


def test_an_engine_keeps_requests_within_the_positions() -> None:
    short = tiny("llama", max_position_embeddings=64)
    with HFEngine(short, cache_config(short, device="1MiB"), Limits(max_tokens=1000)) as engine:
        assert engine.limits.max_tokens == 64
        with pytest.raises(InvalidRequest, match="allowed: 64"):
            engine.submit(Request(tokens=[1] * 60, max_new_tokens=5))
        (reply,) = engine.generate([[1] * 60], max_new_tokens=4)
        assert len(reply.tokens) == 4


def test_an_engine_that_cannot_begin_leaves_no_cache_open(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[PrefixCache] = []
    close = PrefixCache.close

    def watched(cache: PrefixCache, deadline_s: float = 10.0) -> tuple[int, ...]:
        closed.append(cache)
        return close(cache, deadline_s)

    monkeypatch.setattr(PrefixCache, "close", watched)
    config = cache_config(model_of("llama"), device="1MiB", page_size=16)
    with pytest.raises(ConfigError, match="chunk_tokens"):
        HFEngine(model_of("llama"), config, Limits(chunk_tokens=17))
    assert len(closed) == 1


def test_closing_twice_is_well() -> None:
    engine = HFEngine(model_of("llama"), cache_config(model_of("llama"), device="1MiB"))
    reply = engine.submit(Request(tokens=[1, 2, 3]))
    assert engine.close() == ()
    assert reply.finish is not None
    assert engine.close() == ()


def test_the_package_itself_needs_no_transformers() -> None:
    code = (
        "import sys, tiertree, tiertree.engines.engine, tiertree.cli; sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- tiny models ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_are_tiny_and_repeatable(name: str) -> None:
    state = torch.random.get_rng_state()
    one, two, other = tiny(name), tiny(name), tiny(name, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sum(each.numel() for each in one.parameters()) < 1_000_000
    assert not one.training
    weights = [dict(each.state_dict()) for each in (one, two, other)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert any(not torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


@pytest.mark.parametrize("name", NAMES)
def test_tiny_models_do_not_repeat_themselves(name: str) -> None:
    config = cache_config(model_of(name), device="2MiB", page_size=8)
    with HFEngine(model_of(name), config, Limits(chunk_tokens=64)) as engine:
        (reply,) = engine.generate([[*range(50)]], max_new_tokens=24)
    assert len(set(reply.tokens)) >= 12, reply.tokens


def test_tiny_names_and_fields() -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama'"):
        tiny("lama")
    larger = tiny("llama", hidden_size=128, num_hidden_layers=1)
    assert larger.config.hidden_size == 128
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make_plan(larger).layout(Kind("full"), 4).layers == 1
