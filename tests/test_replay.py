"""Trace replay: what it reads, what it counts, what it refuses, and that its comparison can fail."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tiertree import FULL, StopRule, WritePolicy
from tiertree.replay import Replay, ReplayOptions, Report, Request, read_trace

BLOCK = 4
POLICIES = list(WritePolicy)


def requests_of(*prompts: Sequence[int]) -> list[Request]:
    """Requests of whole blocks."""
    return [Request(tuple(prompt), BLOCK) for prompt in prompts]


def replayed(requests: list[Request], checked: bool = True, **options: Any) -> Report:
    """Replay `requests`, checking every invariant after each of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replay = Replay(ReplayOptions(**{"block_tokens": BLOCK, **options}), requests)
    with replay:

        def watch(tally: object) -> None:
            replay.cache.check()
            stats = replay.cache.stats()
            assert not stats.leases
            assert not stats.operations_in_flight

        return replay.run(watch if checked else None)


def random_requests(seed: int, count: int = 60, length: int = 7) -> list[Request]:
    """Random walks down a small tree of ids, so that prefixes are shared at every depth. The same id
    comes back behind other prefixes, where it is another page."""
    chance = random.Random(seed)
    fresh = 1000
    found = []
    for _ in range(count):
        prompt = [chance.randrange(3) for _ in range(chance.randint(1, length))]
        if chance.random() < 0.3:
            prompt.append(fresh := fresh + 1)
        found.append(prompt)
    return requests_of(*found)


# -- hits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "hits", "evicted", "uncached"),
    [
        (None, [0, 2, 3, 1], 0, 0),
        (6, [0, 2, 3, 1], 0, 0),
        (4, [0, 2, 3, 1], 2, 0),  # the last request pushes out 3 and 2: it needs two, its 0 is locked
        (3, [0, 2, 2, 1], 4, 0),  # 3 pushes out 2, 2 pushes out 3, and then 4, 5 push out 2, 1
        (2, [0, 2, 2, 1], 1, 2),  # heads only: [0, 1] stays, the last request replaces 1 by 4
        (1, [0, 1, 1, 1], 0, 8),
    ],
)
def test_device_alone(device: int | None, hits: list[int], evicted: int, uncached: int) -> None:
    requests = requests_of([0, 1, 2], [0, 1, 3], [0, 1, 2], [0, 4, 5])
    report = replayed(requests, device_pages=device)
    assert report.tally.pages == 12
    assert report.unique_pages == 6
    assert report.tally.hits == [sum(hits), 0, 0]
    assert report.tally.hit_ratio == sum(hits) / 12
    if device is None or device > 2:
        assert report.stats.device.evicted == evicted
        assert report.tally.uncached == uncached


def test_a_request_that_does_not_fit_inserts_its_head() -> None:
    report = replayed(requests_of([0, 1, 2, 3, 4], [0, 1, 2, 3, 4]), device_pages=3)
    assert report.tally.hits == [3, 0, 0]
    assert report.tally.uncached == 2 + 2


@pytest.mark.parametrize("page_bytes", [None, 64])
def test_hits_by_tier(page_bytes: int | None) -> None:
    """[0 1] is on device, then on host alone, then on disk alone."""
    requests = requests_of([0, 1], [0, 1], [2, 3], [0, 1], [4, 5], [6, 7], [0, 1])
    report = replayed(requests, device_pages=2, host_pages=4, disk_pages=40, page_bytes=page_bytes)
    assert report.tally.hits == [2, 2, 2]
    assert report.as_dict()["written_pages"] == {"host": 8, "storage": 8}
    assert report.tally.verified == (6 if page_bytes else 0)
    assert report.tally.mismatched == 0


def test_write_back_writes_on_eviction_only() -> None:
    requests = requests_of([0, 1], [2, 3], [0, 1], [2, 3])
    shape = {"device_pages": 2, "host_pages": 4, "write_policy": WritePolicy.WRITE_BACK}
    report = replayed(requests, **shape)
    assert report.tally.hits == [0, 4, 0]
    untouched = replayed(requests[:1] * 3, **shape)
    assert untouched.stats.backed_up == 0


def test_selective_writes_on_the_nth_hit() -> None:
    requests = requests_of([0], [0], [1], [1], [1], [2])
    for n, written in ((1, 2), (2, 1), (3, 0)):
        report = replayed(
            requests,
            device_pages=4,
            host_pages=4,
            write_policy=WritePolicy.WRITE_THROUGH_SELECTIVE,
            selective_hits=n,
        )
        assert report.stats.backed_up == written


