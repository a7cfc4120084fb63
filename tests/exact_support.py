"""An engine on a real model that is watched: what a request finds must be, bit for bit, what was saved.

    insert    what the tree takes over is remembered:  (kind, page hash) ──▶ SHA-256s of the page's bytes
    forward   what a row reads of the tree is compared; where it began, how many tokens, its logits are kept

Pages are compared behind the forward pass, in the slots that it read, with all their sidecars.
"""

from __future__ import annotations

import functools
import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from hf_support import model_of
from transformers import PreTrainedModel

from tiertree import (
    FULL,
    CacheConfig,
    Kind,
    KindConfig,
    LoadBackConfig,
    Mamba,
    PrefetchConfig,
    PrefixCache,
    Refused,
    SlidingWindow,
    StopRule,
    StorageConfig,
    Tier,
    WritePolicy,
)
from tiertree.engines.hf import NAMES, HFEngine, cache_config, make_plan
from tiertree.engines.hf.sizing import rules_of
from tiertree.engines.request import NOTHING_CACHED, Cached, Limits, Reply, Request
from tiertree.engines.row import Row
from tiertree.pools.group import KindPools, PoolGroup
from tiertree.tree.key import Key
from tiertree.types import Slots

CHUNK = 64
LENGTH = 130
"""Tokens of most prompts: two chunks and two tokens, so that the deepest hit is where a chunk ends."""
SHARED = 128
COUNT = 4
"""Tokens of most answers."""
DEVICE, HOST = Tier.DEVICE, Tier.HOST

APART = {name: 8e-4 if name == "qwen3-next" else 5e-5 for name in NAMES}
"""How far logits, which are up to 7, may be from those of other chunks. Measured: 3.3e-4 for qwen3-next,
whose delta rule is another sum where a chunk begins elsewhere; 3.3e-5 at most for the others."""

Places = dict[Kind, list[int]]
"""Pages by kind."""
Saved = dict[tuple[Kind, bytes], set[str]]
"""Digests of bytes by kind and page hash."""


@dataclass
class Run:
    """One request as it was computed."""

    tokens: list[int] = field(default_factory=list)
    cached: Cached = NOTHING_CACHED
    passes: list[tuple[int, int, int]] = field(default_factory=list)
    """Each: where it began, of how many tokens, among how many rows."""
    logits: dict[int, torch.Tensor] = field(default_factory=dict)
    """Behind so many tokens."""
    found: list[Places] = field(default_factory=list)
    """Per pass, which pages of the tree it read and had compared."""


