"""What one Put, Get or Query asks of a storage backend, and what it comes to.

    Put    batches of page buffers ──▶ backend.put    a page counts when all its pools are stored
    Get    batches: backend.get ──▶ page buffers      up to the first page that is not there in all its pools
    Query  backend.holds                              a page counts when all its pools are held

Each pool of a kind, main or sidecar, has its own storage key for the same page. A record is found by
its key and verified by itself, so whatever order records are written in, a crash between any two of
them leaves nothing that could be served wrongly. Of the two orders a Put takes the one with FULL last:
a page of FULL that is found, or announced, then has its states with it, and a storage that runs short
of room gives up the older records, which are those of the other kinds. A Get reads FULL last because
of FULL alone every leading part is worth something, and by then all else is there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from ..pools.group import KindPools
from ..pools.paged import Pool
from ..tree.actions import Completion, Get, Put, Query, Span
from ..types import FULL, Kind, Slots, StorageError
from .base import HASH_BYTES, KEY_BYTES, Buffer, Got, Storage, Wrote, storage_key

BATCH_BYTES = 32 << 20
"""Pages are read and written in batches of about this many bytes, at least one page."""

Job = Put | Get | Query
Stop = Callable[[], bool]
Answer = TypeVar("Answer")


class Keys:
    """Storage keys of one kind's pages: one per pool, in the order of the pools."""

    __slots__ = ("_suffixes",)

    def __init__(self, suffixes: Sequence[bytes]) -> None:
        self._suffixes = tuple(suffixes)

    def of(self, hashes: Sequence[bytes]) -> list[bytes]:
        """The keys of these pages, page by page, pool by pool."""
        return [each + suffix for each in hashes for suffix in self._suffixes]

    def by_page(self, answers: Sequence[Answer]) -> list[Sequence[Answer]]:
        """One answer per key of some pages, page by page."""
        width = len(self._suffixes)
        return [answers[at : at + width] for at in range(0, len(answers), width)]

    def __contains__(self, key: bytes) -> bool:
        """Whether `key` is that of a page of this kind."""
        return key[HASH_BYTES:] in self._suffixes


