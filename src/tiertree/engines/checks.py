"""What an engine refuses: requests that can never be served, limits that do not fit its cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import PrefixCache
from ..types import ConfigError, Tier
from .request import InvalidRequest, Limits, Request
from .row import Runner
from .sequence import is_state

STATES_MIN = 3
"""States of one recurrent kind that a request may hold: the one it read, the one it writes, one saved."""


def key_units(request: Request, allowed: int, unit_bits: int, runner: Runner) -> NDArray[np.int64]:
    """What stands for the prompt of `request` in keys; prompt and answer may have `allowed` tokens together.
    Raises InvalidRequest. O(tokens)."""
    tokens = _token_ids("tokens", request.tokens, runner.vocab_size)
    _token_ids("stop", request.stop, runner.vocab_size)
    most = request.max_new_tokens
    if type(most) is not int or most < 1:
        raise InvalidRequest(f"max_new_tokens: {most!r} is not allowed; allowed: an int of at least 1")
    if not len(tokens):
        raise InvalidRequest("tokens: there are none; allowed: at least one")
    if len(tokens) + most > allowed:
        raise InvalidRequest(
            f"tokens: {len(tokens)} of the prompt and {most} of the answer are too many; allowed: {allowed}"
        )
    units, end = tokens.copy(), 0
    for index, span in enumerate(request.spans):
        if not isinstance(span.vectors, torch.Tensor) or type(span.start) is not int:
            raise InvalidRequest(f"spans[{index}]: start must be an int, vectors a torch.Tensor")
        shape = tuple(span.vectors.shape)
        if len(shape) != 2 or not shape[0] or shape[1] != runner.hidden_size:
            allowed_shape = f"[at least 1, {runner.hidden_size}]"
            raise InvalidRequest(f"spans[{index}].vectors: {shape} is not allowed; allowed: {allowed_shape}")
        if not end <= span.start or span.stop > len(tokens):
            raise InvalidRequest(
                f"spans[{index}]: {span.start} to {span.stop} is not allowed; allowed: behind the one "
                f"before, inside the prompt of {len(tokens)}"
            )
        if unit_bits != 64:
            raise InvalidRequest("spans: need a cache with unit_bits 64")
        units[span.start : span.stop], end = span.units(), span.stop
    return units


def _token_ids(name: str, values: Sequence[int], vocabulary: int) -> NDArray[np.int64]:
    try:
        tokens = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        tokens = np.empty((1, 1))
    if tokens.shape == (0,):
        return np.empty(0, np.int64)
    if tokens.ndim == 0 and tokens.dtype.kind in "iu":
        raise InvalidRequest(f"{name}: must be a sequence of integers, as [{tokens}], not one")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InvalidRequest(f"{name}: must be a flat sequence of integers")
    if tokens.min() < 0 or tokens.max() >= vocabulary:
        raise InvalidRequest(f"{name}: {tokens.min()} to {tokens.max()}; allowed: 0 to {vocabulary - 1}")
    return tokens.astype(np.int64)


def chunk_tokens(cache: PrefixCache, limits: Limits) -> int:
    """Tokens of a chunk: as the limits say, but no more than the pools of windows take."""
    config = cache.config
    page, chunk = config.page_size, limits.chunk_tokens
    if chunk % page:
        raise ConfigError(f"chunk_tokens: {chunk} is not allowed; allowed: a multiple of page_size {page}")
    capacity = config.kind_pages(Tier.DEVICE)
    for each in config.kinds:
        have = capacity[each.kind]
        if is_state(each):
            if have < STATES_MIN:
                raise ConfigError(f"kinds: {have} slots of {each.kind} are too few; allowed: {STATES_MIN}")
            continue
        far = 1 << 20
        room = have - (far - each.rules.since(far, page)) - 1
        if room < 1:
            raise ConfigError(
                f"kinds: {have} pages of {each.kind} are too few; allowed: at least {have - room + 1}, for "
                "the window and a page to compute"
            )
        chunk = min(chunk, room * page)
    return chunk
