"""The reference engine when memory is short, slow, or lost: preemption, load-back, prefetch, clears."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from engine_support import PAGE, Bench, FakeRunner, Shelf, answer, make_config, prompt, sized

from tiertree import (
    FULL,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    PrefixCache,
    SlidingWindow,
    StopRule,
    StorageConfig,
    Tier,
)
from tiertree.engines import sequence
from tiertree.engines.engine import Engine
from tiertree.engines.request import Cached, Limits, Request
from tiertree.engines.scheduler import PREFETCHES_MAX
from tiertree.storage.base import Buffer, Got
from tiertree.storage.memory import MemoryStorage
from tiertree.tree.actions import Copy, Get

WINDOW = sized(SlidingWindow(window=7), 24, 48)
STATE = sized(Mamba(), 16, 32)
each_model = pytest.mark.parametrize(
    "kinds", [(), (WINDOW,), (STATE,), (WINDOW, STATE)], ids=["full", "window", "state", "all"]
)
each_policy = pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
TEXT = prompt(1, 22)


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that waits for a layer asks again at once."""
    monkeypatch.setattr(sequence, "LAYER_SECONDS", 0.0)


def copies(bench: Bench, target: Tier = Tier.DEVICE) -> list[int]:
    """Pending copies to a tier."""
    pending = bench.executor.pending.items()
    return [op for op, each in pending if isinstance(each, Copy) and each.target == target]


def hold(bench: Bench, *kinds: type) -> None:
    """From now on only what is not of these kinds of action gets anywhere by itself."""

    def on_poll() -> None:
        for op, action in list(bench.executor.pending.items()):
            if not isinstance(action, kinds):
                bench.executor.complete(op)

    bench.executor.on_poll = on_poll


# -- giving way -----------------------------------------------------------------------------------


@each_model
def test_kv_of_who_gives_way_comes_back_instead_of_being_recomputed(kinds: Any) -> None:
    """Each preemption costs the tokens of a page that was not whole, and no more."""
    with Bench(make_config(24, 200, kinds=kinds), {"max_running": 4}) as bench:
        replies = [bench.submit(prompt(number, 16), 40) for number in range(4)]
        bench.run()
        preemptions = sum(each.preemptions for each in replies)
        loaded = bench.cache.stats().loaded_back
        assert preemptions >= 2
        assert loaded * PAGE >= 16
        work = sum(16 + len(each.tokens) for each in replies)
        assert bench.runner.computed <= work + preemptions * PAGE


def test_without_room_the_youngest_gives_way() -> None:
    with Bench(make_config(12, 48), {"max_running": 3, "yields": 0}) as bench:
        replies = [bench.submit(prompt(number, 12), 16) for number in range(3)]
        bench.run()
        assert replies[0].preemptions == 0
        assert replies[2].preemptions > 0
        assert [each.finished for each in replies] == sorted(each.finished or 0 for each in replies)


@pytest.mark.parametrize("yields", [0, 1, 2])
def test_who_decodes_gives_way_for_a_first_token_so_often_and_no_oftener(yields: int) -> None:
    with Bench(make_config(10, 100), {"yields": yields, "max_running": 2}) as bench:
        old = bench.submit(prompt(0, 8), 28)
        bench.until(lambda: len(old.tokens) > 0)
        for number in range(1, 5):
            reply = bench.submit(prompt(number, 36), 1)
            bench.until(lambda: reply.finish is not None)  # noqa: B023
            bench.step(1)
            assert (old.finish is None) == (number <= yields), number
        assert old.preemptions == yields
        bench.run()


def test_without_a_host_nobody_gives_way_for_a_first_token() -> None:
    with Bench(make_config(10, None), {"max_running": 2}) as bench:
        old = bench.submit(prompt(0, 8), 28)
        bench.until(lambda: len(old.tokens) > 0)
        new = bench.submit(prompt(1, 36), 1)
        bench.until(lambda: new.finish is not None)
        assert (old.finish, old.preemptions) == ("length", 0)


