"""Real models on pages from storage: of this process, of another one, damaged, of other weights.

A prompt goes from device to host to storage, leaves memory, is read ahead into host and loaded back. What is
compared is told in `test_hf_exact.py`; all chunks here are those of a cold run but where storage had less.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_support import (
    APART,
    COUNT,
    DEVICE,
    HOST,
    LENGTH,
    SHARED,
    Watched,
    close,
    cold,
    computed,
    engine_of,
    hit,
    pass_digests,
    pools_of,
    same_bits,
)
from hf_support import model_of, tokens_of

from tiertree import FULL, Kind
from tiertree.engines.hf import NAMES, tiny
from tiertree.engines.request import Cached
from tiertree.storage.base import Buffer, Got
from tiertree.storage.disk import DiskStorage
from tiertree.storage.jobs import pool_way
from tiertree.storage.memory import MemoryStorage
from tiertree.storage.tamper import flip_byte

PROMPT = tokens_of(1, LENGTH)
OTHER = PROMPT[:SHARED] + tokens_of(2, 12)
BYTES = 64 << 20
FROM_STORAGE = Cached(storage=SHARED)
each_model = pytest.mark.parametrize("name", NAMES)


class Lying(MemoryStorage):
    """Gives the pages of `lies` back with another lowest bit, and says that all is well."""

    def __init__(self) -> None:
        super().__init__(BYTES)
        self.lies: set[bytes] = set()

    def _fill(self, key: bytes, page: Any, into: Buffer) -> Got:
        got = super()._fill(key, page, into)
        if key in self.lies:
            into[-4] ^= 1
        return got


def keys_of(engine: Watched, page: int) -> dict[tuple[Kind, int], bytes]:
    """Under which key storage has a page of PROMPT, by kind and pool."""
    pools = engine.cache.host_pools
    assert pools is not None
    each = engine.cache._core.radix.hashes.of_key(engine.key(PROMPT))[page]
    return {
        (kind, pool): pool_way(kind, pools[kind], "").keys.of([each])[pool] for kind, pool in pools_of(pools)
    }


@each_model
def test_evicted_from_memory_and_read_ahead(name: str) -> None:
    storage, last = Lying(), SHARED // 4 - 1
    with engine_of(name, host=True) as engine:
        engine.cache.attach_storage(storage)
        engine.say(PROMPT)
        for what, tokens in (("again", PROMPT), ("another tail", OTHER)):
            engine.evict(DEVICE, HOST)
            run = engine.say(tokens)
            hit(engine, run, FROM_STORAGE, what)
            same_bits(run, cold(name, 4, tokens), what)
        for place, key in keys_of(engine, last).items():
            storage.lies = {key}
            engine.evict(DEVICE, HOST)
            hit(engine, engine.say(PROMPT, 1), FROM_STORAGE, str(place), bytes_wrong=True)
            assert engine.wrong == {(place[0], last)}
            engine.wrong.clear()
        storage.lies = set()
        engine.evict(DEVICE, HOST)
        hit(engine, engine.say(PROMPT, 1), FROM_STORAGE, "the truth again")


# -- another process ------------------------------------------------------------------------------


def forge(source: Path, target: Path, sizes: dict[bytes, int], flipped: Sequence[bytes]) -> None:
    """A directory with the pages of another one, of which `flipped` have another lowest bit, and checksums
    that are right."""
    here, there = DiskStorage(source, BYTES), DiskStorage(target, BYTES)
    for key, size in sizes.items():
        page = bytearray(size)
        if here.get([key], [memoryview(page)]) == [Got.HIT]:
            if key in flipped:
                page[-4] ^= 1
            there.put([key], [memoryview(page)])
    here.close()
    there.close()


def sizes_of(engine: Watched) -> dict[bytes, int]:
    """The bytes of every page of PROMPT that may be in storage, by its key."""
    pools, sizes = engine.cache.host_pools, {}
    assert pools is not None
    for page in range(SHARED // engine.cache.config.page_size):
        for (kind, pool), key in keys_of(engine, page).items():
            sizes[key] = [*pools[kind]][pool].page_bytes
    return sizes


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, bool], dict[str, Any]]:
    """What a second process makes of the directories of this one, by model, page size, and whether the
    directory is forged."""
    root, cases, places = tmp_path_factory.mktemp("disk"), [], []
    for name, page in [(name, page) for name in NAMES for page in (4, 16)]:
        path = root / f"{name}-{page}"
        with engine_of(name, page, host=True, path=str(path)) as engine:
            engine.say(PROMPT)
            sizes, flipped = sizes_of(engine), [*keys_of(engine, SHARED // page - 1).values()]
        paths = [path]
        if page == 4:
            paths.append(root / f"{name}-forged")
            forge(*paths, sizes, flipped)
        saved = [(kind, each.hex(), [*digests]) for (kind, each), digests in engine.saved.items()]
        for each in paths:
            places.append((name, page, each != path))
            cases.append({"name": name, "page": page, "path": str(each), "saved": saved, "prompt": PROMPT})
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("exact_child.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(places, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("page", [4, 16])
@each_model
def test_persisted_and_found_by_a_new_process(name: str, page: int, served: Any) -> None:
    found, reference = served[name, page, False], cold(name, page, PROMPT)
    assert found["wrong"] == []
    assert found["cached"] == [0, 0, SHARED]
    assert (found["prefetched"], found["loaded_back"]) == (SHARED // page, SHARED // page)
    with engine_of(name, page) as engine:
        assert found["found"] == engine.reads(SHARED // page)
    assert found["tokens"] == reference.tokens
    passes = [tuple(each) for each in found["passes"]]
    assert passes == reference.passes[-len(passes) :]
    assert passes[0][0] == SHARED
    assert found["logits"] == pass_digests(reference)[-len(passes) :]


@each_model
def test_a_flipped_bit_under_a_right_checksum_is_seen_in_a_new_process(name: str, served: Any) -> None:
    found, last = served[name, 4, True], SHARED // 4 - 1
    assert found["cached"] == [0, 0, SHARED]
    with engine_of(name) as engine:
        assert found["wrong"] == sorted([kind, last] for kind in engine.reads(last))


# -- damage, and other weights --------------------------------------------------------------------


@each_model
def test_a_flipped_byte_on_disk_is_refused_and_computed_again(name: str, tmp_path: Path) -> None:
    last = SHARED // 4 - 1
    with engine_of(name, host=True, path=str(tmp_path)) as engine:
        engine.say(PROMPT)
        keys, saved = {page: keys_of(engine, page) for page in (20, last)}, engine.saved
    flips = [(FULL, 0, 20), *((kind, pool, last) for kind, pool in keys[last] if kind != FULL)]
    for kind, pool, page in flips:
        what = f"{kind}, pool {pool}, page {page}"
        storage = DiskStorage(tmp_path, BYTES)
        assert flip_byte(storage, keys[page][kind, pool], 11, 1)
        storage.close()
        with engine_of(name, 4, saved, host=True, path=str(tmp_path)) as engine:
            run = engine.say(PROMPT)
            stats = engine.cache.stats().storage
            assert stats is not None
            assert stats.checksum_failures == 1, what
            assert run.cached.total <= page * 4, what
            hit(engine, run, Cached(storage=run.cached.total), what)
            close(run, cold(name, 4, PROMPT), APART[name], what)
            engine.evict(DEVICE, HOST)
            run = engine.say(PROMPT)
            hit(engine, run, FROM_STORAGE, f"{what}, written anew")
            close(run, cold(name, 4, PROMPT), APART[name], what)


@each_model
def test_others_find_nothing_in_the_directory(name: str, tmp_path: Path) -> None:
    with engine_of(name, host=True, path=str(tmp_path)) as engine:
        engine.say(PROMPT)
        saved = engine.saved
    for what, model, page in (
        ("other weights", tiny(name, seed=1), 4),
        ("another element type", tiny(name).to(torch.bfloat16), 4),
        ("another page size", model_of(name), 16),
    ):
        reference = computed(model, page, PROMPT, COUNT)
        with engine_of(model, page, host=True, path=str(tmp_path)) as engine:
            run = engine.say(PROMPT)
            hit(engine, run, Cached(), what)
            same_bits(run, reference, what)
    with engine_of(name, 4, saved, host=True, path=str(tmp_path)) as engine:
        hit(engine, engine.say(PROMPT), FROM_STORAGE, "the same again")
