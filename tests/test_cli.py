"""The command line: what it prints and writes, how it refuses, and that docs/cli.md tells the truth.

`TIERTREE_UPDATE_DOCS=1 pytest tests/test_cli.py` writes the blocks of docs/cli.md anew.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tiertree.cli import build_parser, main
from tiertree.replay.report import Tally
from tiertree.replay.show import ProgressBar

LINES = [
    {"timestamp": 0, "input_length": 1024, "output_length": 1, "hash_ids": [0, 1]},
    {"timestamp": 1, "input_length": 1024, "output_length": 1, "hash_ids": [2, 3]},
    {"timestamp": 2, "input_length": 1300, "output_length": 1, "hash_ids": [0, 1, 4]},
]
KEYS = {
    "requests": int,
    "pages": int,
    "hit_pages": dict,
    "hit_ratio": float,
    "unique_pages": int,
    "written_pages": dict,
    "evicted_pages": dict,
    "dropped_pages": int,
    "verified_pages": int,
    "mismatched_pages": int,
    "checksum_failures": int,
    "seconds": float,
}

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """As wide as the blocks of docs/cli.md, without colours."""
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A trace of three requests."""
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in LINES))
    return path


def test_replay_prints_a_table_and_writes_json(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = "--device-pages 3 --host-pages 4 --disk-pages 40 --bytes real --page-bytes 64"
    assert main(["replay", str(trace), *options.split(), "--json", str(out)]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "verified 2 pages, 0 mismatches, 0 checksum failures" in said.out
    found = json.loads(out.read_text())
    assert {name: type(found[name]) for name in KEYS} == KEYS
    assert found["hit_pages"] == {"device": 1, "host": 1, "storage": 0}
    assert found["hit_ratio"] == 2 / 7
    assert found["verified_pages"] == 2
    assert set(found["written_pages"]) == {"host", "storage"}
    assert set(found["evicted_pages"]) == {"device", "host", "storage"}


def test_limit_and_metadata_alone(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert main(["replay", str(trace), "--limit", "2", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert (found["requests"], found["pages"], found["unique_pages"]) == (2, 4, 4)
    assert found["hit_pages"] == {"device": 0, "host": 0, "storage": 0}
    assert found["verified_pages"] == 0


def test_a_small_host_is_warned_of(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), "--device-pages", "4", "--host-pages", "2"]) == 0
    assert capsys.readouterr().err.startswith("tiertree replay: warning: host.size: 2 pages are fewer")
    assert main(["replay", str(trace), "--host-pages", "2"]) == 0
    assert capsys.readouterr().err.endswith("(device unbounded: sized for the trace, 5)\n")


def test_settings_are_those_that_count(trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    for options, bytes_of_pages, page_bytes in (("", "none", None), ("--bytes real", "real", 4096)):
        assert main(["replay", str(trace), "--json", str(out), *options.split()]) == 0
        settings = json.loads(out.read_text())["settings"]
        assert (settings["bytes"], settings["page_bytes"]) == (bytes_of_pages, page_bytes)
        assert settings["page_tokens"] == settings["block_tokens"] == 512
        assert settings["device_pages"] is None


def test_kinds_are_reported_by_name(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    options = "--swa-window 512 --swa-device-pages 3 --mamba-every 512 --bytes real --mamba-state-bytes 64"
    assert main(["replay", str(trace), *options.split(), "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^pages +full +swa +mamba$", said, re.MULTILINE)
    assert "verified 4 pages (2 full, 1 swa, 1 mamba), 0 mismatches, 0 checksum failures" in said
    found = json.loads(out.read_text())
    assert list(found["kinds"]) == ["full", "swa", "mamba"]
    assert found["kinds"]["mamba"]["bytes"]["page"] == 64
    assert found["verified_pages"] == sum(each["verified_pages"] for each in found["kinds"].values())
    assert (found["settings"]["swa_window"], found["settings"]["mamba_device_states"]) == (512, None)
    assert main(["replay", str(trace), "--json", str(out)]) == 0
    assert "kinds" not in json.loads(out.read_text())


def test_lines_have_no_trailing_spaces(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["replay", str(trace), "--limit", "1", "--bytes", "real"]) == 0
    said = capsys.readouterr().out
    assert all(line == line.rstrip() for line in said.splitlines())
    assert re.search(r"^1 request, 2 pages, 2 of them different, in \d+ ms$", said, re.MULTILINE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--page-tokens 100", "--page-tokens: 100 does not divide 512"),
        ("--disk-pages 4", "--disk-pages: pages reach disk through host"),
        ("--page-bytes 64", "--page-bytes: pages have no bytes; allowed: only with --bytes real"),
        ("--selective-hits 1", "--selective-hits: allowed: only with --write-policy write_through_selective"),
        ("--corrupt 1", "--corrupt: there are no bytes to flip"),
        ("--limit 0", "--limit: 0 is not allowed; allowed: at least 1"),
        ("--limit 0.5", "tiertree replay: error: --limit: '0.5' is not a whole number\n"),
        ("--device-pages none", "tiertree replay: error: --device-pages: 'none' is not a whole number\n"),
        ("--eviction magic", "--eviction: invalid choice: 'magic'"),
        ("--prefetch never", "--prefetch: invalid choice"),
        ("--bytes some", "--bytes: invalid choice"),
        ("--json /nowhere/at/all.json", "--json: /nowhere/at/all.json is not a file in a directory"),
        ("--json .", "--json: . is not a file"),
        ("--block-tokens 16", "trace.jsonl:1: hash_ids: 2 ids, but input_length 1024 is 64 blocks"),
        ("--swa-device-pages 4", "--swa-device-pages: allowed: only with --swa-window"),
        ("--swa-window 1024 --swa-checkpoint 100", "--swa-checkpoint: 100 is not allowed"),
        ("--mamba-every 100", "--mamba-every: 100 is not allowed; allowed: a multiple of the page's 512"),
        ("--mamba-every 512 --mamba-host-states 4", "--mamba-host-states: there is no host tier"),
        ("--mamba-every few", "tiertree replay: error: --mamba-every: 'few' is not a whole number\n"),
        ("--hosts 3", "unrecognized arguments: --hosts 3"),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    trace: Path, capsys: pytest.CaptureFixture[str], options: str, words: str
) -> None:
    try:
        status: object = main(["replay", str(trace), *options.split()])
    except SystemExit as left:
        status = left.code
    said = capsys.readouterr()
    assert status == 2
    assert words in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""


def test_bad_traces_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(LINES[0]) + "\n" + json.dumps({**LINES[1], "hash_ids": "x"}) + "\n")
    assert main(["replay", str(path)]) == 2
    assert capsys.readouterr().err == (
        f'tiertree replay: error: {path}:2: hash_ids: "x" is not a list of block ids\n'
    )
    assert main(["replay", str(tmp_path / "none")]) == 2
    assert "none: cannot be read: No such file" in capsys.readouterr().err


def test_wrong_bytes_are_an_exit_status(trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A payload that depends on when it is made stands for a cache that returns other bytes."""
    real = ["--device-pages", "8", "--bytes", "real", "--page-bytes", "64"]
    assert main(["replay", str(trace), *real]) == 0
    assert main(["replay", str(trace), *real, "--corrupt", "1"]) == 0
    made: list[int] = []

    def pages(self: object, numbers: object) -> object:
        made.append(1)
        return __import__("numpy").full((len(numbers), 64), len(made), "u1")  # type: ignore[arg-type]

    monkeypatch.setattr("tiertree.replay.payload.Payload.pages", pages)
    assert main(["replay", str(trace), *real]) == 1


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert re.fullmatch(r"tiertree \d+\.\d+\.\d+\n", capsys.readouterr().out)
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 2


def test_an_interrupt_is_no_traceback(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tiertree.replay.driver.Replay.run", interrupted)
    assert main(["replay", str(trace)]) == 130
    assert capsys.readouterr().err == "tiertree replay: interrupted\n"


def test_memory_that_cannot_be_had_is_one_line(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def greedy(*_: object) -> None:
        raise MemoryError("Unable to allocate 7.45 GiB")

    monkeypatch.setattr("tiertree.replay.driver.Replay.run", greedy)
    assert main(["replay", str(trace)]) == 2
    assert capsys.readouterr().err == (
        "tiertree replay: error: not enough memory for so many or such large pages: "
        "Unable to allocate 7.45 GiB\n"
    )


def started(*arguments: str, folder: Path) -> subprocess.Popen[bytes]:
    """The command line in a process of its own, whose temporary files go to `folder`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)}
    environment.pop("PYTHONUNBUFFERED", None)  # argparse overlooks that help cannot be written
    command = [sys.executable, "-m", "tiertree", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)


THREE_TIERS = "--device-pages 8 --host-pages 8 --disk-pages 64 --bytes real --page-bytes 64"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["replay", str(ROOT / "examples" / "tiny_trace.jsonl"), *THREE_TIERS.split()]]
)
def test_output_that_nobody_reads_is_no_traceback(tmp_path: Path, arguments: list[str]) -> None:
    process = started(*arguments, folder=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141
    assert list(tmp_path.iterdir()) == []


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    trace, folder = tmp_path / "long.jsonl", tmp_path / "temporary"
    folder.mkdir()
    line = {"timestamp": 0, "input_length": 1024, "output_length": 1}
    lines = (json.dumps({**line, "hash_ids": [2 * each, 2 * each + 1]}) for each in range(30_000))
    trace.write_text("".join(each + "\n" for each in lines))
    process = started("replay", str(trace), *THREE_TIERS.split(), folder=folder)
    until = time.monotonic() + 60
    while not list(folder.glob("tiertree-replay-*/seg-*")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.01)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (143, b"tiertree replay: terminated\n")
    assert list(folder.iterdir()) == []


def test_the_progress_bar_is_for_terminals() -> None:
    screen = StringIO()
    with ProgressBar(Console(file=screen, force_terminal=True), 10) as bar:
        bar(Tally(requests=5, pages=4, hits=[1, 0, 0]))
    assert "5/10" in screen.getvalue()
    assert "hit ratio 0.2500" in screen.getvalue()


# -- documents and examples -------------------------------------------------------------------------


def outcome(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What `command` prints, run in this process in `folder`."""
    words = shlex.split(command)
    assert words[0] == "tiertree"
    here = os.getcwd()
    os.chdir(folder)
    try:
        status = main(words[1:])
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        os.chdir(here)
    said = capsys.readouterr()
    lines = [each.rstrip() for each in (said.out + said.err).splitlines()]
    if status:
        lines += ["$ echo $?", str(status)]
    return "\n".join(lines).strip("\n")


def timeless(text: str) -> str:
    """`text` without what differs from run to run, and however it is wrapped."""
    text = re.sub(r"in (\d+ ms|[\d.]+ s \([\d,]+ requests/s\))", "in …", text)
    text = re.sub(r"\d+ (s|min|h|d) ago", "… ago", text)
    return " ".join(text.split())


def test_the_document_shows_what_happens(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every ```console block of docs/cli.md is one command and what it prints, one after the other in a copy
    of examples/."""
    folder = tmp_path / "examples"
    shutil.copytree(root / "examples", folder)
    path = root / "docs" / "cli.md"
    updating = bool(os.environ.get("TIERTREE_UPDATE_DOCS"))
    blocks = []

    def run(block: re.Match[str]) -> str:
        command, shown = block[1], block[2]
        blocks.append(command)
        found = outcome(command, folder, capsys)
        assert updating or timeless(shown) == timeless(found), command
        return f"```console\n$ {command}\n{found}\n```"

    text = re.sub(r"^```console\n\$ (.*?)\n(.*?)^```$", run, path.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 5
    if updating:
        path.write_text(text)


def test_every_command_has_its_help_in_the_document(root: Path) -> None:
    text = (root / "docs" / "cli.md").read_text()
    commands = next(each.choices for each in build_parser()._actions if each.dest == "command")
    assert commands
    for name in commands:
        assert f"$ tiertree {name} --help\n" in text


@pytest.mark.parametrize("name", ["three_tiers", "replay_sizes"])
def test_examples_run(root: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    runpy.run_path(str(root / "examples" / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert said
    assert "DIFFERENT" not in said
    assert "False" not in said
