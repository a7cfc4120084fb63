"""The suites for storage backends and eviction policies: a good one passes, and whoever breaks one promise
fails with a message that names it. (Kinds are in `test_components`, engines in `test_conformance_engine`.)"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tiertree.policy.eviction import LRU, POLICIES
from tiertree.storage.base import Buffer, Got, PutResult, Storage, StorageStats, Wrote
from tiertree.storage.disk import DiskStorage
from tiertree.storage.memory import MemoryStorage
from tiertree.storage.tamper import flip_byte
from tiertree.testing.conformance import check_policy, check_storage, hang, page_key, policy
from tiertree.tree.evict import Evictor
from tiertree.tree.node import Node
from tiertree.types import StorageError

CAPACITY = 1 << 19


# -- storage ----------------------------------------------------------------------------------------------


def tamper(storage: Storage, key: bytes) -> None:
    """Change one byte of a page."""
    assert flip_byte(storage, key, 7)  # type: ignore[arg-type]


Pages = Sequence[Buffer]
Keys = Sequence[bytes]


class Borrows(MemoryStorage):
    """Keeps the caller's buffers."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.kept: dict[bytes, Buffer] = {}

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        self.kept.update(zip(keys, pages, strict=False))
        return super().put(keys, pages)

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        results = super().get(keys, into)
        for key, buffer, got in zip(keys, into, results, strict=True):
            if got is Got.HIT:
                buffer[:] = self.kept[key]
        return results


class NoBytes(MemoryStorage):
    """Says HIT and brings nothing."""

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        return super().get(keys, [memoryview(bytearray(len(buffer))) for buffer in into])


class Prefixes(MemoryStorage):
    """Gives the head of a longer page."""

    def _fill(self, key: bytes, page: Any, into: Buffer) -> Got:
        if len(page.data) < len(into):
            return Got.MISS
        into[:] = page.data[: len(into)]
        return Got.HIT


class Nothing(MemoryStorage):
    """Has no room for empty pages."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        done = super().put(keys, pages)
        outcomes = [Wrote.STORED if len(page) else Wrote.REFUSED for page in pages]
        return PutResult(tuple(outcomes), done.evicted) if 0 in map(len, pages) else done


class Overruns(MemoryStorage):
    """Writes a byte behind a short buffer."""

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        results = super().get(keys, into)
        for buffer, got in zip(into, results, strict=True):
            if got is Got.MISS and isinstance(buffer.obj, bytearray) and len(buffer.obj) > len(buffer):
                buffer.obj[len(buffer) + 40] = 0
        return results


class Batches(MemoryStorage):
    """Forgets what is behind the 100th key of a call."""

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        return super().get(keys[:100], into[:100]) + [Got.MISS] * len(keys[100:])


class HashAlone(MemoryStorage):
    """Knows a page by its hash, whatever its kind."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        return super().put([each[:32].ljust(48, b"\0") for each in keys], pages)

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        return super().get([each[:32].ljust(48, b"\0") for each in keys], into)

    def holds(self, keys: Keys) -> list[bool]:
        return super().holds([each[:32].ljust(48, b"\0") for each in keys])


class Cuts(MemoryStorage):
    """Has 16 bits for the length of a page."""

    def _copy(self, key: bytes, payload: memoryview) -> Any:
        return super()._copy(key, payload[: 1 << 16])


class Scribbles(MemoryStorage):
    """Leaves a mark in the buffers that it was given."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        result = super().put(keys, pages)
        for page in pages:
            if len(page) and not page.readonly:
                page[0] ^= 1
        return result


class Repeats(MemoryStorage):
    """Fills one buffer where a key repeats."""

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        results = super().get(keys, into)
        first = dict(reversed([*zip(keys, range(len(keys)), strict=False)]))
        return [
            got if first[key] == at else Got.MISS
            for at, (key, got) in enumerate(zip(keys, results, strict=True))
        ]


class Silent(MemoryStorage):
    """Does not say what it evicts."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        return PutResult(super().put(keys, pages).outcomes)


