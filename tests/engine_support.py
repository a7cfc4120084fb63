"""A model whose KV says what it was computed from, and an engine whose transfers a test works by hand.

    position   0 ──────────── p ────────────       a FULL or window entry holds the unit at p and the chain of
    chain      c₀ = link(adapter, u₀) … cₚ         all units up to p; a state holds the chain; logits are a
                                                   function of the last chain: of the whole prefix

So one stale, aliased or foreign slot is a wrong value, and `answer` knows each answer without any cache.
"""

from __future__ import annotations

import random
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from tiertree import (
    FULL,
    CacheConfig,
    Component,
    DeviceConfig,
    HostConfig,
    KindConfig,
    KVLayout,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    PrefixCache,
    StateLayout,
    StopRule,
    Tier,
    WritePolicy,
)
from tiertree.build import make_pools
from tiertree.engines.engine import Engine
from tiertree.engines.request import Limits, Reply, Request, Span
from tiertree.engines.row import Row, Table
from tiertree.engines.sampling import Chooser
from tiertree.storage.memory import KeyStorage
from tiertree.testing.faults import Clock, FaultyExecutor
from tiertree.tree.actions import Copy
from tiertree.tree.actions import Span as Pages
from tiertree.tree.ledger import REQUEST_FILLING
from tiertree.types import Kind, Slots

PAGE = 4
VOCAB = 40
HIDDEN = 2
LAYERS = {"full": 2, "window": 3, "state": 2}
MASK = 0x7FFFFFFF
SPOILT = 0x5A5A5A5A
"""What is in a slot that a transfer may write to, and has not finished."""

Ints = NDArray[np.int32]


def link(chain: Any, unit: Any) -> Any:
    """The chain behind `unit`; both may be arrays of int64."""
    return ((chain ^ (unit * 0x9E3779B1 & MASK)) * 0x85EBCA6B + 0x1234567) >> 5 & MASK


def root(adapter: str) -> int:
    """The chain before the first unit."""
    return zlib.crc32(adapter.encode()) & MASK


def salt(layer: int, place: int) -> int:
    """What makes the content of each layer and plane, or element, its own."""
    return (layer * 1_000_003 + place * 7_919) & MASK


def logits_of(chain: int) -> torch.Tensor:
    """Logits behind `chain`, with ties."""
    each = np.arange(1, VOCAB + 1, dtype=np.int64)
    return torch.from_numpy(((chain * each * 0x9E3779B1 >> 9) & 63).astype(np.float32) / 16)


def vector_unit(vector: torch.Tensor) -> int:
    """The unit of a position that is computed from `vector`."""
    return zlib.crc32(vector.contiguous().numpy().tobytes()) & MASK | 1 << 20


def units_of(tokens: Sequence[int], spans: Sequence[Span] = ()) -> list[int]:
    """What the model computes a prompt from."""
    units = list(tokens)
    for span in spans:
        units[span.start : span.stop] = [vector_unit(each) for each in span.vectors]
    return units


def answer(request: Request, seed: int | None = None) -> list[int]:
    """What the model says to `request`. A request that samples needs its seed."""
    chain = root(request.adapter)
    for unit in units_of(request.tokens, request.spans):
        chain = link(chain, unit)
    chooser = Chooser(request.sampling, seed or request.sampling.seed or 0)
    tokens: list[int] = []
    while len(tokens) < request.max_new_tokens and not (tokens and tokens[-1] in request.stop):
        logits = logits_of(chain)
        greedy = request.sampling.temperature == 0
        tokens.append(int(np.argmax(logits.numpy())) if greedy else chooser.choose(logits))
        chain = link(chain, tokens[-1])
    return tokens


