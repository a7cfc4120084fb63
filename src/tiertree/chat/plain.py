"""Plain transformers behind the interface of an engine: what a prefix cache has to be compared with.

    keep=False   every request computes its whole prompt into a new DynamicCache
    keep=True    one DynamicCache per conversation is kept for ever, and only new tokens are computed: the
                 best that transformers does by itself; memory grows without bound, nothing is shared
                 between conversations, nothing outlives the process

One request at a time, first come, first served, one token per step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from ..engines.request import Cached, Finish, Reply, Request


@dataclass(slots=True)
class _Kept:
    """A cache and the tokens whose KV it has."""

    cache: Any
    tokens: list[int] = field(default_factory=list)


class PlainEngine:
    """Serves greedy requests on `model`, any causal LM that works with DynamicCache. With `keep` the
    namespace of a request names its conversation; what it said before must be the beginning of what it
    says now, or it starts anew."""

    def __init__(self, model: Any, keep: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.idle = False
        self._model = model
        self._keep = keep
        self._clock = clock
        self._waiting: deque[Reply] = deque()
        self._kept: dict[str, _Kept] = {}
        self._now: tuple[Reply, _Kept] | None = None
        self._submitted = 0

    def submit(self, request: Request) -> Reply:
        """Take a request on."""
        reply = Reply(request=request, number=self._submitted, arrived=self._clock())
        self._submitted += 1
        self._waiting.append(reply)
        return reply

    @property
    def busy(self) -> bool:
        """Whether any request is not answered yet."""
        return self._now is not None or bool(self._waiting)

    def step(self) -> list[Reply]:
        """Compute the prompt of the next request, or one more token of the one that is being answered. Waits
        for nothing."""
        if self._now is None:
            if not self._waiting:
                return []
            self._now = self._begin(self._waiting.popleft())
        reply, kept = self._now
        new = [*reply.request.tokens, *reply.tokens][len(kept.tokens) :]
        reply.tokens.append(self._compute(kept, new))
        if reply.first_token is None:
            reply.first_token = self._clock()
        stopped = reply.tokens[-1] in reply.request.stop
        if stopped or len(reply.tokens) == reply.request.max_new_tokens:
            reply.finish, reply.finished = Finish.STOP if stopped else Finish.LENGTH, self._clock()
            self._now = None
        return [reply]

    def wait(self, seconds: float) -> None:
        """Returns at once: nothing ever comes by itself."""

    def _begin(self, reply: Reply) -> tuple[Reply, _Kept]:
        prompt = list(reply.request.tokens)
        kept = self._kept.get(reply.request.namespace) if self._keep else None
        if kept is None or len(kept.tokens) >= len(prompt) or prompt[: len(kept.tokens)] != kept.tokens:
            kept = _Kept(DynamicCache(config=self._model.config))
        if self._keep:
            self._kept[reply.request.namespace] = kept
        reply.cached = Cached(device=len(kept.tokens))
        return reply, kept

    def _compute(self, kept: _Kept, tokens: list[int]) -> int:
        with torch.inference_mode():
            found = self._model(
                torch.tensor([tokens]), past_key_values=kept.cache, use_cache=True, logits_to_keep=1
            )
        kept.tokens += tokens
        return int(found.logits[0, -1].argmax())