class Chatty(MemoryStorage):
    """Tells of evicted pages again, and of cleared ones."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.last: tuple[bytes, ...] = ()

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        done = super().put(keys, pages)
        last, self.last = self.last, done.evicted
        return PutResult(done.outcomes, (*last, *done.evicted))


class ToldLate(MemoryStorage):
    """Tells of what was cleared as if it were evicted."""

    cleared: tuple[bytes, ...] = ()

    def clear(self) -> None:
        self.cleared = tuple(self.keys())
        super().clear()

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        done = super().put(keys, pages)
        return PutResult(done.outcomes, (*done.evicted, *(self.cleared if done.evicted else ())))


class Fat(MemoryStorage):
    """Takes a page more than there is room for."""

    def stats(self) -> StorageStats:
        stats = super().stats()
        slack = StorageStats(
            stats.pages, stats.bytes, stats.capacity_bytes - 4096, stats.puts, stats.hits, stats.misses
        )
        return slack


class EatsItself(MemoryStorage):
    """Evicts what the same call has stored."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        parts = [super(EatsItself, self).put([key], [page]) for key, page in zip(keys, pages, strict=False)]
        if len(keys) != len(pages):
            return super().put(keys, pages)
        return PutResult(
            tuple(outcome for part in parts for outcome in part.outcomes),
            tuple(key for part in parts for key in part.evicted),
        )


class Again(MemoryStorage):
    """Says STORED of what is there already."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        done = super().put(keys, pages)
        return PutResult(tuple(Wrote.STORED for _ in done.outcomes), done.evicted)


class CountsLooks(MemoryStorage):
    """Counts `holds` as reading."""

    def holds(self, keys: Keys) -> list[bool]:
        held = super().holds(keys)
        self._hits += sum(held)
        return held


class Lingers(MemoryStorage):
    """Cannot be closed."""

    def _require_open(self) -> None:
        return


class AnyKey(MemoryStorage):
    """Takes keys of any length."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        if len(keys) != len(pages):
            raise StorageError("no")
        return super().put([key.ljust(48, b"\0") for key in keys], pages)


