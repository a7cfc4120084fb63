"""Operations: what the tree has asked for and not yet been told about.

    start   pins every slot it names in the ledgers, holds the nodes it works on, and sends an action
    late    past its deadline: its target slots are LOST and the tree goes on as if it had failed
    finish  the executor has answered: the pins and holds go, and LOST slots come home

An operation names pages by (end node, first page, page count). Splits need no bookkeeping: the end
stays valid because it is held, and `fragments` finds the pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from ..types import FULL, Slots, Tier
from .actions import Action, Cancel, Completion, Copy, Move
from .breaker import Breaker, Breakers, Verdict
from .ledger import Ledger, Owner
from .node import Hold, Node, fragments, located, slots_of
from .partial import Partial
from .radix import EMPTY, Radix

Cargo = Sequence[tuple[Partial, Slots]]
"""Pages (ascending depths) of partial kinds that go along with a copy."""


class Purpose(StrEnum):
    """Why an operation runs."""

    BACKUP = "backup"
    DEMOTE = "demote"
    LOAD_BACK = "load_back"
    PERSIST = "persist"
    QUERY = "query"
    FETCH = "fetch"


class Part:
    """What an operation carries of one partial kind: `pages` (ascending depths), and where each is on the
    operation's source and target tier; empty where there is no such tier in memory."""

    __slots__ = ("kind", "pages", "source", "target")

    def __init__(self, kind: Partial, pages: Slots, source: Slots, target: Slots) -> None:
        self.kind = kind
        self.pages = pages
        self.source = source
        self.target = target


@dataclass(slots=True, eq=False)
class Operation:
    """One operation in flight. `source` and `target` are slots of FULL on `source_tier` and
    `target_tier`, none where it carries partial kinds alone. A query has no slots, and `count` pages that it
    asks about."""

    number: int
    purpose: Purpose
    started: float
    deadline: float
    end: Node | None = None
    first: int = 0
    count: int = 0
    source_tier: Tier = Tier.STORAGE
    target_tier: Tier = Tier.STORAGE
    source: Slots = field(default_factory=lambda: EMPTY)
    target: Slots = field(default_factory=lambda: EMPTY)
    parts: tuple[Part, ...] = ()
    holds: list[Hold] = field(default_factory=list)
    leaving: int = 0
    """How many pages of FULL are to leave device once it is done."""
    round: int = 0
    """The round of its breaker in which it was admitted."""
    namespace: str | None = None
    """Of its pages, and `page_hash` of the first of them: known from the start where storage is asked, and
    otherwise as far as can be told once it is late."""
    page_hash: bytes | None = None
    cancelled: bool = False
    """The executor has been asked to stop."""
    owner: str = ""
    """Who wanted it; known once it is late."""
    late: bool = False
    arrived: bool = False
    """The executor is done with it, and it waits for the page before its first."""


STORING = frozenset((Purpose.PERSIST, Purpose.QUERY, Purpose.FETCH))
"""Operations that wait for storage. They have places of their own, so that a storage tier that hangs
cannot keep copies between the in-memory tiers from starting."""


