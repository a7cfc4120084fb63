"""What a model computes, tried with a few small forward passes, whatever its config says.

causal      1 2 3 4 │ 5 6     logits of the first tokens are the same whatever follows them
            1 2 3 4 │ 7 8
continues   1 2 3 4 5 6       a prompt at once is the same as in pieces
            1 2 3 │ 4 5 │ 6
padding     1 2 3 4 │ 5       a row beside a longer one is the same as alone
            × × 1 2 │ 5
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from ...types import ConfigError

_PIECES: Final = (0, 16, 18, 19)
"""Where a prompt is cut that tries whether a model goes on from its own cache. A lost state shows most soon
after the cut."""
_OFF_MAX: Final = 0.01
_OFF_MAX_HALF: Final = 0.3
"""By how much of their length tensors may differ when a prompt comes in pieces. Rounding makes less than
0.001 of it in float32, in half precision more, above all where a token goes to another expert."""
_FOLLOW_MAX: Final = 1e-4
_FOLLOW_MAX_HALF: Final = 0.05
"""By how much of their length logits may differ with what follows. The passes have one shape, so that
rounding makes nearly nothing of it."""
_UNEVEN: Final = (8, 5)
"""Tokens of two rows that try whether a model heeds the mask of padding."""
_JUNK: Final = 10
"""How much larger than others the values in padding are."""


class UnsupportedModel(ConfigError):
    """A model whose state cannot be kept in pages, or not exactly; the message names the layer or setting."""


class Holds(NamedTuple):
    """What a class of cache layers of transformers holds."""

    kv: bool
    window: bool
    state: bool


HOLDS: Final[dict[type, Holds]] = {
    DynamicLayer: Holds(kv=True, window=False, state=False),
    DynamicSlidingWindowLayer: Holds(kv=True, window=True, state=False),
    LinearAttentionLayer: Holds(kv=False, window=False, state=True),
    LinearAttentionAndFullAttentionLayer: Holds(kv=True, window=False, state=True),
    LinearAttentionAndSlidingWindowAttentionLayer: Holds(kv=True, window=True, state=True),
    DummyLayer: Holds(kv=False, window=False, state=False),
}
"""The layers that can be kept in pages. A class of them made elsewhere is another class, and refused."""


def check_inference(modules: Iterable[tuple[str, torch.nn.Module]]) -> None:
    """Refuse a model any part of which is in training mode: its dropout would get into what is kept."""
    for name, module in modules:
        if module.training:
            part = f", its part {name}" if name else ""
            raise UnsupportedModel(f"model{part}: is in training mode; required: model.eval()")


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model whose first tokens compute something else when other tokens follow."""
    kept = _PIECES[1]
    ids = _ids(model, _PIECES[-1])
    others = ids.clone()
    others[:, kept:] = (others[:, kept:] + 1) % _count(model)
    with torch.no_grad():
        one, other = (
            model(input_ids=each, past_key_values=DynamicCache(config=model.config), use_cache=True).logits
            for each in (ids, others)
        )
    off = _off(one[:, :kept], other[:, :kept])
    if not off <= (_FOLLOW_MAX if model.dtype is torch.float32 else _FOLLOW_MAX_HALF):
        raise UnsupportedModel(
            f"model: {type(model).__name__} computes something else when other tokens follow (off by "
            f"{off:.2%}); supported: causal attention (of some models: is_decoder=True)"
        )


def check_continues(model: PreTrainedModel, accepts: frozenset[str]) -> None:
    """Refuse a model that computes something else when a prompt comes in pieces, at positions that are told:
    some forget their state between passes of several tokens, some count positions otherwise."""
    ids = _ids(model, _PIECES[-1])
    whole, pieces = DynamicCache(config=model.config), DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(input_ids=ids, past_key_values=whole, use_cache=True).logits[:, -1]
        for low, high in pairwise(_PIECES):
            told = _places(model, accepts, low, high)
            found = model(input_ids=ids[:, low:high], past_key_values=pieces, use_cache=True, **told).logits
    pairs = [(expected, found[:, -1]), *zip(_kept(whole), _kept(pieces), strict=True)]
    off = max(_off(one, other) for one, other in pairs)
    if not off <= (_OFF_MAX if model.dtype is torch.float32 else _OFF_MAX_HALF):
        raise UnsupportedModel(
            f"model: {type(model).__name__} computes something else when a prompt comes in pieces (off by "
            f"{off:.2%}); supported: models that go on from their own cache"
        )


