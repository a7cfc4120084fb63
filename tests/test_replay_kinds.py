"""Replays of models with sliding windows and recurrent states: what is saved, hit, moved and compared."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_replay import BLOCK, POLICIES, random_requests, replayed, requests_of

from tiertree import FULL, MAMBA, SWA, ConfigError, StateLayout, StopRule, Tier, WritePolicy
from tiertree.replay import Replay, ReplayOptions, Report, Request, read_trace
from tiertree.replay.payload import Payload, state_layout_of
from tiertree.replay.show import kinds, sentences

WINDOW: dict[str, Any] = {"swa_window": 2 * BLOCK}
STATES: dict[str, Any] = {"mamba_every": 2 * BLOCK}
MODELS = [WINDOW, STATES, WINDOW | STATES]
each_model = pytest.mark.parametrize("model", MODELS, ids=["swa", "mamba", "swa+mamba"])


# -- hits -------------------------------------------------------------------------------------------

REQUESTS = requests_of([0, 1, 2, 3], [0, 1, 5], [0, 1, 6], [0, 1, 2, 3], [0, 1, 2, 7])


def test_windows_by_hand() -> None:
    """Pages saved: 2 3 of the first prompt; of the second its last window 1 2, and 0 1 where it parts from
    the first; then one each, for the page in front is there. The fourth computes nothing."""
    report = replayed(REQUESTS, **WINDOW)
    assert report.tally.hits == [0 + 0 + 2 + 4 + 3, 0, 0]
    assert (report.tally.pages, report.unique_pages, report.tally.lost) == (18, 7, 2)
    found = report.as_dict()["kinds"]
    assert found["full"]["saved_pages"] == 4 + 3 + 1 + 0 + 1
    assert found["swa"]["saved_pages"] == 2 + 3 + 1 + 0 + 1
    assert found["swa"]["recovered_pages"] == 2
    assert found["swa"]["held_pages"] == {"device": 7, "host": 0}


def test_states_by_hand() -> None:
    """A state after pages 2 and 4 of the first prompt, and then at each end; the last one parts from the
    first where no state is."""
    report = replayed(REQUESTS, **STATES)
    assert report.tally.hits == [0 + 2 + 2 + 4 + 2, 0, 0]
    assert report.tally.lost == 1
    found = report.as_dict()["kinds"]["mamba"]
    assert (found["saved_pages"], found["recovered_pages"]) == (2 + 1 + 1 + 0 + 2, 1)


def test_both_by_hand() -> None:
    """Each kind alone has states where the other has none: at 2 only the window is missing at first."""
    report = replayed(REQUESTS, **WINDOW, **STATES)
    assert report.tally.hits == [0 + 0 + 2 + 4 + 2, 0, 0]
    assert report.tally.lost == 2 + 1


def test_the_last_window_comes_first_and_a_checkpoint_is_whole_or_not_there() -> None:
    """Two slots: the second prompt keeps its end, and has no room for the place where it parts from the
    first. One slot: nothing fits."""
    report = replayed(REQUESTS[:2], **WINDOW, swa_device_pages=2)
    found = report.as_dict()["kinds"]["swa"]
    assert (found["saved_pages"], found["uncached_pages"]) == (4, 1)
    assert found["evicted_pages"] == {"device": 2, "host": 0}
    again = replayed([*REQUESTS[:2], REQUESTS[1]], **WINDOW, swa_device_pages=2)
    assert again.tally.hits == [3, 0, 0]
    none = replayed([REQUESTS[0], REQUESTS[0]], **WINDOW, swa_device_pages=1)
    assert (none.tally.hits, none.tally.lost) == ([0, 0, 0], 4)
    assert none.tally.kinds[SWA].uncached == 4


def test_checkpoints_are_boundaries() -> None:
    """A prompt of twelve pages, and then parts of it: without checkpoints the first part finds nothing."""
    prompt = list(range(12))
    requests = requests_of(prompt, prompt[:5], prompt[:8], prompt[:9])
    for checkpoint, hits in ((None, 0 + 5 + 8), (4 * BLOCK, 4 + 8 + 8)):
        assert replayed(requests, **WINDOW, swa_checkpoint=checkpoint).tally.hits == [hits, 0, 0]


def test_a_path_has_so_many_states() -> None:
    prompt = list(range(8))
    for most, hit in ((1, 0), (2, 6), (3, 6)):
        report = replayed(requests_of(prompt, prompt[:7]), mamba_every=2 * BLOCK, mamba_per_path=most)
        assert report.tally.hits == [hit, 0, 0]


def test_a_partial_page_is_never_cached_with_states() -> None:
    """States are saved at ends of pages, and the prompt ends after its last whole one."""
    requests = [Request((0, 1, 2), 1), Request((0, 1, 2), 1), Request((0, 1, 3), 4)]
    assert replayed(requests).tally.hits == [3 + 2, 0, 0]
    for model in MODELS:
        report = replayed(requests, **model)
        assert (report.tally.hits, report.tally.pages) == ([2 + 2, 0, 0], 9)
        assert report.tally.kinds[FULL].saved == 2 + 0 + 1


# -- beside FULL alone, and beside a model of its own -------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("page_tokens", [1, 4])
def test_with_all_states_hits_are_those_of_full(seed: int, page_tokens: int) -> None:
    requests = random_requests(seed)
    alone = replayed(requests, page_tokens=page_tokens).tally.hits
    swa, mamba = {"swa_window": 10**6}, {"mamba_every": page_tokens}
    for model in (swa, mamba, swa | mamba):
        report = replayed(requests, page_tokens=page_tokens, **model)
        assert (report.tally.hits, report.tally.lost) == (alone, 0)
        for kind, tally in report.tally.kinds.items():
            assert (tally.saved, tally.uncached) == (report.unique_pages, 0), kind


def expected(requests: list[Request], window: int | None, every: int | None) -> tuple[int, int, int]:
    """Pages hit, lost, and saved of all kinds, of a cache that never lets anything go: sets of prefixes."""
    full: set[tuple[int, ...]] = set()
    states: dict[str, set[tuple[int, ...]]] = {}
    reads: dict[str, Any] = {}
    if window is not None:
        reads["swa"] = lambda end: range(max(0, end - window), end)
    if every is not None:
        reads["mamba"] = lambda end: range(end - 1, end)
    hits = lost = saved = 0
    for request in requests:
        path = [request.blocks[:end] for end in range(1, len(request.blocks) + 1)]
        reach = next((at for at, page in enumerate(path) if page not in full), len(path))
        hit = next(
            end
            for end in range(reach, -1, -1)
            if not end or all(path[p] in states.get(k, ()) for k, needs in reads.items() for p in needs(end))
        )
        hits, lost = hits + hit, lost + reach - hit
        ends = {reach, len(path)}
        full.update(path)
        for kind, needs in reads.items():
            if kind == "mamba":
                ends |= set(range(every or 1, len(path) + 1, every or 1))
            mine = {page for end in ends if end > hit for page in needs(end) if page >= hit}
            saved += len(mine)
            states.setdefault(kind, set()).update(path[page] for page in mine)
    return hits, lost, saved


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5])
@pytest.mark.parametrize("every", [None, 1, 3])
def test_hits_are_those_of_an_independent_model(window: int | None, every: int | None) -> None:
    for seed in range(4):
        requests = random_requests(seed, count=40)
        alone = sum(replayed(requests).tally.hits)
        report = replayed(
            requests, swa_window=window and window * BLOCK, mamba_every=every and every * BLOCK, checked=False
        )
        tally = report.tally
        assert tally.hits[0] <= alone
        if window or every:
            saved = sum(each.saved for kind, each in tally.kinds.items() if kind != FULL)
            assert (tally.hits[0], tally.lost, saved) == expected(requests, window, every)


# -- tiers, policies, bytes ---------------------------------------------------------------------------


@each_model
@pytest.mark.parametrize("policy", POLICIES)
def test_every_page_of_every_kind_is_verified(model: dict[str, Any], policy: WritePolicy) -> None:
    """Through tiers that are too small, with payloads and sizes that differ by kind."""
    for seed in range(3):
        sizes = {"swa_page_bytes": 24} if SWA in str(model) else {}
        sizes |= {"mamba_state_bytes": 200, "mamba_device_states": 6} if MAMBA in str(model) else {}
        shape = {"device_pages": 12, "host_pages": 24, "write_policy": policy, **model}
        report = replayed(
            random_requests(seed, count=40), disk_pages=400, page_bytes=64, seed=seed, **shape, **sizes
        )
        tally, found = report.tally, report.as_dict()
        assert tally.mismatched == 0
        assert tally.kinds[FULL].verified == sum(tally.hits) > 0
        assert tally.verified == sum(each.verified for each in tally.kinds.values())
        for kind in found["kinds"]:
            moved = found["kinds"][kind]
            assert moved["verified_pages"] > 0
            assert moved["backed_up_pages"] > 0
            assert moved["loaded_back_pages"] > 0
            assert moved["bytes"]["backed_up"] == moved["bytes"]["page"] * moved["backed_up_pages"]
            assert moved["bytes"]["device"] == moved["bytes"]["page"] * moved["held_pages"]["device"]
        pages = {"full": 64, "swa": 24, "mamba": 200}
        assert {kind: each["bytes"]["page"] for kind, each in found["kinds"].items()} == {
            kind: pages[kind] for kind in found["kinds"]
        }
        if policy is not WritePolicy.WRITE_BACK:
            real = replayed(random_requests(seed, count=40), page_bytes=64, **shape)
            assert real.tally.hits == replayed(random_requests(seed, count=40), **shape).tally.hits


@each_model
@pytest.mark.parametrize("page_bytes", [None, 64])
def test_hits_by_tier(model: dict[str, Any], page_bytes: int | None) -> None:
    """[0 1] is on device, then on host alone, then on disk alone, and its state with it."""
    requests = requests_of([0, 1], [0, 1], [2, 3], [0, 1], [4, 5], [6, 7], [0, 1])
    report = replayed(
        requests, device_pages=2, host_pages=4, disk_pages=40, page_bytes=page_bytes, seed=2, **model
    )
    assert report.tally.hits == [2, 2, 2]
    for kind, moved in report.as_dict()["kinds"].items():
        pages = 1 if kind == MAMBA else 2
        assert moved["saved_pages"] == moved["backed_up_pages"] == moved["persisted_pages"] == 4 * pages
        assert moved["loaded_back_pages"] == 2 * pages
        assert moved["prefetched_pages"] == pages
        assert (moved["bytes"] is None) == (page_bytes is None)
        assert moved["verified_pages"] == (3 * pages if page_bytes else 0)


@each_model
@pytest.mark.parametrize("rule", list(StopRule))
def test_stop_rules(model: dict[str, Any], rule: StopRule) -> None:
    requests = requests_of([0, 1], [2, 3], [4, 5], [0, 1])
    report = replayed(requests, device_pages=2, host_pages=2, disk_pages=40, prefetch=rule, **model)
    assert report.tally.hits == [0, 0, 2]


def test_load_back_below_the_minimum_is_computed_again() -> None:
    requests = requests_of([0, 1], [2, 3], [0, 1])
    report = replayed(requests, device_pages=2, host_pages=4, load_back_min=2 * BLOCK + 1, **WINDOW)
    assert (report.tally.hits, report.tally.loads_refused) == ([0, 0, 0], 1)


def test_a_request_goes_on_in_a_copy_of_its_state() -> None:
    """What it hit stays as it was, for the next one; the copy is compared too."""
    requests = requests_of([0, 1], [0, 1, 2], [0, 1, 3], [0, 1])
    report = replayed(requests, page_bytes=64, **STATES)
    assert report.tally.hits == [2 + 2 + 2, 0, 0]
    assert report.tally.kinds[MAMBA].verified == 2 + 2 + 1
    assert report.tally.mismatched == 0
    one = replayed(requests, page_bytes=64, mamba_device_states=1, **STATES)
    assert (one.tally.hits, one.tally.mismatched) == ([6, 0, 0], 0)
    assert one.tally.kinds[MAMBA].uncached == 2


@each_model
def test_flipped_bytes_are_found(model: dict[str, Any]) -> None:
    chance = random.Random(1)
    requests = requests_of(*([at, 100 + at, 200 + at] for at in chance.choices(range(8), k=120)))
    shape = {"device_pages": 6, "host_pages": 12, "disk_pages": 200, "page_bytes": 64, **model}
    clean = replayed(requests, **shape)
    assert (clean.tally.mismatched, clean.as_dict()["checksum_failures"]) == (0, 0)
    report = replayed(requests, **shape, corrupt=6, seed=3)
    found = report.as_dict()
    assert found["corrupted_pages"] == {"device": 6, "host": 6, "storage": 6}
    assert found["checksum_failures"] > 0
    assert all(each.mismatched for each in report.tally.kinds.values())
    assert found["mismatched_pages"] == sum(each.mismatched for each in report.tally.kinds.values())


@pytest.mark.parametrize("kind", [FULL, SWA, MAMBA])
def test_one_byte_of_one_kind_is_a_mismatch_of_that_kind(kind: Any) -> None:
    requests = requests_of([0, 1], [0, 1])
    with Replay(ReplayOptions(block_tokens=BLOCK, page_bytes=64, **WINDOW, **STATES), requests) as replay:

        def watch(tally: Any) -> None:
            if tally.requests == 1:
                pools = replay.cache.device_pools
                assert pools is not None
                owned = np.flatnonzero(replay.cache._core.ledger(kind, Tier.DEVICE).book)
                pools[kind].main.logical[owned, 0, 0, 0, 0, 0] ^= 1

        report = replay.run(watch)
    wrong = {each: tally.mismatched for each, tally in report.tally.kinds.items()}
    assert wrong == {FULL: 0, SWA: 0, MAMBA: 0} | {kind: 1 if kind == MAMBA else 2}


def test_payloads_differ_by_kind() -> None:
    numbers = np.arange(50)
    pages = [Payload(64, 1, kind).pages(numbers) for kind in (FULL, SWA, MAMBA)]
    assert len({page.tobytes() for each in pages for page in each}) == 150
    assert Payload(64, 1).mismatches(numbers, pages[0]) == 0
    assert Payload(64, 1, SWA).mismatches(numbers, pages[0]) == 50
    assert state_layout_of(64) == StateLayout(layers=4, elements=16, dtype="uint8")
    for size in (8, 9, 1001):
        assert state_layout_of(size).page_bytes == size


# -- options and words ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"swa_window": 0}, "--swa-window: 0 is not allowed; allowed: 1 to 1000000000"),
        ({"swa_device_pages": 4}, "--swa-device-pages: allowed: only with --swa-window"),
        ({"swa_checkpoint": 8}, "--swa-checkpoint: allowed: only with --swa-window"),
        ({"swa_window": 8, "swa_device_pages": 0}, "--swa-device-pages: 0 is not allowed"),
        (
            {"swa_window": 8, "swa_checkpoint": 6},
            "--swa-checkpoint: 6 is not allowed; allowed: a multiple of",
        ),
        ({"swa_window": 8, "swa_host_pages": 6}, "--swa-host-pages: there is no host tier"),
        ({"swa_window": 8, "swa_page_bytes": 64}, "--swa-page-bytes: there are no bytes"),
        ({"swa_window": 8, "swa_page_bytes": 7, "page_bytes": 64}, "--swa-page-bytes: 7 is not allowed"),
        ({"mamba_every": 0}, "--mamba-every: 0 is not allowed"),
        ({"mamba_every": 6}, "--mamba-every: 6 is not allowed; allowed: a multiple of the page's 4 tokens"),
        ({"mamba_per_path": 1}, "--mamba-per-path: allowed: only with --mamba-every"),
        ({"mamba_device_states": 1}, "--mamba-device-states: allowed: only with --mamba-every"),
        ({"mamba_every": 4, "mamba_host_states": 1}, "--mamba-host-states: there is no host tier"),
        ({"mamba_every": 4, "mamba_state_bytes": 64}, "--mamba-state-bytes: there are no bytes"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        ReplayOptions(**{"block_tokens": BLOCK, **options})
    assert str(caught.value).startswith(message)


def test_full_alone_says_nothing_of_kinds() -> None:
    report = replayed(REQUESTS, page_bytes=64)
    found = report.as_dict()
    assert not {"kinds", "lost_pages"} & found.keys()
    assert not [name for name in found["settings"] if name.startswith(("swa", "mamba"))]
    assert kinds(report) is None
    settings = replayed(REQUESTS, page_bytes=64, **WINDOW).settings
    assert (settings["swa_window"], settings["swa_page_bytes"], settings["swa_device_pages"]) == (8, 64, None)
    assert "mamba_every" not in settings


def rows(report: Report) -> dict[str, list[str]]:
    """The table of kinds: cells by title."""
    table = kinds(report)
    assert table is not None
    titles, *columns = (list(column.cells) for column in table.columns)
    return {str(title): [str(cell) for cell in cells] for title, *cells in zip(titles, *columns, strict=True)}


def test_results_in_words() -> None:
    report = replayed(REQUESTS, page_bytes=1024, **WINDOW)
    assert rows(report)["computed and saved"] == ["9 (9.0 KiB)", "7 (7.0 KiB)"]
    assert rows(report)["evicted from device"] == ["0", "0"]
    assert sentences(dataclasses.replace(report, seconds=0.0), True)[1:] == [
        "FULL reached 2 pages beyond where every kind could continue",
        "verified 15 pages (9 full, 6 swa), 0 mismatches, 0 checksum failures",
    ]
    bare = replayed(REQUESTS, **WINDOW, **STATES)
    assert rows(bare)["on device"] == ["7", "7", "6"]


# -- the trace of a production service ------------------------------------------------------------------


@pytest.mark.parametrize("policy", POLICIES)
def test_the_conversation_trace(trace_path: Path, policy: WritePolicy) -> None:
    """Its beginning, through small tiers: every kind is hit and verified, and FULL alone hits no less."""
    requests = read_trace(trace_path, 512)[:400]
    shape = {"device_pages": 500, "host_pages": 2000, "disk_pages": 20000, "block_tokens": 512}
    shape |= {"write_policy": policy, "page_bytes": 64, "checked": False}
    alone = sum(replayed(requests, **shape).tally.hits)
    model = {"swa_window": 1024, "mamba_every": 2048, "mamba_device_states": 200}
    tally = replayed(requests, **shape, **model).tally
    assert 0 < sum(tally.hits) <= alone
    assert tally.mismatched == 0
    assert tally.kinds[FULL].verified == sum(tally.hits)
    assert min(each.verified for each in tally.kinds.values()) > 0
