"""One HTTP request from its fields to its answer.

Asked ─▶ prompts as tokens ─▶ Exchange ─submit─▶ worker
                               │  pieces() ◀─ updates: text, stop strings, the deadline
                               └─ whatever ends it, nothing of it stays in the engine
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from ..engines.request import Cached, Finish
from ..engines.request import Request as EngineRequest
from .answers import Envelope, Piece, Usage, event
from .asked import Asked, Chat, Completion, unicode
from .failures import ApiError, broken, leaving, refused, too_late
from .text import Answer
from .tokens import Tokenizer
from .worker import Ticket, Update, Worker

COMPLETION_TOKENS = 16
"""Length of a completion when the client does not say."""
CHAT_TOKENS = 1024
"""Length of a chat's answer at most when the client does not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """What every request needs."""

    worker: Worker
    tokenizer: Tokenizer
    name: str
    """What the model is called."""
    vocab_size: int
    request_seconds: float
    """How long one request may take."""

    async def of_completion(self, asked: Completion, salt: str | None) -> Exchange:
        """What `asked` says, with its texts as tokens: they are made in another thread, so that nobody waits
        for them, and last, so that what is refused anyhow costs little. Raises ApiError."""
        self._check(asked, salt)
        given = asked.prompts
        if len(given) > (most := self.worker.requests_max):
            raise refused("prompt", f"{len(given)} prompts are too many; allowed: {most}")
        prompts = await asyncio.to_thread(lambda: [self._completion_tokens(each) for each in given])
        return self._exchange(asked, salt, prompts, "prompt", COMPLETION_TOKENS)

    async def of_chat(self, asked: Chat, salt: str | None) -> Exchange:
        """As `of_completion`. Raises ApiError."""
        self._check(asked, salt)
        turns = asked.turns
        tokens = await asyncio.to_thread(self.tokenizer.chat, turns)
        if not tokens and any(each["content"] for each in turns):
            raise _no_tokens("messages")
        return self._exchange(asked, salt, [tokens], "messages", CHAT_TOKENS)

    def _check(self, asked: Asked, salt: str | None) -> None:
        """What can be said without the tokens of the prompts."""
        asked.check(salt)
        if asked.model is not None and asked.model != self.name:
            raise ApiError(404, f"model: there is only {self.name!r} here", "model", code="model_not_found")
        self._known("stop_token_ids", asked.stop_token_ids or [])

    def _completion_tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            tokens = self.tokenizer.encode(unicode("prompt", prompt))
            if prompt and not tokens:
                raise _no_tokens("prompt")
            return tokens
        self._known("prompt", prompt)
        return prompt

    def _known(self, name: str, tokens: Sequence[int]) -> None:
        strange = next((each for each in tokens if not 0 <= each < self.vocab_size), None)
        if strange is not None:
            raise refused(name, f"there is no token {str(strange)[:30]}; allowed: 0 to {self.vocab_size - 1}")

    def _exchange(
        self, asked: Asked, salt: str | None, prompts: list[list[int]], field: str, default: int
    ) -> Exchange:
        own = asked.stop_token_ids or []
        stop = tuple(dict.fromkeys([*([] if asked.ignore_eos else self.tokenizer.enders), *own]))
        namespace = asked.namespace(salt)
        requests = [
            EngineRequest(
                tokens=each,
                max_new_tokens=self._length(asked.limit, len(each), field, default),
                sampling=asked.sampling,
                stop=stop,
                namespace=namespace,
            )
            for each in prompts
        ]
        answers = [Answer(self.tokenizer.decoder(each), asked.stops, frozenset(stop)) for each in prompts]
        return Exchange(self, requests, answers)

    def _length(self, asked: int | None, prompt: int, field: str, default: int) -> int:
        """How long an answer may become."""
        room = self.worker.longest - prompt
        if not prompt:
            raise refused(field, "is empty; allowed: at least one token")
        if room < (asked or 1):
            raise ApiError(
                400,
                f"{field}: {prompt} tokens and an answer of {asked or 1} are too many; allowed: "
                f"{self.worker.longest} together",
                field,
                code="context_length_exceeded",
            )
        return min(room, default) if asked is None else asked


def _no_tokens(field: str) -> ApiError:
    return refused(field, "the model's tokenizer makes no token of this text; the checkpoint may have none")


class Exchange:
    """The prompts of one HTTP request and their answers. `submit`, then iterate over `pieces` once."""

    def __init__(self, service: Service, requests: list[EngineRequest], answers: list[Answer]) -> None:
        self._service = service
        self._requests = requests
        self._answers = answers
        self._cached: dict[int, Cached] = {}
        self._tickets: list[Ticket] = []
        self.until = asyncio.get_running_loop().time() + service.request_seconds
        """When it must be over, by the loop's clock."""

    @property
    def usage(self) -> Usage:
        """So far."""
        tiers = list(self._cached.values())
        return Usage(
            sum(len(each.tokens) for each in self._requests),
            sum(each.tokens for each in self._answers),
            Cached(*map(sum, zip(*tiers, strict=True))) if tiers else Cached(),
        )

    async def submit(self) -> None:
        """Hand everything in. Raises ApiError: full, going down, or a request that cannot be served."""
        try:
            async with asyncio.timeout_at(self.until):
                self._tickets = await self._service.worker.submit(self._requests)
        except TimeoutError:
            raise too_late(self._service.request_seconds) from None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Text as it comes, until every answer has had its last piece. Raises ApiError when one fails.
        However it is left, what still runs is aborted."""
        going = set(range(len(self._tickets)))
        try:
            while going:
                update = await self._update()
                if update.number in going:
                    piece = self._piece(update)
                    if piece.finish is not None:
                        going.remove(piece.number)
                    if piece.text or piece.finish is not None:
                        yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Abort what still runs. More than once does no harm."""
        self._service.worker.abort(self._tickets)

    async def _update(self) -> Update:
        try:
            async with asyncio.timeout_at(self.until):
                return await self._tickets[0].updates.get()
        except TimeoutError:
            raise too_late(self._service.request_seconds) from None

    def _piece(self, update: Update) -> Piece:
        if update.finish is Finish.ERROR:
            raise broken(update.error or "the engine failed")
        if update.finish is Finish.ABORT:
            raise leaving()
        answer = self._answers[update.number]
        self._cached[update.number] = update.cached
        text = answer.feed(update.tokens)
        if answer.stopped:
            self._service.worker.abort([self._tickets[update.number]])
        elif update.finish is not None:
            text += answer.finish()
        finish = "stop" if answer.stopped or update.finish is Finish.STOP else None
        return Piece(update.number, text, finish or (None if update.finish is None else "length"))

    async def whole(self, envelope: Envelope) -> dict[str, Any]:
        """The answer at once. Raises ApiError."""
        await self.submit()
        texts = [""] * len(self._tickets)
        finishes: list[str | None] = [None] * len(self._tickets)
        async with aclosing(self.pieces()) as pieces:
            async for number, text, finish in pieces:
                texts[number] += text
                finishes[number] = finish
        done = [Piece(*each) for each in zip(range(len(texts)), texts, finishes, strict=True)]
        return envelope.whole(done, self.usage)

    async def events(self, envelope: Envelope) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, after `submit`. What fails on the way is the last event."""
        try:
            async with aclosing(self.pieces()) as pieces:
                for opening in envelope.form.opening(len(self._tickets)):
                    yield envelope.chunk([opening])
                async for piece in pieces:
                    yield envelope.chunk([envelope.form.delta(piece)])
            yield envelope.ending(self.usage)
        except ApiError as error:
            yield event(error.body)
