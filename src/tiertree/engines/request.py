"""What an engine is asked, and what comes back.

    Request ──submit──▶ Reply: waiting ─▶ running ─▶ finished
                          .tokens grows  │  .finish says why it ended

A `Reply` is live: the engine appends to it. It belongs to the engine's thread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ..types import ConfigError, TiertreeError
from ..validate import an_integer
from .row import Embeds


class Overloaded(TiertreeError):
    """So many requests wait already that no more are taken; ask again later."""


class InvalidRequest(TiertreeError, ValueError):
    """A request that can never be served; the message names what is wrong and what is allowed."""


class EngineBroken(TiertreeError):
    """An engine was interrupted while its books were changing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a token is chosen from logits. Raises ConfigError."""

    temperature: float = 0.0
    """0: greedy, the most likely token, the first of equals. Else logits are divided by it."""
    top_p: float = 1.0
    """Nucleus: only the most likely tokens that make this probability together (Holtzman et al., 2020)."""
    top_k: int = 0
    """Only so many of the most likely tokens; 0: all."""
    seed: int | None = None
    """Makes the answer repeatable, whoever is served beside it. None: the engine draws one."""

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 0.0, 100.0), ("top_p", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise ConfigError(f"{name}: {value!r} is not allowed; allowed: {low:g} to {high:g}")
        if self.top_p == 0:
            raise ConfigError("top_p: 0 leaves no token; allowed: above 0, at most 1")
        an_integer(self, "top_k", 0)
        if self.seed is not None:
            an_integer(self, "seed", 0, high=2**63 - 1)


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A placeholder in a prompt, as for an image: tokens `start .. start + n` stand for `vectors` [n, hidden
    size], from which these positions are computed. A digest of the vectors enters the key instead of the
    tokens, so prompts with different images never share what comes after them."""

    start: int
    vectors: torch.Tensor

    @property
    def stop(self) -> int:
        """The position after the last one."""
        return self.start + len(self.vectors)

    def copy(self) -> Span:
        """The same with vectors of its own, that nobody else writes to."""
        return Span(start=self.start, vectors=self.vectors.detach().clone())

    def units(self) -> NDArray[np.int64]:
        """The token units that stand for it in a key: bit 62, which no token has, and 62 bits of a SHA-256
        over the vectors and the place. O(bytes)."""
        vectors = self.vectors.detach().cpu().contiguous()
        about = f"{vectors.dtype};{tuple(vectors.shape)};".encode()
        digest = hashlib.sha256(about + vectors.view(torch.uint8).numpy().tobytes()).digest()
        parts = (
            hashlib.sha256(digest + place.to_bytes(8, "little")).digest() for place in range(len(vectors))
        )
        return np.array([int.from_bytes(each[:8], "little") >> 2 | 1 << 62 for each in parts], np.int64)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Request:
    """One prompt to go on with."""

    tokens: Sequence[int]
    """The prompt: token ids, at least one."""
    max_new_tokens: int = 16
    """Length of the answer at most."""
    sampling: Sampling = GREEDY
    stop: Sequence[int] = ()
    """Tokens that end the answer; the one that does is its last."""
    namespace: str = ""
    """What must never be shared with others: a tenant."""
    adapter: str = ""
    """Name of a LoRA adapter of the model; "": none. Different adapters share nothing."""
    spans: tuple[Span, ...] = ()
    """Placeholders, ascending, not overlapping."""

    @property
    def embeds(self) -> tuple[Embeds, ...]:
        """`spans` as a runner takes them."""
        return tuple(Embeds(each.start, each.vectors) for each in self.spans)


class Finish(StrEnum):
    """Why an answer ended."""

    STOP = "stop"
    """By a stop token."""
    LENGTH = "length"
    """By `max_new_tokens`."""
    ABORT = "abort"
    """By the client."""
    ERROR = "error"
    """By a failure, told in `Reply.error`."""


class Cached(NamedTuple):
    """Tokens of a prompt that needed no prefill, by the tier that held them when the request came."""

    device: int = 0
    host: int = 0
    storage: int = 0

    @property
    def total(self) -> int:
        """Of all tiers."""
        return sum(self)


NOTHING_CACHED = Cached()


@dataclass(slots=True, eq=False)
class Reply:
    """One request's answer as it grows."""

    request: Request
    number: int
    """Counts the requests of an engine."""
    tokens: list[int] = field(default_factory=list)
    """The answer so far."""
    finish: Finish | None = None
    """None while it goes on."""
    error: str | None = None
    """What went wrong, of a reply that ends with an error."""
    cached: Cached = NOTHING_CACHED
    """What its prompt found when it was first admitted."""
    preemptions: int = 0
    """How often it was interrupted, its KV moving out of the device."""
    arrived: float = 0.0
    """When it was submitted, in seconds of the engine's clock."""
    first_token: float | None = None
    """When its first token was there."""
    finished: float | None = None
    """When it ended."""

    @property
    def ttft(self) -> float | None:
        """Time to first token in seconds; None before there is one."""
        return None if self.first_token is None else self.first_token - self.arrived


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an engine takes on. Raises ConfigError."""

    max_tokens: int = 1 << 20
    """Prompt and answer of one request together."""
    max_running: int = 16
    """Requests that compute at the same time."""
    max_waiting: int = 256
    """Requests that wait; more are refused (`Overloaded`)."""
    chunk_tokens: int = 1024
    """Tokens of a prompt that one forward pass computes at most; a multiple of the page size. A model with
    recurrent state saves one where a chunk ends."""
    burst_tokens: int = 1024
    """Tokens of prompts computed in a row at most while others wait for their next token."""
    yields: int = 8
    """How often a request that is decoding gives way to one that waits for its first token, while its KV
    goes to host; 0: never. Without a host tier nobody does."""
    seed: int = 0
    """Where requests that sample without a seed get theirs from."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_running", "max_waiting", "chunk_tokens", "burst_tokens"):
            an_integer(self, name, 1)
        for name in ("yields", "seed"):
            an_integer(self, name, 0)
