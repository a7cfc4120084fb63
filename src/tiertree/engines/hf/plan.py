"""What a model keeps between forward passes, read from its config and from one small forward pass.

    model layer          0     1     2     3
    transformers keeps   KV    KV    KV +  KV
                         win   win   state full
                          │     │    │  │   │
    pool of FULL          │     │    0  │   1        layers of a kind are counted by themselves
    pool of a window      0     1       │
    pool of states                      0            recurrent states; short convolutions ride on them

Keys and values of one size are two planes of a page; of unequal sizes (the latents of MLA) they lie side by
side in one. Everything that makes a layer's state more than a function of the tokens before it is refused
here, by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedModel

from ...config import Attention, KVLayout, SidecarConfig, StateLayout
from ...types import FULL, MAMBA, SWA, Kind
from .probe import (
    HOLDS,
    Holds,
    UnsupportedModel,
    check_causal,
    check_continues,
    check_inference,
    masks_padding,
)

RECURRENT: Final = "recurrent"
CONV: Final = "conv"
"""What states there are. The second is the name of the sidecar on which short convolutions' states ride."""
_PROBE_TOKENS: Final = 4
_DTYPES: Final = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token leaves in one attention layer."""

    heads: int
    key_size: int
    value_size: int
    dtype: str
    window: int | None
    """Tokens that a query sees, itself included; None: all before it."""

    @property
    def split(self) -> bool:
        """Whether keys and values are planes of their own; otherwise they lie side by side in one."""
        return self.key_size == self.value_size

    def layout(self, layers: int, page_size: int) -> KVLayout:
        """The pages of `layers` such layers."""
        return KVLayout(
            layers=layers,
            kv_heads=self.heads,
            head_size=self.key_size if self.split else self.key_size + self.value_size,
            dtype=self.dtype,
            attention=Attention.MHA if self.split else Attention.MLA,
            page_size=page_size,
        )


@dataclass(frozen=True, slots=True)
class StateShape:
    """One state of one layer, without the batch: its shape and element type."""

    shape: tuple[int, ...]
    dtype: str

    def layout(self, layers: int) -> StateLayout:
        """A slot that holds `layers` of them."""
        return StateLayout(layers=layers, elements=torch.Size(self.shape).numel(), dtype=self.dtype)


class Place(NamedTuple):
    """Where a layer's keys and values are: the kind, and which layer of its pool."""

    kind: Kind
    layer: int


class LayerPlan(NamedTuple):
    """What one layer of the model keeps, and where."""

    holds: Holds
    place: Place | None
    """Its keys and values; None: it has none."""
    states: range
    """Its states, as layers of the pools of states; empty: it has none."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything a model keeps."""

    layers: tuple[LayerPlan, ...]
    shapes: Mapping[Kind, KVShape]
    """Keys and values by kind, FULL first. FULL has a window where every layer of the model has one."""
    recurrent: StateShape | None
    """The recurrent state of every layer that has states."""
    conv: StateShape | None
    """The short convolution's state of every layer that has states."""
    vocab_size: int
    hidden_size: int
    max_tokens: int | None
    """For longer prompts the model has no positions, or gives earlier tokens other KV; None: no limit."""
    accepts: frozenset[str]
    """Names of the arguments that the model's forward pass takes, and heeds."""

    @property
    def windows(self) -> dict[Kind, KVShape]:
        """Those of `shapes` that are partial kinds."""
        return {kind: shape for kind, shape in self.shapes.items() if kind != FULL}

    @property
    def states(self) -> int:
        """States of all layers together."""
        return sum(len(each.states) for each in self.layers)

    def layout(self, kind: Kind, page_size: int) -> KVLayout:
        """The pages of a kind of `shapes`."""
        count = sum(each.place is not None and each.place.kind == kind for each in self.layers)
        return self.shapes[kind].layout(count, page_size)

    def state_layout(self) -> StateLayout | None:
        """The main pool of states: the recurrent ones, or where there are none the convolutions'."""
        main = self.recurrent or self.conv
        return None if main is None else main.layout(self.states)

    def sidecars(self) -> tuple[SidecarConfig, ...]:
        """The convolutions' states beside the recurrent ones."""
        if self.recurrent is None or self.conv is None:
            return ()
        return (SidecarConfig(name=CONV, layout=self.conv.layout(self.states), kind=MAMBA),)


def make_plan(model: PreTrainedModel) -> Plan:
    """Read `model`, with a few forward passes of up to 19 tokens. Raises UnsupportedModel."""
    _check_settings(model)
    config = model.config.get_text_config(decoder=True)
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) not in HOLDS:
            raise UnsupportedModel(
                f"layers[{index}]: {type(layer).__name__} is not supported; supported: "
                f"{', '.join(each.__name__ for each in HOLDS)}"
            )
    vocab_size = _probe(model, cache)
    kvs = [_kv_shape(index, layer) for index, layer in enumerate(cache.layers)]
    shapes = kinds_of(kvs)
    recurrent, conv = _states(cache.layers)
    accepts = frozenset(inspect.signature(model.forward).parameters)
    check_causal(model)
    check_continues(model, accepts)
    if {"position_ids", "attention_mask"} <= accepts and not masks_padding(model, accepts):
        accepts -= {"attention_mask"}
    return Plan(
        layers=_places(cache.layers, kvs, shapes),
        shapes=shapes,
        recurrent=recurrent,
        conv=conv,
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        max_tokens=_max_tokens(config),
        accepts=accepts,
    )


