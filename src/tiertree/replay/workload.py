"""A made-up workload: conversations that go on turn by turn behind one system prompt.

    turn 1   [system][user 1]
    turn 2   [system][user 1][answer 1][user 2]
    turn 3   [system][user 1][answer 1][user 2][answer 2][user 3]

A prompt is everything said so far, so each turn repeats the pages of the turn before. Conversations
take turns at random; one that has been quiet for long comes back to pages that have left the device.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .trace import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversations:
    """The shape of the workload; lengths in blocks."""

    requests: int = 1200
    """Turns of all conversations together."""
    active: int = 48
    """Conversations at a time; one that ends makes place for a new one."""
    system_blocks: int = 6
    """Of the system prompt that all share."""
    turn_blocks: tuple[int, int] = (1, 4)
    """Least and most that a turn adds, the answer before it included."""
    turns: tuple[int, int] = (4, 24)
    """Least and most turns of a conversation."""
    returning: float = 0.3
    """How often a turn is of any conversation rather than of one of the last few."""


def conversations(shape: Conversations, block_tokens: int, seed: int) -> list[Request]:
    """The requests of such a workload, in order of arrival, without partial blocks; the same for
    the same arguments."""
    chance = random.Random(seed)
    system = list(range(shape.system_blocks))
    following = shape.system_blocks
    prompts: list[list[int]] = []
    left: list[int] = []
    requests: list[Request] = []
    recent: list[int] = []
    for _ in range(shape.requests):
        if len(prompts) < shape.active:
            prompts.append(list(system))
            left.append(chance.randint(*shape.turns))
            at = len(prompts) - 1
        elif recent and chance.random() >= shape.returning:
            at = chance.choice(recent)
        else:
            at = chance.randrange(len(prompts))
        if not left[at]:
            prompts[at], left[at] = list(system), chance.randint(*shape.turns)
        more = chance.randint(*shape.turn_blocks)
        prompts[at] += range(following, following + more)
        following += more
        left[at] -= 1
        recent = [*(each for each in recent if each != at), at][-8:]
        requests.append(Request(tuple(prompts[at]), block_tokens))
    return requests