def test_who_was_overtaken_often_enough_is_next() -> None:
    """A stream of new requests does not keep an old one from its second token for ever."""
    with Bench(make_config(10, 100), {"yields": 2, "max_running": 2}) as bench:
        old = bench.submit(prompt(0, 8), 28)
        bench.until(lambda: len(old.tokens) > 0)
        while old.finish is None:
            if bench.engine.waiting < 3:
                assert len(bench.replies) < 20
                bench.submit(prompt(len(bench.replies), 36), 1)
            bench.step()
        assert old.preemptions == 2
        bench.run()


def test_nobody_is_interrupted_in_vain() -> None:
    """All who could give way are not enough for it: they go on."""
    with Bench(make_config(12, 100), {"max_running": 3}) as bench:
        small = bench.submit(prompt(1, 3), 4)
        bench.step()
        large = bench.submit(prompt(0, 32), 2)
        bench.step()
        assert len(small.tokens) > 0
        bench.submit(prompt(2, 40), 2)
        bench.step()
        assert (large.preemptions, small.preemptions) == (0, 0)
        bench.run()


def test_what_a_prompt_found_is_counted_once() -> None:
    """Interrupted in its prompt, it finds its own pages, which nobody had cached for it."""
    with Bench(make_config(10, 100), {"max_running": 2, "yields": 0, "burst_tokens": 1}) as bench:
        old = bench.submit(prompt(0, 11), 21)
        bench.until(lambda: len(old.tokens) > 0)
        young = bench.submit(prompt(1, 26), 2)
        bench.run()
        assert (young.preemptions > 0, young.cached.total, old.preemptions) == (True, 0, 0)


# -- load-back ------------------------------------------------------------------------------------


def warmed(kinds: Any = (), **options: Any) -> Bench:
    """A bench whose host has all of TEXT and a token more, and whose device has nothing."""
    bench = Bench(make_config(kinds=kinds, **options))
    bench.say([*TEXT, 5], 1)
    bench.evict()
    bench.runner.passes.clear()
    return bench


@each_model
def test_each_layer_is_read_as_soon_as_it_has_arrived(kinds: Any) -> None:
    with warmed(kinds) as bench:
        executor, seen = bench.executor, []
        hold(bench, Copy)
        reply = bench.submit(TEXT, 3)

        def on_poll() -> None:
            """One more layer arrives at every poll, and the transfer ends when the model has read all."""
            for op in copies(bench):
                if len(seen) < bench.runner._layers:
                    executor.layer(op)
                else:
                    executor.complete(op)

        def on_layer(layer: int) -> None:
            seen.append(max(executor.layers.values(), default=0))

        bench.runner.on_layer = on_layer
        bench.engine._scheduler.admit()
        executor.on_poll = on_poll
        while not seen:
            bench.step()
        assert seen[1] < bench.runner._layers  # layer 0 was read before the last layer had come
        assert bench.runner.passes == [[(20, 2)]]
        assert reply.cached == Cached(host=20)
        bench.executor.on_poll = executor.complete_all
        bench.run()


@each_model
def test_a_load_back_that_fails_is_recomputed(kinds: Any) -> None:
    with warmed(kinds) as bench:
        hold(bench, Copy)
        reply = bench.submit(TEXT, 3)
        bench.executor.on_poll = lambda: [bench.executor.fail(op) for op in copies(bench)]
        bench.step()
        bench.executor.on_poll = bench.executor.complete_all
        bench.run()
        assert reply.cached.total == 0
        assert bench.runner.passes[1][0] == (0, 8)


@each_model
def test_a_load_back_that_never_ends_is_given_up_at_its_deadline(kinds: Any) -> None:
    with warmed(kinds) as bench:
        reply = bench.submit(TEXT, 3)
        bench.executor.on_poll = lambda: bench.clock.advance(0.1)
        bench.step()
        assert reply.cached.total == 20
        bench.run()
        assert reply.cached.total == 0
        assert bench.cache.stats().device.lost == 5


