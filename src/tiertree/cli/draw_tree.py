"""What `tiertree inspect` shows of a tree: its nodes as branches, the largest first, and who holds what."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from ..treeview import LeaseView, NodeView, OperationView, TreeView
from .common import ago, plain_table, say, shown, some

TOKENS_SHOWN = 4
RUNS_SHOWN = 8
INDENT = 4
LINE_WIDTH_MIN = 40
"""What is drawn stays so wide; what is deeper than that allows is counted."""


def draw(view: TreeView, limit: int | None, depth: int | None) -> None:
    """Print `view`: `limit` nodes, leases and operations at most (None: all), nodes down to `depth`
    forks (None: as many as fit)."""
    pages = sum(each.pages for each in view.namespaces)
    print(
        f"pages of {some(view.page_size, 'token')}: {some(len(view.namespaces), 'namespace')}, "
        f"{some(len(view.nodes), 'node')}, {some(pages, 'page')}"
    )
    room = max(1, (Console().width - LINE_WIDTH_MIN) // INDENT)
    trees = _trees(view, limit, min(depth or room, room))
    say(*trees[:limit])
    if len(trees) > len(trees[:limit]):
        print(f"and {some(len(trees) - len(trees[:limit]), 'namespace')} more")
    if view.nodes:
        print("D on device, H on host, B on both, d h on the way to the other, ~ on the way, . not there")
    say("", _ledgers(view))
    late = sorted(view.operations, key=lambda each: (not each.overdue, each.number))
    _lines("lease", [_lease(each) for each in view.leases], limit)
    _lines("operation", [_operation(each) for each in late], limit)


def _lines(what: str, lines: list[str], limit: int | None) -> None:
    for line in lines[:limit]:
        print(line)
    hidden = len(lines) - len(lines[:limit])
    if hidden:
        print(f"and {some(hidden, what)} more")


class _Shape:
    """Per node: how many nodes and pages are at and behind it, and how far in it is drawn. An only child
    goes on where its parent is, so that a conversation is a list and not a staircase. O(nodes)."""

    def __init__(self, nodes: Sequence[NodeView]) -> None:
        self.pages = [each.pages for each in nodes]
        self.count = [1] * len(nodes)
        self.level = [1] * len(nodes)
        children = [0] * len(nodes)
        for each in nodes:
            if each.parent >= 0:
                children[each.parent] += 1
        self.only = [each.parent >= 0 and children[each.parent] == 1 for each in nodes]
        for i, each in enumerate(nodes):
            if each.parent >= 0:
                self.level[i] = self.level[each.parent] + (not self.only[i])
        for i in range(len(nodes) - 1, -1, -1):
            above = nodes[i].parent
            if above >= 0:
                self.pages[above] += self.pages[i]
                self.count[above] += self.count[i]


def _trees(view: TreeView, limit: int | None, depth: int) -> list[Tree]:
    """One tree per namespace, the largest first. Drawn are the nodes with the most pages at and behind
    them: a node has more than its children, so what is drawn hangs together. O(nodes · log nodes)."""
    nodes, shape = view.nodes, _Shape(view.nodes)
    near = [i for i in range(len(nodes)) if shape.level[i] <= depth]
    chosen = sorted(near, key=lambda i: (-shape.pages[i], i))[:limit]
    trees = [Tree(Text(f"namespace {shown(repr(each.name))}")) for each in view.namespaces]
    drawn: dict[int, tuple[Tree, Text]] = {}
    for i in chosen:
        line, above = _node(nodes[i], view.now), nodes[i].parent
        if shape.only[i]:
            drawn[i] = drawn[above]
            drawn[i][1].append(f"\n{line}")
        else:
            text = Text(line)
            drawn[i] = (drawn[above][0] if above >= 0 else trees[nodes[i].namespace]).add(text), text
    hidden: dict[int, list[int]] = {}
    for i, each in enumerate(nodes):
        if i not in drawn and (each.parent < 0 or each.parent in drawn):
            sums = hidden.setdefault(each.parent if each.parent >= 0 else -1 - each.namespace, [0, 0])
            sums[0] += shape.count[i]
            sums[1] += shape.pages[i]
    for place, (count, pages) in hidden.items():
        branch = drawn[place][0] if place >= 0 else trees[-1 - place]
        branch.add(Text(f"… {some(count, 'more node')}, {some(pages, 'page')}"))
    return [trees[i] for i in sorted(range(len(trees)), key=lambda i: -view.namespaces[i].pages)]


def _node(node: NodeView, now: float) -> str:
    tokens = " ".join(str(each) for each in node.first_tokens[:TOKENS_SHOWN])
    more = " …" if node.tokens > TOKENS_SHOWN else ""
    where = "  ".join(f"{shown(kind)} {_runs(text)}" for kind, text in node.where.items())
    held = [
        f"{holds:,} on {tier}"
        for holds, tier in ((node.device_holds, "device"), (node.host_holds, "host"))
        if holds
    ]
    return (
        f"{some(node.pages, 'page')} [{tokens}{more}]  {where}  {some(node.hits, 'hit')}, "
        f"{ago(now - node.last_used)}{f', held {chr(32).join(held)}' if held else ''}"
    )


def _runs(where: str) -> str:
    runs = where.split(" ")
    return " ".join(runs[:RUNS_SHOWN]) + (" …" if len(runs) > RUNS_SHOWN else "")


def _ledgers(view: TreeView) -> Table:
    table = plain_table(*("kind", "tier", "slots", "free", "nodes", "requests", "operations", "lost"), left=2)
    for each in view.ledgers:
        counts = (each.capacity, each.free, each.nodes, each.requests, each.operations, each.lost)
        table.add_row(Text(shown(each.kind)), Text(shown(each.tier)), *(f"{count:,}" for count in counts))
    return table


def _lease(lease: LeaseView) -> str:
    return (
        f"lease {lease.number}: {lease.device_boundary:,} pages on device and {lease.memory_boundary:,} in "
        f"memory of {lease.pages:,}, namespace {shown(repr(lease.namespace))}"
        f"{', loading back' if lease.loading else ''}"
    )


def _operation(operation: OperationView) -> str:
    due = f"{operation.seconds_left:,.1f} s left"
    if operation.overdue:
        due = f"OVERDUE by {max(-operation.seconds_left, 0.0):,.1f} s"
    return (
        f"operation {operation.number}: {shown(operation.purpose)} of {some(operation.pages, 'page')}, "
        f"{operation.age_seconds:,.1f} s old, {due}"
    )
