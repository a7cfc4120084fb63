"""The parts of a replay by themselves: traces, pages, payloads, the disk tier, the clock, options."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_replay import BLOCK, random_requests, replayed, requests_of

from tiertree import ConfigError, StorageError, TraceError, WritePolicy
from tiertree.replay import Conversations, Replay, ReplayOptions, Request, conversations, read_trace
from tiertree.replay.clock import ReplayClock
from tiertree.replay.paging import Paging
from tiertree.replay.payload import Payload, layout_of
from tiertree.replay.show import sentences
from tiertree.replay.tier3 import disk_bytes
from tiertree.storage.base import Wrote, storage_key
from tiertree.storage.disk import DiskStorage

# -- pages and payloads -----------------------------------------------------------------------------


def test_pages_smaller_than_blocks() -> None:
    """Blocks of 4 tokens in pages of 2: 7 tokens are 2 + 2 pages (the last half full), 5 are 2 + 1."""
    requests = [Request((0, 1), 3), Request((0, 2), 1), Request((0, 1), 3), Request((1, 0), 4)]
    paging = Paging(requests, BLOCK, 2)
    assert paging.counts == [4, 3, 4, 4]
    assert (paging.pages, paging.longest) == (15, 4)
    assert paging.unique_pages == 4 + 1 + 4  # behind another prefix 1 and 0 are other pages
    assert [len(paging.tokens(at)) for at in range(4)] == [8, 6, 8, 8]
    assert replayed(requests, page_tokens=2).tally.hits == [0 + 2 + 4 + 0, 0, 0]
    whole = replayed(requests)
    assert (whole.tally.pages, whole.tally.hits[0], whole.unique_pages) == (8, 0 + 1 + 2 + 0, 5)


@pytest.mark.parametrize("page_tokens", [1, 2, 4])
def test_equal_ids_are_equal_tokens_and_no_others(page_tokens: int) -> None:
    ids = [0, 1, 2, 511, 512, 2**31, 2**32, 2**32 + 1, 2**70]
    requests = requests_of(*([0, each, each] for each in ids))
    paging = Paging(requests, BLOCK, page_tokens)
    spelled: dict[bytes, int] = {}
    for at, each in enumerate(ids):
        tokens = paging.tokens(at)
        assert len(tokens) == 3 * BLOCK
        blocks = [tokens[low : low + BLOCK].tobytes() for low in range(0, 3 * BLOCK, BLOCK)]
        assert blocks[1] == blocks[2]
        assert spelled.setdefault(blocks[1], each) == each
        assert len({tokens[low : low + page_tokens].tobytes() for low in range(0, BLOCK, page_tokens)}) == (
            BLOCK // page_tokens
        )
    assert len(spelled) == len(ids)


def test_page_numbers_tell_prefixes_apart() -> None:
    paging = Paging(random_requests(1), BLOCK, 2)
    known: dict[bytes, int] = {}
    for at, count in enumerate(paging.counts):
        tokens, numbers = paging.tokens(at), paging.numbers(at)
        assert len(numbers) == count
        for page, number in enumerate(numbers.tolist()):
            assert known.setdefault(tokens[: 2 * (page + 1)].tobytes(), number) == number
    assert len(set(known.values())) == len(known) == paging.unique_pages


@pytest.mark.parametrize("page_bytes", [8, 9, 63, 64, 1000, 4096, 4097])
def test_payloads(page_bytes: int) -> None:
    assert layout_of(page_bytes, 512).page_bytes == page_bytes
    payload, numbers = Payload(page_bytes, 1), np.arange(50)
    pages = payload.pages(numbers)
    assert pages.shape == (50, page_bytes)
    assert len({page.tobytes() for page in pages}) == 50
    assert payload.mismatches(numbers, pages) == 0
    assert payload.mismatches(numbers[::-1].copy(), pages) == 50
    for at in (0, page_bytes // 2, page_bytes - 1):
        damaged = pages.copy()
        damaged[7, at] ^= 1
        assert payload.mismatches(numbers, damaged) == 1
    assert Payload(page_bytes, 2).mismatches(numbers, pages) == 50


@pytest.mark.parametrize(("pages", "page_bytes"), [(40, 512), (100, 4096), (33, 4096), (1, 8000)])
def test_the_disk_tier_holds_as_many_pages_as_it_should(tmp_path: Path, pages: int, page_bytes: int) -> None:
    capacity, segment = disk_bytes(pages, page_bytes)
    disk = DiskStorage(tmp_path / "disk", capacity, segment)
    keys = [storage_key(bytes([at]) * 32, b"") for at in range(pages + 1)]
    for key in keys[:pages]:
        result = disk.put([key], [memoryview(bytes(page_bytes))])
        assert (result.outcomes, result.evicted) == ((Wrote.STORED,), ())
    assert disk.stats().pages == pages
    assert disk.put(keys[pages:], [memoryview(bytes(page_bytes))]).evicted
    disk.close()


def test_the_clock_counts_requests_and_real_waiting() -> None:
    real = [100.0]
    clock = ReplayClock(lambda: real[0])
    assert clock() == 0.0
    clock.next_request()
    real[0] += 0.25
    assert clock() == 1.25
    clock.next_request()
    assert clock() == 2.0
    real[0] += 3.5
    assert clock() == 5.5
    clock.next_request()
    assert clock() == 6.0


# -- files and options ------------------------------------------------------------------------------

GOOD = {"timestamp": 0, "input_length": 7, "output_length": 1, "hash_ids": [3, 4]}


def line(**changes: object) -> str:
    """A good line with these fields changed; None takes one away."""
    return json.dumps({name: value for name, value in {**GOOD, **changes}.items() if value is not None})


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        f"{line()}\n\n{line(timestamp=1.5, input_length=8)}\r\n{line(hash_ids=[], input_length=0)}"
    )
    read = read_trace(path, 4)
    assert read == [Request((3, 4), 3), Request((3, 4), 4), Request((), 0)]
    assert read_trace(path, 4, limit=2) == read[:2]
    assert replayed(read).tally.pages == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"a": "\xff"}', "is not JSON"),
        ("[1]", "[1] is not a JSON object"),
        (line(hash_ids=None), "hash_ids: is missing"),
        (line(input_length=None), "input_length: is missing"),
        (line(timestamp=None), "timestamp: is missing"),
        (line(output_length=None), "output_length: is missing"),
        (line(timestamp="now"), 'timestamp: "now" is not a number of at least 0'),
        (line(timestamp=-1), "timestamp: -1 is not a number"),
        (line(timestamp=float("nan")), "timestamp: NaN is not a number"),
        (line(output_length=1.5), "output_length: 1.5 is not an integer"),
        (line(input_length=True), "input_length: true is not an integer"),
        (line(input_length=10**30), "input_length: 1000000"),
        (line(hash_ids=7), "hash_ids: 7 is not a list"),
        (line(hash_ids=[1, "x"]), 'hash_ids[1]: "x" is not an integer'),
        (line(hash_ids=[1, -2]), "hash_ids[1]: -2 is not an integer of at least 0"),
        (line(hash_ids=[1, True]), "hash_ids[1]: true is not an integer"),
        (line(hash_ids=[1, 2, 3]), "hash_ids: 3 ids, but input_length 7 is 2 blocks of 4 tokens"),
        (line(hash_ids=[1]), "hash_ids: 1 ids, but input_length 7 is 2 blocks"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(f"{line()}\n{text}\n".encode("latin-1"))
    with pytest.raises(TraceError) as caught:
        read_trace(path, 4)
    assert f"{path}:2: {message}" in str(caught.value)
    assert len(read_trace(path, 4, limit=1)) == 1


def test_bad_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(TraceError, match=str(path)):
            read_trace(path, 4)
    (tmp_path / "empty").write_text("\n\n")
    with pytest.raises(TraceError, match="holds no request"):
        read_trace(tmp_path / "empty", 4)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"device_pages": 0}, "--device-pages"),
        ({"host_pages": -1}, "--host-pages"),
        ({"device_pages": 10**12}, "--device-pages"),
        ({"disk_pages": 5}, "--disk-pages"),
        ({"page_tokens": 3}, "--page-tokens"),
        ({"page_tokens": 0}, "--page-tokens"),
        ({"block_tokens": 0}, "--block-tokens"),
        ({"selective_hits": 0}, "--selective-hits"),
        ({"load_back_min": -1}, "--load-back-min"),
        ({"page_bytes": 7}, "--page-bytes"),
        ({"corrupt": 1}, "--corrupt"),
        ({"corrupt": -1, "page_bytes": 64}, "--corrupt"),
        ({"disk_dir": "x", "host_pages": 4, "disk_pages": 4}, "--disk-dir"),
        ({"disk_dir": "x", "page_bytes": 64}, "--disk-dir"),
        ({"seed": -1}, "--seed"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReplayOptions(**{"block_tokens": BLOCK, **options})
    assert str(caught.value).startswith(name)


def test_results_in_words() -> None:
    report = replayed(requests_of([0, 1], [0]), device_pages=1, page_bytes=64)
    for seconds, words in ((0.0, "in 1 ms"), (0.0274, "in 27 ms"), (0.25, "in 0.2 s (8 requests/s)")):
        report = dataclasses.replace(report, seconds=seconds)
        assert sentences(report, True) == [
            f"2 requests, 3 pages, 2 of them different, {words}",
            "1 page without room on device",
            "verified 1 page, 0 mismatches, 0 checksum failures",
        ]
    report.tally.mismatched = 1
    assert sentences(report, True)[-1] == "verified 1 page, 1 mismatch, 0 checksum failures"


def test_memory_that_cannot_be_had_is_an_error_of_the_options() -> None:
    options = ReplayOptions(device_pages=10**7, block_tokens=BLOCK, page_bytes=10**9)
    with pytest.raises(ConfigError, match="cannot be had"), Replay(options, requests_of([1])):
        pass


def test_a_temporary_directory_is_removed_and_a_named_one_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    requests = requests_of([0, 1], [2, 3])
    shape = {"device_pages": 4, "host_pages": 4, "disk_pages": 40, "page_bytes": 64}
    replayed(requests, **shape)
    assert list(tmp_path.iterdir()) == []
    kept = tmp_path / "kept"
    replayed(requests, **shape, disk_dir=str(kept))
    assert (kept / "FORMAT").exists()
    with pytest.raises(StorageError, match="holds 4 pages already"):
        replayed(requests, **shape, disk_dir=str(kept))


# -- the made-up workload ---------------------------------------------------------------------------


def test_the_workload_is_made_of_growing_prompts() -> None:
    shape = Conversations(requests=300, active=10, system_blocks=3)
    made = conversations(shape, 16, seed=4)
    assert made == conversations(shape, 16, seed=4)
    assert made != conversations(shape, 16, seed=5)
    assert len(made) == 300
    assert all(request.blocks[:3] == (0, 1, 2) for request in made)
    seen: set[tuple[int, ...]] = set()
    grown = 0
    for request in made:
        grown += any(request.blocks[:end] in seen for end in range(4, len(request.blocks)))
        assert request.blocks not in seen
        seen.add(request.blocks)
    assert grown > 200


@pytest.mark.parametrize("policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_a_workload_too_large_for_every_tier_uses_all_of_them(policy: WritePolicy) -> None:
    options = ReplayOptions(
        device_pages=256,
        host_pages=768,
        disk_pages=4096,
        write_policy=policy,
        block_tokens=64,
        page_bytes=32 << 10,
    )
    with Replay(options, conversations(Conversations(requests=700), 64, seed=0)) as replay:
        report = replay.run()
        replay.cache.check()
    assert min(report.tally.hits) > 0
    assert report.tally.verified == sum(report.tally.hits)
    assert report.tally.mismatched == 0
