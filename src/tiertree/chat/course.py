"""What clients measured: one `Served` per turn of each user, a `Course` of them per run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from ..engines.request import Cached


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One turn of one user, answered."""

    user: int
    """From 0."""
    turn: int
    """From 1."""
    ttft: float
    """Seconds from submitting the prompt to the first token of the answer."""
    seconds: float
    """From submitting the prompt to the last token."""
    prompt_tokens: int
    cached: Cached
    """Tokens of the prompt that were not computed, by the tier that held them."""
    answer: tuple[int, ...]

    def plain(self) -> dict[str, Any]:
        """The same as JSON-ready data."""
        return asdict(self)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """What `plain` gave, after a way through JSON."""
        read = {**values, "cached": Cached(*values["cached"]), "answer": tuple(values["answer"])}
        return cls(**read)


@dataclass(slots=True)
class Course:
    """One run of all conversations, or what there is of it so far."""

    served: list[Served] = field(default_factory=list)
    """In order of completion."""
    seconds: float = 0.0
    """From the first prompt until now."""

    def of(self, first: int = 1, last: int | None = None) -> list[Served]:
        """What was served of turns `first` to `last` (None: to the end)."""
        return [each for each in self.served if first <= each.turn and (last is None or each.turn <= last)]

    def mean_ttft(self, first: int = 1, last: int | None = None) -> float | None:
        """Mean seconds to the first token of these turns; None when there are none."""
        found = [each.ttft for each in self.of(first, last)]
        return sum(found) / len(found) if found else None

    def ttft(self, quantile: float, first: int = 1, last: int | None = None) -> float | None:
        """The smallest time to the first token of these turns that at least the fraction `quantile` of them
        does not exceed; None when there are none."""
        found = sorted(each.ttft for each in self.of(first, last))
        return found[max(0, math.ceil(quantile * len(found)) - 1)] if found else None

    def cached(self, first: int = 1, last: int | None = None) -> Cached:
        """Tokens of these turns' prompts that were not computed."""
        return total(each.cached for each in self.of(first, last))

    def prompt_tokens(self, first: int = 1, last: int | None = None) -> int:
        """Tokens of these turns' prompts."""
        return sum(each.prompt_tokens for each in self.of(first, last))

    def hit_rate(self, first: int = 1, last: int | None = None) -> float:
        """Share of these turns' prompt tokens that was not computed; 0 when there are none."""
        return self.cached(first, last).total / max(1, self.prompt_tokens(first, last))

    @property
    def answer_tokens(self) -> int:
        """Of all answers together."""
        return sum(len(each.answer) for each in self.served)

    @property
    def throughput(self) -> float:
        """Tokens answered per second; 0 before anything is."""
        return self.answer_tokens / self.seconds if self.seconds else 0.0

    @property
    def answers(self) -> dict[tuple[int, int], tuple[int, ...]]:
        """What was answered, by user and turn."""
        return {(each.user, each.turn): each.answer for each in self.served}


def total(many: Iterable[Cached]) -> Cached:
    """The sum, tier by tier."""
    device = host = storage = 0
    for each in many:
        device, host, storage = device + each.device, host + each.host, storage + each.storage
    return Cached(device, host, storage)


def first_difference(names: Sequence[str], courses: Sequence[Course]) -> str | None:
    """Where the answers of `courses` first differ from those of the first of them, in the order in which
    they are said; None where they are all the same. A prompt contains the answers before it, so what comes
    after a difference differs anyhow."""
    expected = courses[0].answers
    for name, course in zip(names[1:], courses[1:], strict=True):
        found = course.answers
        for user, turn in sorted(expected.keys() | found.keys(), key=lambda each: (each[1], each[0])):
            mine, theirs = expected.get((user, turn)), found.get((user, turn))
            if mine != theirs:
                place = f"user {user + 1}, turn {turn}"
                if mine is None or theirs is None:
                    return f"{place}: answered {names[0] if theirs is None else name} only"
                at = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None)
                if at is None:
                    return f"{place}: {len(mine)} tokens {names[0]}, {len(theirs)} {name}"
                return f"{place}, token {at + 1}: {mine[at]} {names[0]}, {theirs[at]} {name}"
    return None
