"""`tiertree simulate` from the command line: what it prints, writes and exits with."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from test_simulate import leases_stay

from tiertree.cli import main

Capture = pytest.CaptureFixture[str]


def test_a_campaign_is_a_table_and_json(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "found.json"
    options = ["--seed", "3", "--seeds", "2", "--requests", "12"]
    assert main(["simulate", *options, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert (found["runs"], found["requests"], found["violations"]) == (2, 24, [])
    assert set(found) >= {"operations", "faults", "pages_verified", "digest", "counts"}
    said = capsys.readouterr().out
    assert "no violation" in said
    assert said.splitlines()[-1] == f"digest {found['digest']}"
    assert main(["simulate", *options, "--jobs", "2"]) == 0
    assert capsys.readouterr().out == said


def test_faults_and_habits_can_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--seeds", "3", "--requests", "10", "--faults", "copy_error,copy_twice"]
    assert main(["simulate", *options, "--without", "copy_twice,clear", "--json", str(path)]) == 0
    assert set(json.loads(path.read_text())["faults"]) <= {"copy_error"}


def test_a_violation_is_explained_and_can_be_run_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Capture
) -> None:
    leases_stay(monkeypatch)
    path = tmp_path / "found.json"
    assert main(["simulate", "--seed", "300", "--seeds", "4", "--requests", "20", "--json", str(path)]) == 1
    said = capsys.readouterr().out
    found = json.loads(path.read_text())
    kind = found["violations"][0]["kind"]
    assert kind == found["smallest"]["kind"]
    (command,) = [line for line in said.splitlines() if line.startswith("run it again: ")]
    words = shlex.split(command.removeprefix("run it again: "))
    assert words == shlex.split(found["smallest"]["command"])
    assert main(words[1:]) == 1
    again = capsys.readouterr().out
    assert f"violation: {kind}" in again
    assert found["smallest"]["lines"][-1] in again


def test_the_last_decisions_can_be_seen(capsys: Capture) -> None:
    assert main(["simulate", "--seed", "3", "--requests", "5", "--trace"]) == 0
    assert "the faults are over" in capsys.readouterr().out


def test_with_and_without_storage(tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "found.json"
    options = ["--seed", "1", "--seeds", "2", "--requests", "10", "--json", str(path)]
    assert main(["simulate", "--against-no-storage", *options]) == 0
    found = json.loads(path.read_text())
    assert found["violations"] == []
    assert [each["seed"] for each in found["runs"]] == [1, 2]
    assert "by more than its deadline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: 0 is not allowed"),
        (["--seed", "-1"], "--seed: -1 is not allowed"),
        (["--requests", "0"], "--requests: 0 is not allowed"),
        (["--jobs", "0"], "--jobs: 0 is not allowed"),
        (["--only", "two"], "--only: 'two' is not a list of numbers"),
        (["--only", ","], "--only: ',' is not a list of numbers"),
        (["--faults", ""], "--faults: '' names nothing"),
        (["--trace", "--seeds", "2"], "--trace: one run at a time"),
        (["--against-no-storage", "--jobs", "2"], "--jobs: of no effect"),
        (["--against-no-storage", "--faults", "all"], "--faults: of no effect"),
        (["--only", "500"], "--only: there is no request 500"),
        (["--faults", "rain"], "--faults: 'rain' is not known"),
        (["--without", "rain"], "--without: 'rain' is not known"),
        (["--json", "/nowhere/at/all.json"], "--json: /nowhere/at/all.json is not a file"),
    ],
)
def test_what_cannot_work_is_refused_by_name(options: list[str], message: str, capsys: Capture) -> None:
    assert main(["simulate", *options]) == 2
    assert message in capsys.readouterr().err