class FakeRunner:
    """`Runner` over the device pools of `cache`. `passes` are the rows it was given, as (start, tokens);
    `before` is called with the rows of a pass, `after` with its logits, and both may do their worst."""

    vocab_size = VOCAB
    hidden_size = HIDDEN

    def __init__(self, cache: PrefixCache) -> None:
        assert cache.device_pools is not None
        self._cache = cache
        self._rules = {each.kind: each.rules for each in cache.config.kinds}
        self._memory = {
            kind: ints(cache.device_pools[kind].main.logical) for kind in cache.device_pools.kinds
        }
        self._layers = max(memory.shape[1] for memory in self._memory.values())
        self.passes: list[list[tuple[int, int]]] = []
        self.loading = 0
        self.embedded = 0
        self.before: Callable[[Sequence[Row]], None] = lambda rows: None
        self.on_layer: Callable[[int], None] = lambda layer: None
        self.after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits

    @property
    def computed(self) -> int:
        """Tokens of all passes."""
        return sum(count for rows in self.passes for _, count in rows)

    def forward(self, rows: Sequence[Row], adapter: str = "") -> torch.Tensor:
        """See `Runner`. Raises AssertionError when a row breaks the contract, or reads a wrong byte."""
        self.before(rows)
        self.passes.append([(row.start, len(row.tokens)) for row in rows])
        self.loading += rows[0].ready is not None
        assert len(rows) == 1 or all(len(row.tokens) == 1 and row.ready is None for row in rows)
        self._own(rows)
        return self.after(torch.stack([logits_of(self._compute(row, adapter)) for row in rows]))

    def _own(self, rows: Sequence[Row]) -> None:
        """What a row writes to belongs to its request, and to no other row."""
        for kind in self._memory:
            written = np.concatenate([self._written(kind, row) for row in rows])
            assert len(np.unique(written)) == len(written), (kind, written)
            book = self._cache._core.ledger(kind, Tier.DEVICE).book
            assert (book[written] == REQUEST_FILLING).all(), f"{kind}: {written} are not the requests' own"

    def _written(self, kind: Kind, row: Row) -> Slots:
        if kind in row.states:
            return np.array([row.states[kind].target], np.int64)
        first, slots = row.tables[kind]
        page = self._cache.config.page_size
        low, high = row.start // page, (row.start + len(row.tokens) - 1) // page
        assert first <= low <= high < first + len(slots), (kind, first, len(slots), low, high)
        return slots[low - first : high - first + 1]

    def _compute(self, row: Row, adapter: str) -> int:
        """All layers of `row`; returns its last chain."""
        units = self._units(row)
        chain = np.empty(0, np.int64)
        for layer in range(self._layers):
            self.on_layer(layer)
            if row.ready is not None:
                row.ready(layer)
            if layer == 0:
                chain = self._chain(row, units, root(adapter))
            for kind, memory in self._memory.items():
                if layer >= memory.shape[1]:
                    continue
                if kind in row.states:
                    self._state(kind, layer, row, chain)
                else:
                    self._tokens(kind, layer, row, units, chain)
        return int(chain[-1])

    def _units(self, row: Row) -> NDArray[np.int64]:
        units = list(row.tokens)
        for start, vectors in row.embeds:
            for place in range(max(start, row.start), min(start + len(vectors), row.start + len(units))):
                units[place - row.start] = vector_unit(vectors[place - start])
                self.embedded += 1
        return np.array(units, np.int64)

    def _chain(self, row: Row, units: NDArray[np.int64], first: int) -> NDArray[np.int64]:
        """The chain at every position, checked for all that was computed before."""
        before, chain = self._read(FULL, 0, row.tables[FULL], 0, row.start)
        previous = np.concatenate(([first], chain[:-1]))[: row.start]
        wrong = np.flatnonzero(link(previous, before) != chain)
        assert not len(wrong), f"FULL at {wrong[0]} of {row.start}: {before[wrong[0]]}, {chain[wrong[0]]}"
        grown = chain.tolist() or [first]
        for unit in units.tolist():
            grown.append(link(grown[-1], unit))
        return np.array(grown[-len(units) - row.start :], np.int64)

    def _tokens(
        self, kind: Kind, layer: int, row: Row, units: NDArray[np.int64], chain: NDArray[np.int64]
    ) -> None:
        """Read what attention reads and compare it; then write the new tokens."""
        window = getattr(self._rules.get(kind), "window", row.start)
        low = max(0, row.start - window)
        _, read = self._read(kind, layer, row.tables[kind], low, row.start)
        wrong = np.flatnonzero(read != chain[low : row.start])
        assert not len(wrong), f"{kind}, layer {layer}, position {low + wrong[0]} of {row.start}"
        places = np.arange(row.start, row.start + len(units))
        at, entry = self._at(row.tables[kind], places)
        self._memory[kind][at, layer, 0, entry, 0, 0] = units ^ salt(layer, 0)
        self._memory[kind][at, layer, 1, entry, 0, 0] = chain[row.start :] ^ salt(layer, 1)

    def _read(self, kind: Kind, layer: int, table: Table, low: int, high: int) -> Any:
        at, entry = self._at(table, np.arange(low, high))
        memory = self._memory[kind]
        return tuple(
            memory[at, layer, plane, entry, 0, 0].astype(np.int64) ^ salt(layer, plane) for plane in (0, 1)
        )

    def _at(self, table: Table, places: NDArray[np.int64]) -> tuple[Slots, NDArray[np.int64]]:
        page, entry = np.divmod(places, self._cache.config.page_size)
        assert not len(page) or (page[0] >= table.first and page[-1] < table.first + len(table.slots))
        return table.slots[page - table.first], entry

    def _state(self, kind: Kind, layer: int, row: Row, chain: NDArray[np.int64]) -> None:
        source, target = row.states[kind]
        memory = self._memory[kind][:, layer, 0, 0, 0]
        salts = np.array([salt(layer, place) for place in range(memory.shape[-1])])
        assert (source < 0) == (row.start == 0), (source, row.start)
        if source >= 0:
            read = memory[source].astype(np.int64) ^ salts
            assert (read == chain[row.start - 1]).all(), f"{kind}, layer {layer}, after {row.start}: {read}"
        assert target >= 0
        memory[target] = chain[-1] ^ salts