def _probe(model: PreTrainedModel, cache: DynamicCache) -> int:
    """Let the model fill `cache` with the state of a few tokens. Returns the logits that a token gets."""
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None]
    try:
        with torch.no_grad():
            return int(model(input_ids=ids, past_key_values=cache, use_cache=True).logits.shape[-1])
    except Exception as error:
        raise UnsupportedModel(
            f"model: {type(model).__name__} cannot compute four tokens on a DynamicCache: {error}"
        ) from error


def _check_settings(model: PreTrainedModel) -> None:
    """Refuse what makes state more than a function of the tokens before it."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise UnsupportedModel("is_encoder_decoder: True is not supported; supported: decoder-only models")
    if not getattr(config, "is_causal", True):
        raise UnsupportedModel("is_causal: False is not supported; supported: causal attention")
    if both := getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModel(
            f"use_bidirectional_attention: {both!r} is not supported; supported: causal attention"
        )
    check_inference(model.named_modules())
    if len({each.device for each in model.parameters()}) > 1:
        raise UnsupportedModel("model: is spread over several devices; supported: all of it on one")


def _max_tokens(config: Any) -> int | None:
    """How many tokens the positions of a model are good for."""
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        kind = str(each.get("rope_type", ""))
        if "dynamic" in kind:  # keys turn otherwise from the first longer prompt on, until a shorter one
            limits.append(config.max_position_embeddings - 1)
        elif kind == "longrope":
            limits.append(each.get("original_max_position_embeddings"))
    known = [each for each in limits if isinstance(each, int)]
    return min(known, default=None)


def _kv_shape(index: int, layer: Any) -> KVShape | None:
    """What the probe has left in an attention layer; None for any other."""
    holds = HOLDS[type(layer)]
    if not holds.kv:
        return None
    keys, values = layer.keys, layer.values
    if keys is None or values is None:
        raise UnsupportedModel(f"layers[{index}]: {type(layer).__name__} was not used; supported: used ones")
    window = layer.sliding_window if holds.window else None
    if window is not None and window < 2:
        raise UnsupportedModel(
            f"layers[{index}]: a window of {window} is not supported; supported: 2 or more"
        )
    if keys.shape[:3] != values.shape[:3] or keys.dtype != values.dtype or keys.dtype not in _DTYPES:
        raise UnsupportedModel(
            f"layers[{index}]: keys {keys.dtype} {list(keys.shape)} and values {values.dtype} "
            f"{list(values.shape)} are not supported; supported: as many heads of both, of one type of "
            f"{', '.join(_DTYPES.values())}"
        )
    return KVShape(keys.shape[1], keys.shape[-1], values.shape[-1], _DTYPES[keys.dtype], window)


def kinds_of(kvs: Sequence[KVShape | None]) -> dict[Kind, KVShape]:
    """A kind for each shape: FULL for what sees all tokens, or else for the widest window."""
    found = dict.fromkeys(each for each in kvs if each is not None)
    if not found:
        raise UnsupportedModel("layers: none has keys and values; supported: models with attention layers")
    full = [each for each in found if each.window is None]
    if len(full) > 1:
        index = kvs.index(full[1])
        raise UnsupportedModel(
            f"layers[{index}]: {full[1]} beside {full[0]} is not supported; supported: full attention of one "
            "shape"
        )
    spine = full[0] if full else max(found, key=lambda each: each.window or 0)
    others = [each for each in found if each is not spine]
    names = (SWA, *(Kind(f"{SWA}-{number}") for number in range(2, len(others) + 1)))
    return {FULL: spine, **dict(zip(names, others, strict=False))}


def _states(layers: Sequence[Any]) -> tuple[StateShape | None, StateShape | None]:
    """The recurrent and the convolutions' state of the layers that have states, all alike."""
    found: dict[tuple[StateShape | None, StateShape | None], int] = {}
    for index, layer in enumerate(layers):
        if not HOLDS[type(layer)].state:
            continue
        for state in range(layer.number_of_states):
            pair = _state(layer.recurrent_states[state]), _state(layer.conv_states[state])
            if not layer.has_previous_state[state] or pair == (None, None):
                raise UnsupportedModel(
                    f"layers[{index}]: {type(layer).__name__} keeps no state number {state} to go on from"
                )
            found.setdefault(pair, index)
    if len(found) > 1:
        index = [*found.values()][1]
        raise UnsupportedModel(
            f"layers[{index}]: states of several shapes are not supported ({[*found]}); supported: one for "
            "all layers"
        )
    return next(iter(found), (None, None))


def _state(tensor: torch.Tensor | None) -> StateShape | None:
    if tensor is None:
        return None
    if tensor.dtype not in _DTYPES:
        raise UnsupportedModel(f"states: {tensor.dtype} is not supported; supported: {[*_DTYPES.values()]}")
    return StateShape(tuple(tensor.shape[1:]), _DTYPES[tensor.dtype])


def _places(
    layers: Sequence[Any], kvs: Sequence[KVShape | None], shapes: Mapping[Kind, KVShape]
) -> tuple[LayerPlan, ...]:
    """Count the layers of each kind."""
    kinds = {shape: kind for kind, shape in shapes.items()}
    counts = dict.fromkeys(shapes, 0)
    states = 0
    plans = []
    for layer, shape in zip(layers, kvs, strict=True):
        holds = HOLDS[type(layer)]
        place = None
        if shape is not None:
            place = Place(kinds[shape], counts[kinds[shape]])
            counts[place.kind] += 1
        own = range(states, states + layer.number_of_states) if holds.state else range(0)
        states += len(own)
        plans.append(LayerPlan(holds, place, own))
    return tuple(plans)
