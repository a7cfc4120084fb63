"""A look at the whole tree as plain data: which page is where, who holds it, what is in flight.

    nodes   parents before children, each with the index of its parent: no nesting, however deep the tree
    where   "B12 D3 .2": letter and count, page after page

    | letter | the page is |
    |---|---|
    | `D` `H` `B` | on device, on host, on both |
    | `d` `h` | on device and on its way to host; on host and on its way to device |
    | `~` | nowhere yet, on its way |
    | `.` | nowhere: what a partial kind has let go of, or never had |

`PrefixCache.tree` makes it, `write_view` and `read_view` keep it as JSON. Such a file is outside input:
whatever is wrong with one is a `ViewError` that names the place.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from typing import Any, NoReturn, cast, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

from .tree.core import Core
from .tree.key import KeyMaker
from .tree.lease import Lease
from .tree.ledger import Ledger, Owner, State
from .tree.node import Lane, Node
from .tree.operation import Operation
from .types import FULL, Tier, ViewError

FORMAT = "tiertree-tree 1"
FILE_BYTES_MAX = 256 << 20
NUMBER_MAX = 2**63
FIRST_TOKENS = 8
"""So many tokens of a node are in the view."""

LETTERS = np.array([[".", "~", "H"], ["~", "~", "h"], ["D", "d", "B"]])
"""By state on device and on host: not there, FILLING, READY."""
_WHERE = re.compile(r"[DHBdh~.][1-9][0-9]{0,17}( [DHBdh~.][1-9][0-9]{0,17})*")


@dataclass(frozen=True, slots=True)
class NamespaceView:
    """One root: how many nodes and pages are under it."""

    name: str
    nodes: int
    pages: int


@dataclass(frozen=True, slots=True)
class NodeView:
    """One node. `namespace` and `parent` are indices (−1: the root). `start` is the depth of its first page;
    `where` is by kind. `device_holds` and `host_holds` count leases and operations that rely on it."""

    namespace: int
    parent: int
    start: int
    pages: int
    tokens: int
    first_tokens: tuple[int, ...]
    where: dict[str, str]
    hits: int
    last_used: float
    device_holds: int
    host_holds: int


@dataclass(frozen=True, slots=True)
class LeaseView:
    """One lease: so many pages on device, so many in memory, of a key of `pages`."""

    number: int
    namespace: str
    pages: int
    device_boundary: int
    memory_boundary: int
    loading: bool


@dataclass(frozen=True, slots=True)
class OperationView:
    """One operation in flight: `pages` of all kinds, behind the first `first` pages of the path to `node`
    (−1: that is not in the tree). `overdue`: past its deadline, and nobody counts on it any more."""

    number: int
    purpose: str
    node: int
    first: int
    pages: int
    age_seconds: float
    seconds_left: float
    overdue: bool


@dataclass(frozen=True, slots=True)
class LedgerView:
    """The books of one pool, in pages: who has its slots. Together they are `capacity`."""

    kind: str
    tier: str
    capacity: int
    free: int
    nodes: int
    requests: int
    operations: int
    lost: int


@dataclass(frozen=True, slots=True)
class TreeView:
    """A snapshot of a cache at `now` (seconds of its own clock)."""

    format: str
    now: float
    page_size: int
    namespaces: tuple[NamespaceView, ...]
    nodes: tuple[NodeView, ...]
    leases: tuple[LeaseView, ...]
    operations: tuple[OperationView, ...]
    ledgers: tuple[LedgerView, ...]

    def as_dict(self) -> dict[str, Any]:
        """The same as nested plain dictionaries."""
        return asdict(self)


# -- making one -------------------------------------------------------------------------------------


def view(core: Core, now: float) -> TreeView:
    """The tree of `core`. O(nodes + pages + capacity), changes nothing."""
    namespaces: list[NamespaceView] = []
    nodes: list[NodeView] = []
    index: dict[Node, int] = {}
    for number, root in enumerate(core.radix.roots.values()):
        first, pages = len(nodes), 0
        stack = list(reversed(root.children.values()))
        while stack:
            node = stack.pop()
            assert node.parent is not None
            index[node] = len(nodes)
            nodes.append(_node(core, node, number, index.get(node.parent, -1)))
            pages += node.pages
            stack.extend(reversed(node.children.values()))
        namespaces.append(NamespaceView(root.namespace, len(nodes) - first, pages))
    return TreeView(
        format=FORMAT,
        now=float(now),
        page_size=core.radix.keys.page_size,
        namespaces=tuple(namespaces),
        nodes=tuple(nodes),
        leases=tuple(_lease(each) for each in core.leases.values()),
        operations=tuple(_operation(each, index, now) for each in core.operations.in_flight.values()),
        ledgers=_ledgers(core),
    )


def _node(core: Core, node: Node, namespace: int, parent: int) -> NodeView:
    radix = core.radix
    where = {str(FULL): _where(node.pages, node.lanes, radix.ledgers)}
    for kind in radix.partials:
        lanes = kind.lane(node, Tier.DEVICE), kind.lane(node, Tier.HOST)
        if lanes[0].slots is not None or lanes[1].slots is not None:
            where[str(kind.kind)] = _where(node.pages, lanes, kind.ledgers)
    return NodeView(
        namespace=namespace,
        parent=parent,
        start=node.start,
        pages=node.pages,
        tokens=node.pages * radix.keys.page_size,
        first_tokens=_first_tokens(radix.keys, node.edge),
        where=where,
        hits=node.hits,
        last_used=float(node.last_used),
        device_holds=node.device.locks,
        host_holds=node.host.locks,
    )


def _first_tokens(keys: KeyMaker, edge: bytes) -> tuple[int, ...]:
    count = min(FIRST_TOKENS, len(edge) // keys.unit_bytes)
    units = np.frombuffer(edge, keys.dtype, count).tolist()
    return tuple(unit >> 32 for unit in units) if keys.bigram else tuple(units)


def _where(pages: int, lanes: tuple[Lane, Lane], ledgers: tuple[Ledger, Ledger]) -> str:
    """One letter per page, runs of the same one counted. O(pages)."""
    device, host = (_states(pages, lane, ledger) for lane, ledger in zip(lanes, ledgers, strict=True))
    letters = LETTERS[device, host]
    starts = np.flatnonzero(np.r_[True, letters[1:] != letters[:-1]])
    lengths = np.diff(np.r_[starts, pages])
    return " ".join(f"{letters[at]}{length}" for at, length in zip(starts, lengths, strict=True))


def _states(pages: int, lane: Lane, ledger: Ledger) -> NDArray[np.int64]:
    """Per page 0 (not there), 1 (FILLING) or 2 (READY)."""
    states = np.zeros(pages, np.int64)
    if lane.slots is not None:
        there = np.flatnonzero(lane.slots >= 0)
        found = ledger.states(lane.slots[there])
        states[there] = np.where(found == State.READY, 2, np.where(found == State.FILLING, 1, 0))
    return states


def _lease(lease: Lease) -> LeaseView:
    return LeaseView(
        number=lease.number,
        namespace=lease.key.namespace,
        pages=lease.key.pages,
        device_boundary=lease.device_boundary,
        memory_boundary=lease.memory_boundary,
        loading=lease.loading is not None,
    )


def _operation(operation: Operation, index: dict[Node, int], now: float) -> OperationView:
    return OperationView(
        number=operation.number,
        purpose=str(operation.purpose),
        node=-1 if operation.end is None else index.get(operation.end, -1),
        first=operation.first,
        pages=operation.count + sum(len(part.pages) for part in operation.parts),
        age_seconds=float(now - operation.started),
        seconds_left=float(operation.deadline - now),
        overdue=operation.deadline <= now and not operation.arrived,
    )


def _ledgers(core: Core) -> tuple[LedgerView, ...]:
    kinds: list[tuple[str, Any]] = [(str(FULL), core.radix)]
    kinds += [(str(each.kind), each) for each in core.radix.partials]
    return tuple(
        _ledger(kind, tier, of.ledgers[tier]) for kind, of in kinds for tier in (Tier.DEVICE, Tier.HOST)
    )


def _ledger(kind: str, tier: Tier, ledger: Ledger) -> LedgerView:
    lost = ledger.count(State.LOST)
    return LedgerView(
        kind=kind,
        tier=tier.name.lower(),
        capacity=ledger.capacity,
        free=ledger.free,
        nodes=ledger.count(owner=Owner.NODE),
        requests=ledger.count(owner=Owner.REQUEST),
        operations=ledger.count(owner=Owner.OPERATION) - lost,
        lost=lost,
    )


# -- reading one back -------------------------------------------------------------------------------


def read_view(path: str) -> TreeView:
    """The view in the JSON file `path`, at most `FILE_BYTES_MAX` long. Raises ViewError."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ViewError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > FILE_BYTES_MAX:
        raise ViewError(f"{path}: longer than {FILE_BYTES_MAX >> 20} MiB, so it is no tree")
    try:
        value = json.loads(data, parse_constant=_no_number)
    except RecursionError:
        raise ViewError(f"{path}: nested too deep, so it is no tree") from None
    except ValueError as error:
        raise ViewError(f"{path}: is not JSON: {error}") from None
    found = cast(TreeView, _built(TreeView, value, path))
    _check(found, path)
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _built(kind: Any, value: Any, path: str, place: str = "") -> Any:
    """`value` of the JSON file `path` as a `kind`: dataclass, tuple, dictionary or scalar."""
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind) or origin is dict:
        if not isinstance(value, dict):
            raise _wrong(path, place, "is no object")
    elif origin is tuple and not isinstance(value, list):
        raise _wrong(path, place, "is no list")
    if is_dataclass(kind):
        parts = {}
        for name, hint in _hints(cast(type, kind)).items():
            inner = f"{place}.{name}" if place else name
            if name not in value:
                raise _wrong(path, inner, "is missing")
            parts[name] = _built(hint, value[name], path, inner)
        return cast(Any, kind)(**parts)
    if origin is tuple:
        return tuple(_built(arguments[0], each, path, f"{place}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        return {
            name: _built(arguments[1], each, path, f"{place}[{name!a:.40}]") for name, each in value.items()
        }
    return _scalar(kind, value, path, place)


def _scalar(kind: type, value: Any, path: str, place: str) -> Any:
    if kind is float and type(value) is int and abs(value) < NUMBER_MAX:
        return float(value)
    if type(value) is not kind:
        raise _wrong(path, place, f"{json.dumps(value):.40} is no {kind.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, place, "is not finite")
    if isinstance(value, int) and not -1 <= value < NUMBER_MAX:
        raise _wrong(path, place, "is not in −1 … 2**63 − 1")
    return value


def _wrong(path: str, place: str, what: str) -> ViewError:
    return ViewError(f"{path}: {place}: {what}" if place else f"{path}: {what}")


def _check(found: TreeView, path: str) -> None:
    """What a list of nodes must be for a tree to be drawn from it. Raises ViewError."""
    if found.format != FORMAT:
        raise _wrong(path, "format", f"{found.format!a:.40} is not {FORMAT!r}")
    for i, node in enumerate(found.nodes):
        place = f"nodes[{i}]"
        if not 0 <= node.namespace < len(found.namespaces):
            raise _wrong(path, f"{place}.namespace", f"there are {len(found.namespaces)}")
        if not -1 <= node.parent < i:
            raise _wrong(path, f"{place}.parent", "parents come before their children")
        above = found.nodes[node.parent] if node.parent >= 0 else None
        if above is not None and above.namespace != node.namespace:
            raise _wrong(path, f"{place}.namespace", "is not that of its parent")
        if node.pages < 1 or node.start != (above.start + above.pages if above is not None else 0):
            raise _wrong(path, f"{place}.start", "a node begins where its parent ends, and has pages")
        for kind, text in node.where.items():
            runs = text.split(" ") if len(text) <= node.pages * 20 and _WHERE.fullmatch(text) else []
            if sum(int(each[1:]) for each in runs) != node.pages:
                raise _wrong(
                    path, f"{place}.where[{kind!a:.40}]", f"does not say where {node.pages} pages are"
                )
    for i, each in enumerate(found.operations):
        if each.node >= len(found.nodes):
            raise _wrong(path, f"operations[{i}].node", f"there are {len(found.nodes)}")
