"""What users say: conversations that go on turn by turn behind one system prompt.

    turn 1   [system][said 1]
    turn 2   [system][said 1][answer 1][said 2]
    turn 3   [system][said 1][answer 1][said 2][answer 2][said 3]

A prompt is all that was said so far, the model's own answers included: nobody can know the prompt of a
turn before the answer of the one before it is complete.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ..validate import an_integer


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The shape of the conversations; lengths in tokens. Raises ConfigError."""

    users: int = 8
    """Conversations, all going on at once."""
    turns: int = 4
    """Of each conversation."""
    system_tokens: int = 512
    """The system prompt that all share; 0: none."""
    turn_tokens: int = 512
    """What a user says at each turn."""
    answer_tokens: int = 32
    """What the model answers."""
    seed: int = 0
    """Of everything that is said."""
    vocab: int = 4096
    """Tokens are below it."""

    def __post_init__(self) -> None:
        for name in ("users", "turns", "turn_tokens", "answer_tokens", "vocab"):
            an_integer(self, name, 1)
        for name in ("system_tokens", "seed"):
            an_integer(self, name, 0)

    def said(self, user: int, turn: int) -> list[int]:
        """What `user` (from 0) says at `turn` (from 1). Equal arguments, equal tokens."""
        return self._tokens(f"{user} {turn}", self.turn_tokens)

    def prompt(self, user: int, answers: Sequence[Sequence[int]]) -> list[int]:
        """The prompt of `user`'s next turn, after `answers`. O(its length)."""
        tokens = self._tokens("system", self.system_tokens)
        for turn, answer in enumerate(answers, 1):
            tokens += self.said(user, turn)
            tokens += answer
        return tokens + self.said(user, len(answers) + 1)

    def _tokens(self, what: str, count: int) -> list[int]:
        chance = random.Random(f"{self.seed} {self.vocab} {what}")
        return [chance.randrange(self.vocab) for _ in range(count)]

    def prompt_tokens(self, turn: int) -> int:
        """Length of every prompt of `turn` (from 1), where answers have their full length."""
        return self.system_tokens + turn * self.turn_tokens + (turn - 1) * self.answer_tokens

    @property
    def requests(self) -> int:
        """Turns of all users together."""
        return self.users * self.turns

    @property
    def longest(self) -> int:
        """Tokens of one conversation at its end."""
        return self.prompt_tokens(self.turns) + self.answer_tokens

    def pages(self, page_size: int) -> int:
        """Pages that all conversations take at their end in a cache that has each page once."""
        shared = self.system_tokens // page_size
        return shared + self.users * (-(-self.longest // page_size) - shared)