class Watched(HFEngine):
    """An engine whose bytes are watched. `saved`: what has been saved, by earlier ones too; a page that was
    computed in other chunks meanwhile was saved twice. `wrong` are the pages that were found with bytes that
    nobody has saved."""

    def __init__(
        self,
        model: Any,
        config: CacheConfig,
        limits: Limits | None = None,
        saved: Saved | None = None,
    ) -> None:
        super().__init__(model, config, limits or Limits(chunk_tokens=CHUNK))
        self.saved: Saved = {} if saved is None else saved
        self.wrong: set[tuple[Kind, int]] = set()
        self.runs: dict[int, Run] = {}
        self._forward, self._insert = self._runner.forward, self.cache.insert
        self._runner.forward = self._watched_forward
        self.cache.insert = self._watched_insert
        self._rows: list[Any] = []

    def say(self, tokens: Sequence[int], count: int = COUNT, **options: Any) -> Run:
        """One request alone, from beginning to end."""
        reply = self.submit(Request(tokens=tokens, max_new_tokens=count, **options))
        self.run()
        return self.ran(reply)

    def ran(self, reply: Reply) -> Run:
        """How `reply`, which has ended well, was computed."""
        assert (reply.finish, reply.error) == ("length", None)
        run = self.runs[reply.number]
        run.tokens, run.cached = reply.tokens, reply.cached
        self.cache.check()
        return run

    def evict(self, *tiers: Tier) -> None:
        """All of these tiers is given away, device first, once everything has been copied and stored."""
        for tier in tiers:
            assert self.cache.drain()
            for kind, pages in self.cache.config.kind_pages(tier).items():
                self.cache.evict(pages, tier, kind=kind)
            assert self.cache.drain()
            for kind, pages in self.cache.config.kind_pages(tier).items():
                assert self.cache._core.ledger(kind, tier).free == pages, (tier, kind)

    def reads(self, pages: int) -> Places:
        """What a request reads that goes on behind so many pages."""
        rules = {each.kind: each.rules for each in self.cache.config.kinds}
        size = self.cache.config.page_size
        found = {FULL: list(range(pages))}
        found |= {kind: list(range(each.since(pages, size), pages)) for kind, each in rules.items()}
        return found if pages else {}

    def key(self, tokens: Sequence[int]) -> Key:
        """Of a prompt of the namespace ""."""
        return self.cache.key(list(tokens), "")

    def flip(self, tier: Tier, key: Key, kind: Kind, page: int, pool: int = 0) -> None:
        """Another lowest bit in the last byte but three of one page; a second time, the same as before."""
        pools = self.cache.device_pools if tier is DEVICE else self.cache.host_pools
        slot = where(self.cache, key, kind, tier)[page : page + 1]
        assert slot[0] >= 0, f"page {page} of {kind} is not on {tier.name}"
        memory = [*pools[kind]][pool]
        data = np.empty((1, memory.page_bytes), np.uint8)
        memory.read_pages(slot, data)
        data[0, -4] ^= 1  # the lowest bit of the last float32
        memory.write_pages(slot, data)

    # -- watching ---------------------------------------------------------------------------------

    def _compute(self, sequences: list[Any], count: int) -> None:
        self._rows = sequences
        super()._compute(sequences, count)

    def _watched_forward(self, rows: Sequence[Row], adapter: str = "") -> torch.Tensor:
        logits = self._forward(rows, adapter)
        for sequence, row, each in zip(self._rows, rows, logits, strict=True):
            run = self.runs.setdefault(sequence.reply.number, Run())
            run.passes.append((row.start, len(row.tokens), len(rows)))
            run.logits[row.start + len(row.tokens)] = each.clone()
            run.found.append(self._compare(sequence, row))
        return logits

    def _compare(self, sequence: Any, row: Row) -> Places:
        base, pools = sequence.base, self.cache.device_pools
        assert pools is not None
        size = self.cache.config.page_size
        hashes = self.cache._core.radix.hashes.of_key(sequence.key(base * size))
        found: dict[Kind, dict[int, int]] = {}
        for kind, (first, slots) in row.tables.items():
            found[kind] = dict(zip(range(first, base), slots.tolist(), strict=False))
        for kind, move in row.states.items():
            found[kind] = {base - 1: move.source} if base and row.start == base * size else {}
        for kind, places in found.items():
            slots = np.array([*places.values()], np.int64)
            for page, digest in zip(places, digests(pools[kind], slots), strict=True):
                if digest not in self.saved.get((kind, hashes[page]), ()):
                    self.wrong.add((kind, page))
        return {kind: [*places] for kind, places in found.items() if places}

    def _watched_insert(
        self, key: Key, slots: Slots, lease: Any = None, partial: Mapping[Kind, Slots] | None = None
    ) -> Any:
        first, pools = lease.device_boundary, self.cache.device_pools
        assert pools is not None
        hashes = self.cache._core.radix.hashes.of_key(key)
        brought = []
        for kind, given in {FULL: slots, **(partial or {})}.items():
            at = np.flatnonzero(given >= 0)
            brought.append((kind, at + first, given[at], digests(pools[kind], given[at])))
        done = self._insert(key, slots, lease, partial or {})
        if not isinstance(done, Refused):
            for kind, pages, given, all_digests in brought:
                taken = where(self.cache, key, kind, DEVICE)[pages] == given
                for page, digest, is_taken in zip(pages, all_digests, taken, strict=True):
                    if is_taken:
                        self.saved.setdefault((kind, hashes[page]), set()).add(digest)
        return done


def digests(pools: KindPools, slots: Slots) -> list[str]:
    """Of the bytes of each of these slots, those of sidecars included."""
    parts = []
    for pool in pools:
        data = np.empty((len(slots), pool.page_bytes), np.uint8)
        pool.read_pages(slots, data)
        parts.append(data)
    return [hashlib.sha256(each.tobytes()).hexdigest() for each in np.concatenate(parts, axis=1)]


def where(cache: PrefixCache, key: Key, kind: Kind, tier: Tier) -> Slots:
    """The slot of each page of `key` on `tier`; −1 where it has none."""
    core = cache._core
    path, last, inside = core.radix.walk(key)
    found = np.full(key.pages, -1, np.int64)
    for node, count in [(each, each.pages) for each in path] + ([] if last is None else [(last, inside)]):
        lane = node.lane(tier) if kind == FULL else core.kinds[kind].lane(node, tier)
        if lane.slots is not None:
            found[node.start : node.start + count] = lane.slots[:count]
    return found


def pools_of(pools: PoolGroup) -> list[tuple[Kind, int]]:
    """Every pool, as kind and number: 0 is the main one, behind it are its sidecars."""
    return [(kind, index) for kind in pools.kinds for index, _ in enumerate(pools[kind])]


# -- engines --------------------------------------------------------------------------------------