class Operations:
    """All operations in flight, and the actions waiting to be taken by the executor. Half of
    `operations_max` (at least one) may wait for storage, the other half may be copies."""

    __slots__ = (
        "_guards",
        "_next",
        "_radix",
        "_storing",
        "breakers",
        "deadline_seconds",
        "in_flight",
        "outbox",
        "operations_max",
    )

    def __init__(
        self, radix: Radix, breakers: Breakers, deadline_seconds: float, operations_max: int
    ) -> None:
        self._radix = radix
        self.breakers = breakers
        self._guards: dict[Purpose, Breaker] = {
            Purpose.BACKUP: breakers.to_host,
            Purpose.DEMOTE: breakers.to_host,
            Purpose.PERSIST: breakers.writes,
            Purpose.QUERY: breakers.reads,
            Purpose.FETCH: breakers.reads,
        }
        self._next = 1
        self._storing = 0
        self.deadline_seconds = deadline_seconds
        self.operations_max = operations_max
        self.in_flight: dict[int, Operation] = {}
        self.outbox: list[Action] = []

    @property
    def full(self) -> bool:
        """Whether no further copy may start."""
        return len(self.in_flight) - self._storing >= self.operations_max - self.operations_max // 2

    @property
    def storage_full(self) -> bool:
        """Whether no further operation of storage may start."""
        return self._storing >= max(1, self.operations_max // 2)

    def open(self, purpose: Purpose, now: float) -> Operation:
        """A new operation, in flight from now on; the caller fills it in and sends its action. Its breaker
        admits it, or is waiting for it as the next step of its probe."""
        operation = Operation(self._next, purpose, now, now + self.deadline_seconds)
        if (breaker := self._guards.get(purpose)) is not None:
            operation.round = breaker.admit(now)
        self._next += 1
        self._storing += purpose in STORING
        self.in_flight[operation.number] = operation
        return operation

    def copy(
        self,
        purpose: Purpose,
        pages: tuple[Node, int, int],
        tiers: tuple[Tier, Tier],
        holds: list[Hold],
        now: float,
        cargo: Cargo = (),
    ) -> Operation:
        """Start copying FULL's `pages` (end node, first page, count) and the `cargo` of partial kinds on
        the same path from the first of `tiers` to the second, where they have no slots yet and as many are
        free. The operation gets `holds`. O(pages)."""
        radix, (end, first, count), (source, target) = self._radix, pages, tiers
        operation = self.open(purpose, now)
        operation.end, operation.first, operation.count = pages
        operation.source_tier, operation.target_tier = tiers
        operation.holds = holds
        moves: list[Move] = []
        if count:
            slots = radix.ledgers[target].take(count, Owner.NODE)
            assert slots is not None
            operation.source, operation.target = slots_of(end, source, first, count), slots
            for node, low, high in fragments(end, first, count):
                at = node.start + low - first
                radix.attach(node, target, low, slots[at : at + high - low], filling=True)
            moves.append(Move(FULL, operation.source, slots))
        operation.parts = tuple(self._part(end, tiers, kind, deep) for kind, deep in cargo)
        moves += [Move(part.kind.kind, part.source, part.target) for part in operation.parts]
        self.send(operation, Copy(operation.number, source, target, tuple(moves)))
        return operation

    @staticmethod
    def _part(end: Node, tiers: tuple[Tier, Tier], kind: Partial, pages: Slots) -> Part:
        """Slots on the target tier for `pages`, which are READY on the source tier."""
        slots = kind.ledgers[tiers[1]].take(len(pages), Owner.NODE)
        assert slots is not None
        for node, inside, which in located(end, pages):
            kind.attach(node, tiers[1], inside, slots[which], filling=True)
        source = kind.on(end, tiers[0], pages)
        assert not len(source) or source.min() >= 0
        return Part(kind, pages, source, slots)

    def named(self, operation: Operation) -> Iterator[tuple[Ledger, Slots]]:
        """Every array of slots that `operation` may touch, with its books."""
        ledgers = self._radix.ledgers
        tiers = operation.source_tier, operation.target_tier
        for tier, slots in zip(tiers, (operation.source, operation.target), strict=True):
            if len(slots):
                yield ledgers[tier], slots
        for part in operation.parts:
            for tier, slots in zip(tiers, (part.source, part.target), strict=True):
                if len(slots):
                    yield part.kind.ledgers[tier], slots

    def send(self, operation: Operation, action: Action) -> None:
        """Pin what `operation` names and hand `action` to the executor."""
        for ledger, slots in self.named(operation):
            ledger.pin(slots)
        self.outbox.append(action)

    def hear(self, operation: Operation, verdict: Verdict, now: float) -> None:
        """The breaker of `operation` hears what it has come to. O(1); when that opens the breaker of a
        storage, whatever else was begun there is called back, O(in flight)."""
        breaker = self._guards.get(operation.purpose)
        if breaker is None:
            return
        opened = breaker.opened
        breaker.hear(operation.round, verdict, now)
        if breaker.opened > opened and operation.purpose in STORING:
            for each in self.in_flight.values():
                if self._guards.get(each.purpose) is breaker and not each.cancelled:
                    self.cancel(each)

    def lose(self, operation: Operation) -> None:
        """What `operation` was to fill is LOST until it comes home."""
        if len(operation.target):
            self._radix.ledgers[operation.target_tier].lose(operation.target)
        for part in operation.parts:
            if len(part.target):
                part.kind.ledgers[operation.target_tier].lose(part.target)

    def finish(self, operation: Operation) -> None:
        """The executor will not touch the operation's slots again: pins and holds go."""
        del self.in_flight[operation.number]
        self._storing -= operation.purpose in STORING
        for ledger, slots in self.named(operation):
            ledger.unpin(slots)
        for part in operation.parts:
            part.kind.offer_path(operation.end, part.pages)
        self.let_go(operation)

    def let_go(self, operation: Operation) -> None:
        """The nodes that `operation` works on need not stay; the slots that it may touch stay pinned."""
        for hold in operation.holds:
            self._radix.unhold(hold)
        operation.holds.clear()

    def touch(self, tier: Tier) -> bool:
        """Whether an operation in flight, and not late, keeps slots of `tier` from being evicted.
        O(in flight)."""
        return any(
            not each.late
            and (
                tier in (each.source_tier, each.target_tier) or any(hold.lane == tier for hold in each.holds)
            )
            for each in self.in_flight.values()
        )

    def overdue(self, now: float) -> list[Operation]:
        """Operations that pass their deadline with this call, for the caller to cancel. Deadlines come in
        the order of starting, so this is O(late + 1)."""
        late: list[Operation] = []
        for operation in self.in_flight.values():
            if operation.deadline > now:
                break
            if not operation.late and not operation.arrived:
                operation.late = operation.cancelled = True
                late.append(operation)
        return late

    def cancel(self, operation: Operation) -> None:
        """Ask the executor to stop; the operation stays in flight until it answers."""
        operation.cancelled = True
        self.outbox.append(Cancel(operation.number, operation.late))


def verdict_on(copy: Completion) -> Verdict:
    """What the answer to a Copy says of the tier that it was for."""
    if copy.error is None:
        return Verdict.GOOD
    return Verdict.NOTHING if copy.declined else Verdict.BAD