def test_load_back_below_the_minimum_is_computed_again() -> None:
    requests = requests_of([0, 1], [2, 3], [0, 1])
    shape = {"device_pages": 2, "host_pages": 4}
    assert replayed(requests, **shape, load_back_min=2 * BLOCK).tally.hits == [0, 2, 0]
    report = replayed(requests, **shape, load_back_min=2 * BLOCK + 1)
    assert report.tally.hits == [0, 0, 0]
    assert report.tally.loads_refused == 1


def lru_hits(requests: list[Request], capacity: int) -> int:
    """Pages that one pool of `capacity` blocks hits under leaf-only LRU, the current path locked."""
    used: dict[tuple[int, ...], int] = {}
    children: Counter[tuple[int, ...]] = Counter()
    hits = 0
    for now, request in enumerate(requests):
        path = [request.blocks[:end] for end in range(1, len(request.blocks) + 1)]
        known = next((at for at, page in enumerate(path) if page not in used), len(path))
        hits += known
        used.update(dict.fromkeys(path[:known], now))
        for page in path[known:]:
            if len(used) == capacity:
                leaves = [each for each in used if not children[each] and each not in path]
                if not leaves:
                    break
                victim = min(leaves, key=lambda leaf: used[leaf])
                del used[victim]
                children[victim[:-1]] -= 1
            used[page] = now
            children[page[:-1]] += 1
    return hits


@pytest.mark.parametrize("seed", range(12))
def test_lru_is_that_of_an_independent_model(seed: int) -> None:
    requests = random_requests(seed)
    unique = len({r.blocks[:end] for r in requests for end in range(1, len(r.blocks) + 1)})
    for capacity in (1, 2, 5, 9, 17, 40, unique):
        report = replayed(requests, device_pages=capacity)
        assert report.tally.hits[0] == lru_hits(requests, capacity), f"seed {seed}, capacity {capacity}"
    assert replayed(requests).tally.hits[0] == lru_hits(requests, 10**6)
    assert replayed(requests).unique_pages == unique


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(3))
def test_every_hit_through_every_tier_is_verified(policy: WritePolicy, seed: int) -> None:
    requests = random_requests(seed, count=40)
    alone = replayed(requests, device_pages=12).tally.hits[0]
    for host in (6, 12, 24):
        shape = {"device_pages": 12, "host_pages": host, "disk_pages": 400, "write_policy": policy}
        report = replayed(requests, **shape, page_bytes=64, seed=seed)
        assert report.tally.mismatched == 0
        assert report.tally.verified == sum(report.tally.hits)
        assert sum(report.tally.hits) >= alone
        # Real time decides nothing where pages are not pinned by what is still under way: with no disk
        # to write to, and a host that is not full of pages on their way there.
        if host >= 12 or policy is not WritePolicy.WRITE_BACK:
            del shape["disk_pages"]
            report = replayed(requests, **shape, page_bytes=64, seed=seed)
            assert report.tally.hits == replayed(requests, **shape).tally.hits


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_finds_the_same(policy: WritePolicy) -> None:
    requests = random_requests(5, count=40)
    shape = {"device_pages": 12, "host_pages": 20, "disk_pages": 40, "write_policy": policy}
    real: list[dict[str, Any]] = [{"page_bytes": 64, "corrupt": 3, "seed": 7}, {"page_bytes": 64}]
    for more in ({}, *(real if policy is not WritePolicy.WRITE_BACK else [])):
        first, second = (replayed(requests, **shape, **more).as_dict() for _ in range(2))
        del first["seconds"], second["seconds"]
        assert first == second


@pytest.mark.parametrize("rule", list(StopRule))
@pytest.mark.parametrize("page_bytes", [None, 64])
def test_stop_rules(rule: StopRule, page_bytes: int | None) -> None:
    """What storage answers at once, every rule uses; real reads best_effort does not wait for."""
    requests = requests_of([0, 1], [2, 3], [4, 5], [0, 1])
    report = replayed(
        requests, device_pages=2, host_pages=2, disk_pages=40, prefetch=rule, page_bytes=page_bytes
    )
    assert report.tally.mismatched == 0
    if page_bytes is None or rule is not StopRule.BEST_EFFORT:
        assert report.tally.hits == [0, 0, 2]
    else:
        assert report.tally.hits[:2] == [0, 0]


# -- damage -----------------------------------------------------------------------------------------