class HalfACall(MemoryStorage):
    """Stores what comes before a key that it refuses."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        outcomes: list[Wrote] = []
        evicted: list[bytes] = []
        if len(keys) == len(pages) == 2 and len(keys[1]) != 48:
            super().put(keys[:1], pages[:1])
        done = super().put(keys, pages)
        return PutResult((*outcomes, *done.outcomes), (*evicted, *done.evicted))


class Torn(MemoryStorage):
    """A page is visible before it is whole."""

    def _copy(self, key: bytes, payload: Buffer) -> Any:
        page: Any = super()._copy(key, payload)
        if len(payload) == 4096 and threading.current_thread().name.startswith("Thread-"):
            whole = bytes(payload)
            page.data[2048:] = bytes(2048)
            threading.Timer(0.002, page.data.__setitem__, (slice(0, None), whole)).start()
        return page

    def _fill(self, key: bytes, page: Any, into: Buffer) -> Got:
        if len(page.data) != len(into):
            return Got.MISS
        into[:] = page.data
        return Got.HIT


class Unlocked(MemoryStorage):
    """Loses what another thread evicts at the same time."""

    def put(self, keys: Keys, pages: Pages) -> PutResult:
        done = super().put(keys, pages)
        mine = threading.current_thread().name
        seen = vars(self).setdefault("seen", set())
        seen.add(mine)
        return done if len(seen) < 2 else PutResult(done.outcomes, done.evicted[1:])


class Burns(MemoryStorage):
    """Raises what it should not when it is closed."""

    def holds(self, keys: Keys) -> list[bool]:
        try:
            return super().holds(keys)
        except StorageError as error:
            raise KeyError("gone") from error


class Trusts(MemoryStorage):
    """Does not verify."""

    def _fill(self, key: bytes, page: Any, into: Buffer) -> Got:
        if len(page.data) != len(into):
            return Got.MISS
        into[:] = page.data
        return Got.HIT


class Hangs(MemoryStorage):
    """Does not come back from a call."""

    over: ClassVar[threading.Event]

    def get(self, keys: Keys, into: Pages) -> list[Got]:
        self.over.wait()
        return []


BROKEN_STORAGES = [
    (Borrows, "once put has returned, its buffers are the caller's"),
    (NoBytes, "a HIT has exactly the bytes that were put"),
    (Prefixes, "a page whose length is not that of the buffer is a MISS"),
    (Nothing, "a page of 0 bytes is STORED"),
    (Overruns, "nothing is written outside the buffer"),
    (Batches, "2000 keys of one get are answered each, in order"),
    (HashAlone, "keys that differ in their last bytes alone are keys of different pages"),
    (Cuts, "a page of 1 MiB is a HIT"),
    (Scribbles, "put leaves its buffers as they were"),
    (Repeats, "keys that repeat in one get are answered each"),
    (Silent, "every page that is evicted is told"),
    (Chatty, "a page was evicted that was not there, or evicted twice"),
    (ToldLate, "a page was evicted that was not there, or evicted twice"),
    (Fat, "bytes are more than the capacity"),
    (EatsItself, "a put has evicted what it stored itself"),
    (Again, "a key that repeats in one call is stored once"),
    (CountsLooks, "asking whether a page is present counts as reading it"),
    (Lingers, "should have raised StorageError and did not|should have raised StorageError did not"),
    (AnyKey, "should have raised StorageError did not"),
    (HalfACall, "a call that raises StorageError changes nothing"),
    (Torn, "a page that is read while others are put is a MISS or right"),
    (Unlocked, "exactly what was STORED and not told as evicted is there"),
    (Trusts, "a page that has changed is CORRUPT"),
]


@pytest.mark.parametrize(
    ("make", "promise"), BROKEN_STORAGES, ids=[each.__name__ for each, _ in BROKEN_STORAGES]
)
def test_a_storage_that_breaks_a_promise_does_not_conform(make: type[MemoryStorage], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_storage(make, tamper)


def test_a_storage_that_raises_what_it_should_not_does_not_conform() -> None:
    with pytest.raises(KeyError, match="gone"):
        check_storage(Burns, tamper)


def test_a_storage_that_hangs_does_not_conform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "HANG_S", 0.2)
    Hangs.over = threading.Event()
    with pytest.raises(AssertionError, match="round_trip hangs"):
        check_storage(Hangs)
    Hangs.over.set()


def forgetful(storage: DiskStorage) -> DiskStorage:
    """Loses a page when it is opened again."""
    again = reopened(storage)
    left = again.keys()[:-1]
    into = [memoryview(bytearray(again.locate(key)[2])) for key in left]  # type: ignore[index]
    again.get(left, into)
    again.clear()
    again.put(left, into)
    return again


def altering(storage: DiskStorage) -> DiskStorage:
    """Changes a page when it is opened again."""
    again = reopened(storage)
    for key in again.keys()[-1:]:
        content = memoryview(bytearray(again.locate(key)[2]))  # type: ignore[index]
        again.get([key], [content])
        flip_byte(again, key, 3)
        again.get([key], [content])
        again.put([key], [memoryview(bytes(len(content)))])
    return again


def remembering(cleared: bool) -> Callable[[DiskStorage], DiskStorage]:
    """Has pages again that were given up: page 3, or page 2 only where it is the one that was CORRUPT."""

    def reopen(storage: DiskStorage) -> DiskStorage:
        again = reopened(storage)
        number = 3 if cleared else 2
        others = again.holds([page_key(1), page_key(3 if number == 2 else 1)])
        if all(others) and again.stats().pages in (1, 2):
            again.put([page_key(number)], [memoryview(b"back again")])
        return again

    return reopen


def reopened(storage: DiskStorage) -> DiskStorage:
    """The same directory once more."""
    return DiskStorage(storage.path, CAPACITY)


@pytest.mark.parametrize(
    ("reopen", "promise"),
    [
        (forgetful, "what was STORED is a HIT after reopening"),
        (altering, "what was STORED is a HIT after reopening"),
        (remembering(cleared=True), "what was cleared stays away after reopening"),
        (remembering(cleared=False), "a page that was CORRUPT stays away after reopening"),
    ],
    ids=["forgets", "alters", "resurrects-cleared", "resurrects-corrupt"],
)
def test_a_storage_that_reopens_badly_does_not_conform(reopen: Any, promise: str, tmp_path: Path) -> None:
    numbers = iter(range(100))
    with pytest.raises(AssertionError, match=promise):
        check_storage(lambda capacity: DiskStorage(tmp_path / str(next(numbers)), capacity), tamper, reopen)


# -- policies ---------------------------------------------------------------------------------------------


class Lfu:
    """A policy that a user might write: the fewest hits first, among equals the oldest."""

    name = "lfu"

    def score(self, node: Node) -> float:
        return node.hits + node.last_used * 1e-13


class Depth:
    """Shallow nodes first, whatever they are used."""

    name = "depth"

    def score(self, node: Node) -> float:
        return float(node.start)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("seed", range(2))
def test_the_policies_that_come_along_conform(name: str, seed: int) -> None:
    check_policy(POLICIES[name](), seed)


@pytest.mark.parametrize("made", [Lfu, Depth])
def test_policies_from_outside_conform(made: Callable[[], Any]) -> None:
    before = dict(POLICIES)
    check_policy(made())
    assert before == POLICIES, "the suite has left something behind"


def scoring(score: Callable[[Any, Node], Any], **more: Any) -> Any:
    """LRU with another score."""
    return type("Broken", (LRU,), {"score": score, **more})()


def counted(self: Any, node: Node) -> float:
    self.asked = getattr(self, "asked", 0) + 1
    return node.last_used + self.asked


def first_answer_stays(self: Any, node: Node) -> float:
    known = vars(self).setdefault("known", {})
    known.setdefault(node.hits, node.last_used)
    return float(known[node.hits])


def hits_back(self: Any, node: Node) -> float:
    node.hits -= 1
    return node.last_used


def frees_locks(self: Any, node: Node) -> float:
    if node.host.locks:
        node.host.locks = 0
    return node.last_used


def wants_host(self: Any, node: Node) -> float:
    assert node.host.slots is not None
    return float(node.host.slots[0])


def wants_a_leaf(self: Any, node: Node) -> float:
    if node.children:
        raise KeyError("no leaf")
    return node.last_used


def by_mood(self: Any, node: Node) -> float:
    """Behaves as long as it is not at work in a cache."""
    self.asked = getattr(self, "asked", 0) + 1
    return node.last_used + (self.asked // 1000) * 1e9


def takes_leased(self: Any, node: Node) -> float:
    """Lets go of whatever is leased, once it is at work in a cache."""
    self.asked = getattr(self, "asked", 0) + 1
    above = node.parent
    while self.asked > 600 and above is not None:
        above.device.locks = above.host.locks = 0
        above = above.parent
    return node.last_used


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (scoring(LRU.score, name=""), "a policy has a name"),
        (scoring(LRU.score, name=None), "a policy has a name"),
        (scoring(lambda self, node: None), "a score is a number, not None"),
        (scoring(lambda self, node: (node.last_used, 0)), "a score is a number"),
        (scoring(lambda self, node: node.last_used > 5), "a score is a number, not False"),
        (scoring(lambda self, node: float("nan")), "a score is finite, not nan"),
        (scoring(lambda self, node: node.last_used or float("-inf")), "a score is finite, not -inf"),
        (scoring(lambda self, node: random.random()), "score is pure"),
        (scoring(counted), "score is pure"),
        (scoring(first_answer_stays), "score is pure"),
        (scoring(lambda self, node: float(id(node))), "score is pure"),
        (scoring(lambda self, node: -node.last_used), "a touch makes no node older"),
        (scoring(lambda self, node: 1.0 if node.hits % 2 else 2.0), "a touch makes no node older"),
        (scoring(lambda self, node: float(node.end)), "a node that becomes shorter gets no older"),
        (scoring(lambda self, node: float(node.pages)), "a node that becomes shorter gets no older"),
        (scoring(hits_back), "score has changed the node"),
        (scoring(frees_locks), "score has changed the node"),
        (scoring(wants_host), "score copes with every node"),
        (scoring(wants_a_leaf), "score copes with every node"),
        (scoring(by_mood), "the same load makes the same evictions"),
        (scoring(takes_leased), r"I\d.*seed 0"),
    ],
)
def test_a_policy_that_breaks_a_promise_does_not_conform(broken: Any, promise: str) -> None:
    with pytest.raises(AssertionError, match=re.compile(promise, re.DOTALL)):
        check_policy(broken)


Evict = Callable[..., tuple[int, int]]


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (
            lambda real: lambda self, tier, pages, now: real(self, tier, pages + 1, now),
            "exactly what it is asked for",
        ),
        (lambda real: lambda self, tier, pages, now: (0, 0), "exactly what it is asked for"),
    ],
    ids=["too-many", "none"],
)
def test_the_load_of_a_policy_sees_what_is_evicted(
    change: Callable[[Evict], Evict], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Evictor, "evict", change(Evictor.evict))
    with pytest.raises(AssertionError, match=promise):
        check_policy(LRU())


def test_the_load_of_a_policy_sees_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Evictor.evict

    def never_much(self: Evictor, tier: Any, pages: int, now: float) -> tuple[int, int]:
        return real(self, tier, pages, now) if pages <= 5 else (0, 0)

    monkeypatch.setattr(policy, "STEPS", 60)
    monkeypatch.setattr(Evictor, "evict", never_much)
    with pytest.raises(AssertionError, match="everything goes when nobody holds it"):
        check_policy(LRU())