def config_of(
    model: PreTrainedModel,
    page: int = 4,
    device: int | None = None,
    host: bool = False,
    policy: str = "write_through",
    path: str | None = None,
    checkpoint: int | None = None,
) -> CacheConfig:
    """A small cache for `model`; nothing is too short to be moved. `device`: pages of all kinds but states.
    `checkpoint`: windows are kept before every multiple of so many tokens, too."""
    device = device or 480 // page
    kinds = []
    for rules in rules_of(make_plan(model)).values():
        own = 16 if isinstance(rules, Mamba) else device
        if isinstance(rules, SlidingWindow):
            rules = replace(rules, checkpoint_tokens=checkpoint)
        kinds.append(KindConfig(rules=rules, device=own, host=3 * own if host else None))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cache_config(
            model,
            device=device,
            host=3 * device if host else None,
            storage=None if path is None else StorageConfig(path=path, size="64MiB"),
            page_size=page,
            kinds=kinds,
            write_policy=WritePolicy(policy),
            load_back=LoadBackConfig(min_tokens=0),
            prefetch=PrefetchConfig(min_tokens=0, stop_rule=StopRule.WAIT_COMPLETE),
        )


def engine_of(
    model: str | PreTrainedModel, page: int = 4, saved: Saved | None = None, **options: Any
) -> Watched:
    """A watched engine with nothing in memory; `options` as for `config_of`."""
    if isinstance(model, str):
        model = model_of(model)
    return Watched(model, config_of(model, page, **options), saved=saved)


def computed(
    model: str | PreTrainedModel, page: int, tokens: Sequence[int], count: int, **options: Any
) -> Run:
    """The cold run: by an engine of its own that has nothing cached."""
    with engine_of(model, page) as engine:
        run = engine.say(tokens, count, **options)
        assert run.cached.total == 0
        assert run.passes[0][0] == 0
        return run


@functools.cache
def _cold(name: str, page: int, tokens: tuple[int, ...], count: int) -> Run:
    return computed(name, page, tokens, count)


def cold(name: str, page: int, tokens: Sequence[int], count: int = COUNT) -> Run:
    """`computed`, once for all tests."""
    return _cold(name, page, tuple(tokens), count)


# -- what must be so ------------------------------------------------------------------------------


def same_bits(run: Run, reference: Run, what: str) -> None:
    """Every pass is one of the reference's, in order, with the same logits bit for bit; the tokens too."""
    assert run.tokens == reference.tokens, what
    assert run.passes == reference.passes[-len(run.passes) :], what
    for end, logits in run.logits.items():
        assert torch.equal(logits, reference.logits[end]), (what, end)


def close(run: Run, reference: Run, tolerance: float, what: str) -> None:
    """The same tokens, and nearly the same logits wherever both have some. No token hangs on so little: the
    second best is further behind."""
    assert run.tokens == reference.tokens, what
    ends = run.logits.keys() & reference.logits.keys()
    assert len(ends) >= COUNT, what
    for end in ends:
        apart = float((run.logits[end] - reference.logits[end]).abs().max())
        assert apart <= tolerance, (what, end, apart)
    for end in sorted(reference.logits)[-len(reference.tokens) :]:
        best, second = reference.logits[end].topk(2).values.tolist()
        assert best - second > 2 * tolerance, (what, end, best - second)


def hit(engine: Watched, run: Run, cached: Cached, what: str, bytes_wrong: bool = False) -> None:
    """`run` found just so many tokens on each tier, its first pass began behind them, and read and compared
    everything that is needed there."""
    assert run.cached == cached, what
    assert run.passes[0][0] == cached.total, what
    assert run.found[0] == engine.reads(cached.total // engine.cache.config.page_size), what
    assert bool(engine.wrong) is bytes_wrong, (what, engine.wrong)


def control(
    engine: Watched, tier: Tier, tokens: Sequence[int], cached: Cached, before: Callable[[], None]
) -> None:
    """One flipped bit of any pool on `tier` is noticed, in just that page, and right again when flipped
    back. `before` is called before each run."""
    pools = engine.cache.device_pools
    assert pools is not None
    key, last = engine.key(tokens), cached.total // engine.cache.config.page_size - 1
    for kind, pool in pools_of(pools):
        what = f"{tier.name}, {kind}, pool {pool}"
        before()
        engine.flip(tier, key, kind, last, pool)
        hit(engine, engine.say(tokens, 1), cached, what, bytes_wrong=True)
        assert engine.wrong == {(kind, last)}, what
        engine.wrong.clear()
        before()
        engine.flip(tier, key, kind, last, pool)
    hit(engine, engine.say(tokens, 1), cached, tier.name)


def pass_digests(run: Run) -> list[str]:
    """Of the logits of every pass, in order."""
    return [hashlib.sha256(run.logits[end].numpy().tobytes()).hexdigest() for end in sorted(run.logits)]
