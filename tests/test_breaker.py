"""A tier that fails is left alone, tried again now and then, and used again once it is well."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from rig import Rig

from tiertree import (
    BreakerConfig,
    CacheConfig,
    ConfigError,
    DeviceConfig,
    HostConfig,
    NoRoom,
    Prefetch,
    PrefetchConfig,
    PrefixCache,
    Refused,
    StopRule,
    Tier,
)
from tiertree.storage.base import Buffer, Got, PutResult, Wrote
from tiertree.storage.memory import KeyStorage
from tiertree.tree.actions import Cancel, Copy, Get, Put, Query
from tiertree.tree.breaker import Breaker, State, Verdict

GOOD, ANSWERED, BAD, LATE, NOTHING = Verdict
PROMPT = [1, 2, 3, 4]
HOUR = 3600.0


def breaker(alone: bool = True) -> Breaker:
    return Breaker("a test", 3, 1.0, 8.0, alone)


def opened(waits: int = 1) -> Breaker:
    """A breaker that has opened so often in a row, at 0 for the last time."""
    made = breaker()
    for at in range(-waits + 1, 1):
        now = 100.0 * at
        made.hear(made.admit(now), LATE, now)
    return made


# -- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verdicts", "state", "failures"),
    [
        ([], "closed", 0),
        ([GOOD], "closed", 0),
        ([ANSWERED], "closed", 0),
        ([NOTHING], "closed", 0),
        ([BAD], "closed", 1),
        ([BAD, BAD], "closed", 2),
        ([BAD, BAD, GOOD], "closed", 0),
        ([BAD, BAD, GOOD, BAD, BAD], "closed", 2),
        ([BAD, BAD, ANSWERED], "closed", 2),
        ([BAD, BAD, NOTHING], "closed", 2),
        ([BAD, BAD, BAD], "open", 3),
        ([BAD, ANSWERED, BAD, NOTHING, BAD], "open", 3),
        ([LATE], "open", 1),
        ([GOOD, LATE], "open", 1),
    ],
)
def test_what_opens_it(verdicts: list[Verdict], state: str, failures: int) -> None:
    it = breaker()
    for verdict in verdicts:
        assert it.admits(5.0)
        it.hear(it.admit(5.0), verdict, 5.0)
    assert (it.state(5.0), it.failures, it.opened) == (state, failures, int(state == "open"))
    assert it.admits(5.0) == (state == "closed")
    assert it.seconds_left(5.0) == float(state == "open")


@pytest.mark.parametrize(
    ("verdict", "state", "failures", "next_wait"),
    [
        (GOOD, State.CLOSED, 0, 1.0),
        (ANSWERED, State.CLOSED, 1, 2.0),
        (BAD, State.OPEN, 2, 4.0),
        (LATE, State.OPEN, 2, 4.0),
        (NOTHING, State.HALF_OPEN, 1, 2.0),
    ],
)
def test_what_the_probe_decides(verdict: Verdict, state: State, failures: int, next_wait: float) -> None:
    it = opened()
    assert not it.admits(0.99)
    assert it.state(0.99) == State.OPEN
    assert it.admits(1.0)
    assert it.state(1.0) == State.HALF_OPEN
    probe = it.admit(1.0)
    assert not it.admits(500.0), "one probe at a time"
    assert "half open" in it.refusal(500.0)
    it.hear(probe, verdict, 1.0)
    assert (it.state(1.0), it.failures) == (state, failures)
    if state is State.OPEN:
        assert it.seconds_left(1.0) == 2.0
        assert "tries again in 2 s" in it.refusal(1.0)
    assert it.admits(3.0)
    it.hear(it.admit(3.0), LATE, 3.0)
    assert it.seconds_left(3.0) == next_wait


@pytest.mark.parametrize(("waits", "left"), [(1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (5, 8.0), (50, 8.0)])
def test_the_wait_doubles_up_to_a_most(waits: int, left: float) -> None:
    it = opened(waits)
    assert it.seconds_left(0.0) == left
    assert it.opened == waits


@pytest.mark.parametrize("base", [1.0, 8.0])
def test_until_something_was_good_one_failure_opens_it_again(base: float) -> None:
    it = Breaker("a test", 3, base, 8.0)
    it.hear(it.admit(0.0), LATE, 0.0)
    it.hear(it.admit(10.0), ANSWERED, 10.0)
    assert it.state(10.0) == State.CLOSED
    it.hear(it.admit(10.0), BAD, 10.0)
    assert it.state(10.0) == State.OPEN
    it.hear(it.admit(20.0), GOOD, 20.0)
    it.hear(it.admit(20.0), BAD, 20.0)
    assert it.state(20.0) == State.CLOSED


@pytest.mark.parametrize("verdict", list(Verdict))
def test_operations_of_an_earlier_round_are_not_heard(verdict: Verdict) -> None:
    it = breaker()
    old = it.admit(0.0)
    it.hear(it.admit(0.0), LATE, 0.0)
    it.hear(old, verdict, 0.0)
    assert (it.state(0.0), it.failures, it.opened, it.seconds_left(0.0)) == (State.OPEN, 1, 1, 1.0)
    probe = it.admit(1.0)
    it.hear(old, verdict, 1.0)
    assert (it.state(1.0), it.admits(1.0)) == (State.HALF_OPEN, False)
    it.hear(probe, GOOD, 1.0)
    it.hear(old, verdict, 1.0)
    assert (it.state(1.0), it.failures) == (State.CLOSED, 0)
    assert it.current(probe)
    assert not it.current(old)


def test_where_probes_need_not_be_alone_the_first_to_end_decides() -> None:
    it = breaker(alone=False)
    it.hear(it.admit(0.0), LATE, 0.0)
    assert not it.admits(0.5)
    first, second = it.admit(1.0), it.admit(1.0)
    assert it.admits(1.0)
    it.hear(second, BAD, 1.0)
    it.hear(first, GOOD, 1.0)
    assert (it.state(1.0), it.seconds_left(1.0)) == (State.OPEN, 2.0)


def test_a_reset_forgets_everything_but_how_often_it_has_opened() -> None:
    it = opened(3)
    probe = it.admit(4.0)
    it.reset()
    it.hear(probe, LATE, 4.0)
    assert (it.state(4.0), it.failures, it.opened, it.admits(4.0)) == (State.CLOSED, 0, 3, True)
    it.hear(it.admit(4.0), LATE, 4.0)
    assert it.seconds_left(4.0) == 1.0


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_its_calls_are_bounded(seed: int) -> None:
    """A caller who tries all the time: failures of one kind or another for an hour, nothing ever good."""
    rng, it, now, calls, answers = random.Random(seed), Breaker("a test", 3, 1.0, 60.0), 0.0, 0, 0
    while now < HOUR:
        if it.admits(now):
            verdict = rng.choice([BAD, LATE, ANSWERED] if answers < 20 else [BAD, LATE])
            answers += verdict is ANSWERED
            it.hear(it.admit(now), verdict, now)
            calls += 1
        now += rng.choice([0.01, 0.1, 1.0])
    assert calls - answers <= 3 + 6 + HOUR / 60, f"seed {seed}"
    assert calls - answers >= HOUR / 62, f"seed {seed}"


# -- what counts as a failure -------------------------------------------------------------------------------


def rig(**options: object) -> Rig:
    rules = PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE)
    chosen = {"prefetch": rules, "op_deadline_seconds": 5.0, **options}
    return Rig(device=8, host=8, storage=100, **chosen)  # type: ignore[arg-type]


def stored(**options: object) -> Rig:
    """Storage holds PROMPT, memory nothing."""
    made = rig(**options)
    made.put(PROMPT)
    made.settle()
    made.cache.clear()
    return made


def states(it: Rig) -> tuple[str, str, str]:
    """The states of all three breakers."""
    found = it.cache.stats().breakers
    return tuple(found[name].state for name in ("copies_to_host", "storage_writes", "storage_reads"))  # type: ignore[return-value]


def persist(it: Rig, token: int) -> None:
    """One more page comes to host, and is offered to storage if that is worth it."""
    it.put([token])
    for op in it.running(Copy):
        it.executor.complete(op)
    it.cache.poll()


def read(it: Rig, tokens: list[int] = PROMPT) -> Prefetch:
    started = it.fetch(tokens)
    assert it.running(Query)
    return started


def test_failing_writes_open_the_breaker_of_writes_alone() -> None:
    it = stored()
    for token in range(100, 103):
        assert states(it) == ("closed", "closed", "closed")
        persist(it, token)
        it.failed(it.running(Put)[0])
    assert states(it) == ("closed", "open", "closed")
    stats = it.cache.stats()
    assert stats.persists_refused == 3
    offered = stats.offered
    persist(it, 103)
    stats = it.cache.stats()
    assert not it.running(Put)
    assert (stats.persists_dropped, stats.persists_refused, stats.persists_crowded) == (1, 3, 0)
    assert stats.offered == offered
    assert stats.breakers["storage_writes"].failures_in_a_row == 3
    assert stats.breakers["storage_writes"].seconds_left == 1.0
    it.cache.clear()
    fetch = read(it)
    it.settle()
    assert it.cache.settle(fetch) == 4, "a disk that cannot be written reads well"


def test_a_put_that_keeps_nothing_is_a_failure_and_one_that_keeps_something_is_not() -> None:
    it = Rig(device=8, host=8, storage=1)
    for token in range(100, 110):
        persist(it, token)
        it.settle()
        it.put([200, 201, token])
        it.settle()
    assert it.cache.stats().persists_refused
    assert states(it) == ("closed", "closed", "closed")
    it = Rig(device=8, host=8, storage=1)
    it.storage._capacity = 0  # type: ignore[union-attr]
    for token in range(100, 103):
        persist(it, token)
        it.settle()
    assert states(it) == ("closed", "open", "closed")
    assert it.cache.stats().persists_refused == 3


@pytest.mark.parametrize("what", [Query, Get])
def test_failing_reads_open_the_breaker_of_reads_alone(what: type) -> None:
    """Queries that succeed do not make up for reads that fail."""
    it = stored()
    for _ in range(3):
        assert states(it) == ("closed", "closed", "closed")
        fetch = read(it)
        if what is Get:
            it.done(it.running(Query)[0])
        it.failed(it.running(what)[0])
        assert it.cache.settle(fetch) == 0
    assert states(it) == ("closed", "closed", "open")
    assert it.cache.stats().prefetch_vanished == 0
    refused = it.cache.prefetch(it.cache.key(PROMPT))
    assert refused == Refused("the breaker of storage reads is open: it tries again in 1 s")
    persist(it, 100)
    assert it.running(Put)
    it.settle()
    it.empty_out()


def test_misses_do_not_make_up_for_reads_that_fail() -> None:
    it = stored()
    for token in range(200, 203):
        assert states(it)[2] == "closed"
        read(it)
        it.done(it.running(Query)[0])
        it.failed(it.running(Get)[0])
        if token < 202:
            read(it, [token])
            it.settle()
    assert states(it)[2] == "open"
    it.clock.advance(1.0)
    read(it, [300])
    it.settle()
    assert states(it)[2] == "closed"
    read(it)
    it.done(it.running(Query)[0])
    it.failed(it.running(Get)[0])
    assert states(it)[2] == "open", "nothing has been read since it opened"
    assert it.cache.stats().breakers["storage_reads"].seconds_left == 2.0


def test_one_late_operation_is_enough() -> None:
    it = stored()
    read(it)
    it.clock.advance(6.0)
    it.cache.poll()
    assert states(it) == ("closed", "closed", "open")
    persist(it, 100)
    it.clock.advance(6.0)
    it.cache.poll()
    assert states(it) == ("closed", "open", "half_open")
    it.settle()
    it.empty_out()


def test_a_miss_is_no_failure() -> None:
    it = stored()
    for token in range(200, 210):
        fetch = read(it, [token])
        it.settle()
        assert it.cache.settle(fetch) == 0
    assert states(it) == ("closed", "closed", "closed")
    assert it.cache.stats().prefetch_vanished == 0


@pytest.mark.parametrize("found", range(4))
def test_a_get_that_finds_less_than_the_query_said_is_a_miss_and_is_counted(found: int) -> None:
    it = stored()
    for _ in range(5):
        fetch = read(it)
        it.done(it.running(Query)[0])
        (get,) = it.running(Get)
        it.executor.fail(get, found, "full: that page is not there", broken=False)
        it.cache.poll()
        assert it.cache.settle(fetch) == found
        it.cache.clear()
    assert it.cache.stats().prefetch_vanished == 5 * (4 - found)
    assert states(it) == ("closed", "closed", "closed")
    it.empty_out()


def test_what_was_cancelled_says_nothing() -> None:
    it = stored()
    for stage in (Query, Get) * 5:
        fetch = read(it)
        if stage is Get:
            it.done(it.running(Query)[0])
        it.cache.cancel(fetch)
        (op,) = it.running(stage)
        it.executor.fail(op, error="cancelled", broken=False)
        it.cache.poll()
    assert states(it) == ("closed", "closed", "closed")
    assert it.cache.stats().prefetch_vanished == 0
    it.empty_out()


def test_a_full_queue_is_no_failure_and_what_it_drops_is_counted_apart() -> None:
    it = stored()
    for token in range(100, 105):
        persist(it, token)
        (put,) = it.running(Put)
        it.executor.storage = None  # nothing attached: declined
        it.executor.complete(put)
        it.executor.storage = it.storage
        it.cache.poll()
    stats = it.cache.stats()
    assert (stats.persists_crowded, stats.persists_refused, stats.persists_dropped) == (5, 0, 0)
    assert states(it) == ("closed", "closed", "closed")


def test_too_many_operations_are_no_failure_either() -> None:
    it = rig(max_operations=2)
    for token in range(100, 105):
        persist(it, token)
    stats = it.cache.stats()
    assert (len(it.running(Put)), stats.persists_crowded) == (1, 4)
    assert states(it) == ("closed", "closed", "closed")
    it.settle()
    it.empty_out()


# -- recovery -----------------------------------------------------------------------------------------------


def broken(what: type, **options: object) -> Rig:
    """The breaker of reads (Query, Get) or writes (Put) has just opened."""
    it = stored(**options)
    for token in range(100, 103):
        if what is Put:
            persist(it, token)
        else:
            read(it)
        if what is Get:
            it.done(it.running(Query)[0])
        it.failed(it.running(what)[0])
    it.cache.clear()
    return it


def test_after_the_wait_one_read_tries_and_the_others_are_refused() -> None:
    it = broken(Get)
    it.clock.advance(1.0)
    assert states(it) == ("closed", "closed", "half_open")
    fetch = read(it)
    refused = it.cache.prefetch(it.cache.key([7, 7]))
    assert isinstance(refused, Refused)
    assert "storage reads is half open" in refused.reason
    it.done(it.running(Query)[0])
    assert states(it) == ("closed", "closed", "half_open"), "the Get decides"
    it.settle()
    assert it.cache.settle(fetch) == 4
    assert states(it) == ("closed", "closed", "closed")
    assert it.cache.stats().breakers["storage_reads"].failures_in_a_row == 0
    it.fetch([7, 7])
    it.fetch([8, 8])
    it.settle()
    it.empty_out()


def test_a_read_that_fails_again_makes_it_wait_twice_as_long() -> None:
    it = broken(Get)
    for wait in (1.0, 2.0, 4.0, 8.0):
        it.clock.advance(wait - 0.01)
        assert isinstance(it.cache.prefetch(it.cache.key(PROMPT)), Refused)
        it.clock.advance(0.01)
        read(it)
        it.done(it.running(Query)[0])
        it.failed(it.running(Get)[0])
    assert it.cache.stats().breakers["storage_reads"].opened == 5


def test_a_query_of_before_the_opening_reads_nothing() -> None:
    it = stored()
    before = read(it)
    (query,) = it.running(Query)
    for _ in range(3):
        it.fetch([*PROMPT, 9])
        it.failed(it.running(Query)[-1])
    assert states(it)[2] == "open"
    it.done(query)
    assert not it.running(Get)
    assert it.cache.settle(before) == 0
    assert states(it)[2] == "open"
    it.empty_out()


def test_the_next_offered_page_is_the_probe_of_writes() -> None:
    it = broken(Put)
    it.clock.advance(1.0)
    persist(it, 110)
    persist(it, 111)
    assert len(it.running(Put)) == 1
    assert it.cache.stats().persists_dropped == 1
    it.settle()
    assert states(it) == ("closed", "closed", "closed")
    persist(it, 112)
    persist(it, 113)
    assert len(it.running(Put)) == 2
    it.settle()
    assert it.cache.stats().persists_dropped == 1
    it.empty_out()


def test_a_cancelled_probe_lets_another_one_try() -> None:
    it = broken(Query)
    it.clock.advance(1.0)
    fetch = read(it)
    it.cache.cancel(fetch)
    assert isinstance(it.cache.prefetch(it.cache.key(PROMPT)), Refused), "it is still under way"
    it.executor.fail(it.running(Query)[0], error="cancelled", broken=False)
    it.cache.poll()
    assert states(it)[2] == "half_open"
    fetch = read(it)
    it.settle()
    assert it.cache.settle(fetch) == 4
    assert states(it)[2] == "closed"


def test_a_probe_that_is_late_and_comes_home_later_has_lost_its_say() -> None:
    it = broken(Query)
    it.clock.advance(1.0)
    read(it)
    (probe,) = it.running(Query)
    it.clock.advance(5.0)
    it.cache.poll()
    assert Cancel(probe, late=True) in it.executor.submitted
    assert it.cache.stats().breakers["storage_reads"].seconds_left == 2.0
    it.done(probe)
    assert states(it)[2] == "open"
    it.clock.advance(2.0)
    fetch = read(it)
    it.settle()
    assert it.cache.settle(fetch) == 4
    assert states(it)[2] == "closed"


def test_another_storage_is_another_matter() -> None:
    it = broken(Get)
    for token in range(100, 103):
        persist(it, token)
        it.failed(it.running(Put)[0])
    assert states(it) == ("closed", "open", "open")
    assert it.storage is not None
    it.cache.detach_storage(deadline_s=0)
    it.cache.attach_storage(it.storage)
    assert states(it) == ("closed", "closed", "closed")
    it.cache.clear()
    fetch = read(it)
    it.settle()
    assert it.cache.settle(fetch) == 4


def test_copies_to_host_have_a_breaker_of_their_own_and_what_it_costs_is_counted() -> None:
    it = stored()
    for token in range(100, 103):
        it.put([token])
        it.failed(it.running(Copy)[0])
    assert states(it) == ("open", "closed", "closed")
    it.put([103])
    stats = it.cache.stats()
    assert (it.running(Copy), stats.backups_skipped, stats.backups_dropped) == ([], 1, 0)
    it.clock.advance(1.0)
    it.put([104])
    it.put([105])
    assert len(it.running(Copy)) == 2, "copies are tried by as many as come"
    it.settle()
    assert states(it) == ("closed", "closed", "closed")
    it.look_at([103])  # offered again at its next touch
    it.settle()
    assert it.where([103]) == (1, 1)
    assert len(it.running(Copy)) == 0
    it.cache.evict(8)
    assert it.where([103]) == (0, 1)
    it.empty_out()


# -- bounded ------------------------------------------------------------------------------------------------


class Dead(KeyStorage):
    """Counts the calls that it gets, and answers none of them well until it is repaired."""

    def __init__(self) -> None:
        super().__init__(1000)
        self.calls = 0
        self.dead = True

    def _call(self) -> None:
        self.calls += 1
        if self.dead:
            raise OSError("the disk is gone")

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        self._call()
        return super().put(keys, pages)

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        self._call()
        return super().holds(keys)


class FullAndLying(Dead):
    """Keeps nothing, says that it holds everything, and cannot read it."""

    def put(self, keys: Sequence[bytes], pages: Sequence[Buffer]) -> PutResult:
        self.calls += 1
        return PutResult((Wrote.REFUSED,) * len(keys)) if self.dead else KeyStorage.put(self, keys, pages)

    def holds(self, keys: Sequence[bytes]) -> list[bool]:
        return [True] * len(keys) if self.dead else KeyStorage.holds(self, keys)

    def get(self, keys: Sequence[bytes], into: Sequence[Buffer]) -> list[Got]:
        self._call()
        return super().get(keys, into)


@pytest.mark.parametrize("kind", [Dead, FullAndLying])
def test_a_storage_that_always_fails_gets_a_bounded_number_of_calls_and_is_used_again(
    kind: type[Dead],
) -> None:
    now, storage = [0.0], kind()
    rules = PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE)
    config = CacheConfig(page_size=1, prefetch=rules, device=DeviceConfig(size=8), host=HostConfig(size=8))
    with PrefixCache(config, clock=lambda: now[0]) as cache:
        cache.attach_storage(storage)

        def request(number: int) -> int | None:
            """One request: prefetch what is not there, compute it. Returns how many pages were read."""
            key, landed = cache.key([number, 1]), None
            fetch = cache.prefetch(key)
            cache.poll()
            cache.poll()
            if isinstance(fetch, Prefetch):
                landed = cache.settle(fetch)
            lease = cache.acquire(cache.match(key))
            if lease.memory_boundary == 0:
                slots = cache.allocate(2, lease)
                assert not isinstance(slots, NoRoom)
                cache.insert(key, slots, lease)
            lease.release()
            cache.poll()
            return landed

        requests = 0
        while now[0] < HOUR:
            assert not request(requests)
            requests, now[0] = requests + 1, now[0] + 0.7
        stats = cache.stats()
        assert requests > 5000
        assert storage.calls <= 2 * (3 + 6 + HOUR / 60), "of reads and of writes, each"
        assert storage.calls >= HOUR / 60
        assert stats.persists_dropped >= 2 * requests - storage.calls * 2
        assert stats.breakers["storage_writes"].opened > 60
        assert stats.breakers["storage_reads"].opened > 60
        storage.dead = False
        now[0] += 60.0
        request(requests)
        request(requests + 1)
        cache.clear()
        assert request(requests + 1) == 2, "it is used again"
        assert {each.state for each in cache.stats().breakers.values()} == {"closed"}
        cache.check()


# -- configuration ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"failures": 0}, "breaker.failures: 0"),
        ({"failures": 2.0}, "breaker.failures: 2.0"),
        ({"base_seconds": 0}, "breaker.base_seconds: 0"),
        ({"base_seconds": float("nan")}, "breaker.base_seconds: nan"),
        ({"max_seconds": float("inf")}, "breaker.max_seconds: inf"),
        ({"base_seconds": 2.0, "max_seconds": 1.0}, "breaker.max_seconds: 1.0"),
        ({"failure": 1}, "breaker.failure: is not a known key"),
    ],
)
def test_limits_that_cannot_work_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_mapping({"device": {"size": 4}, "breaker": values})
    assert str(caught.value).startswith(message)


def test_the_limits_are_those_of_the_configuration() -> None:
    config = CacheConfig.from_mapping(
        {"device": {"size": 4}, "breaker": {"failures": 1, "base_seconds": 0.5, "max_seconds": 0.5}}
    )
    assert config.breaker == BreakerConfig(failures=1, base_seconds=0.5, max_seconds=0.5)
    it = stored(breaker=config.breaker)
    for _ in range(5):
        read(it)
        it.failed()
        assert it.cache.stats().breakers["storage_reads"].seconds_left == 0.5
        it.clock.advance(0.5)


def test_evicting_under_an_open_breaker_drops_nothing_that_is_on_host() -> None:
    it = stored()
    it.put(PROMPT)
    it.settle()
    for token in range(100, 103):
        it.put([token])
        it.failed(it.running(Copy)[0])
    assert states(it)[0] == "open"
    it.cache.evict(8, Tier.DEVICE)
    assert it.where(PROMPT) == (0, 4)
