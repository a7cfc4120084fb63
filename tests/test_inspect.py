"""`PrefixCache.tree` tells what is there and changes nothing; `tiertree inspect` draws it, and a disk tier's
directory, and no file that somebody made can do worse than be refused."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from disk_support import abandon
from rig import Rig, books
from test_fsck import CAPACITY, FIRST, PAGE, PAGES, RECORD, SEGMENT, filled, flip, put, state

from tiertree import FULL, SWA, SlidingWindow, Tier, ViewError
from tiertree.cli import main
from tiertree.storage.disk import DiskStorage
from tiertree.storage.files import Files
from tiertree.storage.survey import survey
from tiertree.testing.conformance import page_key
from tiertree.treeview import FORMAT, NodeView, TreeView, read_view


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def letters(where: str) -> str:
    """One letter per page of a node."""
    return "".join(run[0] * int(run[1:]) for run in where.split())


def path_of(view: TreeView, tokens: Sequence[int]) -> list[NodeView]:
    """The nodes of one prompt in the first namespace, by the tokens that the view shows; pages of one
    token. The last of them may share its first pages only."""
    path: list[NodeView] = []
    above, at = -1, 0
    while True:
        found = [
            i
            for i, each in enumerate(view.nodes)
            if each.parent == above
            and each.namespace == 0
            and each.first_tokens[:1] == tuple(tokens[at : at + 1])
        ]
        if not found:
            return path
        (above,) = found
        path.append(view.nodes[above])
        at += path[-1].pages
        if path[-1].first_tokens != tuple(tokens[at - path[-1].pages : at]):
            return path


def drawn(view: TreeView, tokens: Sequence[int], kind: str) -> str:
    """Where each page of a prompt is, as `Rig.map` says it."""
    text = ""
    for each in path_of(view, tokens):
        here = letters(each.where[kind]) if kind in each.where else "." * each.pages
        same = zip(each.first_tokens, tokens[each.start :], strict=False)
        text += here[: next((i for i, (a, b) in enumerate(same) if a != b), len(here))]
    return text.replace("d", "D").replace("h", "H")[: len(tokens)].ljust(len(tokens), ".")


POLICIES = ("write_through", "write_back")


# -- the view ---------------------------------------------------------------------------------------


def test_an_empty_cache_has_an_empty_tree() -> None:
    view = Rig(device=4).cache.tree()
    assert (view.format, view.namespaces, view.nodes, view.leases, view.operations) == (
        FORMAT,
        (),
        (),
        (),
        (),
    )
    assert [(each.kind, each.tier, each.capacity, each.free) for each in view.ledgers] == [
        ("full", "device", 4, 4),
        ("full", "host", 0, 0),
    ]


def test_every_letter() -> None:
    rig = Rig(device=8, host=8)
    rig.put([1, 2])
    assert letters(path_of(rig.cache.tree(), [1, 2])[0].where["full"]) == "dd"
    rig.settle()
    rig.put([3])
    rig.failed()
    (node,) = path_of(rig.cache.tree(), [3])
    assert node.where == {"full": "D1"}
    rig.evict(2)
    assert drawn(rig.cache.tree(), [1, 2], "full") == rig.map([1, 2])
    rig.evict(8)
    assert path_of(rig.cache.tree(), [1, 2])[0].where == {"full": "H2"}
    with rig.lease([1, 2]) as lease:
        rig.load(lease)
        view = rig.cache.tree()
        assert path_of(view, [1, 2])[0].where == {"full": "h2"}
        assert view.leases[0].loading
        assert [(each.purpose, each.pages, each.overdue) for each in view.operations] == [
            ("load_back", 2, False)
        ]
        rig.settle()
        assert path_of(rig.cache.tree(), [1, 2])[0].where == {"full": "B2"}


def test_what_is_on_its_way_and_what_a_kind_has_let_go_of() -> None:
    rig = Rig(device=8, host=8, kinds=[SlidingWindow(window=2)])
    rig.put([1, 2, 3, 4], pages={SWA: [2, 3]})
    rig.settle()
    (node,) = path_of(rig.cache.tree(), [1, 2, 3, 4])
    assert node.where == {"full": "B4", "swa": ".2 B2"}
    rig.evict(1, kind=SWA)
    (node,) = path_of(rig.cache.tree(), [1, 2, 3, 4])
    assert letters(node.where["swa"]) == rig.map([1, 2, 3, 4], SWA)
    assert "H" in node.where["swa"]


def test_nodes_say_who_they_are() -> None:
    rig = Rig(device=40, page_size=2)
    rig.put(list(range(100, 124)), "tenant")
    rig.clock.advance(5)
    rig.put([*range(100, 104), 7, 7], "tenant")
    rig.put([1, 2])
    lease = rig.lease([1, 2])
    rig.clock.advance(2)
    view = rig.cache.tree()
    assert [(each.name, each.nodes, each.pages) for each in view.namespaces] == [
        ("tenant", 3, 13),
        ("", 1, 1),
    ]
    upper, *lower = [each for each in view.nodes if each.namespace == 0]
    assert (upper.parent, upper.start, upper.pages, upper.tokens) == (-1, 0, 2, 4)
    assert upper.first_tokens == (100, 101, 102, 103)
    assert {each.parent for each in lower} == {0}
    assert {each.first_tokens for each in lower} == {tuple(range(104, 112)), (7, 7)}
    held = view.nodes[-1]
    assert (held.hits, held.device_holds, held.host_holds) == (1, 1, 0)
    assert view.now - held.last_used == 2
    (found,) = view.leases
    assert (found.number, found.namespace, found.pages, found.device_boundary) == (lease.number, "", 1, 1)


def test_bigrams_are_shown_by_their_first_token() -> None:
    rig = Rig(device=8, page_size=2, unit_bits=64, bigram=True)
    rig.cache.insert(rig.cache.key([1, 2, 3, 4, 5]), rig.cache.allocate(2))
    assert rig.cache.tree().nodes[0].first_tokens == (1, 2, 3, 4)


def test_operations_past_their_deadline_are_marked() -> None:
    rig = Rig(device=8, host=8)
    rig.put([1, 2])
    rig.clock.advance(1000)
    (found,) = rig.cache.tree().operations
    assert found.overdue
    rig.cache.poll()
    (found,) = rig.cache.tree().operations
    assert (found.overdue, found.age_seconds, found.purpose) == (True, 1000, "backup")
    assert found.seconds_left < 0
    host = next(each for each in rig.cache.tree().ledgers if each.tier == "host")
    assert (host.free, host.nodes, host.operations, host.lost) == (6, 0, 0, 2)


def test_a_tree_that_is_deep_is_no_trouble(tmp_path: Path) -> None:
    depth = 1500
    rig = Rig(device=depth)
    rig.put(list(range(depth)))
    for end in range(1, depth):
        rig.cache.match(rig.cache.key(range(end)))
    view = rig.cache.tree()
    assert len(view.nodes) == depth
    path = tmp_path / "tree.json"
    path.write_text(json.dumps(view.as_dict()))
    assert read_view(str(path)) == view
    assert main(["inspect", str(path), "--depth", "0"]) == 0


@pytest.mark.parametrize("seed", range(12))
def test_a_view_agrees_with_the_tree_and_changes_nothing(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    rig = Rig(device=14, host=10, kinds=[SlidingWindow(window=2)], write_policy=dice.choice(POLICIES))
    prompts = [[1, 2, 3, 4, 5], [1, 2, 6, 7], [1, 2, 3, 8], [9, 9, 9], [1, 2, 6, 7, 3, 3]]
    for _ in range(40):
        tokens = dice.choice(prompts)[: dice.randint(1, 6)]
        step = dice.randrange(6)
        if step == 0 and rig.free() >= len(tokens) and rig.free(kind=SWA) >= 2:
            rig.put(tokens)
        elif step == 1:
            rig.cache.match(rig.cache.key(tokens))
        elif step == 2:
            rig.evict(dice.randint(1, 5), dice.choice([Tier.DEVICE, Tier.HOST]), dice.choice([FULL, SWA]))
        elif step == 3 and rig.executor.pending:
            dice.choice([rig.done, rig.failed])()
        elif step == 4:
            with rig.lease(tokens) as lease:
                rig.cache.load_back(lease)
        rig.clock.advance(dice.random())
        before = books(rig)
        view = rig.cache.tree()
        assert books(rig) == before, f"seed {seed}"
        assert view == rig.cache.tree()
        for prompt in prompts:
            for kind in (FULL, SWA):
                assert drawn(view, prompt, kind) == rig.map(prompt, kind), f"seed {seed}"
        stats = rig.cache.stats()
        assert len(view.nodes) == stats.nodes
        assert sum(each.pages for each in view.namespaces) == sum(each.pages for each in view.nodes)
        on_device = sum(letters(each.where["full"]).count(x) for each in view.nodes for x in "DBd")
        assert on_device <= stats.device.resident
        for each in view.ledgers:
            parts = (each.free, each.nodes, each.requests, each.operations, each.lost)
            assert sum(parts) == each.capacity, f"seed {seed}"
        path = tmp_path / "tree.json"
        path.write_text(json.dumps(view.as_dict()))
        assert read_view(str(path)) == view


# -- drawing it -------------------------------------------------------------------------------------


def example() -> dict[str, Any]:
    """A view with some of everything in it."""
    rig = Rig(device=12, host=8, kinds=[SlidingWindow(window=2)])
    rig.put([1, 2, 3, 4])
    rig.put([1, 2, 7], "tenant")
    rig.put([1, 2, 3, 9])
    rig.done()
    rig.lease([1, 2, 3, 4])
    rig.clock.advance(1000)
    found: dict[str, Any] = json.loads(json.dumps(rig.cache.tree().as_dict()))
    return found


def inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object, *options: str
) -> tuple[int, str, str]:
    """Status and output of drawing a file with this content."""
    path = tmp_path / "tree.json"
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(json.dumps(value))
    status = main(["inspect", str(path), *options])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_a_tree_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = inspected(tmp_path, capsys, example())
    assert (status, err) == (0, "")
    assert "2 namespaces, 4 nodes, 8 pages" in out
    assert "namespace 'tenant'" in out
    assert "3 pages [1 2 3]" in out
    assert "held 1 on device" in out
    assert out.count("OVERDUE") == len(example()["operations"]) > 0
    assert "lease 2: 4 pages on device and 4 in memory of 4, namespace ''" in out


def test_what_is_overdue_comes_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = example()
    late, fresh = value["operations"][0], dict(value["operations"][0])
    late["number"], fresh["number"] = 7, 3
    fresh.update(overdue=False, seconds_left=2)
    value["operations"] = [fresh, late]
    _, out, _ = inspected(tmp_path, capsys, value)
    assert out.index("operation 7: backup") < out.index("operation 3: backup")
    assert out.count("OVERDUE") == 1
    _, out, _ = inspected(tmp_path, capsys, value, "--limit", "1")
    assert "operation 3:" not in out
    assert "and 1 operation more" in out


def test_what_is_not_drawn_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = inspected(tmp_path, capsys, example(), "--limit", "1")
    assert "… 2 more nodes, 2 pages" in out
    assert "and 1 namespace more" in out
    assert "and 2 operations more" in out or "and 1 operation more" in out
    _, out, _ = inspected(tmp_path, capsys, example(), "--depth", "1")
    assert "… 2 more nodes, 2 pages" in out
    _, out, _ = inspected(tmp_path, capsys, example(), "--limit", "0", "--depth", "0")
    assert "more" not in out


def test_names_cannot_do_anything_to_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    value = example()
    evil = "\x1b[2J[/red][bold]:smile:\ud800\n"
    value["namespaces"][0]["name"] = value["leases"][0]["namespace"] = evil
    value["operations"][0]["purpose"] = value["ledgers"][0]["kind"] = value["ledgers"][0]["tier"] = evil
    value["nodes"][0]["where"][evil] = value["nodes"][0]["where"].pop("full")
    status, out, _ = inspected(tmp_path, capsys, value)
    assert status == 0
    assert "\x1b" not in out
    assert "[/red][bold]:smile:" in out


# -- hostile files ----------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    value = example()
    change(value)
    return value


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"{}", "format: is missing"),
        (b"[]", "is no object"),
        (b"null", "is no object"),
        (b"[" * 100_000, "nested too deep"),
        (b'{"format":' * 100_000, "nested too deep"),
        (b'{"format": NaN}', "NaN is no number"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is not JSON"),
        (changed(lambda v: v.pop("nodes")), "nodes: is missing"),
        (changed(lambda v: v.update(format="tiertree-tree 2")), "format: 'tiertree-tree 2' is not"),
        (changed(lambda v: v.update(nodes={})), "nodes: is no list"),
        (changed(lambda v: v.update(now="late")), 'now: "late" is no float'),
        (changed(lambda v: v.update(now=10**400)), "is no float"),
        (changed(lambda v: v.update(page_size=True)), "page_size: true is no int"),
        (changed(lambda v: v.update(page_size=2**64)), "page_size: is not in"),
        (changed(lambda v: v.update(page_size=1.5)), "page_size: 1.5 is no int"),
        (changed(lambda v: v["nodes"].append(7)), "nodes[4]: is no object"),
        (changed(lambda v: v["nodes"][0].pop("hits")), "nodes[0].hits: is missing"),
        (changed(lambda v: v["nodes"][0].update(where=[])), "nodes[0].where: is no object"),
        (changed(lambda v: v["nodes"][0]["where"].update(full="B3 B1")), "does not say where 3 pages are"),
        (changed(lambda v: v["nodes"][0]["where"].update(full="B2")), "does not say where 3 pages are"),
        (changed(lambda v: v["nodes"][0]["where"].update(full="X3")), "does not say where 3 pages are"),
        (changed(lambda v: v["nodes"][0]["where"].update(full="B1 " * 10**6)), "does not say where"),
        (changed(lambda v: v["nodes"][0].update(parent=0)), "parents come before their children"),
        (changed(lambda v: v["nodes"][1].update(parent=-2)), "nodes[1].parent: is not in"),
        (changed(lambda v: v["nodes"][1].update(start=9)), "a node begins where its parent ends"),
        (changed(lambda v: v["nodes"][0].update(namespace=2)), "nodes[0].namespace: there are 2"),
        (changed(lambda v: v["nodes"][1].update(namespace=1)), "is not that of its parent"),
        (changed(lambda v: v["nodes"][0].update(first_tokens=[None])), "first_tokens[0]: null is no int"),
        (changed(lambda v: v["operations"][0].update(node=4)), "operations[0].node: there are 4"),
        (changed(lambda v: v["leases"][0].update(loading=0)), "leases[0].loading: 0 is no bool"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_tree_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: object, words: str
) -> None:
    status, out, err = inspected(tmp_path, capsys, value)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert str(tmp_path / "tree.json") in err


def test_files_that_cannot_be_read_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "none: cannot be read: No such file" in capsys.readouterr().err
    monkeypatch.setattr("tiertree.treeview.FILE_BYTES_MAX", 10)
    status, _, err = inspected(tmp_path, capsys, example())
    assert status == 2
    assert "so it is no tree" in err


HOSTILE = (None, True, -1, 0, 2**62, 1e308, -1e308, "", "B1", "\x1b[0m", [], {}, [[]], {"a": 1})


@pytest.mark.parametrize("seed", range(40))
def test_no_change_of_a_file_does_worse_than_be_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int
) -> None:
    dice = random.Random(seed)
    for _ in range(5):
        value: Any = example()
        for _ in range(dice.randint(1, 3)):
            at = value
            while isinstance(at, dict | list) and at:
                name = dice.choice(list(at) if isinstance(at, dict) else range(len(at)))
                if dice.random() < 0.3 or not isinstance(at[name], dict | list) or not at[name]:
                    if dice.random() < 0.2:
                        del at[name]
                    else:
                        at[name] = dice.choice(HOSTILE)
                    break
                at = at[name]
        status, out, err = inspected(tmp_path, capsys, value)
        assert status in (0, 2), f"seed {seed}"
        assert status == 0 or err.count("\n") == 1, f"seed {seed}"
        assert "\x1b" not in out + err, f"seed {seed}"


def test_errors_are_named() -> None:
    assert issubclass(ViewError, ValueError)


# -- a directory ------------------------------------------------------------------------------------


def test_a_directory_is_shown_and_stays_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "disk")
    (path / "notes\x1b.txt").write_text("mine")
    before = state(path)
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert state(path) == before
    assert "disk tier, format 1, not open" in out
    assert f"3 segments, {sum(each.stat().st_size for each in path.iterdir()) - 4:,} bytes" in out
    assert f"{PAGES} pages live, 1 superseded, 1 tombstone" in out
    assert out.count("sealed") == 3
    assert page_key(0)[32:].hex() in out
    assert f"{PAGE:,}" in out
    assert "\x1b" not in out
    assert "notes" in out
    assert main(["inspect", str(path), "--limit", "1"]) == 0
    assert "2 older" in capsys.readouterr().out


def test_every_page_can_be_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = filled(tmp_path / "disk")
    assert main(["inspect", str(path), "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()[-(PAGES + 2) :]
    assert lines[0] == f"1 64 {page_key(0)[:32].hex()} {page_key(0)[32:].hex()} {PAGE} live"
    assert [line.split()[-1] for line in lines].count("live") == PAGES
    assert [line.split()[-1] for line in lines].count("tombstone") == 1
    assert f"1 {64 + 3 * RECORD} {page_key(3)[:32].hex()} {page_key(3)[32:].hex()} {PAGE} superseded" in lines


def test_a_directory_in_use_can_be_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "disk"
    storage = DiskStorage(path, CAPACITY, SEGMENT)
    put(storage, *range(7))
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert "open in the process with pid" in out
    assert out.count("being written") == 1
    assert "7 pages live" in out
    put(storage, 9)
    storage.close()
    assert main(["inspect", str(path)]) == 0
    assert "being written" not in capsys.readouterr().out


def test_a_killed_and_a_damaged_directory_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = DiskStorage(tmp_path / "disk", CAPACITY, SEGMENT)
    put(storage, *range(7))
    abandon(storage)
    flip(tmp_path / "disk" / FIRST, 3)
    assert main(["inspect", str(tmp_path / "disk")]) == 0
    out = capsys.readouterr().out
    assert "not sealed" in out
    assert "damaged" in out


class Fleeting(Files):
    """A directory whose first segment is reclaimed as soon as its names are known."""

    def listdir(self, path: str) -> list[str]:
        names = super().listdir(path)
        (Path(path) / FIRST).unlink(missing_ok=True)
        return names


def test_a_segment_that_goes_meanwhile_is_left_out(tmp_path: Path) -> None:
    path = filled(tmp_path / "disk")
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    found = survey(str(copy), Fleeting())
    assert [each.segment.number for each in found.found] == [2, 3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("disk --depth 2", "--depth: allowed: only with a tree"),
        ("tree.json --keys", "--keys: allowed: only with a directory"),
        ("tree.json --limit -1", "--limit: -1 is not allowed"),
        (". --limit 3", "has no FORMAT file"),
        ("disk/FORMAT", "is not JSON"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: str,
    words: str,
) -> None:
    filled(tmp_path / "disk")
    (tmp_path / "tree.json").write_text(json.dumps(example()))
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", *options.split()]) == 2
    said = capsys.readouterr()
    assert words in said.err
    assert said.err.count("\n") == 1


def test_a_replay_writes_its_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str], root: Path) -> None:
    trace, out = root / "examples" / "tiny_trace.jsonl", tmp_path / "tree.json"
    assert main(["replay", str(trace), "--device-pages", "5", "--host-pages", "6", "--tree", str(out)]) == 0
    view = read_view(str(out))
    assert view.page_size == 512
    assert sum(letters(each.where["full"]).count(x) for each in view.nodes for x in "DB") == 5
    assert main(["replay", str(trace), "--tree", "/nowhere/at/all.json"]) == 2
    assert "--tree: /nowhere/at/all.json is not a file" in capsys.readouterr().err
