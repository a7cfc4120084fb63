"""What arrives in a simulation, and what is known of it while it is served.

Prompts are prefixes of *streams*: each stream follows another one for a while and then goes its own way,
and every visit to a stream is a little longer than the one before, as the turns of a chat are.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..tree.key import Key
from ..tree.lease import Lease
from ..tree.load import LoadBack
from ..tree.prefetch import Prefetch
from ..types import Kind, Slots
from .dice import Dice
from .plan import LONGEST_PAGES, Plan


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as it arrives. It wants `tokens`, the first `prompt` of which it knows."""

    number: int
    arrives: float
    namespace: str
    tokens: tuple[int, ...]
    prompt: int
    aborts: float | None
    """Seconds after its arrival at which its client goes away."""


@dataclass(slots=True)
class Draft:
    """Pages `first .. stop` that are being computed, with the slots for them: of each partial kind those of
    `pages`."""

    first: int
    stop: int
    slots: dict[Kind, Slots]
    pages: dict[Kind, list[int]]


@dataclass(slots=True, eq=False)
class Request:
    """One request while it is served."""

    ask: Ask
    key: Key | None = None
    prefetched: bool = False
    prefetch: Prefetch | None = None
    lease: Lease | None = None
    load: LoadBack | None = None
    load_began: float = 0.0
    layers: int = 0
    draft: Draft | None = None
    private: dict[Kind, Slots] = field(default_factory=dict)
    """Copies of states that it writes to."""
    not_before: float = 0.0
    """It does nothing before this time."""
    computed: int = 0
    """Pages computed so far, in a calm world."""
    revision: str = ""
    """Of the weights that its lease is of."""
    forgotten: bool = False
    """Its prefix was cleared, or is of old weights: its lease is good for reading alone."""
    ended: float | None = None

    @property
    def number(self) -> int:
        """Its place in the order of arrival."""
        return self.ask.number


def draw_asks(plan: Plan) -> list[Ask]:
    """The requests of a plan, in order of arrival. Each depends on its own number alone."""
    dice = Dice(plan.seed)
    streams = [_stream(dice, number, plan) for number in range(plan.streams)]
    asks, visits, time = [], [0] * plan.streams, 0.0
    wanted = set(plan.numbers())
    for number in range(plan.requests):
        time += plan.arrivals_s * dice.pick((0.0, 0.5, 1.5, 2.0), "gap", number)
        which = dice.below(plan.streams, "stream", number)
        visits[which] += 1
        most = LONGEST_PAGES * plan.page_tokens
        prompt = 1 + dice.below(min(most - 1, (2 + 2 * visits[which]) * plan.page_tokens), "prompt", number)
        output = 1 + dice.below(min(most - prompt, 3 * plan.page_tokens), "output", number)
        if number not in wanted:
            continue
        leaves = plan.habits.get("abort")
        asks.append(
            Ask(
                number=number,
                arrives=time,
                namespace=f"tenant {which % plan.namespaces}" if plan.namespaces > 1 else "",
                tokens=streams[which][: prompt + output],
                prompt=prompt,
                aborts=dice.pick((0.0, 0.02, 0.3, 2.0), "aborts", number)
                if leaves is not None and dice.chance(leaves, "leaves", number)
                else None,
            )
        )
    return asks


def _stream(dice: Dice, number: int, plan: Plan) -> tuple[int, ...]:
    """The tokens of one stream: those of an earlier one up to where they part, then its own."""
    length = LONGEST_PAGES * plan.page_tokens
    if not number:
        return (1,) * length
    follows = dice.below(number, "follows", number)
    shared = dice.below(length * 2 // 3, "parts", number)
    return (*_stream(dice, follows, plan)[:shared], *(number + 1,) * (length - shared))
