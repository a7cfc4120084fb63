"""What clients get back: the JSON of the two routes, whole or as the chunks of a stream.

whole    {"id", "object", "created", "model", "choices": […], "usage"}
chunks   the same with the text that is new, the last of a choice with its `finish_reason`,
         then, if asked for, one without choices that has the `usage`; then [DONE]
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from ..engines.request import NOTHING_CACHED, Cached


class Piece(NamedTuple):
    """New text of the answer to the prompt of this number; in the last one `finish` is not None."""

    number: int
    text: str
    finish: str | None


@dataclass(slots=True)
class Usage:
    """What one HTTP request has used, in tokens of all its prompts together."""

    prompt: int = 0
    answer: int = 0
    cached: Cached = NOTHING_CACHED

    @property
    def as_dict(self) -> dict[str, Any]:
        """As the API has it; `cached_tokens_details` is ours."""
        details = {"cached_tokens": self.cached.total, "cached_tokens_details": self.cached._asdict()}
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.answer,
            "total_tokens": self.prompt + self.answer,
            "prompt_tokens_details": details,
        }


class Form(Protocol):
    """How the answers of one route look."""

    streaming: bool
    prefix: str
    whole_object: str
    chunk_object: str

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Choices that a stream of `count` answers begins with."""
        ...

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The choice of a chunk."""
        ...

    def choice(self, piece: Piece) -> dict[str, Any]:
        """The choice of a whole answer."""
        ...


class TextForm:
    """`/v1/completions`."""

    prefix = "cmpl-"
    whole_object = chunk_object = "text_completion"

    def __init__(self, streaming: bool) -> None:
        self.streaming = streaming

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def delta(self, piece: Piece) -> dict[str, Any]:
        """The same as whole."""
        return self.choice(piece)

    def choice(self, piece: Piece) -> dict[str, Any]:
        """With the text."""
        return {"index": piece.number, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}


class ChatForm:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl-"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, streaming: bool) -> None:
        self.streaming = streaming

    def opening(self, count: int) -> list[dict[str, Any]]:
        """Who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for index in range(count)
        ]

    def delta(self, piece: Piece) -> dict[str, Any]:
        """With the new text, if there is any."""
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.number, "delta": delta, "logprobs": None, "finish_reason": piece.finish}

    def choice(self, piece: Piece) -> dict[str, Any]:
        """With the message."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.number, "message": message, "logprobs": None, "finish_reason": piece.finish}


class Envelope:
    """What all chunks of one answer share."""

    def __init__(self, form: Form, model: str, wants_usage: bool) -> None:
        self.form = form
        self._wants_usage = wants_usage
        self._head = {"id": form.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": model}

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> dict[str, Any]:
        """The answer at once; `pieces` are whole answers in order."""
        choices = [self.form.choice(each) for each in pieces]
        return {**self._head, "object": self.form.whole_object, "choices": choices, "usage": usage.as_dict}

    def chunk(self, choices: list[dict[str, Any]]) -> bytes:
        """One event of a stream."""
        value = {**self._head, "object": self.form.chunk_object, "choices": choices}
        return event({**value, "usage": None} if self._wants_usage else value)

    def ending(self, usage: Usage) -> bytes:
        """The last events of a stream."""
        done = b"data: [DONE]\n\n"
        if not self._wants_usage:
            return done
        value = {**self._head, "object": self.form.chunk_object, "choices": [], "usage": usage.as_dict}
        return event(value) + done


def event(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
