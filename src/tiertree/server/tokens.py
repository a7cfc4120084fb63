"""Text to tokens and back: the checkpoint's own tokenizer, or bytes for the tiny models.

    id        0 ············ 255   256    257       258     259          260 ············ 511
    of bytes  the byte itself      end    system    user    assistant    one printable character each

    conversation     S system E  U first E  A answer E  U second E  A        (the next turn extends it)

A tiny model has random weights and answers anything: bytes that are no UTF-8, ids that stand for nothing.
All of it decodes to something printable that encodes to the same ids again, so that an answer which a client
sends back as part of its next turn is found in the cache. Only the four ids of the middle show as nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

from .failures import ApiError
from .text import Decoder

END, SYSTEM, USER, ASSISTANT = range(256, 260)
_ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
_IDS = 512
_HELD_MAX = 8
"""Tokens that are held back at most for a character to become complete."""
_CONTEXT = 6
"""Tokens of a prompt that may change how the first token of its answer reads."""
_BYTES_AS = 0x2800
"""A byte that is no part of valid UTF-8 shows as this braille character and up."""
_IDS_AS = 0x2900
"""An id of no meaning shows as this mathematical character and up."""


class Tokenizer(Protocol):
    """What the server needs of one."""

    @property
    def enders(self) -> tuple[int, ...]:
        """Tokens that end an answer."""
        ...

    def encode(self, text: str) -> list[int]:
        """The tokens of a prompt."""
        ...

    def chat(self, turns: list[dict[str, str]]) -> list[int]:
        """The tokens of a conversation, up to where the assistant answers. Raises ApiError."""
        ...

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """What makes text of the tokens of one answer to `prompt`."""
        ...


class ByteTokenizer:
    """For models without a tokenizer; ids up to 511."""

    enders: tuple[int, ...] = (END,)

    def encode(self, text: str) -> list[int]:
        """One id per byte of UTF-8; of characters that stand for a byte or an id, that. O(characters)."""
        found: list[int] = []
        for each in text:
            code = ord(each)
            if _BYTES_AS <= code < _BYTES_AS + 256:
                found.append(code - _BYTES_AS)
            elif _IDS_AS + ASSISTANT < code < _IDS_AS + _IDS:
                found.append(code - _IDS_AS)
            else:
                found.extend(each.encode())
        return found

    def chat(self, turns: list[dict[str, str]]) -> list[int]:
        """The conversation as the drawing above has it."""
        found: list[int] = []
        for turn in turns:
            found += [_ROLES[turn["role"]], *self.encode(turn["content"]), END]
        return [*found, ASSISTANT]

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """One that holds back incomplete characters."""
        return _ByteDecoder()


class _ByteDecoder:
    def __init__(self) -> None:
        self._bytes = b""

    def feed(self, token: int) -> str:
        if token < 256:
            self._bytes += bytes([token])
            return self._complete(final=False)
        shown = chr(_IDS_AS + token) if token > ASSISTANT else ""
        return self.finish() + shown

    def finish(self) -> str:
        return self._complete(final=True)

    def _complete(self, final: bool) -> str:
        """What is certain of the bytes held; only the beginning of a character stays."""
        shown = ""
        while self._bytes:
            text, used = _character(self._bytes, final)
            if not used:
                break
            shown, self._bytes = shown + text, self._bytes[used:]
        return shown


def _character(held: bytes, final: bool) -> tuple[str, int]:
    """The first character of `held` and its bytes; "" and 0 while it is not complete. What is no UTF-8, or
    is UTF-8 of a character that stands for something else, goes byte by byte."""
    for size in range(1, min(len(held), 4) + 1):
        try:
            text, used = codecs.utf_8_decode(held[:size], "strict", final and size == len(held))
        except UnicodeDecodeError:
            break
        if used:
            special = len(text) == 1 and _BYTES_AS <= ord(text) < _IDS_AS + _IDS
            return (chr(_BYTES_AS + held[0]), 1) if special else (text, used)
    else:
        if not final:
            return "", 0
    return chr(_BYTES_AS + held[0]), 1


class PretrainedTokenizer:
    """The tokenizer of a checkpoint, as transformers loads it; `enders` are the model's."""

    def __init__(self, tokenizer: Any, enders: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        own = tokenizer.eos_token_id
        self.enders: tuple[int, ...] = tuple(dict.fromkeys([*enders, *([] if own is None else [own])]))

    def encode(self, text: str) -> list[int]:
        """As the tokenizer does it for a prompt, with its beginning-of-text token where it has one."""
        return [int(each) for each in self._tokenizer(text)["input_ids"]]

    def chat(self, turns: list[dict[str, str]]) -> list[int]:
        """By the checkpoint's chat template; 400 when it has none, or when that refuses the conversation."""
        from jinja2 import TemplateError

        if not self._tokenizer.chat_template:
            raise ApiError(
                400, "this model has no chat template; use /v1/completions", code="no_chat_template"
            )
        try:
            text = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(
                400, f"messages: refused by the model's chat template: {error}", "messages"
            ) from None
        return [int(each) for each in self._tokenizer(text, add_special_tokens=False)["input_ids"]]

    def decoder(self, prompt: Sequence[int]) -> Decoder:
        """One that holds back incomplete characters."""
        return _PretrainedDecoder(self._tokenizer, prompt[-_CONTEXT:])


class _PretrainedDecoder:
    """Decodes again from a little before the token at hand, since what a token means may depend on the one
    before it; shows what has come on top.

        tokens   ··· │ context ··· │ held ··· │
                     └ `_tokens`   └ `_shown`: of how many the text has been shown
    """

    def __init__(self, tokenizer: Any, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(context)
        self._shown = len(context)

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        return self._complete(final=False)

    def finish(self) -> str:
        return self._complete(final=True)

    def _complete(self, final: bool) -> str:
        before, text = self._text(self._tokens[: self._shown]), self._text(self._tokens)
        if text.endswith("\ufffd") and not final and len(self._tokens) - self._shown < _HELD_MAX:
            return ""
        self._tokens, self._shown = self._tokens[self._shown :], len(self._tokens) - self._shown
        return text[len(before) :]

    def _text(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
