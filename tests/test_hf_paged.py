"""Models on the pools compute what they compute on transformers' own cache, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hf_support import PAGE, Plain, Prompt, World, kept_plain, model_of, tokens_of
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

from tiertree.engines.hf import NAMES, HFRunner, UnsupportedModel, tiny
from tiertree.engines.hf.paged import PagedCache, Planes
from tiertree.engines.request import InvalidRequest
from tiertree.engines.row import Embeds, Row
from tiertree.types import FULL, MAMBA

CHUNKS = (1, 30, 33, 4, 50, 1, 1, 1, 20, 1)
"""Lengths of passes: a lone first token, chunks off the page boundary, decoding, a chunk again."""
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def others(name: str) -> PreTrainedModel:
    """Architectures beside those of `tiny` whose layers are of another sort."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if name == "windows only":
            made = MistralForCausalLM(MistralConfig(**SMALL, head_dim=16, sliding_window=32))
        elif name == "convolutions only":
            types = ["conv", "full_attention", "conv"]
            made = Lfm2ForCausalLM(Lfm2Config(**SMALL, layer_types=types))
        else:
            config = Llama4TextConfig(
                **SMALL, head_dim=16, intermediate_size_mlp=128, num_local_experts=2, attention_chunk_size=32
            )
            made = Llama4ForCausalLM(config)
    return made.eval()


def feed_both(plain: Plain, prompt: Prompt, tokens: list[int], lengths: tuple[int, ...]) -> None:
    """Feed `tokens` from where both are, in passes of these lengths; logits must be the same bits."""
    for length in lengths:
        part = tokens[plain.done : plain.done + length]
        where = f"{length} tokens at {plain.done}"
        expected, found = plain.feed(part), prompt.feed(part)
        assert not torch.isnan(expected).any(), where
        assert torch.equal(found, expected), (where, float((found - expected).abs().max()))


def same_bytes(plain: Plain, prompt: Prompt) -> None:
    """What both keep is the same, bit for bit."""
    expected, found = kept_plain(plain.cache), prompt.kept()
    assert len(expected) == len(found) > 0
    for index, (one, other) in enumerate(zip(expected, found, strict=True)):
        assert one.dtype == other.dtype
        assert torch.equal(one, other), index


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_kept_bytes_equal_those_on_a_dynamic_cache(name: str, scattered: bool) -> None:
    model = model_of(name)
    world = World(model, seed=1, scattered=scattered)
    plain, prompt, tokens = Plain(model), Prompt(world), tokens_of(2, sum(CHUNKS))
    for length in CHUNKS:
        feed_both(plain, prompt, tokens, (length,))
        same_bytes(plain, prompt)
    assert world.clean()


def test_pages_out_of_order_between_their_ends() -> None:
    """The first and the last page are as far apart as if all between them followed one another."""
    model = model_of("llama")
    plain, prompt, tokens = Plain(model), Prompt(World(model, scattered=False), 8), tokens_of(21, 32)
    prompt.slots[FULL] = prompt.slots[FULL][[0, 2, 1, 3, 5, 6, 4, 7]]
    feed_both(plain, prompt, tokens, (16, 15, 1))
    same_bytes(plain, prompt)


@pytest.mark.parametrize("name", [*NAMES, "windows only", "convolutions only", "chunked attention"])
def test_says_of_itself_what_a_dynamic_cache_does(name: str) -> None:
    """Before a pass and after it, in every layer, for each question that models and masks ask."""
    model = model_of(name) if name in NAMES else others(name)
    world = World(model, seed=22)
    plain, prompt, tokens = Plain(model), Prompt(world), tokens_of(23, 80)
    for length in (1, 20, 12, 33, 1):
        part = tokens[plain.done : plain.done + length]
        row = prompt.row(part)
        ours, theirs = PagedCache(Planes(world.plan, world.pools), [row]), plain.cache
        assert len(ours) == len(theirs)
        assert said(ours, length) == said(theirs, length)
        expected = plain.feed(part)
        with torch.no_grad():
            positions = torch.arange(row.start, row.start + length)[None]
            found = model(
                input_ids=torch.tensor([part]),
                position_ids=positions,
                past_key_values=ours,
                logits_to_keep=1,
            ).logits[:, -1]
        ours.save()
        assert torch.equal(found, expected)
        prompt.passed(row)
        assert [layer[0] for layer in said(ours, 1)] == [layer[0] for layer in said(theirs, 1)]
    same_bytes(plain, prompt)


