"""What clients send: the fields of the two routes, and which values are allowed.

    body ─▶ Completion | Chat ─▶ .sampling, .stops, .namespace, …

Fields that are not here are ignored, as clients send many. Fields that are known to change the answer, in
the official API or at other servers, and that this server does not do are refused unless they have the value
that changes nothing. Types are strict: "5" is no number. Lengths and ids are checked where the model is
known.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ..engines.request import Sampling
from .failures import ApiError, refused, unsupported

STOPS_MAX = 16
"""Stop strings of one request, and characters of each in hundreds: what is held back is bounded by it."""
STOP_CHARACTERS_MAX = 100 * STOPS_MAX
SALT_BYTES_MAX = 1000
"""Bytes of a salt or a user in UTF-8: what a namespace of the cache takes, less what is put before."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "min_tokens": (0,),
    "min_p": (0,),
    "length_penalty": (1,),
    "use_beam_search": (False,),
    "bad_words": ([],),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "structured_outputs": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "add_special_tokens": (),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
}
"""Fields that are not supported → the values, beside null, that change nothing."""


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool | None = None


class Asked(BaseModel):
    """The fields that both routes have."""

    model_config = ConfigDict(strict=True, extra="allow")

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1, le=1 << 31)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = None

    @field_validator("stop", mode="plain")
    @classmethod
    def _stop(cls, value: object) -> list[str]:
        stops = [] if value is None else [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(each, str) and each for each in stops):
            raise ValueError("Input should be a text or a list of texts, none of them empty")
        if len(stops) > STOPS_MAX or any(len(each) > STOP_CHARACTERS_MAX for each in stops):
            raise ValueError(f"At most {STOPS_MAX} texts of {STOP_CHARACTERS_MAX} characters are allowed")
        return stops

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return self.stop if isinstance(self.stop, list) else []

    @property
    def limit(self) -> int | None:
        """The longest answer that is wanted, in tokens; None: the server's choice."""
        return self.max_tokens

    @property
    def sampling(self) -> Sampling:
        """How tokens are chosen. The API's defaults: temperature 1, everything allowed."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(0, self.top_k or 0),
            seed=None if self.seed is None else self.seed & (1 << 63) - 1,
        )

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with a chunk of its own for `usage`."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def namespace(self, header: str | None) -> str:
        """Whose pages these are, "" for everybody's. `cache_salt` decides, in the body or else in the
        header; then `user`. A user can never have the namespace of somebody's salt."""
        if salt := self.cache_salt or header:
            return f"salt:{salt}"
        return f"user:{self.user}" if self.user else ""

    def check(self, header: str | None = None) -> None:
        """Refuse what this server does not do, text that is not Unicode, and salts that are too long, of
        which `header` is one. Raises ApiError."""
        for name, allowed in _NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value is not None and not any(_same(value, each) for each in allowed):
                if name == "tools" and (self.model_extra or {}).get("tool_choice") == "none":
                    continue
                raise unsupported(name, ", ".join(["null", *map(repr, allowed)]))
        if self.stream_options is not None and not self.stream:
            raise refused("stream_options", "is allowed only with stream")
        for name, text in (("user", self.user), ("cache_salt", self.cache_salt), ("model", self.model)):
            unicode(name, text or "")
        salts = (("user", self.user), ("cache_salt", self.cache_salt), ("X-Cache-Salt", header))
        for name, text in salts:
            if len((text or "").encode()) > SALT_BYTES_MAX:
                raise refused(name, f"is too long; allowed: {SALT_BYTES_MAX} bytes of UTF-8")
        for each in self.stops:
            unicode("stop", each)


def _same(value: object, neutral: object) -> bool:
    """Equal, and a bool only to a bool: `n: true` is not 1."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def unicode(name: str, text: str) -> str:
    """`text`, if it can be written in UTF-8: JSON allows half characters. Raises ApiError."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise refused(name, "holds half of a surrogate pair") from None
    return text


class Completion(Asked):
    """The body of `POST /v1/completions`."""

    prompt: str | list[Any]

    @field_validator("prompt", mode="plain")
    @classmethod
    def _prompt(cls, value: object) -> str | list[Any]:
        if isinstance(value, str) or (isinstance(value, list) and value and (_ids(value) or _many(value))):
            return value
        raise ValueError("Input should be a text, a list of token ids, or a list of either, none empty")

    @property
    def prompts(self) -> list[str | list[int]]:
        """Every prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if _ids(self.prompt) else self.prompt


def _ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _many(value: list[Any]) -> bool:
    return all(isinstance(each, str) for each in value) or all(_ids(each) for each in value)


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Any = None

    @property
    def text(self) -> str:
        """What it says; parts are joined. Raises ApiError for what is not text."""
        parts = [self.content] if isinstance(self.content, str) else self.content
        if not isinstance(parts, list):
            raise refused("messages", "content should be a text or a list of parts of type text")
        return "".join(map(_part, parts))


def _part(part: object) -> str:
    if isinstance(part, str):
        return unicode("messages", part)
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return unicode("messages", part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise unsupported("messages", f"parts of type text, not {str(kind)[:100]!r}")


class Chat(Asked):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=1 << 31)

    @property
    def limit(self) -> int | None:
        """The longest answer that is wanted, in tokens; None: the server's choice."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def turns(self) -> list[dict[str, str]]:
        """The messages as chat templates take them. Raises ApiError."""
        roles = {"developer": "system"}
        return [{"role": roles.get(each.role, each.role), "content": each.text} for each in self.messages]


def invalid(errors: list[Any]) -> ApiError:
    """What pydantic found wrong first, as an ApiError that names the field."""
    first = errors[0]
    if isinstance(first.get("input"), bytes):  # the body as it came: nobody said that it is JSON
        return ApiError(415, "the header Content-Type must be application/json", "Content-Type")
    path = [each for each in first["loc"] if each != "body"]
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid" or not path:
        return ApiError(400, f"the body is not the JSON object that is expected: {message}")
    where = ".".join(str(each) for each in path)
    return ApiError(400, f"{where}: {message}", str(path[0]), code="invalid_value")