def _kept(cache: DynamicCache) -> Iterator[torch.Tensor]:
    """All that a model keeps."""
    layers: Sequence[Any] = cache.layers
    for layer in layers:
        holds = HOLDS[type(layer)]
        tensors = [layer.keys, layer.values] if holds.kv else []
        if holds.state:
            tensors += [*layer.recurrent_states.values(), *layer.conv_states.values()]
        yield from (each for each in tensors if each is not None)


def masks_padding(model: PreTrainedModel, accepts: frozenset[str]) -> bool:
    """Whether a row computes the same beside a longer one as alone: the model heeds the `attention_mask` and
    the `position_ids` that it accepts."""
    long, short = (DynamicCache(config=model.config) for _ in _UNEVEN)
    most, least = _UNEVEN
    token = _ids(model, 1)
    with torch.no_grad():
        model(input_ids=_ids(model, most), past_key_values=long, use_cache=True)
        model(input_ids=_ids(model, least), past_key_values=short, use_cache=True)
        both = _joined(long, short)
        told = {
            "position_ids": torch.tensor([[most], [least]]),
            "attention_mask": (torch.arange(most + 1) >= torch.tensor([[0], [most - least]])).to(torch.int64),
        }
        told = {name: value.to(model.device) for name, value in told.items()}
        told = _places(model, accepts, most, most + 1) | told
        beside = model(input_ids=token.expand(2, 1), past_key_values=both, use_cache=True, **told).logits
        told = _places(model, accepts, least, least + 1)
        alone = model(input_ids=token, past_key_values=short, use_cache=True, **told).logits
    return _off(alone[0, -1], beside[1, -1]) <= (_OFF_MAX if model.dtype is torch.float32 else _OFF_MAX_HALF)


def _places(model: PreTrainedModel, accepts: frozenset[str], low: int, high: int) -> dict[str, torch.Tensor]:
    """Where the new tokens of one row stand, as far as the model takes it."""
    places = torch.arange(low, high, device=model.device)
    told = {"position_ids": places[None], "cache_position": places}
    return {name: value for name, value in told.items() if name in accepts}


def _joined(long: DynamicCache, short: DynamicCache) -> DynamicCache:
    """Two prompts in one cache, the shorter one behind padding that would be noticed."""
    both = copy.deepcopy(long)
    layers: Sequence[Any] = both.layers
    for layer, other in zip(layers, short.layers, strict=True):
        for name, junk in (("keys", 1), ("values", _JUNK)):
            mine, its = getattr(layer, name, None), getattr(other, name, None)
            if mine is not None and its is not None:
                padding = mine[:, :, : mine.shape[2] - its.shape[2]] * junk
                setattr(layer, name, torch.cat([mine, torch.cat([padding, its], dim=2)]))
        for name in ("recurrent_states", "conv_states") if HOLDS[type(layer)].state else ():
            states, its = getattr(layer, name), getattr(other, name)
            for state in [each for each in states if states[each] is not None]:
                states[state] = torch.cat([states[state], its[state]])
    return both


def _off(one: torch.Tensor, other: torch.Tensor) -> float:
    """By how much of its length `other` differs."""
    return float((one.float() - other.float()).norm() / one.float().norm())


def _count(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def _ids(model: PreTrainedModel, count: int) -> torch.Tensor:
    """A prompt of `count` tokens."""
    return torch.arange(count, device=model.device)[None] % _count(model)
