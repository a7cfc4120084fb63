"""The demo: three runs answer the same, all tiers serve, and one wrong byte is noticed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tiertree import FULL
from tiertree.chat import Course, Workload, clients, runs
from tiertree.chat.runs import RestartFailed, Setting, restarted, tiered
from tiertree.cli import main
from tiertree.engines.hf import tiny
from tiertree.engines.request import Reply, Request

SMALL = [
    *("--users", "3", "--turns", "2"),
    *("--system-tokens", "32", "--turn-tokens", "48", "--answer-tokens", "4"),
]
SETTING = Setting(
    workload=Workload(users=3, turns=2, system_tokens=32, turn_tokens=48, answer_tokens=4, vocab=512)
)


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third run in this process, all of them with a model that is quick."""
    monkeypatch.setattr(Setting, "model", lambda _: tiny("llama", vocab_size=4096))

    def here(setting: Setting, directory: str, watch: clients.Watch) -> Course:
        return runs.tiered(setting, setting.model(), directory, watch)

    monkeypatch.setattr("tiertree.chat.runs.restarted", here)


def rows(said: str) -> dict[str, list[str]]:
    """The final table: the cells of each line by its title."""
    lines = said[said.index("mean time to first token ") :].splitlines()
    cells = (re.split(r"  +", line.strip()) for line in lines)
    return {title: rest for title, *rest in cells}


def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "tiertree", "demo", *SMALL], capture_output=True, text=True, env=environment
    )
    assert done.stderr == ""
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "identical tokens: yes (24 in each run)"
    progress = [line.split(":")[0] for line in done.stdout.splitlines() if " answered in " in line]
    assert sorted(set(progress)) == ["after a restart", "recomputed", "tiertree"]
    found = rows(done.stdout)
    assert found["mean time to first token"] == ["recomputed", "tiertree", "after a restart"]
    hits = {tier: [int(cell) for cell in found[f"from {tier}"]] for tier in ("device", "host", "disk")}
    assert [each[0] for each in hits.values()] == [0, 0, 0]
    assert hits["device"][1] > 0
    assert hits["host"][1] > 0
    assert hits["disk"][1] == 0
    assert hits["disk"][2] > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("policy", ["write_through", "write_through_selective", "write_back"])
def test_every_write_policy_answers_the_same(
    small_model: None, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    assert main(["demo", *SMALL, "--write-policy", policy, "--parallel", "2"]) == 0
    assert "identical tokens: yes (24 in each run)" in capsys.readouterr().out


def test_one_wrong_byte_is_noticed(
    small_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged: list[int] = []

    class Damaging:
        """Flips a bit in the first page that a request hits on device, once."""

        def __init__(self, engine: Any) -> None:
            self._engine = engine

        def __getattr__(self, name: str) -> Any:
            return getattr(self._engine, name)

        def submit(self, request: Request) -> Reply:
            cache = self._engine.cache
            with cache.acquire(cache.match(cache.key(request.tokens, request.namespace))) as lease:
                if len(lease.slots) and not damaged:
                    damaged.append(int(lease.slots[0]))
                    value = cache.device_pools[FULL].main.logical[damaged[0], 0, 1, 0, 0, 0]
                    value.view(torch.int32).bitwise_xor_(0x40 << 24)
            return self._engine.submit(request)

    def converse(workload: Workload, engine: Any, **options: Any) -> Course:
        return clients.converse(workload, Damaging(engine), **options)

    monkeypatch.setattr("tiertree.chat.runs.converse", converse)
    assert main(["demo", *SMALL]) == 1
    assert len(damaged) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(
        r"identical tokens: no \(user \d, turn \d, token \d: \d+ recomputed, \d+ tiertree\)", last
    )


def test_the_process_after_the_restart_does_not_outlive_the_demo(tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restarted(SETTING, str(tmp_path), interrupted)
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert [each for each in commands if str(tmp_path).encode() in each] == []


def test_a_process_that_fails_is_told(
    small_model: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RestartFailed, match="0 of 6 answered, exit status 1"):
        restarted(SETTING, str(tmp_path))
    served = tiered(SETTING, SETTING.model(), str(tmp_path)).served
    said = json.dumps({"served": [each.plain() for each in served], "running": 0, "seconds": 1})
    script = tmp_path / "fails_late"
    script.write_text(f"#!/bin/sh\necho '{said}'\nexit 3\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    with pytest.raises(RestartFailed, match="6 of 6 answered, exit status 3"):
        restarted(SETTING, str(tmp_path))
    monkeypatch.setattr("tiertree.chat.runs.restarted", restarted)
    assert main(["demo", *SMALL]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "tiertree demo: 6 of 6 answered, exit status 3"


def test_what_is_missing_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        "tiertree demo: error: transformers is not installed; install the extra: pip install 'tiertree[hf]'\n"
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--users 0", "--users: 0 is not allowed; allowed: at least 1"),
        ("--answer-tokens 0", "--answer-tokens: 0 is not allowed; allowed: at least 1"),
        ("--parallel 0", "--parallel: 0 is not allowed; allowed: at least 1"),
        ("--seed -1", "--seed: -1 is not allowed; allowed: at least 0"),
    ],
)
def test_what_cannot_be_is_refused(capsys: pytest.CaptureFixture[str], options: str, words: str) -> None:
    assert main(["demo", *options.split()]) == 2
    assert words in capsys.readouterr().err