def ints(pool: torch.Tensor) -> Ints:
    """A pool of float32 as integers, without a copy."""
    return pool.view(torch.int32).numpy()


class PoolsExecutor(FaultyExecutor):
    """A `FaultyExecutor` over real pools. `on_poll` is called at every poll; by default all that is pending
    ends well there."""

    def __init__(self, config: CacheConfig, clock: Clock, **faults: Any) -> None:
        sizes = [config.kind_pages(tier) for tier in (Tier.DEVICE, Tier.HOST)]
        super().__init__(sizes[0][FULL], sizes[1][FULL], clock, **{"seed": 0, **faults})
        self.pools = dict(zip((Tier.DEVICE, Tier.HOST), make_pools(config), strict=True))
        self._ints = {
            (tier, kind): ints(pools[kind].main.logical)
            for tier, pools in self.pools.items()
            if pools is not None
            for kind in pools.kinds
        }
        self.on_poll: Callable[[], None] = self.complete_all
        self._idle = 0

    def poll(self) -> list[Any]:
        """See `Executor`. Somebody who asks for ever, in vain, is told."""
        before = (self._clock.now, dict(self.layers))
        self.on_poll()
        done = super().poll()
        self._idle = 0 if done or before != (self._clock.now, self.layers) else self._idle + 1
        assert self._idle < 3000, f"nothing comes home: {self.pending}"
        return done

    def layer(self, op: int) -> None:
        """One more layer of the copy `op` arrives."""
        copy, layer = self.pending[op], self.layers.get(op, 0)
        assert isinstance(copy, Copy)
        for move in copy.moves:
            there, here = self._ints[copy.target, move.kind], self._ints[copy.source, move.kind]
            if layer < there.shape[1]:
                there[move.target, layer] = here[move.source, layer]
        self.layers[op] = layer + 1

    def clone(self, kind: Kind, source: Slots, target: Slots) -> None:
        self._move(kind, (Tier.DEVICE, source), (Tier.DEVICE, target))

    def memory(self, kind: Kind, tier: Tier) -> Any:
        pools = self.pools[tier]
        return None if pools is None else pools[kind]

    def _spoil(self, kind: Kind, tier: Tier, slots: Slots) -> None:
        self._ints[tier, kind][slots] = SPOILT

    def _move(self, kind: Kind, source: tuple[Tier, Slots], target: tuple[Tier, Slots]) -> None:
        self._ints[target[0], kind][target[1]] = self._ints[source[0], kind][source[1]]

    def _carry_span(self, span: Pages, low: int, high: int, put: bool) -> None:
        host = self._ints[Tier.HOST, span.kind]
        for page_hash, slot in zip(span.hashes[low:high], span.slots[low:high].tolist(), strict=True):
            if put:
                self.stored[span.kind, page_hash] = host[slot].copy()
            else:
                host[slot] = self.stored[span.kind, page_hash]


class Shelf:
    """A storage that outlives caches."""

    def __init__(self, pages: int = 1000) -> None:
        self.keys = KeyStorage(pages)
        self.stored: dict[Any, object] = {}


def layout(page: int, layers: int = LAYERS["full"]) -> KVLayout:
    """The layout of FULL, or of a window with so many layers."""
    return KVLayout(layers=layers, kv_heads=1, head_size=1, dtype="float32", page_size=page)


def sized(rules: Component, device: int, host: int | None, page: int = PAGE) -> KindConfig:
    """A kind with real pages."""
    state = StateLayout(layers=LAYERS["state"], elements=3, dtype="float32")
    own = state if isinstance(rules, Mamba) else layout(page, LAYERS["window"])
    return KindConfig(rules=rules, device=device, host=host, layout=own)


