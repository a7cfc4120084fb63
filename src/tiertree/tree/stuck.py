"""Operations past their deadline that have not come home: what an operator wants to know of them.

op 17: fetch of 4 pages of namespace 'tenant', the first is 3fa9…c1, for prefetch: 31.2 s, 4 slots LOST
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .lease import Lease
from .node import Node, Root
from .operation import Operation, Operations, Purpose
from .pagehash import PageHashes


@dataclass(frozen=True, slots=True)
class Stuck:
    """One operation that is late. `namespace` and `page_hash` (hex, of its first page) are None where
    nobody can tell any more. `owner` is whoever wanted it: "lease 3" (or several), "prefetch", "tree".
    `pages` are of all kinds; `lost` slots stay LOST until it comes home."""

    op: int
    purpose: str
    namespace: str | None
    page_hash: str | None
    owner: str
    pages: int
    age_seconds: float
    lost: int

    def __str__(self) -> str:
        where = "" if self.namespace is None else f" of namespace {self.namespace!r}"
        first = "" if self.page_hash is None else f", the first is {self.page_hash}"
        age = f"{self.age_seconds:.1f} s, {self.lost} slots LOST"
        return f"op {self.op}: {self.purpose} of {self.pages} pages{where}{first}, for {self.owner}: {age}"


def stuck(operations: Operations, now: float) -> tuple[Stuck, ...]:
    """Every operation in flight that is late, oldest first. O(in flight)."""
    return tuple(_stuck(each, now) for each in operations.in_flight.values() if each.late)


def _stuck(late: Operation, now: float) -> Stuck:
    return Stuck(
        op=late.number,
        purpose=str(late.purpose),
        namespace=late.namespace,
        page_hash=None if late.page_hash is None else late.page_hash.hex(),
        owner=late.owner,
        pages=late.count + sum(len(part.pages) for part in late.parts),
        age_seconds=now - late.started,
        lost=len(late.target) + sum(len(part.target) for part in late.parts),
    )


def remember(operation: Operation, hashes: PageHashes, leases: Iterable[Lease]) -> None:
    """Write down who and what `operation` was for, while the tree still knows: it is late, and about to
    be given up. O(leases + pages of its path that were never hashed)."""
    end = operation.end
    operation.owner = _owner(operation, leases)
    if end is None or operation.namespace is not None:
        return
    operation.namespace = _namespace(end)
    if operation.namespace is None or end.detached or operation.page_hash is not None:
        return
    first = operation.first if operation.count else int(operation.parts[0].pages[0])
    operation.page_hash = hashes.of_range(end, first, 1)[0]


def _owner(operation: Operation, leases: Iterable[Lease]) -> str:
    if operation.purpose in (Purpose.QUERY, Purpose.FETCH):
        return "prefetch"
    waiting = [
        f"{lease.number}"
        for lease in leases
        if lease.loading is not None and operation.number in lease.loading.waiting
    ]
    return f"lease {', '.join(waiting)}" if waiting else "tree"


def _namespace(end: Node) -> str | None:
    node: Node | None = end
    while node is not None:
        if isinstance(node, Root):
            return node.namespace
        node = node.parent
    return None