def test_flipped_bytes_are_found() -> None:
    """Memory is unchecked, so its damage shows as mismatches; disk is checked."""
    chance = random.Random(1)
    requests = requests_of(*([at, 100 + at, 200 + at] for at in chance.choices(range(8), k=120)))
    shape = {"device_pages": 6, "host_pages": 12, "disk_pages": 100, "page_bytes": 64}
    clean = replayed(requests, **shape)
    assert (clean.tally.mismatched, clean.as_dict()["checksum_failures"]) == (0, 0)
    report = replayed(requests, **shape, corrupt=4, seed=3).as_dict()
    assert report["corrupted_pages"] == {"device": 4, "host": 4, "storage": 4}
    assert report["mismatched_pages"] > 0
    assert report["checksum_failures"] > 0
    assert report["verified_pages"] == sum(report["hit_pages"].values())


def test_no_page_is_damaged_twice() -> None:
    """Asked for more than there is, `corrupted_pages` counts pages, not flips; and no flip undoes another."""
    requests = requests_of(*([0, 1] for _ in range(40)))
    report = replayed(requests, device_pages=4, host_pages=4, page_bytes=8, corrupt=30).as_dict()
    assert report["corrupted_pages"] == {"device": 2, "host": 0, "storage": 0}
    assert report["mismatched_pages"] >= 38 + 37


def test_damage_on_disk_alone_never_reaches_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiertree.replay.corrupt.Corruptor._flip_in_pool", lambda *_: None)
    requests = requests_of(*([at % 8, 100 + at % 8] for at in range(80)))
    shape = {"device_pages": 2, "host_pages": 2, "disk_pages": 100, "page_bytes": 64}
    report = replayed(requests, **shape, corrupt=10).as_dict()
    assert report["checksum_failures"] == 10
    assert report["mismatched_pages"] == 0


@pytest.mark.parametrize("tier", ["device", "host"])
def test_one_byte_in_one_pool_is_a_mismatch(tier: str) -> None:
    requests = requests_of([0, 1], [2, 3], [0, 1])
    with Replay(
        ReplayOptions(device_pages=4, host_pages=4, block_tokens=BLOCK, page_bytes=64), requests
    ) as replay:

        def watch(tally: Any) -> None:
            if tally.requests == 2:
                if tier == "host":
                    replay.cache.evict(4)
                pools = replay.cache.device_pools if tier == "device" else replay.cache.host_pools
                assert pools is not None
                pools[FULL].main.logical[:, 0, 0, 0, 0, 0] ^= 1

        report = replay.run(watch)
    assert report.tally.verified == 2
    assert report.tally.mismatched == 2


# -- the trace of a production service --------------------------------------------------------------


@pytest.fixture(scope="module")
def trace(trace_path: Path) -> list[Request]:
    """All of the Mooncake conversation trace."""
    return read_trace(trace_path, 512)


@pytest.mark.parametrize(
    ("device", "ratio"), [(10_000, 0.2116), (1_828, 0.0525), (45_698, 0.3535), (None, 0.3664)]
)
def test_the_conversation_trace(trace: list[Request], device: int | None, ratio: float) -> None:
    report = replayed(trace, checked=False, block_tokens=512, device_pages=device)
    assert (report.tally.requests, report.tally.pages, report.unique_pages) == (12_031, 288_500, 182_790)
    assert report.tally.hit_ratio == pytest.approx(ratio, abs=0.0005)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_conversation_trace_through_three_tiers(trace: list[Request], policy: WritePolicy) -> None:
    """Its beginning, through tiers so small that all three are hit."""
    shape = {"device_pages": 1000, "host_pages": 4000, "disk_pages": 12000, "write_policy": policy}
    report = replayed(trace[:1000], checked=False, block_tokens=512, page_bytes=256, **shape)
    assert report.tally.mismatched == 0
    assert report.tally.verified == sum(report.tally.hits)
    if policy is not WritePolicy.WRITE_THROUGH_SELECTIVE:
        assert min(report.tally.hits) > 0


def test_under_write_back_host_is_worth_as_much_as_device(trace: list[Request]) -> None:
    """4,000 device and 6,000 host pages hit what 10,000 device pages hit alone, or nearly."""
    shape = {"checked": False, "block_tokens": 512}
    alone = replayed(trace[:3000], device_pages=10_000, **shape).tally.hits[0]
    both = replayed(
        trace[:3000], device_pages=4000, host_pages=6000, write_policy=WritePolicy.WRITE_BACK, **shape
    )
    assert sum(both.tally.hits) >= 0.98 * alone
