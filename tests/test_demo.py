"""The demo: it needs no file, uses all three tiers, and every byte it gets back is right."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from tiertree import WritePolicy
from tiertree.cli import DEMO_REQUESTS, main
from tiertree.replay import Conversations, Replay, conversations
from tiertree.replay.demo import demo_options, demo_requests
from tiertree.replay.report import Tally
from tiertree.replay.show import LiveHits

REQUESTS = 700


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
def test_every_tier_is_used_and_verified(policy: WritePolicy) -> None:
    with Replay(demo_options(policy, seed=0), demo_requests(REQUESTS, seed=0)) as replay:
        report = replay.run()
        replay.cache.check()
    assert min(report.tally.hits) > 0
    assert report.tally.verified == sum(report.tally.hits)
    assert report.tally.mismatched == 0


def test_the_demo_prints_its_progress_and_a_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", str(REQUESTS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("request ") for line in lines) == 10
    verdict = re.fullmatch(r"verified ([\d,]+) pages, 0 mismatches, 0 checksum failures", lines[-1])
    assert verdict is not None
    assert int(verdict[1].replace(",", "")) > 0
    assert REQUESTS < DEMO_REQUESTS


def test_a_terminal_sees_hits_grow() -> None:
    screen = StringIO()
    with LiveHits(Console(file=screen, force_terminal=True, width=100), 10) as live:
        live(Tally(requests=5, pages=8, hits=[4, 2, 1]))
    said = screen.getvalue()
    assert "request 5 of 10" in said
    for words in ("device", "host", "storage", "computed", "50.0%", "25.0%", "12.5%"):
        assert words in said


def test_no_requests_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--requests", "0"]) == 2
    assert "--requests: 0 is not allowed" in capsys.readouterr().err
