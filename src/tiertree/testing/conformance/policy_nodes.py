"""Nodes in every state that a tree can have, for checks of what scores them."""

from __future__ import annotations

import numpy as np

from ...tree.node import ABSENT, NO_CHILDREN, NO_PARTIALS, Lane, Node, Partials, Root

_TIMES = (0.0, 1e-9, 17.25, 1e12)
_HITS = (0, 1, 1 << 40)


def _lane(pages: int, count: int, filling: int = 0, locks: int = 0, below: int = 0, ticket: int = 0) -> Lane:
    lane = Lane()
    if count:
        lane.slots = np.full(pages, -1, np.int64)
        lane.slots[:count] = np.arange(count)
    lane.count, lane.filling, lane.locks, lane.below, lane.ticket = count, filling, locks, below, ticket
    return lane


def _under(parent: Node, pages: int, device: Lane, host: Lane, partial: Partials = NO_PARTIALS) -> Node:
    edge = bytes(range(4)) * pages
    node = Node(edge, pages, parent.end + pages, parent, (device, host), partial)
    node.label = edge[:4]
    return node


def nodes() -> list[Node]:
    """New nodes: on device, host, both or nowhere, whole or in part, being filled, locked, queued, detached,
    leaves and not, deep and long, with partial kinds and without, used never, just now and long ago."""
    root = Root("tenant", (Lane(), Lane()))
    made: list[Node] = []
    for device, host in (
        (_lane(3, 3), ABSENT),
        (_lane(3, 3, ticket=9), _lane(3, 3, ticket=2)),
        (_lane(3, 0), _lane(3, 3)),
        (_lane(3, 1), _lane(3, 2)),
        (_lane(3, 3, filling=3), _lane(3, 0)),
        (_lane(3, 3, locks=2), _lane(3, 3, locks=1)),
        (_lane(3, 3, below=2), _lane(3, 3, below=1)),
        (_lane(3, 0), _lane(3, 0)),
    ):
        made.append(_under(root, 3, device, host))
    for last_used in _TIMES:
        for hits in _HITS:
            node = _under(root, 3, _lane(3, 3), _lane(3, 3))
            node.last_used, node.hits = last_used, hits
            made.append(node)
    long = _under(root, 5000, _lane(5000, 5000), _lane(5000, 1))
    child = _under(long, 1, _lane(1, 1), ABSENT)
    long.adopt(child)
    made += [long, child]
    deep = child
    for _ in range(100):
        lower = _under(deep, 1, _lane(1, 1), ABSENT)
        deep.adopt(lower)
        deep = lower
    made.append(deep)
    partial = _under(root, 3, _lane(3, 3), _lane(3, 3), Partials([_lane(3, 2), ABSENT]))
    partial.partial.dead, partial.hashes = 2, bytes(96)
    detached = _under(root, 3, _lane(3, 3, locks=1), ABSENT)
    detached.detached = True
    return [*made, partial, detached]


def cut(node: Node, front: bool) -> None:
    """Take a page off the front of `node`, or off its tail."""
    node.pages -= 1
    node.edge = node.edge[4:] if front else node.edge[:-4]
    node.end -= not front
    for lane in (*node.lanes, *node.partial):
        if lane.slots is not None:
            lane.slots = lane.slots[1:] if front else lane.slots[:-1]
            lane.count = int((lane.slots >= 0).sum())
            lane.filling = min(lane.filling, lane.count)


def picture(node: Node) -> str:
    """All that a node says of itself, and what is next to it, as text."""
    lanes = [
        (None if lane.slots is None else lane.slots[:8].tolist(), lane.count, lane.filling, lane.locks)
        for lane in (*node.lanes, *node.partial)
    ]
    links = [(lane.below, lane.ticket) for lane in (*node.lanes, *node.partial)]
    own = {name: getattr(node, name) for name in ("pages", "end", "last_used", "hits", "detached")}
    more = (len(node.edge), node.label.hex(), len(node.hashes), node.partial.dead, node.partial.unsaved)
    near = (None if node.parent is None else id(node.parent), len(node.children), len(NO_CHILDREN))
    return f"{node} {own} {lanes} {links} {more} {near}"
