"""An interrupt in the middle of a step: the engine says that it is broken, and can still be closed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_support import Bench, prompt
from hf_support import model_of, tokens_of

from tiertree.engines.hf import HFEngine, cache_config
from tiertree.engines.request import EngineBroken, InvalidRequest, Reply, Request
from tiertree.engines.sequence import Sequence


@pytest.fixture
def engine() -> Iterator[HFEngine]:
    model = model_of("llama")
    with HFEngine(model, cache_config(model, device=60, page_size=4)) as made:
        yield made


def interrupted(*ignored: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["admit", "row", "advance", "commit", "hand_over", "ensure"])
def test_an_interrupt_is_told_and_the_engine_closes(
    engine: HFEngine, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = engine.submit(Request(tokens=tokens_of(2, 30), max_new_tokens=2))
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, where, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([tokens_of(1, 20)], 3)
    if where == "row":  # as in the model: those of the pass have ended, all else is in order
        assert not engine.broken
        engine.run()
        return
    assert engine.broken
    for call in (engine.step, lambda: engine.generate([tokens_of(1, 20)], 3)):
        with pytest.raises(EngineBroken, match="interrupted half-way; close it"):
            call()
    engine.abort(waiting)
    engine.close()
    with pytest.raises(Exception, match="closed"):
        engine.cache.poll()


def test_a_reply_of_another_engine_cannot_be_aborted() -> None:
    with Bench() as one, Bench() as other:
        foreign: Reply = other.submit(prompt(1, 9), 1)
        with pytest.raises(InvalidRequest, match="not one of this engine's"):
            one.engine.abort(foreign)
        other.run()
