"""The parts of the server that need no server: bytes as tokens, text in pieces, stop strings, fields."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tiertree.engines import hf
from tiertree.server.asked import Chat, Completion, invalid
from tiertree.server.failures import ApiError
from tiertree.server.load import Options, load, open_engine
from tiertree.server.text import Answer, Decoder, Stops
from tiertree.server.tokens import ASSISTANT, END, SYSTEM, USER, ByteTokenizer, PretrainedTokenizer

BYTES = ByteTokenizer()
SHOWN = st.lists(st.integers(0, 255) | st.integers(ASSISTANT + 1, 511))
"""Tokens that show as something."""


def text_of(tokens: list[int], tokenizer: ByteTokenizer | PretrainedTokenizer = BYTES) -> str:
    """Tokens as text, one at a time."""
    decoder = tokenizer.decoder([])
    return "".join(map(decoder.feed, tokens)) + decoder.finish()


# -- bytes as tokens --------------------------------------------------------------------------------


@given(st.text())
def test_text_survives(text: str) -> None:
    plain = "".join(each for each in text if not 0x2800 <= ord(each) < 0x2B00)
    assert text_of(BYTES.encode(plain)) == plain
    assert BYTES.encode(plain) == list(plain.encode())


@given(SHOWN)
def test_whatever_a_model_answers_encodes_to_the_same_tokens(tokens: list[int]) -> None:
    assert BYTES.encode(text_of(tokens)) == tokens


@given(SHOWN | st.text().map(lambda text: list(text.encode())))
def test_what_does_not_print_is_what_the_bytes_say(tokens: list[int]) -> None:
    """Only control characters and the like, which are valid UTF-8, may not print."""
    assert "\ufffd" not in text_of(tokens) or b"\xef\xbf\xbd" in bytes(each for each in tokens if each < 256)
    assert all(
        each.isprintable() or each.encode() in bytes(t for t in tokens if t < 256) for each in text_of(tokens)
    )


def test_a_character_is_held_back_until_it_is_complete() -> None:
    decoder = BYTES.decoder([])
    assert [decoder.feed(each) for each in "é€😀a".encode()] == ["", "é", "", "", "€", "", "", "", "😀", "a"]
    assert [decoder.feed(each) for each in b"\xe2\x82"] == ["", ""]
    assert decoder.feed(ord("x")) == "\u28e2\u2882x"
    assert decoder.feed(0xE2) == ""
    assert decoder.feed(END) == "\u28e2"
    assert decoder.feed(0xE2) == ""
    assert decoder.finish() == "\u28e2"


def test_a_conversation_extends_the_one_before() -> None:
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé?"}]
    answer = [0xE2, 300, 65, 511, 0xFF, 10]
    begun = BYTES.chat(first)
    assert begun[0] == SYSTEM
    assert begun.count(USER) == 1
    assert begun[-1] == ASSISTANT
    second = [*first, {"role": "assistant", "content": text_of(answer)}, {"role": "user", "content": "So?"}]
    assert BYTES.chat(second)[: len(begun) + len(answer) + 1] == [*begun, *answer, END]


# -- the tokenizer of a checkpoint -------------------------------------------------------------------


@pytest.fixture(scope="module")
def pretrained() -> PretrainedTokenizer:
    """A byte-level tokenizer as checkpoints have them, with a few merges, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "w"), ("Ã", "©")]
    names = [*alphabet, *("".join(each) for each in merges), "<end>"]
    model = models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>"), [7])


def test_a_checkpoint_is_loaded_with_its_tokenizer(pretrained: PretrainedTokenizer, tmp_path: Path) -> None:
    hf.tiny("llama", seed=3, eos_token_id=[5, 6]).save_pretrained(tmp_path)
    pretrained._tokenizer.save_pretrained(tmp_path)
    options = Options(model=f"{tmp_path}/", device_memory="1MiB", host_memory="0", dtype="bfloat16")
    assert options.name == tmp_path.name
    model, tokenizer = load(options)
    assert model.dtype.itemsize == 2
    assert tokenizer.enders == (5, 6, pretrained._tokenizer.eos_token_id)
    assert tokenizer.encode("hello wé") == pretrained.encode("hello wé")
    engine = open_engine(model, options)
    try:
        (reply,) = engine.generate([tokenizer.encode("hello")], max_new_tokens=3)
        assert len(reply.tokens) == 3
    finally:
        engine.close()


@given(text=st.text() | st.text("hel wé😀"))
def test_pieces_of_a_pretrained_tokenizer_make_the_text(pretrained: PretrainedTokenizer, text: str) -> None:
    assert text_of(pretrained.encode(text), pretrained) == text


def test_a_pretrained_tokenizer_holds_back_and_ends(pretrained: PretrainedTokenizer) -> None:
    assert pretrained.enders == (7, pretrained._tokenizer.eos_token_id)
    tokens = pretrained.encode("é 😀")
    decoder = pretrained.decoder(pretrained.encode("hello w"))
    pieces = [decoder.feed(each) for each in tokens]
    assert "".join(pieces) + decoder.finish() == "é 😀"
    assert "" in pieces
    assert all("\ufffd" not in each for each in pieces)


def test_without_a_chat_template_there_is_no_chat(pretrained: PretrainedTokenizer) -> None:
    turns = [{"role": "user", "content": "hello"}]
    with pytest.raises(ApiError, match="no chat template"):
        pretrained.chat(turns)
    inner = pretrained._tokenizer
    try:
        inner.chat_template = "{% for m in messages %}{{ m.content }}!{% endfor %}"
        assert pretrained.chat(turns) == pretrained.encode("hello!")
        inner.chat_template = "{{ raise_exception('no such turn') }}"
        with pytest.raises(ApiError, match=r"messages: .*no such turn"):
            pretrained.chat(turns)
    finally:
        inner.chat_template = None


