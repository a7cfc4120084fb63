"""What the tests of the storage workers share: pools of four kinds, their contents, and one worker."""

from __future__ import annotations

import queue
from collections.abc import Sequence

import numpy as np

from tiertree.kvlayout import Attention, KVLayout, Layout, MemoryOrder, StateLayout
from tiertree.pools.group import KindPools, PoolGroup
from tiertree.pools.paged import Pool
from tiertree.storage.base import HASH_BYTES
from tiertree.storage.jobs import Job, pool_way
from tiertree.storage.memory import MemoryStorage
from tiertree.storage.workers import StorageWorkers
from tiertree.tree.actions import Completion, Get, Put, Query, Span
from tiertree.types import FULL, MAMBA, SWA, Kind

PAGES = 8
MADE_UP = Kind("made-up")
LAYOUT = KVLayout(layers=2, kv_heads=1, head_size=4, dtype="float32", page_size=2)
WIDE = KVLayout(layers=1, kv_heads=2, head_size=6, dtype="bfloat16", page_size=2)
LATENT = KVLayout(layers=1, kv_heads=1, head_size=3, dtype="float32", attention=Attention.MLA, page_size=2)
STATE = StateLayout(layers=2, elements=5)


def group() -> PoolGroup:
    """Pools of four kinds, two with a sidecar. Pages of one pool are not contiguous; the names of two kinds
    are all that tells their pages apart outside."""

    def pool(layout: Layout, order: MemoryOrder = MemoryOrder.PAGE_FIRST_DIRECT) -> Pool:
        return Pool(layout, order, PAGES)

    return PoolGroup(
        {
            FULL: KindPools(pool(LAYOUT), {"draft": pool(LATENT)}),
            SWA: KindPools(pool(WIDE, MemoryOrder.LAYER_FIRST), {"indexer": pool(LATENT)}),
            MADE_UP: KindPools(pool(WIDE)),
            MAMBA: KindPools(pool(STATE)),
        }
    )


def page_hash(page: int) -> bytes:
    return page.to_bytes(HASH_BYTES, "big")


def hashes(pages: Sequence[int]) -> tuple[bytes, ...]:
    return tuple(page_hash(page) for page in pages)


def span(kind: Kind, pages: Sequence[int], slots: Sequence[int] | None = None) -> Span:
    """Pages of `kind` by number, in the slots of the same numbers or in `slots`."""
    return Span(kind, hashes(pages), np.array(pages if slots is None else slots, np.int64))


def content(kind: Kind, page: int, host: PoolGroup) -> list[bytes]:
    """What a page is made of, pool by pool: a function of its kind, number and pool."""
    return [
        np.random.default_rng([page, index, *str(kind).encode()]).bytes(pool.page_bytes)
        for index, pool in enumerate(host[kind])
    ]


class Desk:
    """One worker over pools of four kinds, and every Completion that it has given."""

    def __init__(self, storage: MemoryStorage) -> None:
        self.storage = storage
        self.host = group()
        self.told: queue.Queue[Completion] = queue.Queue()
        self.workers = StorageWorkers(self.host, 1, 4, "tp0/1", self.told.put)
        self.workers.storage = storage
        self._op = 0

    def write(self, kind: Kind, pages: Sequence[int]) -> None:
        """Every page has its content, in the slot of its number."""
        for page in pages:
            for pool, data in zip(self.host[kind], content(kind, page, self.host), strict=True):
                pool.write_pages(np.array([page], np.int64), np.frombuffer(data, np.uint8)[None].copy())

    def read(self, kind: Kind, slot: int) -> list[bytes]:
        """What is in a slot, pool by pool."""
        found = []
        for pool in self.host[kind]:
            page = np.empty((1, pool.page_bytes), np.uint8)
            pool.read_pages(np.array([slot], np.int64), page)
            found.append(page.tobytes())
        return found

    def wipe(self) -> None:
        """Every slot of every pool holds something else."""
        for kind in self.host.kinds:
            for pool in self.host[kind]:
                junk = np.full((PAGES, pool.page_bytes), 0xEE, np.uint8)
                pool.write_pages(np.arange(PAGES, dtype=np.int64), junk)

    def right(self, kind: Kind, pages: Sequence[int]) -> list[bool]:
        """For each page whether its slot has its content, in all pools."""
        return [self.read(kind, page) == content(kind, page, self.host) for page in pages]

    def ask(self, job: Job) -> list[Completion]:
        """Submit and wait: the Completions of `job`, the final one last."""
        self.workers.submit(job)
        told = [self.told.get(timeout=30)]
        while not told[-1].final:
            told.append(self.told.get(timeout=30))
        assert {each.op for each in told} == {job.op}
        return told

    def put(self, *spans: Span) -> Completion:
        return self.ask(Put(self._number(), spans))[-1]

    def get(self, *spans: Span) -> list[Completion]:
        return self.ask(Get(self._number(), spans))

    def query(self, *asked: tuple[Kind, Sequence[int]]) -> Completion:
        (done,) = self.ask(Query(self._number(), tuple((kind, hashes(pages)) for kind, pages in asked)))
        return done

    def key(self, kind: Kind, page: int, pool: int = 0) -> bytes:
        """The storage key of a page in one of the pools of `kind`."""
        return pool_way(kind, self.host[kind], "tp0/1").keys.of([page_hash(page)])[pool]

    def _number(self) -> int:
        self._op += 1
        return self._op


def stored(desk: Desk, full: Sequence[int] = range(5), swa: Sequence[int] = (3, 4)) -> Desk:
    """These pages are on storage, and nothing is left of them on host."""
    for kind, pages in ((FULL, full), (SWA, swa), (MADE_UP, [4])):
        desk.write(kind, pages)
    done = desk.put(span(FULL, full), span(SWA, swa), span(MADE_UP, [4]))
    assert (done.pages, done.others, done.error) == (len(full), (len(swa), 1), None)
    assert done.stored == hashes(full)
    desk.wipe()
    return desk