def said(cache: Cache, length: int) -> list[tuple[object, ...]]:
    """What `cache` answers about each layer, about itself, and before `length` more tokens."""
    answers: list[tuple[object, ...]] = []
    for index, layer in enumerate(cache.layers):
        attends = isinstance(layer, CacheLayerMixin)
        recurs = isinstance(layer, LinearAttentionCacheLayerMixin)
        answers.append(
            (
                cache.get_seq_length(index) if attends else None,
                cache.get_mask_sizes(length, index) if attends else None,
                cache.get_query_offset(index) if attends else None,
                cache.get_max_length(index),
                cache.has_previous_state(index) if recurs else None,
                cache.get_conv_state(index) is None if recurs else None,
                cache.is_recording_past(index),
            )
        )
    return [*answers, (cache.is_sliding, cache.is_linear, cache.is_dummy, cache.is_compileable)]


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_from_pages_copied_elsewhere(name: str) -> None:
    model = model_of(name)
    plain, prompt, tokens = Plain(model), Prompt(World(model, seed=3)), tokens_of(4, 120)
    for lengths in ((45,), (1, 1), (40,), (1, 1, 20)):
        feed_both(plain, prompt, tokens, lengths)
        prompt.move_away()
    feed_both(plain, prompt, tokens, (1, 1))
    same_bytes(plain, prompt)


@pytest.mark.parametrize("name", ["windows only", "convolutions only", "chunked attention"])
def test_other_sorts_of_layers(name: str) -> None:
    model = others(name)
    world = World(model, seed=5)
    plain, prompt, tokens = Plain(model), Prompt(world), tokens_of(6, sum(CHUNKS))
    feed_both(plain, prompt, tokens, CHUNKS)
    same_bytes(plain, prompt)
    assert world.clean()