@dataclass(frozen=True, slots=True)
class Way:
    """How pages of one kind get to a backend: under which keys, from which pools. Without pools a page has
    one key and no bytes."""

    keys: Keys
    pools: tuple[Pool, ...] = ()

    def batches(self, pages: int) -> Iterator[tuple[int, int]]:
        """Ranges of `pages` pages, to be carried one after another."""
        page_bytes = sum(pool.page_bytes for pool in self.pools)
        step = max(1, BATCH_BYTES // page_bytes if page_bytes else pages)
        for low in range(0, pages, step):
            yield low, min(low + step, pages)


Ways = Callable[[Kind], Way]


def pool_way(kind: Kind, pools: KindPools, shard: str) -> Way:
    """Between the pools of `kind` and a backend."""
    named = zip([str(kind), *(f"{kind}/{name}" for name in pools.sidecars)], pools, strict=True)
    return Way(Keys([_suffix(descriptor(name, shard, pool)) for name, pool in named]), tuple(pools))


def bare_way(kind: Kind) -> Way:
    """For metadata alone: a key per page, of its hash and what tells the kinds apart (nothing for FULL)."""
    return Way(Keys([bytes(KEY_BYTES - HASH_BYTES) if kind == FULL else _suffix(kind.encode())]))


def descriptor(name: str, shard: str, pool: Pool) -> bytes:
    """What makes the bytes of this pool's pages differ from another's, as unambiguous text. `name` is that
    of a kind, or "kind/sidecar"."""
    parts = (name.encode(), shard.encode(), pool.layout.descriptor(pool.order))
    return b"".join(len(part).to_bytes(4, "little") + part for part in parts)


def _suffix(text: bytes) -> bytes:
    return storage_key(bytes(HASH_BYTES), text)[HASH_BYTES:]


class Pages:
    """The bytes of some pages in all their pools, page by page: views of the pools where those are
    contiguous on the CPU, and otherwise buffers beside them, filled by `read`, emptied by `write`."""

    def __init__(self, pools: tuple[Pool, ...], slots: Slots) -> None:
        self._pools = pools
        self._slots = slots
        self._beside: dict[int, np.ndarray[tuple[int, int], np.dtype[np.uint8]]] = {}
        columns: list[list[Buffer]] = [] if pools else [[memoryview(b"")] * len(slots)]
        for index, pool in enumerate(pools):
            views = [pool.page_buffer(slot) for slot in slots.tolist()]
            if None in views:
                beside = np.empty((len(slots), pool.page_bytes), np.uint8)
                self._beside[index] = beside
                columns.append([row.data for row in beside])
            else:
                columns.append([view for view in views if view is not None])
        self.buffers: list[Buffer] = [column[at] for at in range(len(slots)) for column in columns]

    def read(self) -> None:
        """Fill the buffers that are not views."""
        for index, beside in self._beside.items():
            self._pools[index].read_pages(self._slots, beside)

    def write(self, pages: int) -> None:
        """Bring the first `pages` pages of the buffers that are not views into the pools."""
        for index, beside in self._beside.items():
            if pages:
                self._pools[index].write_pages(self._slots[:pages], beside[:pages])


class Task(ABC):
    """One job on its way. `run` does it; `completion` says at any time what it has come to."""

    @abstractmethod
    def run(self, storage: Storage, ways: Ways, stop: Stop) -> str | None:
        """Do the job, but no further batch once `stop` says so. Returns why less came of it than was asked,
        or None. Raises what the backend raises, and `StorageError` where it answers for another number
        of pages; `completion` then says what was done before."""

    @abstractmethod
    def completion(self, error: str | None, final: bool = True) -> Completion:
        """What has been done so far."""

    def declined(self, why: str) -> Completion:
        """Nobody begins with it."""
        return replace(self.completion(why), declined=True)

    def broken(self, raised: BaseException) -> Completion:
        """What was done before `run` raised."""
        return replace(self.completion(f"{type(raised).__name__}: {raised}"), broken=True)


def task_of(job: Job, progress: Callable[[Completion], None] = lambda completion: None) -> Task:
    """What carries out `job`. A Get calls `progress` after each batch of FULL but the last."""
    if isinstance(job, Put):
        return _Putting(job)
    return _Getting(job, progress) if isinstance(job, Get) else _Querying(job)


class _Putting(Task):
    def __init__(self, job: Put) -> None:
        self._job = job
        self._kept = [0] * len(job.spans)
        self._stored: dict[bytes, None] = {}
        self._evicted: dict[bytes, None] = {}

    def run(self, storage: Storage, ways: Ways, stop: Stop) -> str | None:
        spine = ways(self._job.spans[0].kind).keys
        for index, span in _full_last(self._job.spans):
            way = ways(span.kind)
            for low, high in way.batches(len(span.hashes)):
                if stop():
                    return "cancelled"
                hashes = span.hashes[low:high]
                pages = Pages(way.pools, span.slots[low:high])
                pages.read()
                result = storage.put(way.keys.of(hashes), pages.buffers)
                _require(result.outcomes, pages.buffers)
                for key in result.evicted:
                    if key in spine:
                        self._evicted[key[:HASH_BYTES]] = None
                        self._stored.pop(key[:HASH_BYTES], None)
                for page_hash, outcomes in zip(hashes, way.keys.by_page(result.outcomes), strict=True):
                    self._page(index, page_hash, outcomes)
        return None

    def _page(self, index: int, page_hash: bytes, outcomes: Sequence[Wrote]) -> None:
        if Wrote.REFUSED in outcomes:
            return
        self._kept[index] += 1
        if index == 0 and Wrote.STORED in outcomes:
            self._stored[page_hash] = None
            self._evicted.pop(page_hash, None)

    def completion(self, error: str | None, final: bool = True) -> Completion:
        kept, *others = self._kept
        new, gone = tuple(self._stored), tuple(self._evicted)
        return Completion(self._job.op, kept, error, final, new, gone, tuple(others))


class _Getting(Task):
    def __init__(self, job: Get, progress: Callable[[Completion], None]) -> None:
        self._job = job
        self._progress = progress
        self._arrived = [0] * len(job.spans)

    def run(self, storage: Storage, ways: Ways, stop: Stop) -> str | None:
        errors = [
            self._read(index, span, storage, ways(span.kind), stop)
            for index, span in _full_last(self._job.spans)
        ]
        return next((error for error in errors if error is not None), None)

    def _read(self, index: int, span: Span, storage: Storage, way: Way, stop: Stop) -> str | None:
        for low, high in way.batches(len(span.hashes)):
            if stop():
                return "cancelled"
            pages = Pages(way.pools, span.slots[low:high])
            got = storage.get(way.keys.of(span.hashes[low:high]), pages.buffers)
            _require(got, pages.buffers)
            hits = [all(each is Got.HIT for each in page) for page in way.keys.by_page(got)]
            whole = _leading(hits)
            pages.write(whole)
            self._arrived[index] = low + whole
            if low + whole < high:
                return f"{span.kind}: page {low + whole} is not there"
            if index == 0 and high < len(span.hashes):
                self._progress(self.completion(None, final=False))
        return None

    def completion(self, error: str | None, final: bool = True) -> Completion:
        arrived, *others = self._arrived
        return Completion(self._job.op, arrived, error, final, others=tuple(others))


class _Querying(Task):
    def __init__(self, job: Query) -> None:
        self._job = job
        self._held = [[False] * len(hashes) for _, hashes in job.asked]

    def run(self, storage: Storage, ways: Ways, stop: Stop) -> str | None:
        held = []
        for kind, hashes in self._job.asked:
            if stop():
                return "cancelled"
            keys = ways(kind).keys
            asked = keys.of(hashes)
            answers = storage.holds(asked)
            _require(answers, asked)
            held.append([all(page) for page in keys.by_page(answers)])
        self._held = held
        return None

    def completion(self, error: str | None, final: bool = True) -> Completion:
        full, *others = self._held
        return Completion(self._job.op, _leading(full), error, final, held=tuple(map(bytes, others)))


def _full_last(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """The spans with their places, the first one last."""
    first, *further = enumerate(spans)
    return [*further, first]


def _leading(good: Sequence[bool]) -> int:
    return next((at for at, each in enumerate(good) if not each), len(good))


def _require(answers: Sequence[object], asked: Sequence[object]) -> None:
    """A backend that answers for another number of pages than it was asked about has not answered."""
    if len(answers) != len(asked):
        raise StorageError(f"the storage backend answered for {len(answers)} pages of {len(asked)}")