def make_config(
    device: int = 32, host: int | None = 64, page: int = PAGE, policy: str = "write_through", **options: Any
) -> CacheConfig:
    """A small cache with real bytes. `options` are fields of CacheConfig; minimum lengths are 0 unless they
    say otherwise."""
    chosen = {
        "load_back": LoadBackConfig(min_tokens=0),
        "prefetch": PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        "unit_bits": 64,
        "model": "fake",
        **options,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small hosts and windows are what many tests are about
        return CacheConfig(
            layout=layout(page),
            page_size=page,
            device=DeviceConfig(size=device),
            host=None if host is None else HostConfig(size=host),
            write_policy=WritePolicy(policy),
            **chosen,
        )


class Bench:
    """An engine over a small cache, with a clock and transfers that move when told. As a context manager it
    sees at the end that nobody holds anything."""

    def __init__(
        self,
        config: CacheConfig | None = None,
        limits: Mapping[str, int] | None = None,
        shelf: Shelf | None = None,
        kind: type[Engine] = Engine,
        **faults: Any,
    ) -> None:
        self.clock = Clock()
        self.config = config or make_config()
        self.executor = PoolsExecutor(self.config, self.clock, **faults)
        self.cache = PrefixCache(self.config, executor=self.executor, clock=self.clock).open()
        self.cache.device_pools = self.executor.pools[Tier.DEVICE]
        if shelf is not None:
            self.executor.stored = shelf.stored
            self.cache.attach_storage(shelf.keys)
        self.runner = FakeRunner(self.cache)
        chosen = {"chunk_tokens": 2 * self.config.page_size, **(limits or {})}
        self.engine = kind(self.cache, self.runner, Limits(**chosen), self.clock)
        self.replies: list[Reply] = []

    def submit(self, tokens: Sequence[int], count: int = 4, **options: Any) -> Reply:
        """A request for `count` tokens behind `tokens`."""
        reply = self.engine.submit(Request(tokens=tokens, max_new_tokens=count, **options))
        self.replies.append(reply)
        return reply

    def step(self, times: int = 1) -> list[Reply]:
        """Step, and look at the books each time."""
        touched: list[Reply] = []
        for _ in range(times):
            touched = self.engine.step()
            self.cache.check()
            if self.engine.idle:
                self.clock.advance(0.01)
        return touched

    def until(self, event: Callable[[], bool], most: int = 2000) -> None:
        """Step until something is so."""
        for _ in range(most):
            if event():
                return
            self.step()
        raise AssertionError(f"not in {most} steps")

    def run(self, most: int = 2000) -> None:
        """Step until nobody is left; every answer is then what it must be."""
        self.until(lambda: not self.engine.busy, most)
        self.verify()

    def say(self, tokens: Sequence[int], count: int = 4, **options: Any) -> Reply:
        """One request alone, from beginning to end."""
        reply = self.submit(tokens, count, **options)
        self.run()
        return reply

    def verify(self) -> None:
        """Every answer is what the model says to its prompt, as far as it has come."""
        for reply in self.replies:
            said = answer(reply.request, self.seed(reply))
            whole = reply.finish in ("stop", "length")
            assert reply.tokens == (said if whole else said[: len(reply.tokens)]), reply

    def seed(self, reply: Reply) -> int:
        """The seed that the engine samples `reply` with."""
        own = reply.request.sampling.seed
        return (self.engine.limits.seed * 0x9E3779B97F4A7C15 + reply.number) % 2**63 if own is None else own

    def evict(self) -> None:
        """Everything that may leave device does."""
        self.cache.drain()
        for kind, pages in self.config.kind_pages(Tier.DEVICE).items():
            self.cache.evict(pages, kind=kind)
        self.cache.drain()

    def empty(self) -> None:
        """Nobody holds anything: every slot is free or the tree's."""
        self.executor.on_poll = self.executor.complete_all
        assert self.cache.drain(), "something never comes home"
        self.cache.check()
        stats = self.cache.stats()
        assert (stats.leases, self.engine.running, self.engine.waiting) == (0, 0, 0)
        for tier in (
            *(stats.device, stats.host),
            *(t for k in stats.kinds.values() for t in (k.device, k.host)),
        ):
            assert (tier.requests, tier.operations, tier.lost, tier.protected) == (0, 0, 0, 0), tier
            assert tier.free + tier.resident == tier.capacity, tier

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.empty()
        self.cache.close(deadline_s=0)


def prompt(seed: int, length: int) -> list[int]:
    """Any prompt of this length."""
    rng = random.Random(seed)
    return [rng.randrange(VOCAB) for _ in range(length)]
