"""The reference engine over a model that breaks: those concerned end with an error, all others go on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_support import Bench, make_config, prompt, sized

from tiertree import Mamba, SlidingWindow
from tiertree.engines.engine import Engine
from tiertree.engines.request import Request, Sampling
from tiertree.engines.row import Row

KINDS = (sized(SlidingWindow(window=7), 24, 48), sized(Mamba(), 16, 32))
BAD = {"NaN": [float("nan")], "plus infinity": [float("inf")], "nothing possible": [float("-inf")] * 40}
each_model = pytest.mark.parametrize("kinds", [(), KINDS], ids=["full", "all"])


class Broken(Exception):
    """What the model raises."""


def breaking(bench: Bench, rows: int, start: int) -> None:
    """The model raises once: in a pass of so many rows, the first of which begins at `start` or later."""

    def before(given: Sequence[Row]) -> None:
        if len(given) == rows and given[0].start >= start:
            bench.runner.before = lambda rows: None
            raise Broken("a kernel failed")

    bench.runner.before = before


@each_model
@pytest.mark.parametrize("start", [0, 8, 16])
def test_a_model_that_raises_in_a_prompt_ends_that_request(kinds: Any, start: int) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        first, second = bench.submit(prompt(1, 22), 4), bench.submit(prompt(2, 9), 4)
        breaking(bench, 1, start)
        with pytest.raises(Broken):
            bench.step(9)
        assert (first.finish, first.error) == ("error", "Broken: a kernel failed")
        assert first.finished is not None
        bench.run()
        assert second.finish == "length"
        assert bench.say(prompt(1, 22), 4).cached.device == start  # what was committed before is good


@each_model
def test_a_model_that_raises_while_decoding_ends_those_of_the_pass(kinds: Any) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        pair = [bench.submit(prompt(number, 7), 9) for number in range(2)]
        bench.until(lambda: len(pair[1].tokens) == 3)
        late = bench.submit(prompt(5, 30), 3)
        breaking(bench, 2, 0)
        with pytest.raises(Broken):
            bench.step(20)
        assert [each.finish for each in pair] == ["error", "error"]
        bench.run()
        assert late.finish == "length"


@each_model
@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_say_nothing_end_that_request_alone(kinds: Any, name: str, temperature: float) -> None:
    with Bench(make_config(kinds=kinds)) as bench:
        sampling = Sampling(temperature=temperature, seed=3)
        trio = [bench.submit(prompt(number, 7), 6, sampling=sampling) for number in range(3)]
        bench.until(lambda: len(trio[2].tokens) == 2)

        def after(logits: torch.Tensor) -> torch.Tensor:
            bench.runner.after = lambda given: given
            logits[1, : len(BAD[name])] = torch.tensor(BAD[name])
            return logits

        bench.runner.after = after
        touched = bench.step()
        assert trio[1] in touched
        assert trio[1].finish == "error"
        assert trio[1].error == "the model gave no finite logits (NaN or infinite)"
        bench.run()
        assert [each.finish for each in trio] == ["length", "error", "length"]


def test_nothing_is_kept_of_a_chunk_whose_logits_say_nothing() -> None:
    with Bench() as bench:
        bench.runner.after = lambda logits: logits * float("nan")
        assert bench.say(prompt(1, 22), 2).finish == "error"
        bench.runner.after = lambda logits: logits
        assert bench.say(prompt(1, 22), 2).cached.total == 0


def test_tokens_that_are_impossible_do_no_harm() -> None:
    with Bench() as bench:

        def after(logits: torch.Tensor) -> torch.Tensor:
            logits[:, 1:] = float("-inf")
            return logits

        bench.runner.after = after
        reply = bench.submit(prompt(1, 5), 3, sampling=Sampling(temperature=1.0))
        bench.until(lambda: not bench.engine.busy)
        assert (reply.tokens, reply.finish) == ([0, 0, 0], "length")


def test_a_stream_of_a_request_that_fails_says_so() -> None:
    with Bench() as bench:
        stream = bench.engine.stream(Request(tokens=prompt(1, 5), max_new_tokens=9))
        next(stream)
        bench.runner.after = lambda logits: logits * float("nan")
        with pytest.raises(RuntimeError, match="no finite logits"):
            list(stream)
        assert not bench.engine.busy


class Adapters(Engine):
    """An engine with adapters."""

    def scope(self, request: Request) -> str:
        return f"{request.adapter}/{request.namespace}"


@each_model
def test_adapters_share_nothing_and_a_pass_has_one(kinds: Any) -> None:
    """Rows of another adapter in one pass would read a wrong chain."""
    with Bench(make_config(60, kinds=kinds), kind=Adapters) as bench:
        for number in range(6):
            bench.submit(prompt(number % 2, 9), 5, adapter=("", "lora", "other")[number % 3])
        bench.run()
        assert max(len(rows) for rows in bench.runner.passes) == 2
        again = [bench.say(prompt(0, 9), 5, adapter=adapter).cached.total for adapter in ("", "lora", "new")]
        assert again == [8, 8, 0]