def test_a_load_back_that_failed_is_tried_again_after_the_next_interruption() -> None:
    with warmed() as bench:
        hold(bench, Copy)
        reply = bench.submit(TEXT, 30)
        bench.executor.on_poll = lambda: [bench.executor.fail(op) for op in copies(bench)]
        bench.until(lambda: len(reply.tokens) == 2)
        bench.executor.on_poll = bench.executor.complete_all
        bench.step()
        bench.engine._scheduler.preempt(bench.engine._scheduler.running[0])
        bench.evict()
        before = bench.runner.loading
        bench.run()
        assert bench.runner.loading == before + 1


@each_model
def test_pages_that_somebody_else_inserts_while_they_are_loaded_are_read_where_they_are(kinds: Any) -> None:
    with warmed(kinds) as bench:
        scheduler = bench.engine._scheduler
        hold(bench, Copy)
        slow = bench.submit(TEXT, 3)
        slow_sequence = scheduler.waiting[0]
        scheduler.admit()
        before = slow_sequence.load.slots.tolist()
        again = bench.submit(TEXT, 2)
        scheduler.waiting[0].may_load = False  # computes what the other one loads
        scheduler.admit()
        first, second = scheduler.running
        scheduler.running[:] = [second]
        bench.until(lambda: again.first_token is not None)
        scheduler.running.append(first)
        assert slow_sequence.load.slots.tolist() != before

        def on_layer(layer: int) -> None:
            bench.executor.on_poll = bench.executor.complete_all

        bench.runner.on_layer = on_layer
        bench.run()
        assert (slow.finish, bench.runner.loading) == ("length", 1)


def test_what_it_would_load_is_not_in_its_own_way() -> None:
    """On a device that a request fills alone, FULL of its prefix is there, and what is missing to go on
    from it is not: it must not hold pages that it cannot read."""
    state = sized(Mamba(), 6, 20)
    quota = LoadBackConfig(min_tokens=0, max_pages=2)
    with Bench(make_config(8, 40, kinds=(state,), load_back=quota), {"chunk_tokens": 24}) as bench:
        bench.say(prompt(1, 24), 1)
        bench.cache.drain()
        bench.cache.evict(6, kind=state.kind)
        bench.cache.evict(4)
        reply = bench.say([*prompt(1, 24), *prompt(2, 6)], 2)
        assert (reply.finish, reply.error) == ("length", None)


# -- storage --------------------------------------------------------------------------------------


@each_model
def test_a_second_engine_finds_in_storage_what_a_first_one_computed(kinds: Any) -> None:
    shelf = Shelf()
    with Bench(make_config(kinds=kinds), shelf=shelf) as bench:
        bench.say(TEXT, 6)
        bench.cache.drain()
    with Bench(make_config(kinds=kinds), shelf=shelf) as bench:
        reply = bench.say([*TEXT, 7], 6)
        assert reply.cached == Cached(storage=20)
        assert bench.runner.passes[0][0][0] == 20


@each_model
def test_it_is_told_which_tier_held_a_prompt(kinds: Any) -> None:
    shelf = Shelf()
    with Bench(make_config(kinds=kinds), shelf=shelf) as bench:
        bench.say(prompt(1, 33), 1)
        bench.cache.drain()
    with Bench(make_config(kinds=kinds), shelf=shelf) as bench:
        bench.say(prompt(1, 17), 1)
        bench.evict()
        bench.say(prompt(1, 9), 1)
        reply = bench.say(prompt(1, 33), 1)
        assert reply.cached == Cached(device=8, host=8, storage=16)


def test_a_request_is_read_ahead_while_it_waits_and_others_are_served() -> None:
    shelf = Shelf()
    with Bench(shelf=shelf) as bench:
        bench.say(TEXT, 1)
        bench.cache.drain()
    with Bench(shelf=shelf) as bench:
        hold(bench, Get)
        reply = bench.submit(TEXT, 1)
        other = bench.submit(prompt(9, 9), 3)
        bench.until(lambda: other.finish is not None)
        assert reply.first_token is None
        assert any(isinstance(each, Get) for each in bench.executor.pending.values())
        bench.executor.on_poll = bench.executor.complete_all
        bench.run()
        assert reply.cached == Cached(storage=20)