# -- stop strings ------------------------------------------------------------------------------------

LETTERS = st.text("ab", max_size=12)


@given(
    text=LETTERS,
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 12)),
)
def test_stop_strings_cut_however_the_text_comes(text: str, stops: list[str], cuts: list[int]) -> None:
    """Against an oracle that looks at the whole text, letter by letter."""
    expected, over = text, False
    for end in range(len(text) + 1):
        begins = [end - len(each) for each in stops if text[:end].endswith(each)]
        if begins:
            expected, over = text[: min(begins)], True
            break
    edges = sorted({0, len(text), *(each for each in cuts if each < len(text))})
    filter_, shown, found = Stops(stops), "", False
    for start, end in pairwise(edges):
        piece, found = filter_.feed(text[start:end])
        shown += piece
        assert expected.startswith(shown), "what is shown is never taken back"
        if found:
            break
    assert (shown if found else shown + filter_.finish(), found) == (expected, over)


class Letters:
    """Tokens that are letters."""

    def feed(self, token: int) -> str:
        return chr(token)

    def finish(self) -> str:
        return "!"


def test_an_answer_counts_its_tokens_up_to_the_stop() -> None:
    decoder: Decoder = Letters()
    answer = Answer(decoder, ["xy"], frozenset({0}))
    assert answer.feed([97, 120]) == "a"
    assert answer.feed([121, 98, 98]) == ""
    assert (answer.tokens, answer.stopped, answer.finish()) == (3, True, "")
    answer = Answer(Letters(), ["xy"], frozenset({0}))
    assert answer.feed([97, 120, 0]) + answer.finish() == "ax!"
    assert (answer.tokens, answer.stopped) == (3, False)


# -- fields ------------------------------------------------------------------------------------------


def refusal(kind: type[Completion | Chat], body: dict[str, Any]) -> ApiError:
    """How `body` is refused."""
    try:
        asked = kind.model_validate(body)
        asked.check()
        if isinstance(asked, Chat):
            assert asked.turns
    except ValidationError as error:
        return invalid(list(error.errors()))
    except ApiError as error:
        return error
    pytest.fail(f"{body} is allowed")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("max_tokens", each) for each in (0, -1, 1.5, "5", True, 10**400)),
        *(("temperature", each) for each in (-0.1, 2.1, "hot", float("nan"), True)),
        *(("top_p", each) for each in (0, 1.1, [])),
        *(("top_k", each) for each in (-2, 0.5)),
        *(("seed", each) for each in (1 << 63, "x")),
        *(("stop", each) for each in ("", [""], [1], {"a": 1}, ["a"] * 17, "x" * 2000, "\ud800")),
        *(("stop_token_ids", each) for each in (1, ["a"], [True])),
        *(("prompt", each) for each in ("", [], [[]], [1, "a"], [[1], "a"], [1.0], None, 5)[1:]),
        *(("stream", each) for each in (1, "true")),
        *(("n", each) for each in (2, 0, "1", True)),
        *(("best_of", each) for each in (2,)),
        *(("logprobs", each) for each in (True, 5, 0)),
        *(("echo", each) for each in (True,)),
        *(("suffix", each) for each in ("x",)),
        *(("presence_penalty", each) for each in (0.5,)),
        *(("logit_bias", each) for each in ({"5": 1},)),
        *(("user", each) for each in (5, "\udfff")),
        *(("cache_salt", each) for each in ([], "\udfff")),
        *(("model", each) for each in (5,)),
        *(("stream_options", each) for each in (5, {"include_usage": 1}, {"include_usage": True})),
    ],
)
def test_a_wrong_value_is_refused_by_name(field: str, value: Any) -> None:
    error = refusal(Completion, {"prompt": "x", field: value})
    assert (error.status, error.param) == (400, field)
    assert error.message.startswith(field)
    assert error.body["error"]["type"] == "invalid_request_error"
    assert len(error.message) < 300


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        ["x"],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "\ud800"}]}],
    ],
)
def test_messages_that_are_no_text_are_refused(messages: Any) -> None:
    error = refusal(Chat, {"messages": messages})
    assert (error.status, error.param) == (400, "messages")
    error.body["error"]["message"].encode()


def test_what_changes_nothing_is_allowed_and_the_rest_ignored() -> None:
    neutral = {
        "n": 1,
        "logprobs": False,
        "echo": False,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "best_of": None,
    }
    asked = Completion.model_validate({"prompt": [[1], [2]], "whatever": object(), **neutral})
    asked.check()
    assert asked.prompts == [[1], [2]]
    assert (asked.sampling.temperature, asked.sampling.top_k, asked.sampling.seed) == (1.0, 0, None)
    chat = Chat.model_validate(
        {
            "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}, "b"]}],
            "max_tokens": 3,
            "max_completion_tokens": 4,
            "seed": -1,
            "tools": [{"type": "function"}],
            "tool_choice": "none",
        }
    )
    chat.check()
    assert chat.turns == [{"role": "system", "content": "ab"}]
    assert (chat.limit, chat.sampling.seed) == (4, (1 << 63) - 1)


def test_namespaces_of_salts_and_users_are_apart() -> None:
    def of(header: str | None = None, **fields: str) -> str:
        return Completion.model_validate({"prompt": "x", **fields}).namespace(header)

    assert of() == ""
    assert of(user="", cache_salt="") == ""
    assert len({of(), of(user="a"), of(cache_salt="a"), of(user="salt:a"), of(cache_salt="user:a")}) == 5
    assert of(cache_salt="a") == of("a") == of("b", cache_salt="a", user="u")
    assert re.match("user:", of(user="u"))
