"""The reference engine: continuous batching over a prefix cache, for any model behind `Runner`.

    submit ─▶ waiting ─▶ running: prefill, chunk by chunk ─▶ decode, together ─▶ finished
                  step = poll · admit · one chunk of one prompt, or one token for everybody who decodes

A token for everybody comes when no prompt is left to compute, and after every `Limits.burst_tokens` of them.
Every chunk is inserted as soon as it is computed, so others share it at once, and it is copied to host
while the next one is computed; an answer is inserted when it ends, or gives way. The first chunk after a
hit begins while its pages are still coming from host: each layer waits for its own.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray

from ..cache import PrefixCache
from ..tree.key import check_namespace
from .checks import chunk_tokens, key_units
from .request import (
    GREEDY,
    EngineBroken,
    Finish,
    InvalidRequest,
    Limits,
    Overloaded,
    Reply,
    Request,
    Sampling,
)
from .row import Runner
from .scheduler import Scheduler, lacks
from .sequence import Lost
from .sequence import Sequence as Served

IDLE_SECONDS = 0.02
"""How long `run` sleeps at most when there is nothing to compute."""
RESTARTS_MAX = 16
"""How often a request may begin again because what it relied on was lost."""


class Engine:
    """Serves requests by `runner` over `cache`, which is open and belongs to the caller's thread, as the
    engine does. Raises ConfigError for limits that do not fit the cache."""

    def __init__(
        self,
        cache: PrefixCache,
        runner: Runner,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.limits = limits or Limits()
        self.clock = clock
        self.idle = True
        """Whether the last step had nothing to compute: time to `wait`."""
        self.broken = False
        """Whether a step was interrupted, by Ctrl-C say, while the books were changing: nothing but closing
        the cache is possible then. An interrupt while the model computes breaks nothing."""
        self._runner = runner
        self._chunk = chunk_tokens(cache, self.limits)
        self._scheduler = Scheduler(cache, self.limits, self._chunk, clock)
        self._count = 0
        self._touched: dict[int, Reply] = {}
        self._since_decode = 0

    # -- requests ---------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._scheduler.waiting)

    @property
    def running(self) -> int:
        """Requests that compute."""
        return len(self._scheduler.running)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do for `step`."""
        return bool(self._scheduler.waiting or self._scheduler.running)

    def scope(self, request: Request) -> str:
        """The namespace of the cache in which `request` shares. Raises InvalidRequest for an adapter."""
        if request.adapter:
            raise InvalidRequest(f"adapter: {request.adapter!r} is not known; allowed: ''")
        return request.namespace

    def submit(self, request: Request) -> Reply:
        """Take `request`; `step` serves it. Raises InvalidRequest for what can never be served, Overloaded
        while `limits.max_waiting` requests wait. O(tokens)."""
        self._check()
        units = self._units(request)
        check_namespace(scope := self.scope(request))
        if self.waiting >= self.limits.max_waiting:
            raise Overloaded(f"{self.waiting} requests wait already; allowed: {self.limits.max_waiting}")
        request = replace(request, spans=tuple(each.copy() for each in request.spans))
        reply = Reply(request, self._count, arrived=self.clock())
        self._count += 1
        seed = request.sampling.seed
        if seed is None:
            seed = (self.limits.seed * 0x9E3779B97F4A7C15 + reply.number) % 2**63
        self._scheduler.waiting.append(Served(self.cache, reply, units, scope, seed))
        return reply

    def abort(self, reply: Reply) -> None:
        """End `reply` now; what it has computed stays in the cache. Nothing if it has ended."""
        if reply.finish is None and not self.broken:
            sequence = next((each for each in self._everybody() if each.reply is reply), None)
            if sequence is None:
                raise InvalidRequest("reply: is not one of this engine's")
            if sequence in self._scheduler.running:
                sequence.hand_over()
            self._end(sequence, Finish.ABORT)

    def abort_all(self) -> None:
        """End everybody."""
        for sequence in [] if self.broken else self._everybody():
            if sequence.reply.finish is None:
                self.abort(sequence.reply)
            else:
                self._scheduler.drop(sequence)

    def _everybody(self) -> list[Served]:
        return [*self._scheduler.running, *self._scheduler.waiting]

    # -- serving ----------------------------------------------------------------------------------

    def step(self) -> list[Reply]:
        """Serve everybody a little: see the drawing above. Waits for nothing but what it computes, and for
        layers that are on their way from host. Returns the replies that have grown or ended. An exception of
        the runner ends the requests that it was computing with an error, and is raised."""
        self._check()
        self.broken = True  # until the books are in order again
        self._touched, self.idle = {}, True
        self.cache.poll()
        for sequence, lacking in self._scheduler.admit():
            self._end(sequence, Finish.ERROR, lacks(lacking))
        computed = self._prefill()
        self._since_decode += computed
        if not computed or self._since_decode >= self.limits.burst_tokens:
            self._since_decode = 0
            self._decode()
        self.broken = False
        return list(self._touched.values())

    def wait(self, seconds: float) -> None:
        """Sleep until something may have come home, somebody calls `cache.wake()`, or for `seconds`."""
        poller = select.poll()
        if (descriptor := self.cache.fileno()) >= 0:
            poller.register(descriptor, select.POLLIN)
        poller.poll(seconds * 1000)

    def run(self, watch: Callable[[list[Reply]], None] | None = None) -> None:
        """Serve until nobody is left. `watch` gets what every step returns."""
        while self.busy:
            touched = self.step()
            if watch is not None:
                watch(touched)
            if self.idle:
                self.wait(IDLE_SECONDS)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int = 16,
        *,
        namespace: str = "",
        sampling: Sampling = GREEDY,
        stop: Sequence[int] = (),
        adapter: str = "",
    ) -> list[Reply]:
        """The answers to `prompts`, any number of them, served together, with whoever else is. A reply with
        an `error` has failed by itself. Raises InvalidRequest before anything is computed."""
        requests = [
            Request(
                tokens=prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                namespace=namespace,
                adapter=adapter,
            )
            for prompt in prompts
        ]
        for request in requests:
            self._units(request)
        replies: list[Reply] = []
        try:
            while len(replies) < len(requests) or self.busy:
                while len(replies) < len(requests) and self.waiting < self.limits.max_waiting:
                    replies.append(self.submit(requests[len(replies)]))
                self.step()
                if self.idle:
                    self.wait(IDLE_SECONDS)
        finally:
            for reply in replies:
                self.abort(reply)
        return replies

    def stream(self, request: Request) -> Iterator[int]:
        """The tokens of one answer as they come, while everybody is served; leaving early aborts it. Raises
        what `submit` does, and RuntimeError if it ends with an error."""
        reply = self.submit(request)
        given = 0
        try:
            while given < len(reply.tokens) or reply.finish is None:
                if given < len(reply.tokens):
                    given += 1
                    yield reply.tokens[given - 1]
                else:
                    self.step()
                    if self.idle and reply.finish is None:
                        self.wait(IDLE_SECONDS)
        finally:
            self.abort(reply)
        if reply.error is not None:
            raise RuntimeError(reply.error)

    # -- passes -----------------------------------------------------------------------------------

    def _prefill(self) -> int:
        """One chunk of the oldest prompt that is not computed yet. Returns its tokens."""
        for sequence in self._by_age():
            if not sequence.decoding:
                if sequence.outdated() and not self._scheduler.readmit(sequence):
                    continue
                count = sequence.chunk(self._chunk)
                if self._scheduler.ready(sequence, count):
                    self._compute([sequence], count)
                    return count
        return 0

    def _decode(self) -> None:
        """One token for everybody who has room for it, those of one adapter at a time."""
        rows = []
        for sequence in self._by_age():
            if sequence.decoding:
                sequence.pass_windows()
                if self._scheduler.ready(sequence, 1):
                    rows.append(sequence)
        rows.sort(key=lambda each: each.reply.request.adapter)
        for _, group in groupby(rows, lambda each: each.reply.request.adapter):
            self._compute(list(group), 1)

    def _by_age(self) -> Iterator[Served]:
        """Who runs, the oldest first; those that give way meanwhile are left out."""
        for sequence in sorted(self._scheduler.running, key=lambda each: each.reply.number):
            if sequence in self._scheduler.running:
                yield sequence

    def _compute(self, sequences: list[Served], count: int) -> None:
        self.idle = False
        prefill = not sequences[0].decoding
        try:
            rows = [each.row(count) for each in sequences]
            logits = self._runner.forward(rows, sequences[0].reply.request.adapter)
        except Lost:
            self._restart(sequences[0])
            return
        except BaseException as error:
            for each in sequences:
                self._end(each, Finish.ERROR, f"{type(error).__name__}: {error}")
            self.broken = False
            raise
        right = torch.isfinite(logits.amax(1)).tolist()  # some may be −∞, but none +∞ or NaN
        for sequence, row, is_right in zip(sequences, logits, right, strict=True):
            if not is_right:
                self._end(sequence, Finish.ERROR, "the model gave no finite logits (NaN or infinite)")
                continue
            try:
                sequence.advance(count)
                if prefill:
                    sequence.commit()
            except Lost:
                self._restart(sequence)
                continue
            if not sequence.left:
                self._token(sequence, row)

    def _restart(self, sequence: Served) -> None:
        """What `sequence` relied on is gone: it computes that itself, but not for ever."""
        sequence.may_load = False
        sequence.restarts += 1
        self._scheduler.requeue(sequence)
        if sequence.restarts > RESTARTS_MAX:
            self._end(sequence, Finish.ERROR, f"lost what it relied on {sequence.restarts} times")

    def _token(self, sequence: Served, logits: torch.Tensor) -> None:
        """All that is known of `sequence` is computed: choose what comes next, or be done."""
        reply = sequence.reply
        if sequence.closing:
            sequence.hand_over()
            self._scheduler.drop(sequence)
            return
        if reply.first_token is None:
            reply.first_token = self.clock()
        token = sequence.chooser.choose(logits)
        reply.tokens.append(token)
        sequence.tokens.append(token)
        self._touched[reply.number] = reply
        stopped = token in reply.request.stop
        if not stopped and len(reply.tokens) < reply.request.max_new_tokens:
            return
        reply.finish, reply.finished = Finish.STOP if stopped else Finish.LENGTH, self.clock()
        if len(sequence.tokens) % self.cache.config.page_size or sequence.ensure(1) is not None:
            sequence.hand_over()
            self._scheduler.drop(sequence)
        else:
            sequence.closing = True

    def _end(self, sequence: Served, finish: Finish, error: str | None = None) -> None:
        reply = sequence.reply
        self._scheduler.drop(sequence)
        if reply.finish is None:
            reply.finish, reply.error, reply.finished = finish, error, self.clock()
            self._touched[reply.number] = reply

    def _units(self, request: Request) -> NDArray[np.int64]:
        config = self.cache.config
        allowed = min(self.limits.max_tokens, config.device_pages * config.page_size)
        return key_units(request, allowed, config.unit_bits, self._runner)

    def _check(self) -> None:
        if self.broken:
            raise EngineBroken("a step of this engine was interrupted half-way; close it and make another")