def test_everybody_in_a_long_line_is_read_ahead() -> None:
    """Only the first of the line are, at a time, and nobody overtakes those without being read ahead."""
    shelf, count = Shelf(), PREFETCHES_MAX + 8
    with Bench(shelf=shelf) as bench:
        for number in range(count):
            bench.say(prompt(number, 9), 1)
        bench.cache.drain()
    with Bench(make_config(200, 400), {"max_running": 100}, shelf=shelf) as bench:
        replies = [bench.submit(prompt(number, 9), 1) for number in range(count)]
        bench.run()
        assert [each.cached.storage for each in replies] == [8] * count


@pytest.mark.parametrize("rule", list(StopRule))
@pytest.mark.parametrize("hung", [Get, Copy])
def test_a_storage_or_a_copy_that_hangs_keeps_nobody_from_an_answer(rule: StopRule, hung: type) -> None:
    shelf = Shelf()
    with Bench(shelf=shelf) as bench:
        bench.say(TEXT, 1)
        bench.cache.drain()
    config = make_config(prefetch=PrefetchConfig(min_tokens=0, stop_rule=rule), op_deadline_seconds=1.0)
    with Bench(config, shelf=shelf) as bench:
        hold(bench, hung)
        now = bench.executor.on_poll
        bench.executor.on_poll = lambda: (now(), bench.clock.advance(0.01))  # type: ignore[func-returns-value]
        for _ in range(2):
            assert bench.say(TEXT, 2).finish == "length"


@pytest.mark.parametrize("where", ["prefetching", "loading", "prefilling", "decoding", "closing"])
@pytest.mark.parametrize("what", ["abort", "clear", "clear others"])
@each_model
def test_an_abort_or_a_clear_at_any_time(kinds: Any, what: str, where: str) -> None:
    shelf = Shelf()
    with Bench(make_config(kinds=kinds), shelf=shelf) as bench:
        bench.say(TEXT, 1, namespace="a")
        if where == "prefetching":
            bench.cache.clear()
        bench.evict()
        hold(bench, *([Get] if where == "prefetching" else [Copy] if where == "loading" else []))
        text = TEXT if where in ("prefetching", "loading") else prompt(3, 18)
        reply, other = bench.submit(text, 2, namespace="a"), bench.submit(prompt(4, 12), 6)
        if where == "loading":
            bench.engine._scheduler.admit()
        else:
            steps = {"prefetching": 3, "prefilling": 1}.get(where)
            if steps:
                bench.step(steps)
            else:
                wanted = {"decoding": 1, "closing": 2}[where]
                bench.until(lambda: len(reply.tokens) == wanted)
        if what == "abort":
            reads = [op for op, each in bench.executor.pending.items() if isinstance(each, Get)]
            bench.engine.abort(reply)
            assert bench.executor.cancelled.issuperset(reads)
            assert bool(reads) == (where == "prefetching")
            assert reply.finish == ("length" if where == "closing" else "abort")
        else:
            bench.cache.clear(None if what == "clear" else "")
        bench.cache.check()
        bench.executor.on_poll = bench.executor.complete_all
        bench.run()
        assert other.finish == "length"
        assert reply.finish == ("abort" if what == "abort" and where != "closing" else "length")


def test_after_a_clear_nothing_of_before_is_shared() -> None:
    with Bench() as bench:
        reply = bench.submit(TEXT, 12)
        bench.until(lambda: len(reply.tokens) == 2)
        bench.cache.clear()
        bench.run()
        assert bench.say(TEXT, 1).cached.total == 0


# -- little room ----------------------------------------------------------------------------------


@each_model
@each_policy
@pytest.mark.parametrize("host", [None, 3, 60])
def test_a_device_that_one_request_fills_serves_any_number(kinds: Any, policy: str, host: int | None) -> None:
    small = [sized(each.rules, 6, host and 4) for each in kinds]
    with Bench(make_config(7, host, policy=policy, kinds=tuple(small)), {"max_running": 3}) as bench:
        for number in range(5):
            bench.submit(prompt(number % 3, 18 + number), 5)
            bench.step(2)
        bench.run()
        assert bench.say(prompt(0, 18), 10).finish == "length"