@pytest.mark.parametrize("name", [*NAMES, "windows only", "chunked attention"])
def test_rows_of_different_length_together_are_as_alone(name: str) -> None:
    """Not the same bits: a batch is another matrix product. But close, and nobody reads anybody else."""
    model = model_of(name) if name in NAMES else others(name)
    world = World(model, seed=7)
    lengths = (1, 5, 31, 32, 33, 80, 3)
    prompts = [Prompt(world, pages=(length + 8) // PAGE + 1) for length in lengths]
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        prompt.feed(tokens_of(100 + index, length))
    for turn in range(4):
        tokens = [tokens_of(1000 * turn + index, 1) for index in range(len(prompts))]
        alone = torch.cat([world.runner.forward([p.row(t)]) for p, t in zip(prompts, tokens, strict=True)])
        rows = [p.row(t) for p, t in zip(prompts, tokens, strict=True)]
        together = world.runner.forward(rows)
        assert together.shape == (len(rows), world.runner.vocab_size)
        assert not torch.isnan(together).any()
        assert torch.equal(together.argmax(1), alone.argmax(1)), turn
        torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)
        for prompt, row in zip(prompts, rows, strict=True):
            prompt.passed(row)
    assert world.clean()


@pytest.mark.parametrize("name", ["llama", "bamba", "falcon-h1"])
def test_first_tokens_may_come_with_others(name: str) -> None:
    model = model_of(name)
    world = World(model, seed=8)
    old, new = Prompt(world, 4), Prompt(world, 4)
    old.feed(tokens_of(9, 6))
    (one, two) = tokens_of(10, 2)
    rows = [old.row([one]), new.row([two])]
    together = world.runner.forward(rows)
    expected = Plain(model).feed([two])
    torch.testing.assert_close(together[1:], expected, rtol=1e-4, atol=1e-4)
    if MAMBA in rows[1].states:  # such rows compute apart
        assert torch.equal(together[1:], expected)


@pytest.mark.parametrize("name", ["gemma3", "falcon-h1", "bamba", "qwen3-next"])
def test_states_and_pages_may_stay_where_they_are(name: str) -> None:
    model = model_of(name)
    plain, prompt, tokens = Plain(model), Prompt(World(model, seed=11)), tokens_of(12, 60)
    feed_both(plain, prompt, tokens, (20,))
    for length in (1, 17, 1, 1):  # the new state is written over the old one
        part = tokens[plain.done : plain.done + length]
        row = prompt.row(part, target=prompt.state)
        assert torch.equal(prompt.world.runner.forward([row]), plain.feed(part))
        prompt.passed(row)
    same_bytes(plain, prompt)


@pytest.mark.parametrize("name", NAMES)
def test_no_layer_is_read_before_it_is_ready(name: str) -> None:
    """Pages arrive layer by layer, and only when asked for."""
    model = model_of(name)
    world = World(model, seed=13)
    plain, prompt, tokens = Plain(model), Prompt(world), tokens_of(14, 60)
    feed_both(plain, prompt, tokens, (41,))
    saved = {kind: [pool.tensor.clone() for pool in world.pools[kind]] for kind in world.pools.kinds}
    for kind in world.pools.kinds:
        world.pools[kind].poison(np.arange(world.pools[kind].main.pages))
    asked: list[int] = []

    def ready(layer: int) -> None:
        if layer in asked:
            return
        asked.append(layer)
        for kind, copies in saved.items():
            for pool, copy in zip(world.pools[kind], copies, strict=True):
                if layer < len(copy):
                    pool.tensor[layer] = copy[layer]

    prompt.ready = ready
    feed_both(plain, prompt, tokens, (7,))
    layers = max(len(copy) for copies in saved.values() for copy in copies)
    assert sorted(asked) == list(range(layers))


@pytest.mark.parametrize("name", ["gemma3", "bamba"])
def test_what_ready_raises_stops_the_pass(name: str) -> None:
    world = World(model_of(name), seed=15)
    prompt = Prompt(world)
    prompt.feed(tokens_of(16, 10))

    def ready(layer: int) -> None:
        if layer == 1:
            raise ConnectionError("gone")

    prompt.ready = ready
    with pytest.raises(ConnectionError, match="gone"):
        prompt.feed(tokens_of(17, 3))
    assert world.clean()


def embedded(model: PreTrainedModel, tokens: list[int], scale: float) -> torch.Tensor:
    with torch.no_grad():
        return model.get_input_embeddings()(torch.tensor(tokens)) * scale


@pytest.mark.parametrize("name", NAMES)
def test_vectors_in_the_place_of_tokens(name: str) -> None:
    """Those that the model itself gives to the tokens change nothing, others do; chunks may cut them."""
    scale = 3.0 if name == "falcon-h1" else 1.0
    model = tiny(name, **({"embedding_multiplier": scale} if name == "falcon-h1" else {}))
    tokens = tokens_of(18, 40)
    plain = Plain(model)
    expected = [plain.feed(tokens[:16]), plain.feed(tokens[16:39]), plain.feed(tokens[39:])]
    for strange in (False, True):
        prompt = Prompt(World(model, seed=19))
        vectors = embedded(model, tokens[10:20], scale)
        prompt.embeds = (Embeds(10, vectors.flip(1) if strange else vectors), Embeds(30, vectors[:0]))
        found = [prompt.feed([0 if 10 <= at < 20 else tokens[at] for at in range(16)])]
        found += [prompt.feed([0] * 4 + tokens[20:39]), prompt.feed(tokens[39:])]
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) != strange


def test_a_model_that_wants_its_tokens_refuses_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    prompt = Prompt(World(model))
    prompt.embeds = (Embeds(0, torch.zeros(2, 64)),)
    lookup = model.get_input_embeddings()
    monkeypatch.setattr(model, "get_input_embeddings", lambda: lambda ids: lookup(ids) + 1)
    with pytest.raises(InvalidRequest, match="spans"):
        prompt.feed([1, 2, 3])


def test_without_positions_rows_compute_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(model_of("llama"), seed=20)
    prompts = [Prompt(world, 8), Prompt(world, 8)]
    for index, prompt in enumerate(prompts):
        prompt.feed(tokens_of(index, 5 + index))
    rows = [prompt.row([7]) for prompt in prompts]
    alone = torch.cat([world.runner.forward([row]) for row in rows])
    passes: list[int] = []
    whole = HFRunner._pass

    def counted(runner: HFRunner, rows: list[Row]) -> torch.Tensor:
        passes.append(len(rows))
        return whole(runner, rows)

    monkeypatch.setattr(HFRunner, "_pass", counted)
    plan = world.runner.plan
    limited = type(plan)(
        **{name: getattr(plan, name) for name in plan.__slots__ if name != "accepts"},
        accepts=plan.accepts - {"position_ids"},
    )
    found = HFRunner(model_of("llama"), limited, world.pools).forward(rows)
    assert torch.equal(found, alone)
    assert passes == [1, 1]


def test_a_model_in_training_mode_is_refused() -> None:
    model = tiny("llama")
    prompt = Prompt(World(model))
    model.train()
    with pytest.raises(UnsupportedModel, match="training"):
        prompt.feed([1])