def test_what_finds_no_room_ends_with_an_error_and_not_in_silence() -> None:
    """Pages that a copy keeps, which never ends, are lost until it comes home."""
    with warmed(op_deadline_seconds=1.0) as bench:
        hold(bench, Copy)
        stuck = bench.submit(TEXT, 3)
        bench.executor.on_poll = lambda: bench.clock.advance(0.1)
        bench.until(lambda: stuck.finish is not None)
        assert bench.cache.stats().device.lost == 5
        large = bench.submit(prompt(7, 120), 2)
        bench.until(lambda: large.finish is not None)
        assert large.finish == "error"
        assert re.fullmatch(r"no room for \d+ pages of full on device: \d+ are free", large.error or "")
        assert bench.say(prompt(8, 60), 2).finish == "length"
        bench.executor.on_poll = bench.executor.complete_all
        assert bench.say(prompt(7, 120), 2).finish == "length"


# -- real threads ---------------------------------------------------------------------------------


def serve(cache: PrefixCache, prompts: Sequence[list[int]], count: int = 6) -> tuple[Engine, list[Cached]]:
    """Serve `prompts` on a cache with threads of its own, and see that the answers are right."""
    engine = Engine(cache, FakeRunner(cache), Limits(chunk_tokens=2 * PAGE))
    replies = engine.generate(prompts, count)
    for reply in replies:
        assert reply.tokens == answer(Request(tokens=reply.request.tokens, max_new_tokens=count))
    cache.check()
    return engine, [reply.cached for reply in replies]


@each_policy
def test_a_second_process_finds_on_disk_what_a_first_one_computed(policy: str, tmp_path: Path) -> None:
    config = make_config(
        policy=policy,
        kinds=(WINDOW, STATE),
        storage=StorageConfig(path=str(tmp_path), size="16MiB"),
        selective_hits=1,
    )
    prompts = [prompt(number, 22) for number in range(3)]
    with PrefixCache(config) as cache:
        serve(cache, prompts)
        serve(cache, prompts)
        for kind, pages in config.kind_pages(Tier.DEVICE).items():
            cache.evict(pages, kind=kind)
        assert cache.drain()
    with PrefixCache(config) as cache:
        _, found = serve(cache, prompts)
        assert {each.storage for each in found} == {20}


class Hung(MemoryStorage):
    """A storage whose reads do not end before they are told to."""

    def __init__(self) -> None:
        super().__init__(1 << 20)
        self.go = threading.Event()

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        self.go.wait()
        return super().get(keys, into)


def test_a_storage_that_hangs_in_a_thread_keeps_nobody_from_an_answer() -> None:
    rules = PrefetchConfig(min_tokens=0, stop_rule=StopRule.TIMEOUT, base_seconds=0.01)
    storage = Hung()
    with PrefixCache(make_config(prefetch=rules)) as cache:
        cache.attach_storage(storage)
        serve(cache, [TEXT])
        cache.drain()
        cache.clear()
        _, (found,) = serve(cache, [TEXT])
        assert found.total == 0
        storage.go.set()
        assert cache.drain()
        assert cache.stats().device.requests == 0
        assert FULL in cache.config.kind_pages(Tier.DEVICE)


def test_who_decodes_keeps_only_the_window_and_the_states_that_it_needs() -> None:
    with Bench(make_config(kinds=(WINDOW, STATE))) as bench:
        reply = bench.submit(prompt(1, 20), 40)
        bench.until(lambda: len(reply.tokens) == 20)
        window, state = (bench.cache.stats().kinds[str(each.kind)].device for each in (WINDOW, STATE))
        assert (window.protected, state.protected) == (0, 0)
        assert window.requests <= 3  # 7 tokens, and the page that is being computed
        assert state.requests <= 3
        bench.run()
